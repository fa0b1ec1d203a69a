"""Several seeds of one experiment as one program.

    separate     seed 0: step step step ...   seed 1: step step step ...
    vectorized   step of all seeds, step of all seeds, ...              jax.vmap over state, batch and keys

Each seed has its parameters, its order of the data, its dropout, its directory and its checkpoints, as if it were
trained alone: the numbers agree to float32 rounding, since matmuls over seeds may add in another order. It pays where
one small model does not fill the device; memory grows with the number of seeds. A seed whose loss is not finite any
more is marked and goes on being computed, unrecorded, while the others train.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llmlab.data.dataset import Dataset
from llmlab.data.prefetch import prefetch
from llmlab.nn.module import Params
from llmlab.objectives import Batch
from llmlab.tokenizers import Tokenizer
from llmlab.training.checkpoint import Checkpoints
from llmlab.training.evaluation import evaluated, means
from llmlab.training.faults import NonFiniteError, in_background, wait
from llmlab.training.loop import Parts, train
from llmlab.training.metrics import MetricsLog
from llmlab.training.program import EvaluateStep, Program
from llmlab.training.recorder import Recorder
from llmlab.training.session import Session, throughput, validation
from llmlab.training.state import TrainState
from llmlab.training.step import Scalars
from llmlab.training.throughput import Throughput


@dataclass(kw_only=True)
class Lane:
    """One seed's part of the work."""

    session: Session
    tokenizer: Tokenizer
    dataset: Dataset
    program: Program
    checkpoints: Checkpoints
    log: MetricsLog
    speed: Throughput
    start: int = 0
    unevaluated: bool = False
    failure: NonFiniteError | None = None
    """Set when its loss is not finite any more."""


@dataclass(kw_only=True)
class Outcome:
    """How a seed ended."""

    session: Session
    model: Any = None
    """After the last step; None where it failed."""
    summary: dict[str, Any] = field(default_factory=dict)
    """As of `Session.run`."""
    failure: NonFiniteError | None = None


def run_seeds(sessions: Sequence[Session]) -> list[Outcome]:
    """Trains sessions whose experiments differ in their seed alone, to the end; those that have done equally many steps
    as one program.

    Args:
        sessions: of one process; the first one's report, phases and interruption serve all.

    Raises:
        ValueError: the experiments differ in more than the seed.
        Interrupted: a signal asked to stop; all states are saved.
    """
    first = sessions[0]
    for session in sessions[1:]:
        same = dataclasses.replace(session.experiment.train, seed=first.experiment.train.seed)
        if dataclasses.replace(session.experiment, train=same) != first.experiment:
            raise ValueError(f"{session.directory.path} differs from {first.directory.path} in more than the seed")
    outcomes: dict[int, Outcome] = {}
    with contextlib.ExitStack() as open_files:
        lanes = [_opened(session, open_files) for session in sessions]
        first.phases.begin("compile", f"{len(lanes)} seeds, {lanes[0].program.num_parameters:,} parameters each")
        states = [_state(lane) for lane in lanes]
        by_start: dict[int, list[int]] = {}
        for number, lane in enumerate(lanes):
            by_start.setdefault(lane.start, []).append(number)
        for numbers in by_start.values():
            group = [lanes[number] for number in numbers]
            final = _train_together(group, [states[number] for number in numbers])
            outcomes |= {
                number: _outcome(lane, params, together=len(group))
                for number, lane, params in zip(numbers, group, final, strict=True)
            }
    return [outcomes[number] for number in range(len(sessions))]


def _opened(session: Session, open_files: contextlib.ExitStack) -> Lane:
    tokenizer = session.tokenizer()
    dataset = session.dataset(tokenizer)
    checkpoints = open_files.enter_context(contextlib.closing(session.checkpoints()))
    log = open_files.enter_context(contextlib.closing(MetricsLog(session.directory.path)))
    program = session.program(tokenizer, dataset)
    return Lane(
        session=session,
        tokenizer=tokenizer,
        dataset=dataset,
        program=program,
        checkpoints=checkpoints,
        log=log,
        speed=throughput(program, session.experiment.train.steps),
    )


def _state(lane: Lane) -> TrainState:
    """The state to go on from; its metrics are cut back to it."""
    state, lane.start, lane.unevaluated = lane.session.state(lane.program, lane.checkpoints)
    lane.log.cut_back(lane.start)
    lane.session.started(lane.start, {"data": lane.dataset.fingerprint, "tokenizer": lane.tokenizer.fingerprint})
    return state


def _train_together(lanes: list[Lane], states: list[TrainState]) -> list[Params]:
    """The last parameters of every lane."""
    first, program = lanes[0].session, lanes[0].program
    config, start = first.experiment.train, lanes[0].start
    stacked, where = _stack_states(states, program)
    step, place = _vectorized(lanes, where)
    parts = Parts(
        config=config,
        step=step,
        evaluate=_Evaluation(lanes, place),
        batches=lambda begin: prefetch(
            lambda number: _rows([lane.dataset.train.batch(number) for lane in lanes]), begin, place, stop=config.steps
        ),
        checkpoints=_Savers(lanes),
        recorder=_Recorders(lanes),
        speed=_Speeds(lanes),
        phases=first.phases,
        report=first.report,
        interruption=first.interruption,
    )
    first.phases.begin("train")
    first.report.progress(start, config.steps, "steps")
    unevaluated = any(lane.unevaluated for lane in lanes)
    try:
        params = train(stacked, start, parts, unevaluated=unevaluated).params
    except NonFiniteError:  # of the last lane that was left
        return [{} for _ in lanes]
    return [_lane(params, number) for number in range(len(lanes))]


def _stack_states(states: list[TrainState], program: Program) -> tuple[TrainState, TrainState]:
    """All states as one, and where its arrays are; the list is emptied, so that nothing is there twice for long."""
    where: Any = jax.tree.map(lambda x: _over_seeds(x.sharding), program.state)
    stack = jax.jit(lambda trees: jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees), out_shardings=where)
    stacked = stack(tuple(states))
    states.clear()
    return stacked, where


def _over_seeds(sharding: Any) -> NamedSharding:
    """Of an array with one more dimension before the others, which no axis of the mesh splits."""
    return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind)


def _vectorized(lanes: list[Lane], where: TrainState) -> tuple[Any, Callable[[dict[str, np.ndarray]], Batch]]:
    """The compiled step of all lanes, (state, batch) -> (state, metrics of each), and what places its batches."""
    program = lanes[0].program
    shared = program.scalars.optimizer
    keys, frozen = np.stack([lane.program.scalars.key for lane in lanes]), program.scalars.frozen
    scalars = Scalars(key=keys, optimizer=shared, frozen=frozen)
    axes: Any = Scalars(key=0, optimizer=dict.fromkeys(shared), frozen=None)

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, list[dict[str, jax.Array]]]:
        state, metrics = jax.vmap(program.traced_step, in_axes=(0, 0, axes))(state, batch, scalars)
        return state, [_lane(metrics, number) for number in range(len(lanes))]

    of_batch = {name: _over_seeds(kind.sharding) for name, kind in program.batch.items()}
    whole = NamedSharding(program.placement.mesh, PartitionSpec())
    everywhere: Any = whole
    beside = Scalars(key=whole, optimizer=everywhere, frozen=jax.tree.map(lambda x: x.sharding, frozen))
    jitted = jax.jit(step, donate_argnums=0, in_shardings=(where, of_batch, beside), out_shardings=(where, whole))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(lanes), *x.shape), x.dtype), (program.state, program.batch)
    )
    compiled = wait(in_background(lambda: jitted.lower(*shapes, scalars).compile()))

    def place(batch: dict[str, np.ndarray]) -> Batch:
        return {name: jax.device_put(rows, of_batch[name]) for name, rows in batch.items()}

    given = dataclasses.replace(scalars, frozen=program.frozen)
    return lambda state, batch: compiled(state, batch, given), place


def _rows(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _lane(tree: Any, number: int) -> Any:
    return jax.tree.map(lambda array: array[number], tree)


class _Recorders:
    """A recorder for every lane; those whose loss is not finite any more record no further."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes
        self._each = [
            Recorder(lane.log, lane.session.report, lane.speed, lane.session.experiment.train, lane.checkpoints.newest)
            for lane in lanes
        ]

    def step(self, step: int, metrics: list[dict[str, jax.Array]]) -> None:
        self._all(lambda recorder, number: recorder.step(step, metrics[number]))

    def flush(self) -> None:
        self._all(lambda recorder, number: recorder.flush())

    def evaluation(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        self._all(lambda recorder, number: recorder.evaluation(step, _numbers(metrics, number)))

    def sync(self) -> None:
        self._all(lambda recorder, _: recorder.sync())

    def _all(self, do: Callable[[Recorder, int], None]) -> None:
        for number, (lane, recorder) in enumerate(zip(self._lanes, self._each, strict=True)):
            if lane.failure is None:
                try:
                    do(recorder, number)
                except NonFiniteError as error:
                    lane.failure = error
                    lane.session.report.message(f"{lane.session.directory.path.name}: {error}", "error")
        failures = [lane.failure for lane in self._lanes if lane.failure is not None]
        if len(failures) == len(self._lanes):
            raise failures[-1]


class _Speeds:
    """The speeds of all lanes, paused together."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        with contextlib.ExitStack() as pauses:
            for lane in self._lanes:
                pauses.enter_context(lane.speed.pause())
            yield


class _Savers:
    """The checkpoints of every lane that has a finite loss."""

    def __init__(self, lanes: list[Lane]) -> None:
        self._lanes = lanes

    def save(self, state: TrainState, step: int, meta: Mapping[str, Any]) -> None:
        for number, lane in enumerate(self._lanes):
            if lane.failure is None:
                lane.checkpoints.save(_lane(state, number), step, _numbers(meta, number))

    def poll(self) -> int | None:
        return _latest([lane.checkpoints.poll() for lane in self._lanes])

    def wait(self) -> int | None:
        return _latest([lane.checkpoints.wait() for lane in self._lanes])


class _Evaluation:
    """Metrics of a stacked state by name, an array with a number for every lane."""

    def __init__(self, lanes: list[Lane], place: Callable[[dict[str, np.ndarray]], Batch]) -> None:
        self._lanes, self._place = lanes, place
        program = lanes[0].program
        evaluation = jax.jit(jax.vmap(program.traced_evaluate, in_axes=(0, 0, None)))
        self._step = EvaluateStep(evaluation, lambda: program.frozen)

    @property
    def num_batches(self) -> int:
        """Of the validation split, which seeds do not change."""
        return self._lanes[0].dataset.validation.num_batches

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """A batch for every lane."""
        return _rows([lane.dataset.validation.batch(step) for lane in self._lanes])

    def __call__(self, state: TrainState) -> dict[str, Any] | None:
        session = self._lanes[0].session

        def evaluate(params: Params) -> dict[str, Any] | None:
            sums = evaluated(
                self._step,
                params,
                self,
                self._place,
                max_batches=session.experiment.train.evaluate_batches,
                stop=session.interruption.look,
                progress=lambda done, total: session.report.progress(done, total, "evaluate"),
            )
            if sums is None:
                return None
            each = [means([_lane(parts, number) for parts in sums]) for number in range(len(self._lanes))]
            return {name: np.asarray([values[name] for values in each]) for name in each[0]}

        return validation(state, evaluate)


def _numbers(values: Mapping[str, Any], number: int) -> dict[str, float]:
    """A lane's own, and what is the same for all."""
    return {name: float(value[number] if np.ndim(value) else value) for name, value in values.items()}


def _latest(steps: list[int | None]) -> int | None:
    return max((step for step in steps if step is not None), default=None)


def _outcome(lane: Lane, params: Params, together: int) -> Outcome:
    session = lane.session
    if lane.failure is not None:
        return Outcome(session=session, failure=lane.failure)
    counted = lane.dataset.baselines(session.experiment.train.accumulation)
    summary = session.summary(lane.program, lane.dataset, lane.speed, counted) | {"seeds_together": together}
    return Outcome(session=session, model=lane.program.finished(params), summary=summary)

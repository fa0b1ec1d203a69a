"""An experiment's memory by arithmetic, for `llmlab plan --memory` and to prune `--search`."""

import dataclasses
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmlab.commands.plan_worker import settled
from llmlab.plan.memory import Estimate, Setting, State, estimate, kept

if TYPE_CHECKING:
    from llmlab.experiment import Experiment
    from llmlab.optim import Optimizer
    from llmlab.training.step import Precision

POLICIES = ("none", "dots", "full")


class Arithmetic:
    """What is asked of one experiment many times over; each thing that takes a trace is done once."""

    def __init__(self, experiment: "Experiment") -> None:
        self.experiment = experiment
        self.model, self.batch = settled(experiment)
        self.graphdef, self.params, self.axes = self.model.abstract()
        self._kept: dict[tuple[str, str], int] = {}
        self._states: dict[str, State] = {}

    @property
    def has_remat(self) -> bool:
        """Whether the model says what the backward pass recomputes."""
        return "execution" in {field.name for field in dataclasses.fields(self.model)}

    @property
    def policies(self) -> tuple[str, ...]:
        """Remat policies to try."""
        return POLICIES if self.has_remat else ("none",)

    @property
    def num_layers(self) -> int:
        """Of the model; 1 where it has no such number."""
        return vars(self.model).get("num_layers", 1)

    @cached_property
    def dims(self) -> dict[str, set[int]]:
        """Logical axis name to the sizes of the parameters' dimensions of that name."""
        import jax

        found: dict[str, set[int]] = {}

        def note(names: tuple[str | None, ...], array: Any) -> None:
            for name, size in zip(names, array.shape, strict=True):
                if name is not None:
                    found.setdefault(name, set()).add(size)

        jax.tree.map(note, self.axes, self.params, is_leaf=lambda node: isinstance(node, tuple))
        return found

    def state(self, optimizer: "Optimizer | None" = None) -> State:
        """Parameters and an optimizer's state (default: the experiment's), by shape."""
        import jax

        from llmlab.optim.transformation import state_axes

        optimizer = optimizer or self.experiment.optimizer
        name = repr(optimizer)
        if name not in self._states:
            steps, growth = self.experiment.train.steps, self.experiment.model.width_growth
            transformation = optimizer.build(self.axes, steps, growth=growth)
            shapes = jax.eval_shape(transformation.init, self.params)
            axes = state_axes(shapes, self.axes)
            self._states[name] = State(params=self.params, axes=self.axes, optimizer=shapes, optimizer_axes=axes)
        return self._states[name]

    def kept(self, remat: str, precision: "Precision") -> int:
        """Bytes that the backward pass needs of the forward pass for each row, on an accelerator."""
        import jax

        from llmlab.nn.module import merge
        from llmlab.training.step import cast

        if (remat, precision) not in self._kept:
            model = for_accelerator(with_remat(self.model, remat) if self.has_remat else self.model)
            graphdef = model.abstract()[0]
            objective = self.experiment.objective

            def loss(params: Any, batch: Any) -> jax.Array:
                parts = objective.loss(merge(graphdef, cast(params, precision)), objective.prepare(batch))
                return parts.total

            self._kept[remat, precision] = kept(loss, self.params, self.batch)
        return self._kept[remat, precision]

    def estimate(
        self,
        *,
        mesh: Any,
        num_devices: int,
        remat: str,
        accumulation: int,
        precision: "Precision",
        optimizer: "Optimizer | None" = None,
    ) -> Estimate:
        """Memory of a device with these choices in place of the experiment's."""
        train = self.experiment.train
        setting = Setting(
            mesh=mesh,
            num_devices=num_devices,
            batch_size=train.batch_size,
            accumulation=accumulation,
            precision=precision,
            num_layers=self.num_layers,
            logits=self._logits(train.batch_size // accumulation, mesh, num_devices),
        )
        return estimate(self.state(optimizer), setting, self.kept(remat, precision), self.kept("none", precision))

    def _logits(self, rows: int, mesh: Any, num_devices: int) -> int:
        """Elements of a chunk of scores."""
        from llmlab.objectives.tokens import TokenObjective
        from llmlab.training.program import chunk

        objective, length = self.experiment.objective, self.experiment.train.sequence_length
        if not isinstance(objective, TokenObjective) or length is None:
            return 0
        sizes = mesh.resolve(num_devices)
        positions = objective.chunk or chunk(rows, self.model.vocab_size, "gpu", mesh.table, sizes)
        return rows * min(positions, length) * self.model.vocab_size


def with_remat(model: Any, remat: str) -> Any:
    """The model with another remat policy."""
    return dataclasses.replace(model, execution=dataclasses.replace(model.execution, remat=remat))


def for_accelerator(config: Any) -> Any:
    """The config with what `auto` chooses on accelerators, while jax here only knows this machine's CPU: attention
    that keeps no matrix of weights, layers in a loop."""
    if isinstance(config, tuple):
        return tuple(for_accelerator(item) for item in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    chosen = {"kernel": "blockwise", "mode": "scan"}
    changes = {}
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        new = chosen[field.name] if value == "auto" and field.name in chosen else for_accelerator(value)
        if new is not value:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config

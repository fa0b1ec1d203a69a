"""Runs that differ in their seed alone, trained as one program: see `llmlab.training.seeds`.

    train_seeds([replace(e, train=replace(e.train, seed=s)) for s in range(5)], directories)

leaves five run directories that `llmlab.train` could have made, up to float32 rounding.
"""

import contextlib
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from llmlab import runs
from llmlab.config import config_hash, to_json
from llmlab.experiment import Experiment
from llmlab.training.directory import RunDirectory
from llmlab.training.faults import Interruption, NonFiniteError
from llmlab.training.phases import Phases
from llmlab.training.program import Programs
from llmlab.training.provenance import Account, Provenance
from llmlab.training.report import NullReport, Report


def train_seeds(
    experiments: Sequence[Experiment],
    outs: Sequence[Path],
    *,
    name: str = "experiment",
    report: Report | None = None,
    experiment_file: Path | None = None,
    programs: Programs | None = None,
) -> list[runs.Run | NonFiniteError]:
    """Trains experiments that differ in `train.seed` alone, as one program on the devices of this process.

    Args:
        experiments: one for each seed.
        outs: their run directories. Finished runs there are left alone, others go on at their checkpoints; those that
            have done equally many steps train together.
        name: of the experiment.
        report: told about the whole.
        experiment_file: the Python file, for the provenance.
        programs: compiled by earlier calls.

    Returns:
        the runs, in order; of a seed whose loss became infinite the error that `llmlab.train` would have raised.

    Raises:
        ValueError: the experiments differ in more than their seed, or a directory is another's.
        Interrupted: Ctrl-C or SIGTERM; every seed's state is saved.
    """
    import jax

    from llmlab.training.seeds import Outcome, run_seeds
    from llmlab.training.session import Session

    report, programs = report or NullReport(), programs or Programs()
    phases = Phases(report, {})
    ended: dict[Path, runs.Run | NonFiniteError] = {}
    with contextlib.ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        waiting: list[tuple[Session, Account]] = []
        for experiment, out in zip(experiments, outs, strict=True):
            experiment.validate(num_devices=jax.device_count())
            directory = RunDirectory(out)
            stack.enter_context(directory.held())
            runs.settle_config(directory, experiment, report, allow=False)
            if runs.Run(out).summary.get("step") == experiment.train.steps:
                ended[out] = runs.Run(out)
                continue
            begin = functools.partial(
                Provenance.begin,
                out,
                name=name,
                config=json.loads(to_json(experiment)),
                config_hash=config_hash(experiment),
                experiment_file=experiment_file,
            )
            account = Account(begin)
            stack.enter_context(account.failures())
            session = Session(
                experiment=experiment,
                directory=directory,
                report=report,
                phases=phases,
                interruption=interruption,
                started=account.started,
                weights=runs.initial_weights(experiment),
                programs=programs,
            )
            waiting.append((session, account))
        outcomes: list[Outcome] = run_seeds([session for session, _ in waiting]) if waiting else []
        phases.stop()
        for outcome, (session, account) in zip(outcomes, waiting, strict=True):
            out = session.directory.path
            if outcome.failure is not None:
                account.finish("failed", outcome.failure.step)
                ended[out] = outcome.failure
            else:
                runs.conclude(session.directory, outcome.summary, phases)
                account.finish("finished", outcome.summary["step"])
                ended[out] = runs.Run(out)
    return [ended[out] for out in outs]

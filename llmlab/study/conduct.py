"""An ablation carried out: check, run, (look, add a seed,) decide, write.

    arms checked -> study.json -> learning rates tuned -> every arm at every seed -> results.json
                                                              ^                |
                                                              +- one seed more +     seeds="until settled" only

Runs are trials (llmlab.study.trials): they live apart from the study, and one that is there already is not run again.
So the same call after an interruption, or a kill, goes on where it was, and comes to the same results. In a study whose
number of seeds is fixed nothing is computed from the runs before the last of them is done.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.experiment import Experiment
from llmlab.study import analysis, matching, work
from llmlab.study.ablation import Ablation, Arm
from llmlab.study.measures import PREFIX, measured
from llmlab.study.outcomes import Job, Table, Tuned, comparison_jobs, outcome, table, tuned, tuning_jobs
from llmlab.study.record import Record, open_record
from llmlab.study.trials import Status, Trial, directory_of, forgive, read_trial
from llmlab.training.directory import write_json

RESULTS = "results.json"

Execute = Callable[[Mapping[str, Experiment]], dict[str, Trial]]
"""Runs experiments by label, and returns the trials of all."""


@dataclass(frozen=True, kw_only=True)
class Conduct:
    """How and where an ablation is carried out."""

    name: str
    """Of the study, for the report."""
    folder: Path
    """Of the study."""
    root: Path = work.DEFAULT_ROOT
    """Of all runs."""
    workers: int = 1
    vectorize_seeds: bool = False
    """Train the seeds of an arm as one program."""
    storage: str | None = None
    """Address of the queue's database; None for SQLite in the folder."""
    exploratory: bool = False
    """Go on although the results are known and the definition is another."""
    allow_change: bool = False
    """Go on in a folder that another definition began."""
    retry_failed: bool = False
    """Run again what failed or is damaged. What diverged is a result, and would diverge again."""
    file: Path | None = None
    """The experiment file."""
    command: str | None = None
    """That makes the study again."""
    progress: Callable[[work.Progress], None] | None = None
    """Told how the runs stand, from another thread."""
    tell: Callable[[str], None] = field(default=lambda _: None)
    """Told what happens between runs."""
    execute: Execute | None = None
    """Runs experiments in another way than the executor of `llmlab.study.work`."""

    def run(self, ablation: Ablation) -> dict[str, Any]:
        """Carries it out, or goes on with it; writes results.json and returns its content.

        Raises:
            ValueError: it cannot run, or the folder is another study's; nothing was run.
            MismatchError: the configs show that the arms will not match.
            PeekingError: the results are known, and the definition is another.
            Interrupted: Ctrl-C or SIGTERM; everything is saved.
        """
        arms = ablation.arms()
        acknowledged = matching.check(ablation, arms)
        record = open_record(self.folder, ablation, arms, exploratory=self.exploratory, allow_change=self.allow_change)
        for remark in record.remarks:
            self.tell(remark)
        for mismatch in acknowledged:
            self.tell(f"{mismatch}: acknowledged, {ablation.acknowledge_mismatch}")
        rates = self._tune(ablation, arms)
        compared = self._compare(ablation, arms, {name: found.best for name, found in rates.items()}, record)
        context = analysis.Context(
            name=self.name,
            mode=record.mode,
            exploratory=record.exploratory,
            command=self.command,
            file=None if self.file is None else self.file.name if self.file.is_absolute() else self.file.as_posix(),
        )
        results = analysis.results(ablation, arms, compared, rates, context)
        if compared.paired:
            record.results_known(len(compared.seeds))
        write_json(self.folder / RESULTS, results)
        return results

    def _tune(self, ablation: Ablation, arms: Sequence[Arm]) -> dict[str, Tuned]:
        """The learning rate of every arm; empty where they are not tuned."""
        jobs = tuning_jobs(ablation, arms)
        if not jobs:
            return {}
        trials = self._trials(ablation, jobs)
        found = [outcome(ablation, job, trials[job.label]) for job in jobs]
        chosen = {arm.name: tuned(ablation, arm.name, [f for f in found if f.job.arm == arm.name]) for arm in arms}
        self.tell("learning rates: " + ", ".join(f"{name} {one.best:g}" for name, one in chosen.items()))
        return chosen

    def _compare(self, ablation: Ablation, arms: Sequence[Arm], rates: Mapping[str, float], record: Record) -> Table:
        """All arms at all seeds; in a sequential study, at as many as it takes."""
        seeds, most = ablation.first_seeds, ablation.most_seeds(len(arms))
        while True:
            jobs = comparison_jobs(arms, seeds, rates)
            compared = table(ablation, arms, jobs, self._trials(ablation, jobs))
            if not ablation.sequential:
                return compared
            if compared.paired:
                record.results_known(len(seeds))
            decisions = analysis.decide(ablation, arms, compared)
            open_ones = [arm.name for arm in arms[1:] if not _settled(decisions.get(arm.name))]
            if not open_ones or len(seeds) >= most:
                return compared
            self.tell(f"not settled after {len(seeds)} seeds for {', '.join(open_ones)}: one seed more in every arm")
            seeds = (*seeds, len(seeds))

    def _trials(self, ablation: Ablation, jobs: Sequence[Job]) -> dict[str, Trial]:
        """The trials of these jobs, run where they are not there yet, and measured. All training of a study goes
        through here."""
        experiments = {job.label: job.experiment for job in jobs}
        if self.retry_failed:
            for experiment in experiments.values():
                trial = read_trial(directory_of(self.root, experiment), experiment)
                if trial.status in (Status.FAILED, Status.CORRUPT) and forgive(trial):
                    self.tell(f"{trial.directory} is run again: {trial.problem}")
        trials = self._executed(ablation, experiments)
        if ablation.measure is None:
            return trials
        self.tell(f"measuring {ablation.measure.__name__} of {len(trials)} runs")
        return {label: measured(trial, ablation.measure) for label, trial in trials.items()}

    def _executed(self, ablation: Ablation, experiments: Mapping[str, Experiment]) -> dict[str, Trial]:
        if self.execute is not None:
            return self.execute(experiments)
        # What is measured of a run is not there yet when the queue notes how it ended.
        of_training = not ablation.metric.startswith(PREFIX)
        return work.execute(
            experiments,
            folder=self.folder,
            root=self.root,
            workers=self.workers,
            storage=self.storage,
            progress=self.progress,
            metric=ablation.metric if of_training else "validation/loss",
            direction=ablation.direction if of_training else "lower",
            file=self.file,
            seeds_together=self.vectorize_seeds,
        )


def _settled(decision: Any) -> bool:
    return decision is not None and decision.verdict != "inconclusive"

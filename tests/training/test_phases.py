"""Every second belongs to one phase."""

from llmlab.training.phases import Phases
from llmlab.training.report import NullReport


class Told(NullReport):
    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, name: str, detail: str = "") -> None:
        self.phases.append(name)


def test_seconds_add_up_and_a_phase_may_come_again() -> None:
    now = 0.0
    report = Told()
    phases = Phases(report, {"imports": 2.0}, clock=lambda: now)
    now = 1.0  # before the first phase: nobody's
    phases.begin("compile")
    now = 4.0
    phases.begin("train")
    now = 10.0
    with phases.within("evaluate"):
        now = 11.0
    now = 20.0
    phases.stop()
    now = 30.0
    phases.stop()
    assert phases.seconds == {"imports": 2.0, "compile": 3.0, "train": 15.0, "evaluate": 1.0}
    assert report.phases == ["compile", "train", "evaluate", "train"]

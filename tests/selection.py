"""Which cases of a test run with every change, and which at scale."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def at_scale_but(always: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All of `cases` for `parametrize`, those that are not in `always` marked `scale`.

    A case is a value, or a tuple of them where a test takes several. `always` says which cases differ in kind; the
    others are more of the same and take long together.
    """
    cases = list(cases)
    assert set(always) <= set(cases), f"no such cases: {set(always) - set(cases)}"
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in always else pytest.mark.scale)
        for case in cases
    ]

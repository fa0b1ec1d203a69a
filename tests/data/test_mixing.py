import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.mixing import Dealer

weights_of_any_kind = st.lists(
    st.sampled_from([0.1, 0.2, 0.25, 1.0, 3.0, 1e-3, 7.5]) | st.floats(0.01, 100), min_size=1, max_size=9
)


@given(weights=weights_of_any_kind, rows=st.integers(0, 400))
def test_every_source_has_its_share_of_the_first_rows_and_gives_its_own_rows_in_order(
    weights: list[float], rows: int
) -> None:
    dealer = Dealer(weights)
    counts = [0] * len(weights)
    for row in range(rows):
        source, number = dealer.deal(row)
        assert number == counts[source]  # none skipped, none repeated
        counts[source] += 1
    assert dealer.counts(rows) == counts
    total = sum(Fraction(repr(weight)) for weight in weights)
    bound = math.ceil(math.log2(len(weights))) or 1
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - rows * Fraction(repr(weight)) / total) < bound


def test_shares_stay_exact_after_a_billion_rows() -> None:
    dealer = Dealer([0.7, 0.2, 0.1])
    assert dealer.counts(10**10) == [7 * 10**9, 2 * 10**9, 10**9]
    before = dealer.counts(10**9 + 12345)
    source, number = dealer.deal(10**9 + 12345)
    assert number == before[source]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.inf], [math.nan]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"weight=.* must be positive|no sources"):
        Dealer(weights)

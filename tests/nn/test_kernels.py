"""Every attention kernel computes the equation and its gradient, whatever the mask, the bias and the grouping."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.kernels import Bias, Scoring, attention, choose, dispatch
from llmlab.nn.kernels.blockwise import blockwise
from llmlab.nn.kernels.cudnn import cudnn, cudnn_lacks
from llmlab.nn.kernels.reference import reference
from llmlab.nn.kernels.relative import relative, relative_lacks
from llmlab.nn.kernels.splash import _sloped, splash, splash_lacks
from llmlab.nn.kernels.unrolled import unrolled
from llmlab.nn.masks import Causal, Full, Mask, Padding, Prefix, Segments, SlidingWindow
from llmlab.nn.positions import ALiBi, T5Relative, alibi_slopes
from tests.selection import at_scale_but

ROWS, HEAD_DIM = 2, 8
RunKernel = Callable[[jax.Array, jax.Array, jax.Array, Scoring], jax.Array]

KERNELS: Mapping[str, RunKernel] = {
    "blockwise": partial(blockwise, block=32),
    "unrolled": unrolled,
    "cudnn": partial(cudnn, implementation="xla"),  # the same wrapper, without the GPU
    "splash": partial(splash, interpret=True),  # the same kernel, run in Python
    "relative": partial(relative, interpret=True),
}


@dataclass(frozen=True)
class Case:
    """An attention problem."""

    mask: Mask
    num_queries: int = 70  # no multiple of any kernel's block
    num_keys: int = 70
    heads: int = 4
    kv_heads: int = 2
    bias: Bias | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def scoring(self, bias: Bias | None) -> Scoring:
        return Scoring(mask=self.mask, bias=bias, scale=HEAD_DIM**-0.5, **self.settings)

    def inputs(self, dtype: Any = jnp.float32, spread: float = 1.0) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random q, k and v; `spread` is the standard deviation of q."""
        random = np.random.default_rng(0)
        shapes = [(self.num_queries, self.heads), (self.num_keys, self.kv_heads), (self.num_keys, self.kv_heads)]
        q, k, v = (random.normal(size=(ROWS, length, heads, HEAD_DIM)) for length, heads in shapes)
        return jnp.asarray(spread * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)

    def lacks(self, kernel: str) -> str | None:
        """Why a kernel does not do this, platform and dtype aside."""
        scoring = self.scoring(self.bias)
        q, k, _ = self.inputs(jnp.bfloat16)
        if kernel == "cudnn":
            return cudnn_lacks(q, k, scoring, "gpu")
        if kernel == "splash":
            return splash_lacks(q, k, scoring, "tpu")
        if kernel == "relative":
            return relative_lacks(scoring, "tpu")
        if kernel == "unrolled" and scoring.indexed:
            return "no cached decoding"
        return None


def packed(num_tokens: int) -> Segments:
    """Three documents in row 0, two in row 1."""
    ids = np.stack([np.arange(num_tokens) // 25, (np.arange(num_tokens) > 40) * 7])
    return Segments(jnp.asarray(ids), jnp.asarray(ids))


def _left_padding(num_tokens: int) -> Padding:
    """5 tokens of padding before row 0, and after row 1."""
    place = np.arange(num_tokens)
    return Padding(jnp.asarray(np.stack([place >= 5, place < num_tokens - 5])))


def _rolled(num_keys: int) -> jax.Array:
    """Keys of row 0 in any order, of row 1 turned round by 11, and some that are none."""
    index = np.stack([np.random.default_rng(5).permutation(num_keys), (np.arange(num_keys) - 11) % num_keys])
    index[0, 7:20] = index[1, 30:41] = -1
    return jnp.asarray(index)


_T5 = T5Relative(num_buckets=8, max_distance=20, bidirectional=True).build(4, rngs=nnx.Rngs(params=0)).bias()
_ALIBI = ALiBi().build(4, rngs=nnx.Rngs(params=0)).bias()
_SEED = jnp.array([3, 5], jnp.uint32)

CASES: Mapping[str, Case] = {
    "causal": Case(Causal()),
    "cross": Case(Full(), num_queries=40, kv_heads=4),
    "window, documents, soft cap": Case(Causal() & SlidingWindow(9, 9) & packed(70), settings={"softcap": 2.0}),
    "two-sided window, multi-query": Case(SlidingWindow(3, 5), kv_heads=1),
    "prefix": Case(Prefix(jnp.array([0, 33])) & _left_padding(70)),
    "left padding, empty rows": Case(Causal() & _left_padding(70)),
    "queries beyond the window's keys": Case(SlidingWindow(4, 0), num_queries=150, num_keys=10),
    "alibi": Case(Causal(), bias=_ALIBI),
    "alibi, documents, grouped queries": Case(
        Causal() & packed(70), kv_heads=3, heads=6, bias=ALiBi().build(6, rngs=nnx.Rngs(params=0)).bias()
    ),
    "t5": Case(packed(70), bias=_T5),
    "t5, several blocks": Case(packed(300), num_queries=300, num_keys=300, bias=_T5),
    "t5, several blocks, some beyond the window": Case(
        Causal() & SlidingWindow(left=150) & _left_padding(520), num_queries=300, num_keys=520, bias=_T5
    ),
    "alibi both ways, some blocks beyond the window": Case(
        SlidingWindow(60, 170), num_queries=520, num_keys=300, kv_heads=4, bias=_ALIBI
    ),
    "dropout": Case(Causal(), bias=_T5, settings={"dropout": 0.4, "seed": _SEED}),
    "cached decoding": Case(
        Causal() & SlidingWindow(left=20),
        num_queries=3,
        bias=_T5,
        settings={"query_index": jnp.array([[10, 11, 12], [60, 61, 62]])},
    ),
    "slots in another order": Case(
        Causal() & SlidingWindow(left=20) & _left_padding(70),
        num_queries=3,
        bias=_T5,
        settings={"query_index": jnp.array([[10, 11, 12], [60, -1, 62]]), "key_index": _rolled(70)},
    ),
    "keys in another order": Case(Causal() & packed(70), settings={"key_index": _rolled(70)}),
}


def solve(
    run: RunKernel, case: Case, dtype: Any = jnp.float32, spread: float = 1.0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Output, and gradients of a random projection of it with respect to q, k, v and the bias's arrays."""
    direction = np.random.default_rng(1).normal(size=(ROWS, case.num_queries, case.heads, HEAD_DIM))

    def value(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None) -> tuple[jax.Array, jax.Array]:
        o = run(q, k, v, case.scoring(bias))
        return jnp.sum(o.astype(jnp.float32) * direction), o

    gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True))
    (_, o), gradients = gradient(*case.inputs(dtype, spread), case.bias)
    named = {name: np.asarray(x, np.float32) for name, x in zip("qkv", gradients[:3], strict=True)}
    named |= {f"bias {i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(gradients[3]))}
    return np.asarray(o, np.float32), named


def by_the_equation(
    q_SNH: np.ndarray,
    k_TKH: np.ndarray,
    v_TKH: np.ndarray,
    allowed_ST: np.ndarray,
    bias_NST: np.ndarray,
    softcap: float | None,
) -> np.ndarray:
    """Attention of one row in float64, one query and head at a time."""
    o = np.zeros(q_SNH.shape)
    num_queries, heads, head_dim = q_SNH.shape
    for n in range(heads):
        kv_head = n // (heads // k_TKH.shape[1])
        for s in range(num_queries):
            seen = np.flatnonzero(allowed_ST[s])
            if not len(seen):
                continue
            logits = k_TKH[seen, kv_head] @ q_SNH[s, n] / np.sqrt(head_dim)
            if softcap:
                logits = softcap * np.tanh(logits / softcap)
            weights = np.exp(logits + bias_NST[n, s, seen])
            o[s, n] = weights / weights.sum() @ v_TKH[seen, kv_head]
    return o


def dense_bias(case: Case, query: np.ndarray | jax.Array) -> np.ndarray:
    """The bias of a case as one array."""
    if case.bias is None:
        return np.zeros((1, case.heads, case.num_queries, case.num_keys))
    return np.asarray(case.bias.block(query, case.settings.get("key_index", np.arange(case.num_keys))))


# Products of 8 numbers and sums over at most 150 keys, in another order: a few dozen roundings of 6e-8 each.
FLOAT32 = 1e-5
# bfloat16 rounds each weight, output and gradient by 2^-9 = 0.2%; a few such roundings meet in one number. Logits
# rounded to bfloat16 would be off by 2^-9 of their size, here up to 30, and the weights by 6%.
BFLOAT16 = 1.5e-2


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str) -> None:
    """No element is off by more than `tolerance` of the largest one (of 1 where all are tiny)."""
    assert np.isfinite(got).all(), what
    scale = max(np.abs(want).max(), 1.0)
    assert np.abs(got - want).max() <= tolerance * scale, what


@cache
def solved_by_reference(name: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return solve(reference, CASES[name])


def cases_of(kernel: str) -> list[str]:
    return [name for name, case in CASES.items() if case.lacks(kernel) is None]


KERNEL_CASES = [(kernel, name) for kernel in KERNELS for name in cases_of(kernel)]
INTERPRETED = ("splash", "relative")
"""Kernels that run in an interpreter here, a second for each case."""
EVERYDAY = [
    (kernel, name)
    for kernel, name in KERNEL_CASES
    if kernel not in INTERPRETED or name in ("causal", "alibi, documents, grouped queries", "t5, several blocks")
]


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_reference_is_the_equation(name: str) -> None:
    case = CASES[name]
    query = case.settings.get("query_index", np.arange(case.num_queries))
    kv = case.settings.get("key_index", np.arange(case.num_keys))
    allowed, bias = case.mask.allowed(query, kv), dense_bias(case, query)
    allowed = np.broadcast_to(np.asarray(allowed), (ROWS, *allowed.shape[1:])) & np.atleast_2d(kv >= 0)[:, None]
    q, k, v = (np.asarray(x, np.float64) for x in case.inputs())
    got, _ = solved_by_reference(name)
    for row in range(ROWS):
        bias_NST = bias[row % len(bias)]
        want = by_the_equation(q[row], k[row], v[row], allowed[row], bias_NST, case.settings.get("softcap"))
        assert_close(got[row], want, FLOAT32, f"row {row}")


@pytest.mark.parametrize("name", ["window, documents, soft cap", "t5", "dropout"])
def test_reference_gradient_is_the_slope(name: str) -> None:
    """Against central differences in float64 along a random direction in all inputs at once."""
    case = CASES[name]
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(np.asarray(x, np.float64)) for x in case.inputs())
        inputs = (q, k, v, case.bias)
        leaves, tree = jax.tree.flatten(inputs)
        random = np.random.default_rng(2)
        direction = jax.tree.unflatten(tree, [jnp.asarray(random.normal(size=x.shape)) for x in leaves])

        @jax.jit
        @jax.value_and_grad
        def value(step: jax.Array) -> jax.Array:
            q, k, v, bias = jax.tree.map(lambda x, d: x + step * d, inputs, direction)
            return jnp.sum(jnp.sin(reference(q, k, v, case.scoring(bias))))

        _, gradient = value(jnp.float64(0.0))
        # Logits are float32 by design: a step this large keeps their rounding, 1e-7 / step, below the third-order term
        (above, _), (below, _) = value(jnp.float64(1e-2)), value(jnp.float64(-1e-2))
        slope = float(above - below) / 2e-2
    np.testing.assert_allclose(float(gradient), slope, rtol=5e-3)


@pytest.mark.parametrize(("kernel", "name"), at_scale_but(EVERYDAY, KERNEL_CASES))
def test_kernel_equals_reference_in_float32(kernel: str, name: str) -> None:
    got, gradients = solve(KERNELS[kernel], CASES[name])
    want, wanted = solved_by_reference(name)
    assert_close(got, want, FLOAT32, "output")
    assert gradients.keys() == wanted.keys()
    for what, gradient in gradients.items():
        assert_close(gradient, wanted[what], FLOAT32, f"gradient of {what}")


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_bfloat16_is_as_exact_as_its_inputs(kernel: str) -> None:
    case, run = CASES["left padding, empty rows"], KERNELS.get(kernel, reference)
    spread = 8.0  # logits of up to 30, which bfloat16 could not hold to within 0.1

    def exact(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
        return reference(q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32), scoring)

    want, wanted = solve(exact, case, jnp.bfloat16, spread)  # the same numbers, computed in float32
    got, gradients = solve(run, case, jnp.bfloat16, spread)
    assert_close(got, want, BFLOAT16, "output")
    for what, gradient in gradients.items():
        assert_close(gradient, wanted[what], BFLOAT16, f"gradient of {what}")


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_packed_documents_do_not_see_each_other(kernel: str) -> None:
    """Perturb the first document: the second one's output and gradients stay bitwise, and are those it has alone."""
    run, cut, length = KERNELS.get(kernel, reference), 25, 60
    segments = packed(length)
    first = jnp.arange(length)[None, :, None, None] < cut

    def second(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        o = run(q, k, v, Scoring(mask=Causal() & segments, scale=0.3))
        return jnp.sum(jnp.sin(o[0, cut : 2 * cut])), o[0, cut : 2 * cut]

    solve_second = jax.jit(jax.value_and_grad(second, argnums=(0, 1, 2), has_aux=True))
    case = Case(Full(), num_queries=length, num_keys=length)
    inputs = case.inputs()
    (_, o), gradients = solve_second(*inputs)
    perturbed = [jnp.where(first, 50.0 * x + 3.0, x) for x in inputs]
    (_, o_perturbed), gradients_perturbed = solve_second(*perturbed)
    np.testing.assert_array_equal(o, o_perturbed)
    for one, other in zip(gradients, gradients_perturbed, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.asarray(one[0, :cut]).any()
    q, k, v = (x[:1, cut : 2 * cut] for x in inputs)
    alone = reference(q, k, v, Scoring(mask=Causal(), scale=0.3))[0]
    assert_close(np.asarray(o), np.asarray(alone), FLOAT32, "alone")


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_query_that_sees_no_key_gives_zeros_and_takes_no_gradient(kernel: str) -> None:
    case = Case(Causal() & Padding(jnp.zeros((ROWS, 70), bool).at[1].set(True)))
    o, gradients = solve(KERNELS.get(kernel, reference), case)
    assert not o[0].any()
    assert o[1].any()
    for what in "qkv":
        assert not gradients[what][0].any(), what
        assert np.isfinite(gradients[what]).all(), what


def test_dropout_keeps_the_asked_share_and_the_mean() -> None:
    scoring = Scoring(mask=Full(), scale=1.0, dropout=0.25, seed=jnp.array([1, 2], jnp.uint32))
    place = np.arange(200, dtype=np.int32)
    factor = np.asarray(scoring.kept(200, (2, 3, 200, 200), place, place))
    assert set(np.unique(factor)) == {np.float32(0.0), np.float32(1 / 0.75)}
    # 240,000 draws: the share's standard deviation is 0.0009
    assert abs((factor > 0).mean() - 0.75) < 0.005
    for axis in range(4):  # no two rows, heads, queries or keys share their draws
        a, b = np.take(factor, 0, axis), np.take(factor, 1, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(
        factor[:, :, 50:90, 30:70], scoring.kept(200, (2, 3, 40, 40), place[50:90], place[30:70])
    )


def test_dropout_needs_a_key_and_keys_differ() -> None:
    q, k, v = CASES["causal"].inputs()

    def drop(key: jax.Array | None) -> np.ndarray:
        return np.asarray(attention(q, k, v, mask=Causal(), scale=0.3, dropout=0.5, key=key))

    none, one, again, other = drop(None), drop(jax.random.key(1)), drop(jax.random.key(1)), drop(jax.random.key(2))
    np.testing.assert_array_equal(none, attention(q, k, v, mask=Causal(), scale=0.3))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, none)


def shapes(
    num_queries: int, num_keys: int, dtype: Any = jnp.bfloat16, head_dim: int = 64
) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros((2, num_queries, 4, head_dim), dtype), jnp.zeros((2, num_keys, 2, head_dim), dtype)


@pytest.mark.parametrize(
    ("platform", "sizes", "settings", "kernel"),
    [
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {}, "splash"),
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {"bias": _ALIBI}, "splash"),
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {"bias": _T5}, "relative"),
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {"bias": _T5, "dropout": 0.1, "seed": _SEED}, "blockwise"),
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {"bias": _ALIBI, "softcap": 30.0}, "blockwise"),
        ("tpu", (2048, 131_072, jnp.bfloat16, 64), {"bias": _ALIBI}, "relative"),
        ("tpu", (64, 64, jnp.bfloat16, 64), {}, "reference"),
        ("tpu", (1, 2048, jnp.bfloat16, 64), {"query_index": jnp.zeros((2, 1), jnp.int32)}, "reference"),
        ("gpu", (2048, 2048, jnp.bfloat16, 64), {}, "cudnn"),
        ("gpu", (2048, 2048, jnp.bfloat16, 64), {"softcap": 30.0}, "blockwise"),
        ("gpu", (2048, 2048, jnp.float32, 64), {}, "blockwise"),
        ("gpu", (2048, 2048, jnp.bfloat16, 100), {}, "blockwise"),
        ("cpu", (256, 256, jnp.float32, 64), {}, "unrolled"),
        ("cpu", (8192, 8192, jnp.float32, 64), {}, "blockwise"),
        ("cpu", (1, 300, jnp.float32, 64), {"query_index": jnp.zeros((2, 1), jnp.int32)}, "reference"),
        ("cpu", (256, 256, jnp.float32, 64), {"key_index": jnp.zeros((2, 256), jnp.int32)}, "reference"),
        ("tpu", (2048, 2048, jnp.bfloat16, 64), {"key_index": jnp.zeros((2, 2048), jnp.int32)}, "blockwise"),
        ("gpu", (2048, 2048, jnp.bfloat16, 64), {"key_index": jnp.zeros((2, 2048), jnp.int32)}, "blockwise"),
        ("cpu", (4000, 4000, jnp.bfloat16, 64), {"query_index": jnp.zeros((2, 4000), jnp.int32)}, "blockwise"),
    ],
)
def test_auto_takes_the_platforms_kernel_where_it_can(
    monkeypatch: pytest.MonkeyPatch, platform: str, sizes: tuple[Any, ...], settings: dict[str, Any], kernel: str
) -> None:
    monkeypatch.setattr(dispatch, "platform", lambda: platform)
    num_queries, num_keys, dtype, head_dim = sizes
    q, k = jnp.zeros((2, num_queries, 4, head_dim), dtype), jnp.zeros((2, num_keys, 2, head_dim), dtype)
    assert choose(q, k, Scoring(mask=Causal(), scale=1.0, **settings)) == kernel


def test_splash_has_the_slopes_of_alibi_exactly_in_bfloat16() -> None:
    """Of 12 heads, whose slopes are no powers of two, and of keys beyond bfloat16's whole numbers."""
    num_keys, slopes = 65_536, jnp.asarray(alibi_slopes(12), jnp.float32)
    q, k = jnp.ones((1, 3, 4, 1, 5), jnp.bfloat16), jnp.ones((1, 3, num_keys, 5), jnp.bfloat16)
    more_q, more_k = jax.jit(_sloped)(q, k, slopes)
    assert more_q.dtype == more_k.dtype == jnp.bfloat16
    found = np.einsum("kgd,ktd->kgt", *(np.asarray(x, np.float64)[..., 5:] for x in (more_q[0, :, :, 0], more_k[0])))
    exact = np.asarray(slopes, np.float64)[:, None] * np.arange(num_keys)
    np.testing.assert_array_equal(found.reshape(12, num_keys), exact)


def test_a_kernel_that_cannot_says_why() -> None:
    q, k, v = CASES["causal"].inputs()
    with pytest.raises(
        ValueError, match=r"kernel='splash' .* needs a TPU and this program is for cpu; use kernel='auto'"
    ):
        attention(q, k, v, mask=Causal(), scale=1.0, kernel="splash")
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, jnp.zeros((2, 70, 3, 8)), jnp.zeros((2, 70, 3, 8)), mask=Causal(), scale=1.0)


def test_an_unknown_kind_of_mask_is_not_ignored_by_splash() -> None:
    q, k, _ = CASES["causal"].inputs()
    prefix = Scoring(mask=Causal() & Prefix(jnp.array([3, 3])), scale=1.0)
    assert splash_lacks(q, k, prefix, "tpu") == "Prefix is no mask it knows"
    both_ways = Scoring(mask=Full(), bias=_ALIBI, scale=1.0)
    assert splash_lacks(q, k, both_ways, "tpu") == "of all biases it has only a slope, and that in causal attention"
    two = Scoring(mask=packed(70) & packed(70), scale=1.0)
    assert splash_lacks(q, k, two, "tpu") == "it takes one pair of segment ids"

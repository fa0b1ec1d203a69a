"""PaLM against its equations in NumPy; there is no other reference. Gradients by complex steps.

The derivative of an analytic function f along d is Im f(x + i h d) / h, exact to h^2: with h = 1e-30 no difference of
nearby numbers is ever taken, and float64 is all the rounding there is (Squire and Trapp 1998).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.palm import PRESETS, palm
from llmlab.models.weights import flatten
from llmlab.nn.module import merge

DIM, HEADS, HEAD_DIM, LAYERS, VOCAB, EPSILON = 12, 3, 6, 2, 17, 1e-6
CONFIG = palm(embed_dim=DIM, num_layers=LAYERS, num_heads=HEADS, head_dim=HEAD_DIM, vocab_size=VOCAB)
ROWS, LENGTH = 3, 9
MASK = np.arange(LENGTH) < np.array([[LENGTH], [6], [LENGTH]])
MASK[2, :4] = False


def drawn() -> dict[str, Any]:
    """Every parameter drawn: gains of one would hide mistakes."""
    random = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> np.ndarray:
        noise = random.normal(size=leaf.shape)
        return 1 + 0.3 * noise if path.endswith("scale") else noise if "table" in path else 0.4 * noise

    return {path: draw(path, leaf).astype(np.float32) for path, leaf in flatten(CONFIG.abstract()[1]).items()}


def layer_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON)


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotary positions of (length, ..., head_dim), pairs (i, i + head_dim / 2)."""
    half = HEAD_DIM // 2
    angle = np.arange(len(x))[:, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = (f(angle).reshape(len(x), *[1] * (x.ndim - 2), half) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(params: dict[str, np.ndarray], ids: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Of one row, from the paper's section 2."""
    x = params["embedding.tokens.table"][ids]
    sees = np.tril(np.ones((LENGTH, LENGTH), bool)) & real
    sees |= ~sees.any(1, keepdims=True)  # a padding token that sees nothing: whatever
    for layer in range(LAYERS):
        p = {name.partition("stack.blocks.0.")[2]: leaf[layer] for name, leaf in params.items() if "blocks" in name}
        n = layer_norm(x, p["norm_mixer.scale"])
        q = rotated(np.einsum("sd,dnh->snh", n, p["mixer.query.kernel"]))
        k = rotated(n @ p["mixer.key.kernel"][:, 0])  # one key/value head
        v = n @ p["mixer.value.kernel"][:, 0]
        scores = np.einsum("snh,th->nst", q, k) / math.sqrt(HEAD_DIM)
        powers = np.exp(scores - np.where(sees, np.real(scores), -np.inf).max(-1, keepdims=True)) * sees
        weights = powers / powers.sum(-1, keepdims=True)
        attended = np.einsum("nst,th,nhd->sd", weights, v, p["mixer.output.kernel"])
        gate = n @ p["ffn.gate.kernel"]
        fed = (gate / (1 + np.exp(-gate)) * (n @ p["ffn.up.kernel"])) @ p["ffn.down.kernel"]
        x = x + attended + fed
    return layer_norm(x, params["final_norm.scale"]) @ params["embedding.tokens.table"].T / math.sqrt(DIM)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and labels that are the next tokens where this one and the next are real."""
    ids = np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH))
    counted = np.pad(MASK[:, :-1] & MASK[:, 1:], ((0, 0), (0, 1)))
    return ids, np.where(counted, np.roll(ids, -1, axis=1), -100)


def loss(params: dict[str, np.ndarray], ids: np.ndarray, labels: np.ndarray) -> Any:
    total, count = 0.0, (labels >= 0).sum()
    for row in range(ROWS):
        scores = logits(params, ids[row], MASK[row])
        scores = scores - np.real(scores).max(-1, keepdims=True)
        log_probs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        total = total - sum(log_probs[s, labels[row, s]] for s in range(LENGTH) if labels[row, s] >= 0)
    return total / count


def ours(params: dict[str, np.ndarray]) -> tuple[Any, Any, Any]:
    """Logits, loss and gradient by path, of llmlab."""
    graphdef, shapes, _ = CONFIG.abstract()
    treedef = jax.tree.structure(shapes)
    tree = jax.tree.unflatten(treedef, [params[path] for path in flatten(shapes)])
    ids, labels = (jnp.asarray(array) for array in batch())

    def value(tree: Any) -> Any:
        out = merge(graphdef, tree)(ids, attention_mask=jnp.asarray(MASK), labels=labels)
        return out.loss, out.logits

    (found, scores), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(tree)
    return scores, found, flatten(gradient)


@pytest.fixture(scope="module")
def params() -> dict[str, np.ndarray]:
    return drawn()


def test_logits_and_gradients_equal_the_equations(params: dict[str, np.ndarray]) -> None:
    scores, found, gradient = ours(params)
    exact = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    ids, labels = batch()
    expected = np.stack([logits(exact, ids[row], MASK[row]) for row in range(ROWS)])
    np.testing.assert_allclose(np.asarray(scores)[MASK], expected[MASK], atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(found, loss(exact, ids, labels), rtol=1e-6)
    random, step = np.random.default_rng(2), 1e-30
    for path, leaf in exact.items():
        for _ in range(4):
            direction = random.normal(size=leaf.shape)
            moved = exact | {path: leaf + 1j * step * direction}
            slope = loss(moved, ids, labels).imag / step
            mine = np.sum(np.asarray(gradient[path], np.float64) * direction)
            # float32: 1e-7 of the gradient's norm, a few operations deep
            assert abs(mine - slope) < 1e-5 * np.linalg.norm(gradient[path]) * math.sqrt(leaf.size), path


def test_presets_have_the_published_sizes() -> None:
    """Table 1 of the paper, in billions of parameters."""
    published = {"palm-8b": 8.63, "palm-62b": 62.50, "palm-540b": 540.35}
    for name, billions in published.items():
        assert abs(PRESETS[name].num_parameters() / 1e9 - billions) < 0.01
    assert PRESETS["palm-nano"].vocab_size is None

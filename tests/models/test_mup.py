"""muP: nothing at the base width, the same change of every layer's output at all others."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Head, Tied, Transformer, Untied
from llmlab.models.gemma import preset as gemma
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block, FeedForward
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.lsh import LSHAttention
from llmlab.nn.module import merge, split
from llmlab.nn.moe import MixtureOfExperts
from llmlab.nn.mup import MuP
from llmlab.nn.norms import RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.optim import LAMB, SGD, Adafactor, AdamW, Constant, Cosine, Lion, Momentum, Muon, Optimizer
from llmlab.study.coordinates import Coordinates, coordinates, slopes
from llmlab.training.config import Train

BASE, VOCAB = 64, 32
Ffn = Callable[[int], FeedForward]


def gated(width: int) -> FeedForward:
    return GatedMLP(hidden_dim=2 * width)


def plain(width: int) -> FeedForward:
    return MLP(hidden_dim=2 * width)


def experts(width: int) -> FeedForward:
    return MixtureOfExperts(num_experts=4, experts_per_token=2, expert=GatedMLP(hidden_dim=width))


def decoder(
    width: int, *, mup: bool, head: Head | None = None, ffn: Ffn = gated, wider_heads: bool = False, base: int = BASE
) -> Transformer:
    """Two layers of grouped-query attention; more heads with more width, or wider ones."""
    head_dim = 16 * width // base if wider_heads else 16
    num_heads = width // head_dim
    mixer = Attention(num_heads=num_heads, num_kv_heads=num_heads // 2, head_dim=head_dim, position=Rotary())
    return Transformer(
        vocab_size=VOCAB,
        embed_dim=width,
        num_layers=2,
        pattern=(Block(mixer=mixer, ffn=ffn(width), norm=RMSNorm(), wiring=PreNorm()),),
        embedding_std=0.125 if isinstance(head, Tied) else 0.5,  # a tied table starts as the untied head does
        final_norm=RMSNorm(),
        head=head or Untied(),
        mup=MuP(base_width=base, base_head_dim=16) if mup else None,
    )


def batch() -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(0, VOCAB, (4, 16))
    return {"input_ids": jnp.asarray(ids[:, :-1]), "labels": jnp.asarray(ids[:, 1:])}


def experiment(model: Transformer, optimizer: Optimizer) -> Experiment:
    return Experiment(
        model=model,
        data=Packed(StandardLibrary()),
        optimizer=optimizer,
        train=Train(steps=10, batch_size=4, sequence_length=16),
    )


def trained(model: Transformer, optimizer: Optimizer, steps: int = 2) -> tuple[Any, jax.Array]:
    """Parameters after some steps, and the logits."""
    graphdef, params = split(model.build(nnx.Rngs(params=0)))
    transformation = optimizer.build(model.abstract()[2], 10, growth=model.width_growth)
    state = transformation.init(params)
    inputs = batch()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: merge(graphdef, p)(**inputs).loss)(params)
        updates, state = transformation.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, merge(graphdef, params)(inputs["input_ids"]).logits


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": AdamW(peak_lr=2e-2),
    "sgd": SGD(peak_lr=0.1, clip_norm=None),
    "momentum": Momentum(peak_lr=0.05, weight_decay=0.1, clip_norm=None),
    "lion": Lion(peak_lr=1e-2),
    "muon": Muon(peak_lr=2e-2),
    "muon by jordan": Muon(peak_lr=2e-2, update_rms=None),
    "lamb": LAMB(peak_lr=5e-2),
    "adafactor": Adafactor(peak_lr=5e-2, min_dim_to_factor=4),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, {"head": Tied()}) for name in OPTIMIZERS),
        ("adamw", {"head": Untied(bias=True), "ffn": experts}),
        ("muon", {"ffn": experts}),
    ],
)
@pytest.mark.scale
def test_at_the_base_width_mup_is_the_standard_parametrisation_bit_for_bit(name: str, kind: dict[str, Any]) -> None:
    with_, without = (trained(decoder(BASE, mup=mup, **kind), OPTIMIZERS[name]) for mup in (True, False))
    jax.tree.map(np.testing.assert_array_equal, with_, without)


def checked(optimizer: Optimizer, widths: tuple[int, ...], *, mup: bool, **kind: Any) -> list[Coordinates]:
    return [coordinates(experiment(decoder(width, mup=mup, **kind), optimizer), batch(), steps=3) for width in widths]


MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"head": Tied()},
    "wider heads": {"wider_heads": True, "ffn": plain},
    "experts": {"ffn": experts},
}


@pytest.mark.scale
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "untied") for name in OPTIMIZERS),
        ("adamw", "tied"),
        ("adamw", "wider heads"),
        ("adamw", "experts"),
        ("sgd", "tied"),
    ],
)
def test_every_layer_changes_by_the_same_amount_at_all_widths_under_mup_only(name: str, kind: str) -> None:
    """Slopes of log change against log width. What is left of them is finite width: at width 128 the random part of the
    logits. change, which falls as 1 / sqrt(width), is not yet small (see the test below)."""
    under_mup = slopes(checked(OPTIMIZERS[name], (128, 512), mup=True, **MODELS[kind]))
    standard = slopes(checked(OPTIMIZERS[name], (64, 512), mup=False, **MODELS[kind]))
    told = {layer: f"{slope:.2f}, standard {standard[layer]:.2f}" for layer, slope in under_mup.items()}
    assert all(abs(slope) < 0.15 for layer, slope in under_mup.items() if layer != "logits"), told
    assert -0.4 < under_mup["logits"] < 0.1, told
    assert max(standard.values()) > 0.3, told


@pytest.mark.scale
def test_what_is_left_of_the_slope_of_the_logits_goes_away_with_width() -> None:
    sgd = SGD(peak_lr=0.1, clip_norm=None)
    narrow, middle, wide = checked(sgd, (64, 256, 1024), mup=True, head=Tied())
    assert slopes([narrow, middle])["logits"] + 0.1 < slopes([middle, wide])["logits"] < 0.1
    assert all(abs(slope) < 0.05 for layer, slope in slopes([middle, wide]).items() if layer != "logits")


@pytest.mark.scale
def test_the_size_of_activations_is_flat_too() -> None:
    found = checked(AdamW(peak_lr=2e-2), (64, 512), mup=True)
    assert all(abs(slope) < 0.15 for layer, slope in slopes(found, of="size").items() if layer != "logits")
    grown = slopes(checked(AdamW(peak_lr=2e-2), (64, 512), mup=False), of="size")
    assert grown["layer 2"] > 0.3
    with pytest.raises(ValueError, match="at least two widths"):
        slopes(found[:1])


@pytest.mark.scale
def test_the_check_trains_with_the_peak_learning_rate_in_spite_of_warm_up() -> None:
    model = decoder(32, mup=False)
    with_, without = (
        coordinates(experiment(model, AdamW(peak_lr=1e-2, schedule=schedule)), batch(), steps=2).change["logits"]
        for schedule in (Cosine(warmup_steps=5), Constant())
    )
    assert with_ == pytest.approx(without, rel=1e-3)
    assert without[0] == 0.0 < without[1]


@pytest.mark.scale
def test_initial_weights_and_factors_are_the_tables() -> None:
    """Table 8: the head starts with the base model's deviation and its input is divided by the ratio of widths."""
    wide = decoder(4 * BASE, mup=True).build(nnx.Rngs(params=0))
    base = decoder(BASE, mup=True).build(nnx.Rngs(params=0))
    for model in (wide, base):
        assert model.head is not None
        assert float(jnp.std(model.head.kernel[...])) == pytest.approx(1 / np.sqrt(BASE), rel=0.05)
    block: Any = wide.stack.blocks[0]
    up = block.ffn.up.kernel[...]
    assert float(jnp.std(up)) == pytest.approx(1 / np.sqrt(4 * BASE), rel=0.05)
    hidden = jnp.ones((1, 4 * BASE))
    assert wide.head is not None
    np.testing.assert_allclose(wide.project(hidden), hidden @ wide.head.kernel[...] / 4, rtol=1e-5)
    tied = decoder(4 * BASE, mup=True, head=Tied()).build(nnx.Rngs(params=0))
    np.testing.assert_allclose(
        tied.project(hidden), hidden @ tied.embedding.tokens.table[...].T / 4, rtol=1e-5, atol=1e-6
    )
    biased = decoder(4 * BASE, mup=True, head=Untied(bias=True)).build(nnx.Rngs(params=0))
    assert biased.head is not None
    assert biased.head.bias is not None
    biased.head.bias[...] = jnp.full(VOCAB, 3.0)
    np.testing.assert_allclose(biased.project(0 * hidden), np.full((1, VOCAB), 3.0))  # the bias is not divided


def test_attention_is_divided_by_the_width_of_a_head() -> None:
    mixer = decoder(4 * BASE, mup=True, wider_heads=True).blocks()[0].mixer
    assert isinstance(mixer, Attention)
    assert mixer.scale == pytest.approx(np.sqrt(16) / 64)  # 1 / sqrt(16) at the base's 16, then as 1 / head_dim
    given = dataclasses.replace(mixer, scale=1.0).under_mup(MuP(base_width=BASE, base_head_dim=16), 4 * BASE)
    assert given.scale == 0.25  # the base model's 1, times 16 / 64
    more_heads = decoder(4 * BASE, mup=True).blocks()[0].mixer
    assert isinstance(more_heads, Attention)
    assert more_heads.scale is None


def test_the_router_is_an_output_matrix() -> None:
    ffn = decoder(4 * BASE, mup=True, ffn=experts).blocks()[0].ffn
    assert isinstance(ffn, MixtureOfExperts)
    layer = ffn.build(4 * BASE, rngs=nnx.Rngs(params=0))
    assert float(jnp.std(layer.router.kernel[...])) == pytest.approx(1 / np.sqrt(BASE), rel=0.1)
    x = jax.random.normal(jax.random.key(0), (1, 3, 4 * BASE))
    np.testing.assert_allclose(layer.logits(x), x @ layer.router.kernel[...] / 4, rtol=1e-4, atol=1e-5)


def test_what_grows_is_told_to_the_optimizer() -> None:
    assert decoder(256, mup=False).width_growth == {}
    assert decoder(256, mup=True).width_growth == {
        "embed": 4.0, "mlp": 4.0, "heads": 4.0, "kv_heads": 4.0, "head_dim": 1.0,
    }  # fmt: skip
    wider = decoder(256, mup=True, wider_heads=True).width_growth
    assert (wider["heads"], wider["kv_heads"], wider["head_dim"]) == (1.0, 1.0, 4.0)


def test_what_mup_cannot_do_is_refused_with_the_way_out() -> None:
    model = decoder(256, mup=False)
    mup = MuP(base_width=64, base_head_dim=16)
    fixed_kv = Attention(num_heads=16, num_kv_heads=2, head_dim=16)
    block = dataclasses.replace(model.pattern[0], mixer=fixed_kv)
    with pytest.raises(ValueError, match=r"num_kv_heads=2 of width 16 .* are 0.5 heads .* key/value heads grow"):
        dataclasses.replace(model, pattern=(block,), mup=mup)
    lsh = dataclasses.replace(model.pattern[0], mixer=LSHAttention(num_heads=16, head_dim=16))
    with pytest.raises(ValueError, match=r"muP of LSHAttention is not known; use Attention"):
        dataclasses.replace(model, pattern=(lsh,), mup=mup)
    other = dataclasses.replace(model.pattern[0], mixer=Attention(num_heads=8, head_dim=32))
    with pytest.raises(ValueError, match="heads of one width, and there are 16, 32"):
        dataclasses.replace(model, pattern=(model.pattern[0], other), mup=mup)
    with pytest.raises(ValueError, match=r"embedding_scale=16 is sqrt\(embed_dim\).* use 8.0, its value at"):
        dataclasses.replace(model, embedding_scale=16.0, mup=mup)
    with pytest.raises(ValueError, match=r"head.scale=0.0625 is 1/sqrt\(embed_dim\).* use 0.125"):
        dataclasses.replace(model, head=Tied(scale=0.0625), mup=mup)
    with pytest.raises(ValueError, match=r"mup.base_width=0 is not positive"):
        MuP(base_width=0, base_head_dim=16)
    gemma_ = gemma("nano")
    same = MuP(base_width=gemma_.embed_dim, base_head_dim=_head_dim(gemma_))
    assert dataclasses.replace(gemma_, mup=same).width_growth["embed"] == 1.0  # its sqrt(embed_dim) is the base's own


def _head_dim(model: Transformer) -> int:
    mixer = model.pattern[0].mixer
    assert isinstance(mixer, Attention)
    return mixer.resolved_head_dim(model.embed_dim)

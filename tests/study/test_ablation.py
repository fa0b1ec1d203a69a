"""Arms: what a variant changes is computed, one change at a time; every arm runs the same seeds on the same data."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmlab.data import Packed, TextFiles
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.nn.positions import Rotary
from llmlab.nn.wiring import PreNorm
from llmlab.optim import AdamW, Constant, Cosine
from llmlab.study.ablation import Ablation, Variant, swap, unchanged, with_values
from llmlab.study.changes import change_problems, changes_of, grouped
from llmlab.training.config import Train

Make = Callable[..., Ablation]

BLOCK = Block(
    mixer=Attention(num_heads=2, position=Rotary()),
    ffn=MLP(hidden_dim=32, activation="relu"),
    norm=RMSNorm(),
    wiring=PreNorm(),
)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("\n".join(f"{i} is half of {2 * i}" for i in range(200)), encoding="utf-8")
    return Experiment(
        model=Transformer(embed_dim=16, num_layers=2, pattern=(BLOCK, BLOCK), final_norm=RMSNorm()),
        data=Packed(TextFiles(str(corpus), separator="\n"), validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=2)),
        train=Train(steps=6, batch_size=8, sequence_length=16),
    )


@pytest.fixture
def make(experiment: Experiment) -> Make:
    def ablation(**fields: Any) -> Ablation:
        if not {"variants", "factors", "leave_one_out"} & fields.keys():
            fields["variants"] = {"layernorm": swap(RMSNorm, LayerNorm())}
        return Ablation(**{"hypothesis": "LayerNorm is no worse than RMSNorm", "baseline": experiment} | fields)

    return ablation


def refusal(ablation: Ablation) -> str:
    with pytest.raises(ValueError, match="this ablation cannot run") as caught:
        ablation.arms()
    return str(caught.value)


# --- changes ---------------------------------------------------------------------------------------------------------


def test_swap_replaces_every_instance_and_nothing_else(experiment: Experiment) -> None:
    swapped = swap(RMSNorm, LayerNorm())(experiment)
    blocks = tuple(replace(block, norm=LayerNorm()) for block in experiment.model.pattern)  # type: ignore[attr-defined]  a Transformer
    assert swapped == replace(experiment, model=replace(experiment.model, pattern=blocks, final_norm=LayerNorm()))
    assert "RMSNorm" not in repr(swapped)


def test_swap_by_a_function_sees_what_goes(experiment: Experiment) -> None:
    swapped = swap(MLP, lambda ffn: GatedMLP(hidden_dim=ffn.hidden_dim * 2 // 3, activation="silu"))(experiment)
    assert {path for path, _, _ in changes_of(experiment, swapped)} == {"model.pattern.0.ffn", "model.pattern.1.ffn"}
    assert "hidden_dim=21" in repr(swapped)


def test_swap_of_what_is_not_there_names_what_is(make: Make) -> None:
    message = refusal(make(variants={"x": swap(LayerNorm, RMSNorm())}))
    assert "there is no LayerNorm" in message
    assert "RMSNorm" in message


def test_swap_wants_an_instance() -> None:
    with pytest.raises(ValueError, match=r"LayerNorm\(\.\.\.\)"):
        swap(RMSNorm, LayerNorm)


def test_values_are_set_by_path_also_inside_tuples(experiment: Experiment) -> None:
    changed = with_values({"optimizer.peak_lr": 2e-3, "model.pattern.1.ffn.hidden_dim": 48})(experiment)
    assert changes_of(experiment, changed) == [
        ("model.pattern.1.ffn.hidden_dim", 32, 48),
        ("optimizer.peak_lr", 1e-2, 2e-3),
    ]


def test_a_path_that_is_not_there_is_named_with_those_that_are(make: Make) -> None:
    message = refusal(make(variants={"x": with_values({"optimizer.peek": 1, "model.pattern.7.ffn": None})}))
    assert "optimizer.peek: AdamW has no field peek; did you mean optimizer.peak_lr" in message
    assert "model.pattern.7: model.pattern is a row of 2; its elements are 0 to 1" in message


def test_one_change_may_show_in_several_places(experiment: Experiment) -> None:
    swapped = swap(RMSNorm, LayerNorm())(experiment)
    values = with_values({f"model.pattern.{i}.mixer.num_heads": 4 for i in (0, 1)})(experiment)
    assert [len(group) for group in grouped(changes_of(experiment, swapped))] == [3]
    assert [len(group) for group in grouped(changes_of(experiment, values))] == [2]


def test_equal_values_in_fields_of_other_names_are_two_changes() -> None:
    assert len(grouped([("a.steps", 1, 2), ("b.steps", 1, 2), ("a.size", 1, 2)])) == 2
    assert len(grouped([("a.qk_norm", None, RMSNorm()), ("a.embedding_norm", None, RMSNorm())])) == 2
    assert len(grouped([("a.norm", RMSNorm(), LayerNorm()), ("b.norm", RMSNorm(), LayerNorm(bias=False))])) == 2
    assert len(grouped([("a.norm", RMSNorm(), LayerNorm()), ("a.final", RMSNorm(epsilon=1e-3), LayerNorm())])) == 1


# --- one change ------------------------------------------------------------------------------------------------------


def test_a_second_change_is_refused_and_named(make: Make) -> None:
    def both(e: Experiment) -> Experiment:
        return with_values({"optimizer.peak_lr": 5e-3})(swap(RMSNorm, LayerNorm())(e))

    message = refusal(make(variants={"layernorm": both}))
    assert "changes 2 things at once" in message
    assert "optimizer.peak_lr: 0.01 -> 0.005" in message
    assert "RMSNorm() -> LayerNorm()" in message
    declared = Variant(both, changes=("model.*norm", "optimizer.peak_lr"))
    assert len(make(variants={"layernorm": declared}).arms()) == 2


def test_a_declaration_covers_only_what_it_says(experiment: Experiment) -> None:
    differences = changes_of(experiment, with_values({"train.steps": 8, "optimizer.peak_lr": 5e-3})(experiment))
    assert change_problems(differences, ("train.steps", "optimizer")) == []
    assert "optimizer.peak_lr: 0.01 -> 0.005" in change_problems(differences, ("train.*",))[0]
    assert change_problems(differences, ("train", "optimizer", "model")) == [
        "changes='model' is declared, and nothing differs there"
    ]


def test_no_change_is_refused(make: Make) -> None:
    message = refusal(make(variants={"same": unchanged, "also": swap(RMSNorm, RMSNorm())}))
    assert message.count("does not differ from the baseline") == 2


def test_two_variants_that_are_the_same_are_refused(make: Make) -> None:
    change = swap(RMSNorm, LayerNorm())
    assert "b: it is the same experiment as a" in refusal(make(variants={"a": change, "b": change}))


def test_a_variant_that_cannot_run_is_refused_before_anything_runs(make: Make) -> None:
    message = refusal(make(variants={"x": with_values({"train.batch_size": 9, "train.accumulation": 2})}))
    assert "train.batch_size=9 is not divisible by train.accumulation=2" in message


def test_the_seed_is_the_studys(make: Make) -> None:
    assert "changes train.seed, which the study sets" in refusal(make(variants={"x": with_values({"train.seed": 3})}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 1}, "seeds=1 must be at least 2"),
        ({"margin": -0.1}, "margin=-0.1"),
        ({"margin": float("nan")}, "margin=nan"),
        ({"alpha": 0.7}, "alpha=0.7"),
        ({"claim": "equal"}, "needs a margin"),
        ({"learning_rates": (1e-3,)}, "leaves nothing to tune"),
        ({"learning_rates": (1e-3, 1e-3)}, "has one twice"),
        ({"budget": 10}, 'is for seeds="until settled"'),
        ({"min_seeds": 8, "max_seeds": 4}, "min_seeds=8 and max_seeds=4"),
        ({"variants": {}}, "exactly one of variants, factors and leave_one_out"),
        ({"variants": {"a": unchanged}, "leave_one_out": {"b": unchanged}}, "variants and leave_one_out was given"),
        ({"hypothesis": " "}, "hypothesis is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Make, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**fields)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_factorial_has_every_cell_and_each_changes_what_its_levels_change(make: Make, experiment: Experiment) -> None:
    factors = {
        "norm": {"rms": unchanged, "layer": swap(RMSNorm, LayerNorm())},
        "warmup": {"on": unchanged, "off": with_values({"optimizer.schedule": Constant()})},
        "heads": {"2": unchanged, "1": swap(Attention, lambda a: replace(a, num_heads=1)), "4": _heads(4)},
    }
    arms = make(factors=factors).arms()
    assert arms[0].name == "baseline"
    assert arms[0].levels == (("norm", "rms"), ("warmup", "on"), ("heads", "2"))
    assert len(arms) == len({arm.levels for arm in arms}) == 12
    corner = next(arm for arm in arms if arm.name == "norm=layer,warmup=off,heads=4")
    by_hand = _heads(4)(with_values({"optimizer.schedule": Constant()})(swap(RMSNorm, LayerNorm())(experiment)))
    assert corner.experiment == by_hand
    assert len(grouped(corner.changes)) == 3


def test_a_level_that_changes_two_things_is_refused(make: Make) -> None:
    two = with_values({"train.steps": 8, "optimizer.peak_lr": 5e-3})
    assert "two=on: it changes 2 things at once" in refusal(make(factors={"two": {"off": unchanged, "on": two}}))


def test_factors_that_depend_on_their_order_are_refused(make: Make) -> None:
    factors = {
        "heads": {"2": unchanged, "4": with_values({"train.batch_size": 16})},
        "steps": {"6": unchanged, "8": lambda e: replace(e, train=replace(e.train, batch_size=e.train.batch_size * 4))},
    }
    assert "depends on the order" in refusal(make(factors=factors))


def test_a_factor_needs_the_baselines_level(make: Make) -> None:
    factors = {"norm": {"layer": swap(RMSNorm, LayerNorm()), "other": swap(RMSNorm, LayerNorm(bias=False))}}
    assert "exactly one is the baseline's" in refusal(make(factors=factors))


def test_leave_one_out_takes_parts_away_from_the_full_recipe(make: Make) -> None:
    parts = {
        "rotary": swap(Attention, lambda a: replace(a, position=None)),
        "cosine": with_values({"optimizer.schedule": Constant()}),
    }
    arms = make(leave_one_out=parts, claim="worse").arms()
    assert [arm.name for arm in arms] == ["baseline", "full minus rotary", "full minus cosine"]
    assert [len(grouped(arm.changes)) for arm in arms] == [0, 1, 1]
    assert {arm.claim for arm in arms} == {"worse"}
    assert arms[1].changes[0] == ("model.pattern.0.mixer.position", Rotary(), None)


def test_a_variant_may_claim_something_else(make: Make) -> None:
    variant = Variant(swap(RMSNorm, LayerNorm()), claim="equal", margin=0.5)
    arms = make(variants={"layernorm": variant}).arms()
    assert (arms[1].claim, arms[1].margin) == ("equal", 0.5)


# --- seeds -----------------------------------------------------------------------------------------------------------


def _heads(count: int) -> Callable[[Experiment], Experiment]:
    return swap(Attention, lambda attention: replace(attention, num_heads=count))


def _batches(experiment: Experiment, steps: int = 3) -> list[np.ndarray]:
    tokenizer = experiment.tokenizer.build()
    data = experiment.data.build(
        tokenizer,
        sequence_length=experiment.train.sequence_length,
        batch_size=experiment.train.batch_size,
        seed=experiment.train.seed,
    )
    return [data.train.batch(step)["input_ids"] for step in range(steps)]


def test_a_seed_means_the_same_batches_in_every_arm_and_others_than_another_seed(make: Make) -> None:
    variants = {"layernorm": swap(RMSNorm, LayerNorm()), "rate": with_values({"optimizer.peak_lr": 1e-3})}
    arms = make(variants=variants).arms()
    by_seed = []
    for seed in (0, 1):
        first, *others = [_batches(arm.run(seed)) for arm in arms]
        for other in others:
            np.testing.assert_array_equal(first, other)
        by_seed.append(first)
    assert not np.array_equal(by_seed[0], by_seed[1])


def test_runs_of_one_seed_differ_in_the_change_alone(make: Make) -> None:
    base, variant = make().arms()
    assert changes_of(base.run(3), variant.run(3)) == list(variant.changes)
    assert changes_of(base.run(3), base.run(4, learning_rate=0.5)) == [
        ("optimizer.peak_lr", 0.01, 0.5),
        ("train.seed", 3, 4),
    ]


def test_seeds_for_tuning_are_never_compared(make: Make) -> None:
    ablation = make(learning_rates=(1e-3, 1e-2), tuning_seeds=2, seeds=4)
    assert len(ablation.seeds_for_tuning) == 2
    assert not set(ablation.seeds_for_tuning) & set(ablation.first_seeds)


def test_a_budget_of_runs_bounds_the_seeds(make: Make) -> None:
    ablation = make(seeds="until settled", budget=21, learning_rates=(1e-3, 1e-2), tuning_seeds=2)
    assert ablation.most_seeds(2) == (21 - 2 * 2 * 2) // 2
    message = refusal(make(seeds="until settled", budget=5))
    assert "budget=5 runs is too few for 2 arms: it leaves 2 of the min_seeds=3" in message

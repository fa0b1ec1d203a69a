"""Does a family's training step cost what its FLOPs say?

Claim    At nano size a step of any family takes at most 1.15 times a plain decoder's step of equal FLOPs.
Command  python experiments/benchmarks/families.py
Cost     11 minutes on 2 CPU cores
Result   holds for all 28; nearest to the limit is Mixtral with 1.14: results/families_cpu.md

The families are those of the catalogue, each with its nano preset; a new one appears by itself. A batch is what the
config says its model is called with (`batch_shapes`), with random numbers and as many random labels as there are
scores. The step is the one that `llmlab train` runs, float32 AdamW: chunked cross-entropy where the model scores
tokens, else the loss of a call with labels.

The plain decoder is the GPT-2 shape of the same width, depth, heads and vocabulary on as many tokens, its MLP as wide
as makes the FLOPs equal. FLOPs are the matmul FLOPs of the whole gradient, counted in the program of each
(llmlab.plan.cost: loops times their trips, what a causal kernel skips not counted); what rounding the width leaves is
divided out. Norms, softmax, activations and the optimizer's update are no FLOPs but take their time on both sides.
Families whose attention is made for long rows get as many tokens in rows of --long-length, and so does their decoder.

Every family and its decoder take turns, step by step, and the ratio is that of the medians. --clock cpu compares
processor time instead of the clock on the wall: what to use on a machine with other work. --profile NAME writes a trace
of both for TensorBoard or Perfetto.
"""

import argparse
import dataclasses
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIMIT = 1.15
LONG = ("longformer", "big_bird", "reformer", "performer", "linformer")
"""Modules of families that are made for long rows."""


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules of families, for a part of the table: bert xlnet")
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch (32)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (128)")
    parser.add_argument("--long-length", type=int, default=1024, help="the same for families made for long rows (1024)")
    parser.add_argument("--vocab", type=int, default=1024, help="tokens of the vocabulary (1024)")
    parser.add_argument("--steps", type=int, default=9, help="steps of each side (9)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what is compared (wall)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="write a trace of each side's steps there")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Side:
    """A model with a batch, ready to step."""

    config: Any
    flops: int
    """Matmul FLOPs of loss and gradient."""
    step: Callable[[], float]
    """One step; seconds on the wall or of the processor."""


def main() -> None:
    """Prints the table."""
    args = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from llmlab.models.catalog import FAMILIES

    rows = []
    for family in FAMILIES:
        module = module_of(family)
        nano = next((config for name, config in family.presets.items() if name.endswith("nano")), None)
        if nano is None or (args.names and module not in args.names):
            continue
        rows.append({"family": family.name, **compare(sized(nano, args.vocab), args, module)})
        if not args.json:
            print(line(rows[-1]), flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        sys.exit(f"no family is called {', '.join(args.names)}; llmlab models lists them")
    else:
        worst = max(rows, key=lambda row: row["ratio"])
        print(f"\nlargest: {worst['family']} {worst['ratio']:.2f}; the limit is {LIMIT}")


def module_of(family: Any) -> str:
    """Name of the module that defines a family."""
    from llmlab.models import catalog

    modules = {name: module for name, module in vars(catalog).items() if inspect.ismodule(module)}
    return next(name for name, module in modules.items() if vars(module).get("FAMILY") is family)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    mark = "" if row["ratio"] <= LIMIT else f"  above {LIMIT}"
    ours, theirs = 1e3 * row["seconds"], 1e3 * row["decoder_seconds"]
    return (
        f"{row['family']:12} {row['parameters'] / 1e6:6.2f} M parameters  {row['gflops']:7.2f} GFLOPs a step  "
        f"{ours:8.1f} ms, decoder {theirs:8.1f} ms  ratio {row['ratio']:.2f}{mark}"
    )


def sized(config: Any, vocab_size: int) -> Any:
    """The config with its vocabulary, where it has one."""
    return config.with_vocabulary(vocab_size) if config.vocab_size is None else config


def compare(config: Any, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A family's step against its decoder's, in turns."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    tokens, length = args.batch * args.length, args.long_length if name in LONG else args.length
    length = min(length, config.max_length or length)
    shapes = config.batch_shapes(max(1, tokens // length), length)
    family = prepared(config, shapes, clock)
    decoder = prepared(*plain(config, shapes, family.flops, args.vocab), clock)
    seconds: dict[str, list[float]] = {"family": [], "decoder": []}
    for number in range(args.steps + 2):
        for side, prepared_side in (("family", family), ("decoder", decoder)):
            taken = prepared_side.step()
            if number >= 2:  # the first ones compile and warm the caches
                seconds[side].append(taken)
    if args.profile is not None:
        for side, prepared_side in (("family", family), ("decoder", decoder)):
            trace(prepared_side, args.profile / f"{name}-{side}")
    ours, theirs = (statistics.median(seconds[side]) for side in ("family", "decoder"))
    return {
        "parameters": config.num_parameters(),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "gflops": family.flops / 1e9,
        "decoder_gflops": decoder.flops / 1e9,
        "seconds": ours,
        "decoder_seconds": theirs,
        "ratio": ours / family.flops / (theirs / decoder.flops),
        "clock": args.clock,
    }


def plain(config: Any, shapes: Mapping[str, tuple[int, ...]], flops: int, vocab_size: int) -> tuple[Any, Any]:
    """The GPT-2 shape of a config's width and depth with these FLOPs a step, and the shapes of its batch."""
    from llmlab.models.gpt2 import gpt2

    total = config.num_tokens(shapes)
    length = shapes["input_ids"][1] if "input_ids" in shapes else total // shapes["pixel_values"][0]
    rows = max(1, round(total / length))  # twice the batch for an encoder and a decoder
    towers = [part for part in (vars(config).get("text"), vars(config).get("vision")) if part is not None]
    body = config if "embed_dim" in vars(config) else towers[0]
    dim, layers = body.embed_dim, vars(body).get("num_layers", 4)
    heads = next((n for n in (6, 4, 3, 2) if dim % n == 0), 1)
    batch = {"input_ids": (rows, length)}

    def decoder(hidden_dim: int, num_layers: int) -> Any:
        return gpt2(
            embed_dim=dim,
            num_layers=num_layers,
            num_heads=heads,
            hidden_dim=hidden_dim,
            max_length=length,
            vocab_size=vocab_size if config.vocab_size is not None else 128,
        )

    while True:  # FLOPs are linear in the MLP's width
        narrow, wide = (gradient_flops(decoder(width, layers), batch) for width in (dim, 2 * dim))
        hidden_dim = round(dim * (1 + (flops - narrow) / (wide - narrow)) / 8) * 8
        if hidden_dim > 8 * dim:
            layers += 1
        elif hidden_dim < dim and layers > 1:
            layers -= 1
        else:
            return decoder(max(hidden_dim, 8), layers), batch


def inputs_of(shapes: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> dict[str, Any]:
    """Arrays of these shapes, with numbers that suit their names."""
    import jax
    import jax.numpy as jnp

    arrays = {}
    for number, (name, shape) in enumerate(shapes.items()):
        key = jax.random.key(number)
        if name.endswith("mask"):
            arrays[name] = jnp.ones(shape, jnp.int32)
        elif name.endswith("ids"):
            arrays[name] = jax.random.randint(key, shape, 0, vocab_size or 2)
        else:
            arrays[name] = jax.random.normal(key, shape)
    return arrays


def graph(config: Any, shapes: Any) -> tuple[Any, Any, dict[str, Any], Any]:
    """Graph definition, parameter shapes, a batch with labels, and the objective."""
    import jax
    import jax.numpy as jnp

    from llmlab.nn.module import merge

    graphdef, params, axes = config.abstract()
    batch = inputs_of(shapes, config.vocab_size)
    output = jax.eval_shape(lambda params, batch: merge(graphdef, params)(**batch), params, batch)
    logits = vars(output).get("logits")
    if logits is not None:
        batch["labels"] = jax.random.randint(jax.random.key(99), logits.shape[:-1], 0, logits.shape[-1], jnp.int32)
    return graphdef, params, batch, axes


def objective() -> Any:
    """Cross-entropy of whatever the model scores."""
    from llmlab.objectives import LossParts, Objective
    from llmlab.objectives.cross_entropy import chunked_cross_entropy

    class Scores(Objective):
        def loss(self, model: Any, batch: Any, *, key: Any = None) -> LossParts:
            import jax.numpy as jnp

            if "labels" not in batch or batch["labels"].ndim == 1:  # a class, a pair, or a tower without a loss
                output, count = model(**batch), self.count(batch)
                loss = vars(output).get("loss")
                if loss is None:
                    loss = jnp.mean(jnp.square(output.last_hidden_state.astype(jnp.float32)))
                return LossParts(total=loss * count, count=count, metrics={})
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            hidden = model.hidden_states(**inputs)
            parts = chunked_cross_entropy(hidden.states, model.project, batch["labels"])
            return parts.plus(model.auxiliary_losses(hidden.auxiliary))

        def count(self, batch: Any) -> Any:
            import jax.numpy as jnp

            return jnp.asarray(batch["labels"].size if "labels" in batch else 1, jnp.float32)

    return Scores()


def gradient_flops(config: Any, shapes: Any) -> int:
    """Matmul FLOPs of loss and gradient, counted in the program."""
    import jax

    from llmlab.nn.module import merge
    from llmlab.plan.cost import count

    graphdef, params, batch, _ = graph(config, shapes)

    def loss(params: Any, batch: Any) -> Any:
        return objective().loss(merge(graphdef, params), batch).total

    return count(jax.value_and_grad(loss), params, batch).matmul_flops


def prepared(config: Any, shapes: Any, clock: Callable[[], float]) -> Side:
    """The step of a config, with its state."""
    import jax
    from flax import nnx

    from llmlab.nn.module import split
    from llmlab.optim import AdamW, Constant
    from llmlab.training.state import initialise
    from llmlab.training.step import make_train_step

    graphdef, _, batch, axes = graph(config, shapes)
    optimizer = AdamW(peak_lr=3e-4, schedule=Constant()).build(axes, total_steps=1000)
    state = initialise(lambda key: split(config.build(nnx.Rngs(params=key)))[1], optimizer, seed=0)
    run = make_train_step(graphdef, objective(), optimizer)

    def step() -> float:
        nonlocal state
        start = clock()
        state, metrics = run(state, batch)
        jax.block_until_ready((state, metrics))
        return clock() - start

    return Side(config, gradient_flops(config, shapes), step)


def trace(side: Side, directory: Path) -> None:
    """Five steps under jax's profiler."""
    import jax

    with jax.profiler.trace(str(directory)):
        for _ in range(5):
            side.step()


if __name__ == "__main__":
    main()

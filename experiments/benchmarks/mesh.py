"""What does the mesh cost?

Claims   The machinery of meshes costs one device less than 2% of a step; eight simulated devices on the same cores add
         no more than 10% to one device's time for the same work.
Command  python experiments/benchmarks/mesh.py
Cost     7 minutes on 2 CPU cores
Result   both hold on 2 cores of an AMD EPYC: 1.01 (0.98 to 1.07), and 1.02 (0.96 to 1.06) with fsdp=8; data=8, whose
         devices do more work, 1.10 (1.02 to 1.15). On Sapphire Rapids, where memory was not kept yet, eight devices
         took 1.2 to 1.3 times one device's time (results/mesh_cpu.md)

Programs of the same step take turns, in another order each time, in one process that has eight simulated CPU devices
(the cores are the same for all of them):

    plain      no mesh at all: nothing is placed, nothing constrained
    one        a mesh of one device, as `llmlab train` has it on a laptop
    fsdp=8     every device has an eighth of the rows and of the training state (ZeRO-3)
    data=8     every device has an eighth of the rows and all of the state, so that the update is computed eight times
    gradient   loss and gradient alone, on one device
    shares     the same of an eighth of the rows on each device, nothing summed: what the model itself costs there

The shape is that of train_step.py: GPT-2, 6 layers, width 384, 6 heads, vocabulary 8,192, 8 rows of 256 tokens, float32
AdamW. Memory that a step frees is kept, as `llmlab train` has it on a CPU; with GLIBC_TUNABLES= before the command,
malloc stays as it is. A ratio is the geometric mean over turns with its 95% interval (BCa bootstrap); "processor" is
the same of the seconds that the cores worked, which other guests of the machine hardly touch. --mesh takes the place of
the two meshes: --mesh fsdp=4,tensor=2.
"""

import argparse
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 6, "dim": 384, "heads": 6, "vocab": 8192, "seq": 256, "batch": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=30, help="steps of each program (30)")
    parser.add_argument("--accumulation", type=int, default=1, help="parts of the batch, which a pipeline needs (1)")
    parser.add_argument("--mesh", action="append", help="axes of a mesh of up to eight devices; may be given again")
    parser.add_argument("--json", action="store_true", help="print a JSON line alone")
    return parser.parse_args()


def main() -> None:
    """Prints the ratios."""
    args = parse()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    import jax

    from llmlab.sharding import Mesh
    from llmlab.training import host_memory

    host_memory.keep(os.environ)
    programs = {"plain": plain(args), "one": on_mesh(args, Mesh().build(jax.devices()[:1]))}
    for axes in args.mesh or ["fsdp=8", "data=8"]:
        sizes: dict[str, Any] = {name: int(size) for name, size in (part.split("=") for part in axes.split(","))}
        many = Mesh(**{"data": 1, **sizes})
        programs[axes] = on_mesh(args, many.build(jax.devices()[: many.num_devices]))
    programs |= {"gradient": gradients(args, 1), "shares": gradients(args, 8)}

    wall, processor = measure(programs, args.rounds)
    pairs = dict.fromkeys(programs, "one") | {"one": "plain", "shares": "gradient"}
    del pairs["plain"], pairs["gradient"]
    result = {
        "milliseconds": {name: round(1e3 * statistics.median(values), 1) for name, values in wall.items()},
        "fastest": {name: round(1e3 * min(values), 1) for name, values in wall.items()},
        **{f"{name} / {base}": ratio(wall[name], wall[base]) for name, base in pairs.items()},
        "processor": {f"{name} / {base}": ratio(processor[name], processor[base]) for name, base in pairs.items()},
    }
    print(json.dumps(result) if args.json else "\n".join(f"{name:16} {value}" for name, value in result.items()))


def measure(programs: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], ...]:
    """Seconds of the clock and of the cores, of each program's steps."""
    wall: dict[str, list[float]] = {name: [] for name in programs}
    processor: dict[str, list[float]] = {name: [] for name in programs}
    order, shuffler = list(programs), random.Random(0)
    for number in range(rounds + 2):
        shuffler.shuffle(order)  # what ran before leaves caches and memory behind
        for name in order:
            start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
            programs[name]()
            seconds, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            if number >= 2:  # the first ones compile and warm the caches
                wall[name].append(seconds)
                processor[name].append(now.ru_utime - used.ru_utime + now.ru_stime - used.ru_stime)
    return wall, processor


def ratio(values: list[float], base: list[float]) -> dict[str, Any]:
    """The geometric mean of the turns' ratios, and its 95% interval where there are several."""
    import numpy as np

    from llmlab.study.paired import bca_interval

    logs = np.log(values) - np.log(base)
    interval = [round(float(np.exp(bound)), 3) for bound in bca_interval(logs)] if len(values) > 1 else None
    return {"ratio": round(float(np.exp(logs.mean())), 3), "interval": interval}


def model_and_batch(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The config and one random batch on the host."""
    import numpy as np

    from llmlab.models.gpt2 import gpt2

    config = gpt2(
        embed_dim=args.dim, num_layers=args.layers, num_heads=args.heads, max_length=args.seq, vocab_size=args.vocab
    )
    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.seq)).astype(np.int32)
    return config, {"input_ids": tokens, "labels": np.roll(tokens, -1, axis=1)}


def plain(args: argparse.Namespace) -> Callable[[], None]:
    """A step without a mesh."""
    import jax
    from flax import nnx

    from llmlab.nn.module import split
    from llmlab.objectives import NextToken
    from llmlab.optim import AdamW, Constant
    from llmlab.training.state import initialise
    from llmlab.training.step import make_train_step

    config, batch = model_and_batch(args)
    graphdef, _, axes = config.abstract()
    optimizer = AdamW(peak_lr=3e-4, schedule=Constant()).build(axes, total_steps=1000)
    state = initialise(lambda key: split(config.build(nnx.Rngs(params=key)))[1], optimizer, seed=0)
    step = make_train_step(graphdef, NextToken(), optimizer, accumulation=args.accumulation)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def on_mesh(args: argparse.Namespace, placement: Any) -> Callable[[], None]:
    """A step on a mesh."""
    import jax

    from llmlab.objectives import NextToken
    from llmlab.optim import AdamW, Constant
    from llmlab.training.config import Train
    from llmlab.training.program import Program

    config, batch = model_and_batch(args)
    train = Train(steps=1000, batch_size=args.batch, sequence_length=args.seq, accumulation=args.accumulation)
    program = Program.build(config, NextToken(), AdamW(peak_lr=3e-4, schedule=Constant()), placement, train, batch)
    state, placed = program.initialise(None), program.place(batch)

    def run() -> None:
        nonlocal state
        state, metrics = program.train_step(state, placed)
        jax.block_until_ready((state, metrics))

    return run


def gradients(args: argparse.Namespace, num_devices: int) -> Callable[[], None]:
    """Loss and gradient of each device's share of the rows; each keeps its own."""
    import jax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from llmlab.nn.module import merge, split
    from llmlab.objectives import NextToken

    config, batch = model_and_batch(args)
    graphdef, params = split(config.build(nnx.Rngs(params=0)))
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("data",), devices=devices, axis_types=(AxisType.Auto,))
    whole, rows = PartitionSpec(), PartitionSpec("data")

    def share(params: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda params: NextToken().loss(merge(graphdef, params), batch).total)(params)
        return jax.tree.map(lambda leaf: leaf[None], gradient)

    mapped = jax.jit(jax.shard_map(share, mesh=mesh, in_specs=(whole, rows), out_specs=rows, check_vma=False))
    placed = jax.device_put((params, batch), (NamedSharding(mesh, whole), NamedSharding(mesh, rows)))
    return lambda: jax.block_until_ready(mapped(*placed))


if __name__ == "__main__":
    main()

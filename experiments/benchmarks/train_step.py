"""How fast is the train step that `llmlab train` runs, against PyTorch?

Claim    At least PyTorch eager's tokens/s on 2 CPU cores, for the GPT-2 and the Llama shape.
Command  python experiments/benchmarks/train_step.py --shape gpt2 --compare PATH/TO/torch_train_step.py
Cost     1 minute a shape on 2 CPU cores

Prints one JSON line with --json: {"framework", "shape", "params", "tokens_per_second", "step_seconds",
"model_gflops_per_second"}. Model FLOPs per token = 6 * parameters (a tied table once) + 12 * layers * embed_dim *
sequence (full, not causal, attention). The step is float32 AdamW on one fixed random batch; every step is waited for.

--compare runs the peer's script, which takes the same flags and prints the same JSON line, and this one in turns
(ours, theirs, ours, theirs...) in processes of their own, and prints the ratio of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE_FLAGS = {"layers": 6, "dim": 384, "heads": 6, "kv_heads": 0, "ffn": 0, "vocab": 8192, "seq": 256, "batch": 8}


def parse() -> argparse.Namespace:
    """The peer's flags, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("gpt2", "llama"), default="gpt2")
    for name, default in {**SHAPE_FLAGS, "steps": 10, "threads": 2}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for a GPU")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--compile", action="store_true", help="the peer's flag; this side always compiles")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--compare", type=Path, metavar="SCRIPT", help="the peer's script, run in turns with this one")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side under --compare")
    return parser.parse_args()


def model_config(args: argparse.Namespace) -> Any:
    """The model that the flags describe."""
    from llmlab.models.config import Tied
    from llmlab.models.gpt2 import gpt2
    from llmlab.models.llama import llama

    if args.shape == "gpt2":
        return gpt2(
            embed_dim=args.dim, num_layers=args.layers, num_heads=args.heads, max_length=args.seq, vocab_size=args.vocab
        )
    return llama(
        embed_dim=args.dim,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads or None,
        hidden_dim=args.ffn or 4 * args.dim,
        vocab_size=args.vocab,
        head=Tied(),
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the framework's train step on the shape that the flags describe; the peer's JSON fields."""
    if args.device == "cpu":
        # jax reads these when it starts: this many threads, and no looking for other devices
        os.environ["JAX_PLATFORMS"] = "cpu"
        threads = "--xla_cpu_multi_thread_eigen=true" if args.threads > 1 else "--xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {threads}".strip()
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    from flax import nnx

    from llmlab.nn.module import num_parameters, split
    from llmlab.objectives import NextToken
    from llmlab.optim import AdamW, Constant
    from llmlab.training.state import initialise
    from llmlab.training.step import make_train_step

    config = model_config(args)
    graphdef, shapes, axes = config.abstract()
    optimizer = AdamW(peak_lr=3e-4, schedule=Constant()).build(axes, total_steps=1000)
    state = initialise(
        lambda key: split(config.build(nnx.Rngs(params=key)))[1], optimizer, seed=0, precision=args.dtype
    )
    step = make_train_step(graphdef, NextToken(), optimizer, precision=args.dtype)
    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.seq), 0, args.vocab)
    batch = {"input_ids": tokens, "labels": jax.numpy.roll(tokens, -1, axis=1)}
    for _ in range(3):
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        float(metrics["train/loss"])
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    num_params = num_parameters(shapes)
    tokens_per_second = args.batch * args.seq / median
    flops_per_token = 6 * num_params + 12 * args.layers * args.dim * args.seq
    return {
        "framework": f"llmlab-jax-{jax.__version__}",
        "shape": args.shape,
        "params": num_params,
        "tokens_per_second": round(tokens_per_second, 1),
        "step_seconds": round(median, 4),
        "model_gflops_per_second": round(flops_per_token * tokens_per_second / 1e9, 1),
    }


def compare(args: argparse.Namespace) -> None:
    """Run both sides in turns, each in a process of its own, and print the ratio of medians."""
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in (*SHAPE_FLAGS, "steps", "threads")]
    flags += [f"--shape={args.shape}", f"--device={args.device}", f"--dtype={args.dtype}"]
    flags += ["--compile"] if args.compile else []
    commands = {
        "llmlab": [sys.executable, __file__, *flags, "--json"],
        "peer": [args.peer_python, str(args.compare), *flags],
    }
    rates: dict[str, list[float]] = {"llmlab": [], "peer": []}
    memory: dict[str, float] = {}
    for turn in range(args.rounds):
        for side, command in commands.items():
            result, peak = run(command)
            rates[side].append(result["tokens_per_second"])
            memory[side] = max(memory.get(side, 0.0), peak)
            print(f"turn {turn + 1}  {side:7} {json.dumps(result)}  peak resident {peak:.0f} MiB", flush=True)
    ours, theirs = (statistics.median(rates[side]) for side in ("llmlab", "peer"))
    print(f"ratio of medians, tokens/s llmlab / peer: {ours / theirs:.3f}")
    print(f"peak resident memory llmlab / peer: {memory['llmlab'] / memory['peer']:.3f}")


def run(command: list[str]) -> tuple[dict[str, Any], float]:
    """The JSON line that a command prints, and its own peak resident memory in MiB."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)  # and not wait(): only this tells one child's memory
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
        output.seek(0)
        return json.loads(output.read().strip().splitlines()[-1]), usage.ru_maxrss / 1024


def main() -> None:
    """Measure, or compare with the peer."""
    args = parse()
    if args.compare is not None:
        compare(args)
        return
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:24} {value}")


if __name__ == "__main__":
    main()

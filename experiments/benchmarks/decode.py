"""How fast is decoding, against the peer and against what the machine allows?

Claim    At batch 1 and at batch 16 at least 2.5 times the new tokens/s of transformers' generate() on 2 CPU cores, for
         a Llama shape in float32; on a GPU at least 60% of the memory-bandwidth roofline at batch 1, for a Llama of 1.2
         billion parameters in bfloat16.
Command  python experiments/benchmarks/decode.py --peer PATH/TO/torch_generate.py
         python experiments/benchmarks/decode.py --preset 1b --device gpu
Result   on 2 EPYC cores without AVX-512 4.3 times at batch 1 and 2.7 at batch 16 with kernels that need a C++ compiler,
         without one 3.0 and 1.8 (results/decode_cpu.md). On an H100 60% of the roofline, to within what two runs
         differ by (results/decode_gpu.md)
Cost     5 minutes on 2 CPU cores with the peer; 3 minutes on a GPU, most of it compilation

Greedy, no early stop, through the call that users make (`generate_ids`). Rates are as the peer counts them: rows times
new tokens over the time of the whole call, the prompt's pass included. Beside them

    first token   from the call to the first token of every row on the host, compiled before
    step          (whole call - first token) / (new tokens - 1)
    floor         bytes that a step must read at least, over the bandwidth that a program of this process measures here:
                  every weight of a matmul once, and the keys and values of the positions so far, halfway through
    of roofline   floor / step

--peer runs the peer's script, which takes the same flags and prints one JSON line with "new_tokens_per_second", and
this one in turns, in processes of their own; the ratio is that of the medians. --beside adds lines without a peer:
other dtypes of the weights, and after a colon of keys and values. LLMLAB_CPU_KERNELS=0 measures without the kernels for
CPUs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

SHAPE_FLAGS = {"layers": 6, "dim": 384, "heads": 6, "kv_heads": 0, "ffn": 0, "vocab": 8192}
RUN_FLAGS = {"prompt": 64, "new_tokens": 128, "repeats": 3, "threads": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "small": {"batch": [1, 16], "dtype": "float32", "beside": ["bfloat16", "float32:bfloat16", "float32:int8"]},
    "1b": {"batch": [1], "dtype": "bfloat16", "beside": ["bfloat16:int8"]},
}


def parse() -> argparse.Namespace:
    """The peer's flags, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="small", help="small is what the shape flags say")
    for name, default in {**SHAPE_FLAGS, **RUN_FLAGS}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--batch", type=int, nargs="+", help="rows; several for several lines")
    parser.add_argument("--dtype", help="of the weights (float32); with :int8, say, also of keys and values")
    parser.add_argument("--beside", nargs="*", metavar="DTYPE", help="dtypes of further lines")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--peer", type=Path, metavar="SCRIPT", help="the peer's script, run in turns with this one")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--json", action="store_true", help="print JSON lines alone")
    parser.add_argument("--here", action="store_true", help="measure one line in this process, without turns")
    args = parser.parse_args()
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    """Prints a line for every batch size and dtype."""
    args = parse()
    if args.here:
        print(json.dumps(measure(args)))
        return
    lines = [(batch, args.dtype, args.peer) for batch in args.batch]
    lines += [(batch, dtype, None) for dtype in args.beside for batch in args.batch]
    for batch, dtype, peer in lines:
        line = in_turns(args, batch, dtype, peer)
        print(json.dumps(line) if args.json else shown(line), flush=True)


def in_turns(args: argparse.Namespace, batch: int, dtype: str, peer: Path | None) -> dict[str, Any]:
    """Medians of one line, of turns in processes of their own."""
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in (*SHAPE_FLAGS, *RUN_FLAGS)]
    flags += [f"--batch={batch}", f"--dtype={dtype}"]
    own = [f"--preset={args.preset}", f"--device={args.device}", "--here"]
    commands = {"llmlab": [sys.executable, __file__, *flags, *own]}
    if peer is not None:
        device = {"gpu": "cuda"}.get(args.device, args.device)
        commands["peer"] = [args.peer_python, str(peer), *flags, f"--device={device}"]
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in commands}
    for _ in range(args.rounds):
        for side, command in commands.items():
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            results[side].append(json.loads(output.strip().splitlines()[-1]))
    line = {name: middle([result[name] for result in results["llmlab"]]) for name in results["llmlab"][0]}
    if peer is not None:
        rates = [result["new_tokens_per_second"] for result in results["peer"]]
        line |= {"peer": results["peer"][0]["framework"], "peer_new_tokens_per_second": middle(rates)}
        line["ratio"] = line["new_tokens_per_second"] / line["peer_new_tokens_per_second"]
    return line


def middle(values: list[Any]) -> Any:
    """The median of numbers that differ from turn to turn; what does not differ, itself."""
    return statistics.median(values) if isinstance(values[0], float) else values[0]


def shown(line: dict[str, Any]) -> str:
    """A line of the table."""
    text = (
        f"batch {line['batch']:3}  {line['dtype']:16}  {line['new_tokens_per_second']:8.1f} new tokens/s  "
        f"first token {line['first_token_ms']:7.2f} ms  step {line['step_ms']:6.3f} ms  "
        f"floor {line['floor_ms']:6.3f} ms ({line['step_bytes'] / 1e6:.1f} MB at {line['bandwidth_gb_s']:.1f} GB/s)  "
        f"{line['roofline']:.0%} of roofline"
    )
    if "ratio" in line:
        text += f"  peer {line['peer_new_tokens_per_second']:8.1f}  ratio {line['ratio']:.2f}"
    return f"{text}  [{line['device']}, {line['versions']}]"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One line, in this process."""
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    import jax
    import numpy as np

    from llmlab.infer.generate import generate_ids
    from llmlab.infer.sampling import Sampling

    batch = args.batch[0]
    dtype, _, stored = args.dtype.partition(":")
    cache_dtype = np.dtype(stored or dtype)  # bfloat16 is a name of jax's
    model, weight_bytes = build(args, dtype)
    prompts = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, args.prompt)).tolist()

    def run() -> tuple[float, float]:
        """Seconds to the first token of every row, and to the last."""
        start = time.perf_counter()
        tokens = generate_ids(
            model, prompts, max_new_tokens=args.new_tokens, sampling=Sampling(temperature=0), cache_dtype=cache_dtype
        )
        next(tokens)
        first = time.perf_counter() - start
        count = 1 + sum(1 for _ in tokens)
        assert count == args.new_tokens, f"{count} tokens of {args.new_tokens}"
        return first, time.perf_counter() - start

    run()
    runs = [run() for _ in range(args.repeats)]
    first, whole = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    step = statistics.median((last - first) / (args.new_tokens - 1) for first, last in runs)
    positions = batch * (args.prompt + args.new_tokens // 2)
    step_bytes = weight_bytes + positions * position_bytes(model.config, cache_dtype.itemsize)
    bandwidth = read_bandwidth(weight_bytes)
    device = jax.devices()[0]
    return {
        "framework": f"llmlab-jax-{jax.__version__}",
        "device": processor() if args.device == "cpu" else device.device_kind,
        "versions": f"jax {jax.__version__}, jaxlib {metadata.version('jaxlib')}, Python {platform.python_version()}",
        "batch": batch,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "dtype": args.dtype,
        "new_tokens_per_second": batch * args.new_tokens / whole,
        "first_token_ms": 1e3 * first,
        "step_ms": 1e3 * step,
        "step_bytes": step_bytes,
        "bandwidth_gb_s": bandwidth / 1e9,
        "floor_ms": 1e3 * step_bytes / bandwidth,
        "roofline": step_bytes / bandwidth / step,
    }


def build(args: argparse.Namespace, dtype: str) -> tuple[Any, int]:
    """The model with random weights, and the bytes of those that every step reads."""
    import jax
    from flax import nnx

    from llmlab.models.config import Tied
    from llmlab.models.llama import PRESETS as LLAMAS
    from llmlab.models.llama import llama
    from llmlab.nn.module import merge, split

    if args.preset == "1b":
        config = LLAMAS["llama-1b"]
    else:
        config = llama(
            embed_dim=args.dim,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads or None,
            hidden_dim=args.ffn or 4 * args.dim,
            vocab_size=args.vocab,
        )
    graphdef = config.abstract()[0]

    @jax.jit
    def draw(key: jax.Array) -> Any:
        params = split(config.build(nnx.Rngs(params=key)))[1]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    params = draw(jax.random.key(0))
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not isinstance(config.head, Tied):  # of a table that is not the head, a step reads one row for each of the batch
        read -= params["embedding"]["tokens"]["table"].nbytes
    return merge(graphdef, params), read


def position_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one position, all layers, without the scales of an int8 cache."""
    mixers = [block.mixer for block in config.layers()]
    heads = [(mixer.num_kv_heads or mixer.num_heads) * mixer.resolved_head_dim(config.embed_dim) for mixer in mixers]
    return 2 * itemsize * sum(heads)


def processor() -> str:
    """Name of this machine's processor, as far as it is known, and the cores in use."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def read_bandwidth(num_bytes: int) -> float:
    """Bytes/s at which the device reads an array of this size, the best of several times.

    On CPU the array stays where the weights would (in the last-level cache, if they fit), and one thread a core reads
    its share; on accelerators it is a sum of at least 1 GB.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() == "cpu":
        from concurrent.futures import ThreadPoolExecutor

        cores = len(os.sched_getaffinity(0))
        parts = np.array_split(np.ones(num_bytes // 4, np.float32), cores)
        with ThreadPoolExecutor(cores) as pool:
            # a maximum: numpy vectorises it without the pairwise bookkeeping of a sum
            return num_bytes / best_of(lambda: list(pool.map(np.max, parts)))
    num_bytes = max(num_bytes, 2**30)
    array = jnp.ones((num_bytes // 4 // 2048, 2048), jnp.float32)
    total = jax.jit(lambda array: array.sum(axis=1))
    return num_bytes / best_of(lambda: jax.block_until_ready([total(array) for _ in range(5)])) * 5


def best_of(function: Callable[[], object], times: int = 10) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    function()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    main()

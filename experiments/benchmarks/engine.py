"""Does continuous batching pay, and how long does one wait for a first token?

Claim    64 requests of mixed lengths get at least 1.8 times the new tokens/s of static batching.
Command  python experiments/benchmarks/engine.py
Result   4.0 times on 2 CPU cores: results/engine_cpu.md
Cost     5 minutes on 2 CPU cores

Static batching takes the requests in groups of --rows as they come, pads prompts to the longest of the group and
decodes until the longest has all its tokens (`generate_ids`); the tokens that a request did not ask for do not count.
The engine gets all requests at once. Lengths are what users' are like, many short and some long: exponential, with the
means --prompt and --new, at most four times that and at least 4; the same for both sides. Greedy, no early end. Both
sides are compiled before; medians of --repeats turns (static, engine, static...).

The time to the first token is measured from submission to the event: of all requests at once, where those that wait for
a row wait long whatever the engine does, and under load, where requests come as a Poisson process at --load of the rate
at which the engine served them before.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHAPE_FLAGS = {"layers": 6, "dim": 384, "heads": 6, "kv_heads": 0, "ffn": 0, "vocab": 8192}
RUN_FLAGS = {"requests": 64, "rows": 16, "prompt": 96, "new": 96, "seed": 0, "repeats": 3, "threads": 2}


def parse() -> argparse.Namespace:
    """Shape, requests, engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**SHAPE_FLAGS, **RUN_FLAGS}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--steps", type=int, nargs="+", default=[8], help="steps_per_call; several for several lines")
    parser.add_argument("--load", type=float, default=0.7, help="arrivals under load, as a share of the served rate")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--cache", choices=("float32", "bfloat16", "int8"), help="of keys and values; as the weights")
    parser.add_argument("--deterministic", action="store_true", help="the engine's deterministic mode")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--json", action="store_true", help="print JSON lines alone")
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Work:
    """What is asked: prompts, and how many tokens each is to be continued by."""

    prompts: list[tuple[int, ...]]
    new: list[int]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Work":
        """The requests that the flags describe."""
        import numpy as np

        rng = np.random.default_rng(args.seed)

        def lengths(mean: int) -> list[int]:
            return np.clip(rng.exponential(mean, args.requests), 4, 4 * mean).astype(int).tolist()

        prompts = [tuple(rng.integers(1, args.vocab, length).tolist()) for length in lengths(args.prompt)]
        return cls(prompts, lengths(args.new))


def main() -> None:
    """Prints a line for every number of steps."""
    args = parse()
    if args.device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    work, model = Work.of(args), build(args)
    engines = [served(args, model, steps) for steps in args.steps]
    static(args, model, work)
    for engine in engines:
        at_once(engine, work)
    rounds = [(static(args, model, work), [at_once(engine, work) for engine in engines]) for _ in range(args.repeats)]
    of_static = statistics.median(seconds for seconds, _ in rounds)
    for number, (steps, engine) in enumerate(zip(args.steps, engines, strict=True)):
        seconds, first = zip(*(of_engines[number] for _, of_engines in rounds), strict=True)
        of_engine = statistics.median(seconds)
        rate = args.load * args.requests / of_engine
        line = conditions(args, work) | {
            "steps_per_call": steps,
            "static_tokens_per_second": sum(work.new) / of_static,
            "engine_tokens_per_second": sum(work.new) / of_engine,
            "ratio": of_static / of_engine,
            "at_once_first_token_ms": quantiles(first[len(first) // 2]),
            "requests_per_second_under_load": rate,
            "under_load_first_token_ms": quantiles(under_load(engine, work, rate, args.seed)),
        }
        print(json.dumps(line) if args.json else shown(line), flush=True)
        engine.close()


def conditions(args: argparse.Namespace, work: Work) -> dict[str, Any]:
    """What a line holds for."""
    import jax

    device = platform.processor() or platform.machine() if args.device == "cpu" else jax.devices()[0].device_kind
    return {
        "device": device,
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
        "dtype": args.dtype,
        "cache": args.cache or args.dtype,
        "deterministic": args.deterministic,
        "rows": args.rows,
        "prompt_tokens": sum(map(len, work.prompts)),
        "new_tokens": sum(work.new),
    }


def shown(line: dict[str, Any]) -> str:
    """A line of the table."""
    load, once = line["under_load_first_token_ms"], line["at_once_first_token_ms"]
    return (
        f"{line['rows']} rows, {line['steps_per_call']:2} steps a call, cache {line['cache']}"
        f"{', deterministic' if line['deterministic'] else ''}: "
        f"static {line['static_tokens_per_second']:7.1f} new tokens/s, engine {line['engine_tokens_per_second']:7.1f}, "
        f"ratio {line['ratio']:.2f}; first token at once p50 {once['p50']:.0f} ms, p99 {once['p99']:.0f} ms, "
        f"at {line['requests_per_second_under_load']:.2f} requests/s p50 {load['p50']:.0f} ms, p99 {load['p99']:.0f} ms"
        f"  [{line['device']}, {line['versions']}]"
    )


def build(args: argparse.Namespace) -> Any:
    """A Llama with random weights."""
    import jax
    from flax import nnx

    from llmlab.models.llama import llama
    from llmlab.nn.module import merge, split

    config = llama(
        embed_dim=args.dim,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads or None,
        hidden_dim=args.ffn or 4 * args.dim,
        vocab_size=args.vocab,
    )

    @jax.jit
    def draw(key: jax.Array) -> Any:
        params = split(config.build(nnx.Rngs(params=key)))[1]
        return jax.tree.map(lambda leaf: leaf.astype(args.dtype), params)

    return merge(config.abstract()[0], draw(jax.random.key(0)))


def tokenizer(vocab_size: int) -> Any:
    """One of that size, trained on the code that runs this: the engine spells what it writes."""
    from llmlab.tokenizers import ByteLevelBPE

    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return ByteLevelBPE(vocab_size=vocab_size).build(lambda: (file.read_text("utf-8", "replace") for file in files))


def served(args: argparse.Namespace, model: Any, steps: int) -> Any:
    """An engine that was started, all its programs compiled."""
    from llmlab.infer.engine.config import EngineConfig
    from llmlab.infer.engine.engine import Engine

    config = EngineConfig(
        max_rows=args.rows,
        max_length=4 * (args.prompt + args.new),
        prefill_chunk=128,
        steps_per_call=steps,
        prefix_caching=False,  # the same requests are served again and again
        cache_dtype=args.cache,
        deterministic=args.deterministic,
    )
    engine = Engine(model, tokenizer(args.vocab), config)
    engine.warm_up()
    engine.start()
    return engine


def static(args: argparse.Namespace, model: Any, work: Work) -> float:
    """Seconds of static batching."""
    from llmlab.infer.generate import generate_ids
    from llmlab.infer.sampling import GREEDY

    start = time.perf_counter()
    for first in range(0, args.requests, args.rows):
        prompts, new = work.prompts[first : first + args.rows], work.new[first : first + args.rows]
        for _ in generate_ids(model, prompts, max_new_tokens=max(new), sampling=GREEDY):
            pass
    return time.perf_counter() - start


def at_once(engine: Any, work: Work) -> tuple[float, list[float]]:
    """Seconds of the engine for all requests, and until the first token of each."""
    start = time.perf_counter()
    waits = [_submit(engine, prompt, new) for prompt, new in zip(work.prompts, work.new, strict=True)]
    for handle, _ in waits:
        (reply,) = handle.replies()
        assert reply.finish_reason == "length", reply
    return time.perf_counter() - start, [first[0] for _, first in waits]


def under_load(engine: Any, work: Work, rate: float, seed: int) -> list[float]:
    """Seconds until the first token, of requests that come at this rate."""
    import numpy as np

    pauses = np.random.default_rng(seed + 1).exponential(1 / rate, len(work.prompts))
    waits, due = [], time.perf_counter()
    for prompt, new, pause in zip(work.prompts, work.new, pauses, strict=True):
        due += pause
        time.sleep(max(0.0, due - time.perf_counter()))
        waits.append(_submit(engine, prompt, new))
    for handle, _ in waits:
        handle.replies()
    return [first[0] for _, first in waits]


def _submit(engine: Any, prompt: tuple[int, ...], new: int) -> tuple[Any, list[float]]:
    """The handle, and a list that gets the seconds to the first token."""
    from llmlab.infer.engine.request import Request
    from llmlab.infer.sampling import GREEDY

    first: list[float] = []
    start = time.perf_counter()
    handle = engine.submit(Request(prompt, sampling=GREEDY, max_new_tokens=new, stop_at_eos=False))
    handle.on_event(lambda _: first.append(time.perf_counter() - start) if not first else None)
    return handle, first


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    import numpy as np

    return {name: 1e3 * float(np.quantile(seconds, q)) for name, q in (("p50", 0.5), ("p99", 0.99))}


if __name__ == "__main__":
    main()

"""Do 200 streaming clients at once each get the reply that they would get alone?

Claim    No stream is lost or mixed with another, memory is flat, and every block comes back, while clients come and go.
Command  python experiments/benchmarks/serve_load.py
Cost     200 clients for 120 s, and the solo replies before, on 2 CPU cores

Before the load every request is sent alone, in deterministic mode, and its reply is kept. Then the clients send them in
random order, all at once, for the time given; one in four hangs up in the middle of the stream or before it. Each
reply must be, to the character, the solo reply (or, of a client that hung up, a beginning of it), with the finish
reason and the counts of tokens of the solo reply. Prompts share beginnings, so prefixes are found; some ask for two
samples, log-probabilities or a stop string; all together they need more blocks than there are, so samples are
preempted.

At the end nobody is inside, every block is free, and the resident memory of the second half of the time is that of the
first within a few per cent. Exits with 1 where any of this is not so.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

WORDS = ("the", "a", "of", "to", "and", "in", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")


@dataclass(frozen=True)
class Reply:
    """What one request got: per choice its text, its reason and its log-probabilities; and the counts of tokens."""

    texts: tuple[str, ...]
    reasons: tuple[str | None, ...]
    logprobs: tuple[tuple[float, ...], ...]
    usage: tuple[int, int] | None


@dataclass
class Tally:
    """What happened under load."""

    whole: int = 0
    hung_up: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    """Seconds to the first text of whole replies."""
    tokens: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the load and prints what came of it, as JSON."""
    arguments = _parser().parse_args(argv)
    from llmlab.infer.engine.engine import Engine
    from llmlab.infer.server.app import make_service
    from llmlab.infer.server.config import ServerConfig
    from llmlab.infer.server.serving import Server, listen, url_of

    model, tokenizer = _model()
    config = ServerConfig(name="load", port=0, max_concurrent=4 * arguments.clients + 16)
    requests = _requests(arguments.requests, random.Random(arguments.seed))
    with Engine(model, tokenizer, _engine_config(arguments)) as engine, listen(config) as listening:
        service = make_service(config, tokenizer, engine)
        server = Server(service)
        thread = threading.Thread(target=server.serve_on, args=(listening,))
        thread.start()
        port = int(url_of(listening).rpartition(":")[2])
        try:
            result = asyncio.run(_load(port, requests, arguments))
            end = time.monotonic() + 10
            while time.monotonic() < end and (service.gate.inside or engine.stats().running or engine.stats().waiting):
                time.sleep(0.05)
        finally:
            server.should_exit = True
            thread.join()
        stats = engine.stats()
    result |= {
        "inside at the end": service.gate.inside,
        "blocks": stats.blocks_total,
        "blocks free at the end": stats.blocks_free,
        "preemptions": stats.preemptions,
        "prefix hit tokens": stats.prefix_hit_tokens,
        "finished": dict(stats.finished),
    }
    print(json.dumps(result, indent=2))
    return _verdict(result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=200, help="clients at one time (200)")
    parser.add_argument("--seconds", type=float, default=120.0, help="length of the load (120)")
    parser.add_argument("--requests", type=int, default=60, help="different requests (60)")
    parser.add_argument("--rows", type=int, default=16, help="samples that are decoded at once (16)")
    parser.add_argument("--blocks", type=int, default=64, help="blocks of 16 positions (64)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and of who hangs up when (0)")
    return parser


def _model() -> tuple[Any, Any]:
    """A small decoder whose embeddings have unit size, so that what it writes depends on what it was given."""
    from flax import nnx

    from llmlab.models.llama import llama
    from llmlab.tokenizers import Bytes

    config = llama(embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=128, vocab_size=259)
    return replace(config, embedding_std=1.0).build(nnx.Rngs(params=0)), Bytes().build()


def _engine_config(arguments: argparse.Namespace) -> Any:
    from llmlab.infer.engine.config import EngineConfig

    return EngineConfig(
        num_blocks=arguments.blocks,
        max_rows=arguments.rows,
        max_length=192,
        prefill_chunk=32,
        deterministic=True,
        max_waiting=4 * arguments.clients + 16,
    )


def _requests(count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Bodies of all kinds; a third of the prompts begin alike."""
    bodies: list[dict[str, Any]] = []
    shared = "this is a beginning that many requests have in common, and "
    for number in range(count):
        prompt = (shared if number % 3 == 0 else "") + " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))
        body: dict[str, Any] = {
            **{"prompt": prompt, "max_tokens": chance.randint(4, 80), "seed": number, "ignore_eos": True},
            **{"temperature": chance.choice([0, 0.7, 1.0]), "stream": True, "stream_options": {"include_usage": True}},
        }
        if number % 5 == 0:
            body["n"] = 2
        if number % 7 == 0:
            body["logprobs"] = 1
        if number % 11 == 0:
            body["stop"] = ["e", "\x00"]
        bodies.append(body)
    return bodies


async def _load(port: int, requests: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    solo = []
    for body in requests:
        reply, _ = await _ask(port, body, None)
        assert reply is not None
        solo.append(reply)
    print(f"{len(solo)} solo replies", file=sys.stderr)
    tally, memory = Tally(), []
    start = time.monotonic()
    end = start + arguments.seconds
    clients = [
        asyncio.create_task(_client(port, requests, solo, end, random.Random(arguments.seed * 10_007 + number), tally))
        for number in range(arguments.clients)
    ]
    while time.monotonic() < end:
        await asyncio.sleep(min(1.0, arguments.seconds / 20))
        memory.append(_resident_mib())
    await asyncio.gather(*clients)
    seconds = time.monotonic() - start
    # The first fifth is left out: buffers, connections and the prefix cache fill up.
    settled = memory[len(memory) // 5 :]
    half = len(settled) // 2
    first = sorted(tally.first)
    return {
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "whole replies": tally.whole,
        "hung up": tally.hung_up,
        "wrong": tally.wrong[:5],
        "failed": tally.failed[:5],
        "tokens/s of whole replies": round(tally.tokens / seconds, 1),
        "time to first text, s": {
            name: round(first[min(int(share * len(first)), len(first) - 1)], 3) if first else None
            for name, share in (("p50", 0.5), ("p99", 0.99))
        },
        "resident MiB, first and second half": [
            round(statistics.median(part), 1) for part in (settled[:half], settled[half:])
        ],
    }


async def _client(
    port: int, requests: list[dict[str, Any]], solo: list[Reply], end: float, chance: random.Random, tally: Tally
) -> None:
    """Sends one request after the other until the time is over."""
    while time.monotonic() < end:
        number = chance.randrange(len(requests))
        leave_after = chance.randint(0, 8) if chance.random() < 0.25 else None
        try:
            reply, first = await _ask(port, requests[number], leave_after)
        except Exception as error:  # whatever it is, it is counted and shown
            tally.failed.append(f"request {number}: {type(error).__name__}: {error}")
            continue
        if reply is None:
            tally.hung_up += 1
        elif leave_after is not None and reply.usage is None:
            tally.hung_up += 1
            if not all(whole.startswith(part) for whole, part in zip(solo[number].texts, reply.texts, strict=True)):
                tally.wrong.append(f"request {number}, beginning: {reply.texts} is none of {solo[number].texts}")
        else:
            tally.whole += 1
            tally.first.append(first)
            tally.tokens += reply.usage[1] if reply.usage else 0
            if reply != solo[number]:
                tally.wrong.append(f"request {number}: {reply} is not {solo[number]}")


async def _ask(port: int, body: dict[str, Any], leave_after: int | None) -> tuple[Reply | None, float]:
    """One request on a connection of its own: the reply, and the seconds to its first text.

    Args:
        port: of the server on loopback.
        body: what is asked.
        leave_after: hang up after so many events, 0 before the first; the reply is then what came until there.
    """
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    try:
        writer.write(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        await writer.drain()
        if leave_after == 0:
            return None, 0.0
        status = await reader.readline()
        if b" 200 " not in status:
            raise ValueError((await reader.read()).decode(errors="replace")[-300:])
        return await _read(reader, body.get("n", 1), leave_after, start)
    finally:
        writer.close()


async def _read(
    reader: asyncio.StreamReader, samples: int, leave_after: int | None, start: float
) -> tuple[Reply, float]:
    texts, reasons, logprobs = [""] * samples, [None] * samples, [()] * samples
    usage, first, events, done = None, 0.0, 0, False
    async for line in reader:
        if not line.startswith(b"data: "):
            continue  # headers, sizes of chunks, empty lines
        if line.strip() == b"data: [DONE]":
            done = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            raise ValueError(event["error"]["message"])
        events += 1
        if event["usage"]:
            usage = (event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"])
        for choice in event["choices"]:
            index = choice["index"]
            first = first or (time.monotonic() - start if choice["text"] else 0.0)
            texts[index] += choice["text"]
            reasons[index] = choice["finish_reason"]
            if choice["logprobs"]:
                logprobs[index] += tuple(choice["logprobs"]["token_logprobs"])
        if leave_after is not None and events >= leave_after:
            break
    if leave_after is None and not done:
        raise ValueError("the stream ended before its end")
    return Reply(tuple(texts), tuple(reasons), tuple(logprobs), usage), first


def _resident_mib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status does not tell the resident memory; this script needs Linux")


def _verdict(result: dict[str, Any]) -> int:
    """Says what was not as claimed; the exit code."""
    before, after = result["resident MiB, first and second half"]
    problems = [
        *(["replies differ from the solo replies"] if result["wrong"] else []),
        *(["requests failed"] if result["failed"] else []),
        *(["nobody got a whole reply"] if not result["whole replies"] else []),
        *(["requests are still inside"] if result["inside at the end"] else []),
        *(["blocks did not come back"] if result["blocks free at the end"] != result["blocks"] else []),
        *([f"memory grew from {before} to {after} MiB"] if after > 1.05 * before else []),
    ]
    for problem in problems:
        print(f"NOT AS CLAIMED: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

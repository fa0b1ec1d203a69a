"""`llmlab serve`: a model behind an OpenAI-compatible HTTP server, with a chat page."""

import argparse
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.serve_model import open_model, tell

if TYPE_CHECKING:
    from llmlab.commands.serve_model import Served
    from llmlab.infer.engine.config import EngineConfig
    from llmlab.infer.server.config import ServerConfig

KEY_VARIABLE = "LLMLAB_API_KEY"
DESCRIPTION = f"""\
Serve the model of a run, a checkpoint or a Hugging Face directory over HTTP, as OpenAI's interface has it:
    llmlab serve runs/quickstart-1a2b3c4d
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{{"prompt": "def main(", "max_tokens": 32}}'
Any client of that interface works: OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none"). There are completions,
chat/completions (through the model's own chat template), embeddings and models under /v1, /health and /metrics for
whoever watches, and a chat page at http://127.0.0.1:8000/.

Requests are batched continuously: a new one joins those that are being answered at the next step. Keys and values live
in blocks that requests with the same beginning share. The server listens on 127.0.0.1; to let other machines in, give
--host 0.0.0.0 and a key, in the environment variable {KEY_VARIABLE} rather than on the command line, which every user
of the machine can read. SIGTERM and Ctrl-C finish what is under way first.

Exit codes: 0 after SIGTERM, 130 after Ctrl-C, 2 for a mistake, 1 for a failure.
"""


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab serve`."""
    arguments = _parser().parse_args(argv)
    from llmlab.infer.server.extra import require_serve

    require_serve()
    _logs(arguments.log_requests)
    config = _server_config(arguments)
    engine_config = _engine_config(arguments)

    from llmlab.infer.server.serving import Server, listen, url_of

    start = time.perf_counter()
    with listen(config) as listening:  # before the model is loaded: a port that is taken should not cost minutes
        served = open_model(arguments, config, engine_config)
        try:
            server = Server(served.service, on_drain=_tell_draining)
            _announce(url_of(listening), served, start)
            server.serve_on(listening)
        finally:
            served.close()
    return 130 if server.stopped_by is signal.SIGINT else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmlab serve",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="PATH", help="a run, a checkpoint or a Hugging Face directory")
    parser.add_argument("--name", help="what clients call the model (the directory's name)")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja file instead of the model's own")
    _add_network(parser.add_argument_group("network"))
    _add_engine(parser.add_argument_group("engine"))
    _add_limits(parser.add_argument_group("limits of requests"))
    return parser


def _add_network(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (8000)")
    group.add_argument("--api-key", metavar="KEY", help=f"what clients must send; better set {KEY_VARIABLE}")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name besides localhost by which a proxy on this machine passes requests on; may be repeated",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="pages of this origin may call the server from a browser; may be repeated (none)",
    )
    group.add_argument("--log-requests", action="store_true", help="a line for every request, without its content")


def _add_engine(group: Any) -> None:
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and arithmetic (as they are loaded)",
    )
    group.add_argument("--cache-dtype", choices=("float32", "bfloat16", "int8"), help="of keys and values (as --dtype)")
    group.add_argument(
        "--memory-fraction",
        type=float,
        default=0.8,
        metavar="F",
        help="of the device's memory that weights, keys and values may take together (0.8)",
    )
    group.add_argument("--num-blocks", type=int, metavar="N", help="blocks of keys and values, instead of a fraction")
    group.add_argument("--block-size", type=int, default=16, metavar="N", help="positions of a block (16)")
    group.add_argument("--max-rows", type=int, default=16, metavar="N", help="texts that are written at once (16)")
    group.add_argument("--max-length", type=int, metavar="N", help="positions of a text (the model's, else 2,048)")
    group.add_argument("--prefill-chunk", type=int, default=256, metavar="N", help="prompt tokens of one call (256)")
    group.add_argument(
        "--steps-per-call", type=int, default=8, metavar="N", help="tokens of every text between two looks (8)"
    )
    group.add_argument("--max-waiting", type=int, default=1024, metavar="N", help="requests that may wait (1,024)")
    group.add_argument("--preemption", choices=("recompute", "swap"), help="how a text makes room (recompute)")
    group.add_argument(
        "--deterministic", action="store_true", help="answers do not depend on what else is running, to the bit; slower"
    )
    group.add_argument(
        "--mesh.tensor",
        dest="mesh_tensor",
        type=int,
        default=1,
        metavar="N",
        help="devices that matrices, heads, keys and values are split over (1)",
    )
    group.add_argument(
        "--warm-up",
        action="store_true",
        help="compile every program before the first request; else each when a request first needs it, which then "
        "waits for seconds; they are kept on disk for the next start",
    )
    group.add_argument("--no-prefix-caching", action="store_true", help="requests that begin alike share nothing")


def _add_limits(group: Any) -> None:
    group.add_argument("--max-concurrent", type=int, default=512, metavar="N", help="requests at one time (512)")
    group.add_argument("--max-body", type=float, default=4.0, metavar="MIB", help="of the body, in MiB (4)")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="of a prompt (what the model takes)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="new tokens (what the model has positions for)")
    group.add_argument("--max-samples", type=int, default=128, metavar="N", help="prompts times samples (128)")
    group.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (600)")
    group.add_argument("--grace", type=float, default=30.0, metavar="S", help="seconds to finish after SIGTERM (30)")


def _server_config(arguments: argparse.Namespace) -> "ServerConfig":
    from llmlab.infer.server.config import ServerConfig

    return ServerConfig(
        name=arguments.name or arguments.model.absolute().name,
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None,
        allowed_hosts=tuple(arguments.allow_host),
        cors_origins=tuple(arguments.cors_origin),
        max_body_bytes=int(arguments.max_body * 2**20),
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_new_tokens=arguments.max_tokens,
        max_samples=arguments.max_samples,
        max_concurrent=arguments.max_concurrent,
        max_seconds=arguments.timeout,
        grace_seconds=arguments.grace,
    )


def _engine_config(arguments: argparse.Namespace) -> "EngineConfig":
    from llmlab.infer.engine.config import EngineConfig

    return EngineConfig(
        block_size=arguments.block_size,
        num_blocks=arguments.num_blocks,
        memory_fraction=arguments.memory_fraction,
        cache_dtype=arguments.cache_dtype,
        max_rows=arguments.max_rows,
        max_length=arguments.max_length,
        prefill_chunk=arguments.prefill_chunk,
        steps_per_call=arguments.steps_per_call,
        deterministic=arguments.deterministic,
        prefix_caching=not arguments.no_prefix_caching,
        preemption=arguments.preemption,
        max_waiting=arguments.max_waiting,
    )


def _announce(url: str, served: "Served", start: float) -> None:
    """What is served where, with how much memory, and who can reach it."""
    config, engine = served.service.config, served.engine
    lines = [f"serving {config.name}, ready after {time.perf_counter() - start:.1f} s"]
    lines.append(f"  chat page   {url}/")
    lines.append(f"  base URL    {url}/v1")
    memory = f"{served.num_parameters:,} parameters, {served.weight_bytes / 2**20:,.1f} MiB"
    if engine is not None:
        blocks, size = engine.config.num_blocks, engine.config.block_size
        memory += f"; {blocks:,} blocks of {size} positions, {engine.cache_bytes / 2**20:,.1f} MiB"
        lines.append(f"  texts       {engine.config.max_rows} at once, of up to {engine.config.max_length:,} positions")
    lines.append(f"  memory      {memory}")
    template = "plain: the model has no chat template" if served.service.template.is_plain else "the model's"
    lines.append(f"  template    {template}")
    if config.api_key is not None:
        lines.append("  access      with the API key")
    elif config.local:
        lines.append("  access      this machine alone, without a key")
    print("\n".join(lines), flush=True)
    if config.api_key is None and not config.local:
        tell(
            f"WARNING: whoever reaches {config.host} port {url.rpartition(':')[2]} can use the model: there is no API "
            f"key. Set {KEY_VARIABLE}, or leave --host out to serve this machine alone"
        )


def _tell_draining(count: int) -> None:
    tell(f"finishing {count} request{'s' * (count != 1)}; Ctrl-C ends at once")


def _logs(requests: bool) -> None:
    """Failures always, a line for every request where asked for."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("llmlab.serve.access").setLevel(logging.INFO if requests else logging.WARNING)

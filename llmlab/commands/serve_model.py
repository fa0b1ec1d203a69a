"""The model that `llmlab serve` serves: loaded to where it stays, its engine started, its programs compiled."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmlab.commands.offloading import OPTION, check_offload_layers, offloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmlab.infer.engine.config import EngineConfig
    from llmlab.infer.engine.engine import Engine
    from llmlab.infer.server.config import ServerConfig
    from llmlab.infer.server.service import Service
    from llmlab.sharding import Placement


@dataclass(frozen=True)
class Served:
    """A model that can be served."""

    service: "Service"
    engine: "Engine | None"
    """None where there are embeddings alone."""
    num_parameters: int
    weight_bytes: int
    host_bytes: "Sequence[int]"
    """Of these, those of every layer that is in the host's memory."""

    def close(self) -> None:
        """Ends the engine."""
        if self.engine is not None:
            self.engine.close()


def open_model(arguments: argparse.Namespace, config: "ServerConfig", engine_config: "EngineConfig") -> Served:
    """The model of the command line, ready to answer."""
    import jax

    import llmlab
    from llmlab.buckets import default_cache_dir
    from llmlab.infer.engine.engine import Engine
    from llmlab.infer.offload import offloaded_bytes
    from llmlab.infer.server.app import make_service
    from llmlab.infer.server.embedder import Embedder
    from llmlab.infer.server.templates import ChatTemplate
    from llmlab.nn.module import split
    from llmlab.sharding.xla_flags import leave_out_absent_tpu
    from llmlab.training import compilation_cache

    leave_out_absent_tpu()
    compilation_cache.enable(default_cache_dir())
    tell(f"load {arguments.model}")
    tokenizer = llmlab.load_tokenizer(arguments.model)
    template = ChatTemplate(tokenizer, _template(arguments.model, arguments.chat_template))
    placement = _placement(arguments.mesh_tensor)
    num_offloaded: int = arguments.offload_layers
    check_offload_layers(arguments.model, num_offloaded)
    if num_offloaded and placement is not None:
        raise ValueError(
            f"{OPTION} {num_offloaded} with --mesh.tensor {arguments.mesh_tensor}: layers are offloaded from one "
            "device; give one of the two"
        )
    model = _cast(llmlab.load(arguments.model, placement=placement, host=num_offloaded > 0), arguments.dtype)
    model = offloaded(model, num_offloaded)
    leaves = jax.tree.leaves(split(model)[1])
    engine = None
    if _continues_tokens(model):
        engine = Engine(model, tokenizer, engine_config, placement=placement)
        if arguments.warm_up:
            engine.warm_up(lambda what: tell(f"compile {what}"))
        engine.start()
        _write_one_token(engine)
    embedder = None
    try:
        embedder = Embedder(model, tokenizer)
    except ValueError as error:
        tell(str(error))
    if engine is None and embedder is None:
        raise ValueError(f"{arguments.model} has nothing to serve: it neither continues texts nor embeds them")
    service = make_service(config, tokenizer, engine, embedder=embedder, template=template)
    sizes = sum(p.size for p in leaves), sum(p.nbytes for p in leaves)
    return Served(service, engine, *sizes, offloaded_bytes(model))


def _write_one_token(engine: "Engine") -> None:
    """So that a model that cannot write is found out now, and the programs of a short request are there."""
    from llmlab.infer.engine.request import Request

    tell("compile what a first request needs")
    (reply,) = engine.submit(Request((0,), max_new_tokens=1)).replies()
    if reply.finish_reason == "error":
        raise RuntimeError(f"the model does not write: {reply.message}")


def tell(text: str) -> None:
    """A line of news; the error stream, for the output is for those who asked."""
    print(text, file=sys.stderr, flush=True)


def _template(model: Path, file: Path | None) -> str | None:
    """Source of the chat template: of the file that was named, else the model's own."""
    from llmlab import buckets
    from llmlab.infer.server.templates import find_template
    from llmlab.runs import locate

    if file is not None:
        return file.read_text(encoding="utf-8")
    directory, _ = locate(buckets.local(model, weights=False))
    return find_template(directory, directory / "tokenizer")


def _placement(tensor: int) -> "Placement | None":
    """The mesh that matrices and heads are split over; None for one device."""
    if tensor == 1:
        return None
    import jax

    from llmlab.sharding import Mesh

    devices = jax.devices()
    if tensor > len(devices):
        raise ValueError(f"--mesh.tensor {tensor} needs as many devices, and there are {len(devices)}")
    return Mesh(data=1, tensor=tensor).build(devices[:tensor])


def _cast(model: Any, dtype: str | None) -> Any:
    """The model with its weights in another type."""
    if dtype is None:
        return model
    import jax
    import jax.numpy as jnp

    from llmlab.nn.module import merge, split

    graphdef, params = split(model)
    wanted = jnp.dtype(dtype)
    return merge(
        graphdef, jax.tree.map(lambda p: p.astype(wanted) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
    )


def _continues_tokens(model: Any) -> bool:
    """Whether the engine is for such models; others have embeddings alone, and are told so."""
    from llmlab.infer.steps import DecoderSteps, prepare

    try:
        steps, _ = prepare(model)
    except ValueError as error:
        tell(f"embeddings only: {error}")
        return False
    if type(steps) is not DecoderSteps:
        tell(f"embeddings only: the server writes with decoders, which a {type(model).__name__} is not")
        return False
    return True

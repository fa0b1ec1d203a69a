"""`--offload-layers`: layers whose weights wait in the host's memory, for commands that decode."""

from pathlib import Path
from typing import Any

OPTION = "--offload-layers"


def add_offload_layers(group: Any) -> None:
    """Adds the option to a parser or a group of one."""
    group.add_argument(
        OPTION,
        type=int,
        default=0,
        metavar="N",
        help="keep the weights of the last N layers in the host's memory, for a model larger than the device's; every "
        "step moves their bytes over the bus, whatever the number of texts, so take no more than it needs (0)",
    )


def check_offload_layers(path: Path, num_layers: int) -> None:
    """Raises ValueError for what the model of a path or the device cannot do, before minutes are spent on loading."""
    if num_layers == 0:
        return
    import jax

    from llmlab.infer.offload import check_offload
    from llmlab.nn.module import merge
    from llmlab.runs import load_config
    from llmlab.sharding.memory import check_host_memory

    check_host_memory(jax.local_devices()[:1], f"{OPTION} {num_layers}")
    graphdef, shapes, _ = load_config(path).abstract()
    check_offload(merge(graphdef, shapes), num_layers, setting=OPTION)


def offloaded(model: Any, num_layers: int) -> Any:
    """The model with its parameters in place; it was loaded to the host's memory where layers are to be offloaded."""
    if num_layers == 0:
        return model
    from llmlab.infer.offload import offload

    return offload(model, num_layers, setting=OPTION)

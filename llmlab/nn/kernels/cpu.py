"""A decoding step's large pieces of work on CPUs: two kernels in C++.

A step is products of a few rows with every matrix of weights, and attention of one query a row over its cache. XLA on a
CPU makes of the first products that pack the weights anew at every call, one core each where there is one row, and of
the second a matrix-vector product for every row and head on one core, over the whole cache. Here are

    product       y = x W^T of at most 64 rows, with all cores: weights are read once, as they lie
    attend_one    softmax(q K^T) V of one query a row and head, over the slots up to its position and no others, in the
                  cache's own storage

They have no gradient: they are for models that are laid out for decoding, and training stays with XLA. Arithmetic is
float32, whatever the storage. A row's numbers do not depend on what the other rows are, nor on the number of threads,
but one row alone is summed in another order than several.

The kernels are compiled from cpu.cc by the C++ compiler of this machine (GCC or Clang: $CXX, c++, g++ or clang++) for
its processor, at first use; that takes 5 seconds, and the library is kept in llmlab's cache for the next time. They
are called through XLA's foreign function interface, whose headers jaxlib brings along. Where there is no compiler,
`lacks` says so, and layers stay with XLA; so they do with LLMLAB_CPU_KERNELS=0.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from importlib import metadata
from pathlib import Path

import jax
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from llmlab.buckets import default_cache_dir
from llmlab.nn.kernels.heads import join_heads, split_heads
from llmlab.nn.platform import processor

MAX_ROWS = 64
"""Rows up to which `product` is for; of more, XLA's products are as fast."""
_SOURCE = Path(__file__).with_suffix(".cc")
_first = threading.Lock()  # a second library of the same kernels cannot be registered
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


def product(x: Float[Array, "*B D"], kernel_FD: Float[Array, "F D"]) -> Float[Array, "*B F"]:
    """x W^T of a matrix whose rows are the weights of an output each, float32 or bfloat16 as `takes` says."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    shape = jax.ShapeDtypeStruct((rows.shape[0], kernel_FD.shape[0]), jnp.float32)
    y = jax.ffi.ffi_call("llmlab_product", shape, vmap_method="sequential")(rows, kernel_FD)
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


def takes(x: Float[Array, "*B D"], kernel_FD: Float[Array, "F D"]) -> bool:
    """Whether `product` is for these arrays."""
    few = 0 < x.size <= MAX_ROWS * x.shape[-1]
    return few and x.dtype == kernel_FD.dtype and kernel_FD.dtype in (jnp.float32, jnp.bfloat16)


def attend_one(
    q_B1NH: Float[Array, "B 1 N H"],
    key: tuple[Shaped[Array, "B K T H"], Float[Array, "B K T"] | None],
    value: tuple[Shaped[Array, "B K T H"], Float[Array, "B K T"] | None],
    position_B: Int[Array, "B"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Causal attention of one query a row, as `llmlab.nn.kernels.decoding.attend_one` has it for GPUs; heads may be of
    any width."""
    q_BKGH = split_heads(q_B1NH, key[0].shape[1])[:, :, :, 0].astype(jnp.float32)
    scales = [] if key[1] is None else [key[1], value[1]]
    o_BKGH = jax.ffi.ffi_call(
        "llmlab_attend", jax.ShapeDtypeStruct(q_BKGH.shape, jnp.float32), vmap_method="sequential"
    )(
        *(q_BKGH, key[0], value[0], position_B.astype(jnp.int32), *scales),
        scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0),
    )
    return join_heads(o_BKGH[:, :, :, None]).astype(q_B1NH.dtype)


def lacks() -> str | None:
    """Why there are no such kernels, or None. The first call makes them ready."""
    with _first:
        return _made_ready()


@functools.cache
def _made_ready() -> str | None:
    if os.environ.get("LLMLAB_CPU_KERNELS") == "0":
        return "LLMLAB_CPU_KERNELS is 0"
    if os.name != "posix":
        return f"they are not for {sys.platform}"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "there is no C++ compiler on PATH (c++, g++ or clang++; or name one in CXX)"
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"decoding goes on without its kernels for CPUs: {compiler}: {output.strip()}", stacklevel=3)
        return "they could not be compiled or loaded"
    jax.ffi.register_ffi_target("llmlab_product", jax.ffi.pycapsule(library.llmlab_product), platform="cpu")
    jax.ffi.register_ffi_target("llmlab_attend", jax.ffi.pycapsule(library.llmlab_attend), platform="cpu")
    return None


def _compiled(compiler: str) -> Path:
    """The library: of an earlier time, or of now."""
    command = [compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), str(_SOURCE)]
    about = [*command, metadata.version("jaxlib"), processor(), _SOURCE.read_text(encoding="utf-8")]
    directory = default_cache_dir() / "kernels"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.so"
    _check_ours_alone(directory)
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=directory) as new:
            library = Path(new) / path.name
            subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
            library.chmod(0o700)
            os.replace(library, path)
    _check_ours_alone(path)
    return path


def _check_ours_alone(path: Path) -> None:
    """Raises OSError where somebody else could have put code that is not ours."""
    about = path.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise OSError(f"{path} may be written by others; remove it, or chmod go-w, or set LLMLAB_CACHE")

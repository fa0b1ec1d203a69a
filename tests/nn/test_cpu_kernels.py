"""The kernels of a decoding step on CPUs against NumPy, and what happens where they cannot be had."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.kernels import cpu

ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 40, 64]
# (inputs, outputs): single numbers, lines of the cache with a rest and without, several tasks.
SHAPES = [(1, 1), (5, 13), (32, 6), (48, 100), (37, 2), (1000, 70)]


@pytest.fixture(autouse=True)
def available() -> None:
    if jax.default_backend() != "cpu" or cpu.lacks() is not None:
        pytest.skip(cpu.lacks() or "the default device is no CPU")


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", ROWS)
def test_a_product_is_the_sums_of_its_definition(num_rows: int, dtype: str) -> None:
    for inputs, outputs in SHAPES:
        x, kernel = normal(1, num_rows, inputs, dtype=dtype), normal(2, outputs, inputs, dtype=dtype)
        assert cpu.takes(x, kernel)
        got = jax.jit(cpu.product)(x, kernel)
        assert (got.shape, got.dtype) == ((num_rows, outputs), jnp.dtype(dtype))
        exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T
        # each of the sum's terms and partial sums is rounded by 2^-24, and the result to bfloat16 by 2^-9
        size = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(kernel, np.float64)).T
        bound = 2.0**-22 * np.sqrt(inputs) * size + (2.0**-8 * np.abs(exact) if dtype == "bfloat16" else 0)
        assert np.all(np.abs(np.asarray(got, np.float64) - exact) <= bound), (inputs, outputs)


@pytest.mark.parametrize("num_rows", [3, 8, 16, 40])
def test_a_row_of_a_product_does_not_depend_on_what_the_others_are(num_rows: int) -> None:
    x, kernel = normal(1, num_rows, 100), normal(2, 70, 100)
    want = cpu.product(x, kernel)
    others = x.at[1:].set(1e30).at[2:].set(jnp.nan)
    np.testing.assert_array_equal(cpu.product(others, kernel)[0], want[0])
    np.testing.assert_array_equal(cpu.product(x, kernel), want)


def test_leading_dimensions_are_rows_and_vmap_is_a_loop() -> None:
    x, kernel = normal(1, 2, 3, 20), normal(2, 3, 7, 20)
    got = jax.vmap(cpu.product, in_axes=(1, 0))(x, kernel)
    # 20 products of a few units each, in another order
    np.testing.assert_allclose(got, np.einsum("brd,rfd->rbf", x, kernel), rtol=0, atol=1e-5)


def test_more_rows_and_other_numbers_are_not_for_it() -> None:
    kernel = normal(2, 7, 20)
    assert not cpu.takes(normal(1, 65, 20), kernel)
    assert not cpu.takes(normal(1, 0, 20), kernel)
    assert not cpu.takes(normal(1, 2, 20), kernel.astype(jnp.bfloat16))
    assert not cpu.takes(normal(1, 2, 20, dtype=jnp.float16), kernel.astype(jnp.float16))


def test_calls_of_many_threads_do_not_disturb_each_other() -> None:
    """More callers than cores, and more tasks than threads in each."""
    kernel = normal(2, 4000, 300)
    inputs = [normal(10 + i, 1 + i, 300) for i in range(8)]
    product = jax.jit(cpu.product)
    want = [np.asarray(product(x, kernel)) for x in inputs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(20) if not np.array_equal(product(inputs[i], kernel), want[i]))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache without the library, and nothing known of it."""
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    cpu._made_ready.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    cpu._made_ready.cache_clear()


def test_without_a_compiler_or_switched_off_it_says_why(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    assert "no C++ compiler" in str(cpu.lacks())
    cpu._made_ready.cache_clear()
    monkeypatch.setenv("LLMLAB_CPU_KERNELS", "0")
    assert cpu.lacks() == "LLMLAB_CPU_KERNELS is 0"


def test_a_compiler_that_fails_is_a_warning_with_what_it_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(fresh / "c++", "echo cannot find -lstdc++ >&2; exit 1")
    monkeypatch.setenv("PATH", f"{fresh}{os.pathsep}{os.environ['PATH']}")
    with pytest.warns(UserWarning, match=r"c\+\+: cannot find -lstdc\+\+"):
        assert "could not be compiled" in str(cpu.lacks())
    assert not list((fresh / "cache").rglob("*.so"))


def test_it_is_compiled_once_and_not_loaded_where_others_could_have_written(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    script(fresh / "c++", f'echo once >> {fresh}/log; exec {compiler} "$@"')
    monkeypatch.setenv("CXX", str(fresh / "c++"))
    for _ in range(2):
        assert said_by_a_process() == ("None\n", "")
    assert (fresh / "log").read_text() == "once\n"
    (library,) = (fresh / "cache" / "kernels").glob("*.so")
    library.chmod(0o722)
    output, warning = said_by_a_process()
    assert output != "None\n"
    assert "may be written by others; remove it, or chmod go-w" in warning


def said_by_a_process() -> tuple[str, str]:
    command = [sys.executable, "-c", "from llmlab.nn.kernels import cpu; print(cpu.lacks())"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return process.stdout, process.stderr


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)

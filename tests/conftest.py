"""What every test stands on: eight simulated CPU devices, shapes checked at every call, caches out of the way."""

import gc
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import install_import_hook

from tests.xla_flags import FAST

REPOSITORY = Path(__file__).parent.parent

# Before jax is imported: it reads these once. Subprocesses of tests inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = {"xla_force_host_platform_device_count": "8", **FAST}
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [*_given.split(), *(f"--{name}={value}" for name, value in _FLAGS.items() if f"--{name}" not in _given)]
)
# Subprocesses of tests run this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
# The allocator stays as it is in a process that measures memory in its next test (see llmlab.training.host_memory).
os.environ.setdefault("GLIBC_TUNABLES", "")
# Compiled programs are shared by all workers and by later runs of the suite.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".pytest_cache" / "jax"))
# Small programs too: most of a test's compilations are of single operations, and other tests need the same ones.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jax  # noqa: E402  the variables above must be set first
import jax.monitoring  # noqa: E402  the same
import jax.tree_util  # noqa: E402  the same


def _exempt_from_construction_checks(register: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a pytree registration mark its class as one whose constructor is not type-checked.

    jax rebuilds a registered dataclass through its constructor with whatever a tree_map returned: booleans,
    PartitionSpecs, placeholders. The annotations describe the arrays that the class holds in real use, which the
    signatures of the functions that take and return them check.
    """

    def wrapper(cls: type, *args: Any, **kwargs: Any) -> type:
        cls.__no_type_check__ = True  # jaxtyping's decorator (applied after this one) then leaves __init__ alone
        cls.__init__ = inspect.unwrap(cls.__init__)  # and where it was applied before, its wrapper goes
        return register(cls, *args, **kwargs)

    return wrapper


for name in ("register_dataclass", "register_pytree_node_class", "register_pytree_with_keys_class"):
    setattr(jax.tree_util, name, _exempt_from_construction_checks(getattr(jax.tree_util, name)))

# Every function of llmlab checks its arguments' and results' types and shapes at every call. The numeric tower of
# PEP 484 (an int where a float is asked for) is what type checkers accept and users write: dropout=0.
install_import_hook("llmlab", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not look through it again after every program."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def llmlab_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Token stores of tests go to a temporary directory, never to the user's cache."""
    directory = tmp_path_factory.mktemp("llmlab-cache")
    previous = os.environ.get("LLMLAB_CACHE")
    os.environ["LLMLAB_CACHE"] = str(directory)
    yield directory
    if previous is None:
        del os.environ["LLMLAB_CACHE"]
    else:
        os.environ["LLMLAB_CACHE"] = previous


class _Programs:
    """Programs that were compiled or read since the mappings were last counted."""

    new = 0

    @classmethod
    def listen(cls, event: str, duration_secs: float, **_: str | int) -> None:
        """Called by jax."""
        cls.new += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_Programs.listen)


@pytest.fixture(autouse=True)
def _few_mappings() -> Iterator[None]:
    """Forgets compiled programs before a worker has as many memory mappings as Linux allows a process (65,530): each
    program is three, a worker meets ten thousand programs, and XLA crashes where it gets no more. Rarely, for it takes
    seconds, and what is needed again must be compiled again."""
    yield
    if _Programs.new > 1000:
        _Programs.new = 0
        mappings = Path("/proc/self/maps")
        if mappings.exists() and len(mappings.read_bytes().splitlines()) > 40_000:
            jax.clear_caches()
            gc.collect()

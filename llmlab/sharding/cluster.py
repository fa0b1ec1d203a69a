"""Several processes, one computation: how a process finds the others, and how they talk besides the devices.

JAX runs the same program on every host of a cluster, each process with its own devices and all of them in one mesh.
`join` makes a process part of that, before anything touches a device:

    llmlab train FILE --coordinator HOST:PORT --num-processes N --process-id I      or LLMLAB_COORDINATOR and so on
    srun llmlab train FILE            Slurm: the addresses come from its variables
    the same command on every worker of a TPU pod: from TPU_WORKER_HOSTNAMES, MEGASCALE_*, or the metadata server

Everywhere else it does nothing, and asks no network.

Numbers travel between devices, in the program. What remains is decisions ("resume at step 500"), names and errors: few,
small, sometimes an hour apart (one process tokenizes, the others wait). For those collectives are wrong, which give up
after half a minute on some transports and block signals on all. They go through the key-value store of the
coordinator, which every process is connected to anyway. One exception is asked at every step, whether a signal wants
the run to stop: that is a collective of one number, read a step late, so that nobody waits for it.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLES = ("LLMLAB_COORDINATOR", "LLMLAB_NUM_PROCESSES", "LLMLAB_PROCESS_ID")
_FLAGS = ("--coordinator", "--num-processes", "--process-id")
# The variables by which jax recognises a step that srun started; a batch script itself has some of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_SHUTDOWN_SECONDS = 60  # that a process which ends waits for the others; jax's own 300 keep a failed pod busy
_POLL_MILLISECONDS = 200  # signals are handled between two polls
_DEPARTED, _LEFT = "llmlab/departed", "llmlab/left"
_WATCH_SECONDS = 2  # between two looks whether another process left
_NOTICE_SECONDS = 10  # that a process has to leave by itself after another one left
_FAREWELL_SECONDS = 20  # that the first process, which is the coordinator, waits for the others to leave


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where the processes meet, and which of them this one is."""

    coordinator: str
    """HOST:PORT of process 0."""
    num_processes: int
    """How many there are."""
    process_id: int
    """Which one this is, from 0."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\S+:\d+", self.coordinator):
            raise ValueError(f"coordinator={self.coordinator!r} is not HOST:PORT, as in 10.0.0.1:8476")
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} is not one of num_processes={self.num_processes}; "
                f"they are numbered from 0 to {self.num_processes - 1}"
            )


class Departed(RuntimeError):
    """Another process left the computation, so this one cannot go on."""

    def __init__(self, process: int, reason: str, *, exit_code: int, signal: int) -> None:
        self.exit_code = exit_code
        """Of that process; the right one for this process too."""
        self.signal = signal
        """That it was stopped by; 0 for none."""
        super().__init__(f"process {process} left: {reason}")


def explicit(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Address | None:
    """The address that flags and variables give together, flags first; None where there is none of them.

    Raises:
        ValueError: some are missing, or a value cannot be.
    """
    flags = (coordinator, num_processes, process_id)
    given = [environment.get(name) if flag is None else str(flag) for flag, name in zip(flags, _VARIABLES, strict=True)]
    missing = [
        f"{flag} (or {name})" for flag, name, value in zip(_FLAGS, _VARIABLES, given, strict=True) if value is None
    ]
    if len(missing) == len(given):
        return None
    if missing:
        present = ", ".join(f"{f}={v}" for f, v in zip(_FLAGS, given, strict=True) if v is not None)
        raise ValueError(f"a cluster needs all of {', '.join(_FLAGS)}: there is {present}; add {' and '.join(missing)}")
    for name, value in zip(_VARIABLES[1:], given[1:], strict=True):
        if not re.fullmatch(r"-?\d+", value or ""):
            raise ValueError(f"{name}={value!r} is not a whole number")
    return Address(coordinator=given[0] or "", num_processes=int(given[1] or 0), process_id=int(given[2] or 0))


def detected(environment: Mapping[str, str], *, tpu: bool) -> str | None:
    """What kind of cluster the environment speaks of, which jax then finds its way in: "slurm", "tpu", or None.

    Args:
        environment: variables.
        tpu: whether this machine has TPU chips: their metadata server knows of workers that no variable names.
    """
    if all(name in environment for name in _SLURM):
        return "slurm" if _number(environment["SLURM_NTASKS"]) > 1 else None
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if _number(environment.get("MEGASCALE_NUM_SLICES", "1")) > 1 or "," in (workers or ""):
        return "tpu"
    return "tpu" if tpu and workers is None and "TPU_SKIP_MDS_QUERY" not in environment else None


def join(
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins the cluster that the arguments, the variables or the scheduler name; does nothing where there is none.

    To be called before anything touches a device.

    Args:
        coordinator: HOST:PORT of process 0, which listens there.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
        timeout: seconds to wait for the others. When they are over the process ends, with a message and exit code 1:
            jax, which waits in C++, would abort it without one.

    Raises:
        ValueError: the address is incomplete or impossible.
        ConnectionError: the cluster could not be joined.
    """
    address = explicit(coordinator, num_processes, process_id, os.environ)
    if address is not None:
        if address.num_processes > 1:
            _initialize(
                timeout,
                f"{address.num_processes} processes did not meet at {address.coordinator} within {timeout} s (this is "
                f"process {address.process_id}); start all of them with the same --coordinator and --num-processes, "
                f"and let its port through",
                coordinator_address=address.coordinator,
                num_processes=address.num_processes,
                process_id=address.process_id,
            )
        return
    kind = detected(os.environ, tpu=has_tpu())
    if kind is not None:
        alone = "" if kind == "slurm" else ", or set TPU_SKIP_MDS_QUERY=1 to train on this machine alone"
        _initialize(timeout, f"the processes of this {kind} job did not meet within {timeout} s{alone}")


def has_tpu(devices: Path = Path("/dev")) -> bool:
    """Whether this machine has TPU chips, by their device files; libtpu may be installed anywhere."""
    vfio = devices / "vfio"
    return any(devices.glob("accel[0-9]*")) or (vfio.is_dir() and any(path.name.isdigit() for path in vfio.iterdir()))


def _initialize(timeout: int, failure: str, **address: Any) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # without effect where devices are not CPUs
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    watch = threading.Timer(timeout, _give_up, [failure])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=2 * timeout + 60, shutdown_timeout_seconds=_SHUTDOWN_SECONDS, **address
        )
    except (RuntimeError, OSError) as error:
        raise ConnectionError(f"{failure}. ({str(error).splitlines()[0]})") from error
    finally:
        watch.cancel()
    # jax listens for SIGTERM as well, in a way that leaves the process running: signals are the run's own affair.
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)


def _give_up(failure: str) -> None:
    sys.stderr.write(f"error: {failure}\n")
    sys.stderr.flush()
    os._exit(1)


class Cluster:
    """The processes that compute together, seen from one of them. Every process calls the same methods with the same
    names, in the same order for each name.

    Args:
        index: of this process.
        count: of processes.
        client: of the coordinator; None for a process that is alone.
    """

    def __init__(self, index: int = 0, count: int = 1, client: Any = None) -> None:
        self.index = index
        self.count = count
        self._client = client
        self._used: dict[str, int] = {}
        self._exit_code: int | None = None
        self._watched = False
        self._said_farewell = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def lead(self, name: str, function: Callable[[], Any]) -> Any:
        """What `function` returns in the first process, in all of them; the others wait for it.

        Args:
            name: of the matter.
            function: its result must be a JSON value where there are several processes.

        Raises:
            ValueError, RuntimeError: in the other processes, where it raises in the first.
        """
        if self.count == 1:
            return function()
        key = self._key(name)
        if not self.is_first:
            outcome = json.loads(self._wait(key))
            if "error" in outcome:
                raise (ValueError if outcome["users"] else RuntimeError)(f"process 0: {outcome['error']}")
            return outcome["value"]
        try:
            value = function()
        except Exception as error:
            users = isinstance(error, (ValueError, FileNotFoundError, FileExistsError, PermissionError))
            self._client.key_value_set(key, json.dumps({"error": str(error), "users": users}))
            raise
        self._client.key_value_set(key, json.dumps({"value": value}))
        return value

    def gather(self, name: str, value: str) -> list[str]:
        """The values of all processes, by index."""
        if self.count == 1:
            return [value]
        key = self._key(name)
        self._client.key_value_set(f"{key}/{self.index}", value)
        if self.is_first:
            values = [self._wait(f"{key}/{index}") for index in range(self.count)]
            self._client.key_value_set(f"{key}/all", json.dumps(values))
            return values
        return json.loads(self._wait(f"{key}/all"))

    def meet(self, name: str) -> None:
        """Returns when all processes are here."""
        self.gather(name, "")

    def check_same(self, **values: str) -> None:
        """Raises ValueError, in all processes, where one of the values is not the same in all of them."""
        for name, value in values.items():
            found = self.gather(f"same/{name}", value)
            for index, other in enumerate(found):
                if other != found[0]:
                    raise ValueError(
                        f"the {name} of process {index} is not that of process 0 ({other[:16]}... and "
                        f"{found[0][:16]}...); give every process the same command, files and packages"
                    )

    def depart(self, reason: str, *, exit_code: int, signal: int = 0) -> None:
        """Lets the others know that this process cannot go on; they then leave as well.

        From here on the end of the interpreter is the end of the process, with this exit code: jax's own shutdown would
        wait for the others for a minute, and abort.
        """
        if self.count > 1 and self._exit_code is None:
            self._exit_code = exit_code
            self._post(_DEPARTED, {"process": self.index, "reason": reason, "exit_code": exit_code, "signal": signal})
            atexit.register(self._end, exit_code)  # before jax's, which was registered earlier

    def votes(self) -> Callable[[int], int] | None:
        """A ballot that all processes hold at the same points of a computation: see `_Votes`; None for one alone."""
        return None if self.count == 1 else _Votes()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, another process' departure ends this one, with the same exit code, if it does not leave by itself
        within a few seconds: it may hang in a collective, which nothing else can interrupt."""
        if self.count == 1 or self._watched:
            yield
            return
        self._watched, over = True, threading.Event()
        thread = threading.Thread(target=self._watch, args=[over], name="llmlab-cluster", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()  # inside jax when the interpreter ends, it would abort the process
            self._watched = False

    def farewell(self) -> None:
        """To be called before the process ends, by one that departed: the first one waits until the others have left,
        since without a coordinator jax aborts them."""
        if self.count == 1 or self._said_farewell or self._exit_code is None:
            return
        self._said_farewell = True
        self._post(f"{_LEFT}/{self.index}", {})
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.is_first and time.monotonic() < deadline:
            if len(self._client.key_value_dir_get(_LEFT)) == self.count:
                return
            time.sleep(0.1)

    def _post(self, key: str, note: Mapping[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # another one was faster, or the coordinator is gone
            self._client.key_value_set(key, json.dumps(note))

    def _end(self, exit_code: int) -> None:
        self.farewell()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)

    def _watch(self, over: threading.Event) -> None:
        note = None
        while note is None:
            if over.wait(_WATCH_SECONDS):
                return
            try:
                note = self._get(_DEPARTED, milliseconds=1)
            except RuntimeError:  # the coordinator is gone, and jax is about to end the process
                return
        if not over.wait(_NOTICE_SECONDS) and self._exit_code is None:
            departed = _departure(note)
            self._exit_code = departed.exit_code
            sys.stderr.write(f"error: {departed}\n")
            self._end(departed.exit_code)

    def _key(self, name: str) -> str:
        number = self._used[name] = self._used.get(name, 0) + 1
        return f"llmlab/{name}/{number}"

    def _wait(self, key: str) -> str:
        while True:
            value = self._get(key)
            if value is not None:
                return value
            note = self._get(_DEPARTED, milliseconds=1)
            if note is not None:
                raise _departure(note)

    def _get(self, key: str, *, milliseconds: int = _POLL_MILLISECONDS) -> str | None:
        import jax

        try:
            return self._client.blocking_key_value_get(key, milliseconds)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise


def _departure(note: str) -> Departed:
    found = json.loads(note)
    return Departed(found["process"], found["reason"], exit_code=found["exit_code"], signal=found["signal"])


ALONE = Cluster()
"""A process that is the whole computation."""


def here() -> Cluster:
    """The cluster of this process, once it has joined it."""
    from jax._src import distributed  # jax has no public way to the key-value store; orbax and Flax take this one

    state = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return ALONE
    return _joined(state.process_id, state.num_processes, state.client)


_joined = functools.cache(Cluster)  # one object, since it counts what it has said


class _Votes:
    """The largest of all processes' numbers, by a collective of one number.

    The result is that of the previous ballot (0 at the first), so that the devices need not be waited for. All
    processes get the same numbers at the same ballots.
    """

    def __init__(self) -> None:
        self._pending: Any = None

    def __call__(self, value: int) -> int:
        import jax
        import numpy as np

        before = self._pending
        where, largest = self._program
        number = np.asarray([value], np.int32)
        ballot = jax.make_array_from_callback((where.mesh.size,), where, lambda _: number)
        self._pending = largest(ballot)
        return 0 if before is None else int(jax.device_get(before))

    @functools.cached_property
    def _program(self) -> tuple[Any, Any]:
        """Where the numbers are, and the function to the largest. Made late: devices are only there when all are."""
        import jax
        import jax.numpy as jnp
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
        everywhere = NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0

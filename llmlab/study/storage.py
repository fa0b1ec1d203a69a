"""Where the workers of a study meet: Optuna's storage in a database, SQLite on one machine, PostgreSQL for many.

Optuna keeps trials with their states, and a heartbeat by which the others notice a worker that died. Two things it does
not give, and both cost points that run twice or never:

- SQLite through SQLAlchemy begins a transaction as a reader and upgrades it when it writes, so two workers can both
  read "waiting" and both write "running". Transactions here begin as writers (BEGIN IMMEDIATE), one after the other.
- Between two calls of Optuna a worker can be killed: after a stale trial was failed and before its retry was enqueued,
  or after a trial was taken and before its first heartbeat. So everything that concerns the queue happens while a lock
  is held that the operating system or the server takes back from the dead (`Store.exclusive`), and whoever holds it
  next puts right what it finds.
"""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import optuna
    import sqlalchemy

HEARTBEAT_SECONDS = 10
"""Between two signs of life of a worker."""
GRACE_SECONDS = 60
"""Without a sign of life, after which a worker of another machine is taken for dead."""
MAX_RETRIES = 10
"""Workers that a trial may lose before it counts as failed: one that needs too much memory kills every worker."""

_SQLITE_TIMEOUT = 120  # seconds to wait for other writers
# Of the advisory lock that keeps PostgreSQL's tables from being made twice: any number that others hardly use.
_TABLES_LOCK = 0x6C6C6D6C6162


@dataclass(frozen=True, kw_only=True)
class Store:
    """A study in a database."""

    study: "optuna.Study"
    rdb: "optuna.storages.RDBStorage"
    url: str

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Inside, no other process changes the queue of this study. It ends with the process, however that ends."""
        with _locked(self.rdb.engine, self.study.study_name):
            yield

    def fail_stale(self) -> None:
        """Takes the trials of workers that gave no sign of life for long from them, and enqueues them again."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", optuna.exceptions.ExperimentalWarning
            )  # heartbeats are what we are here for
            optuna.storages.fail_stale_trials(self.study)

    def close(self) -> None:
        """Gives the connections back."""
        self.rdb.remove_session()
        self.rdb.engine.dispose()


def storage_url(folder: Path, storage: str | None) -> str:
    """The address of a study's database: `<folder>/study.db`, unless another is given.

    Raises:
        ValueError: it is neither SQLite nor PostgreSQL, or the driver is missing.
    """
    import sqlalchemy
    from sqlalchemy.exc import ArgumentError

    if storage is None:
        return f"sqlite:///{folder / 'study.db'}"
    try:
        url = sqlalchemy.make_url(storage)
    except ArgumentError:
        raise ValueError(
            "--storage is no database address; use sqlite:///PATH, or postgresql+psycopg://USER@HOST/DATABASE"
        ) from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ValueError(
            f"--storage {url.get_backend_name()} is not supported: sqlite is, for one machine, and postgresql for many"
        )
    if url.get_backend_name() == "sqlite" and not url.database:
        raise ValueError("--storage sqlite:// is in memory, where no other worker sees it; use sqlite:///PATH")
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        raise ValueError(
            f"--storage {url.drivername} needs the package {error.name}; use postgresql+psycopg://..., whose driver "
            "comes with pip install 'llmlab[study]'"
        ) from None
    return storage


def shown(url: str) -> str:
    """The address without its password, for messages and files."""
    import sqlalchemy

    return sqlalchemy.make_url(url).render_as_string(hide_password=True)


def open_study(
    url: str,
    name: str,
    *,
    direction: Literal["minimize", "maximize"] = "minimize",
    heartbeat: int = HEARTBEAT_SECONDS,
    grace: int = GRACE_SECONDS,
) -> Store:
    """Opens a study, which is made where it does not exist; any number of processes may do so at once.

    Args:
        url: of the database, from `storage_url`.
        name: of the study in it.
        direction: "minimize" or "maximize".
        heartbeat: seconds between signs of life.
        grace: seconds without one after which a trial is taken from its worker.

    Raises:
        ConnectionError: the database cannot be reached.
        ValueError: the study exists with the other direction.
    """
    import optuna
    import sqlalchemy
    from sqlalchemy.exc import OperationalError

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # what is worth telling is told by the commands
    path = sqlalchemy.make_url(url).database
    if url.startswith("sqlite") and path is not None:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    sqlite = {"connect_args": {"timeout": _SQLITE_TIMEOUT}}
    # A server that was restarted in the meantime is asked again instead of failing the trial.
    options: dict[str, Any] = sqlite if url.startswith("sqlite") else {"pool_pre_ping": True}
    own = sqlalchemy.create_engine(url, **options, poolclass=sqlalchemy.NullPool)
    try:
        with _locked(own, _TABLES_LOCK), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats, retries
            rdb = optuna.storages.RDBStorage(
                url,
                engine_kwargs=options,
                heartbeat_interval=heartbeat,
                grace_period=grace,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
                    max_retry=MAX_RETRIES, inherit_intermediate_values=True
                ),
            )
            if url.startswith("sqlite"):
                _begin_as_writer(rdb.engine)
            study = optuna.create_study(storage=rdb, study_name=name, direction=direction, load_if_exists=True)
    except (OperationalError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ConnectionError(f"the storage {shown(url)} cannot be used: {reason}") from error
    finally:
        own.dispose()
    if study.direction.name.lower() != direction:
        rdb.engine.dispose()
        raise ValueError(
            f"the study {name} in {shown(url)} was begun to {study.direction.name.lower()}, and now is to {direction}; "
            "give this one another folder with --out"
        )
    return Store(study=study, rdb=rdb, url=url)


def _begin_as_writer(engine: "sqlalchemy.Engine") -> None:
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def no_transactions_of_the_driver(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: "sqlalchemy.Connection") -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections of before know nothing of this


@contextlib.contextmanager
def _locked(engine: "sqlalchemy.Engine", key: str | int) -> Iterator[None]:
    """Holds the lock of this name in the database, or for SQLite on a file beside it."""
    import sqlalchemy

    if engine.dialect.name == "sqlite":
        assert engine.url.database is not None  # storage_url refused what is in memory
        with _file_locked(Path(f"{engine.url.database}.lock")):
            yield
        return
    with engine.begin() as connection:  # the transaction's end is the lock's, and a lost connection is its end
        if isinstance(key, int):
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
        else:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": key})
        yield


@contextlib.contextmanager
def _file_locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("a+b") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield


def this_process() -> dict[str, Any]:
    """Names this process, so that others on the same machine can see whether it lives."""
    return {"machine": _machine(), "pid": os.getpid()}


def is_dead(process: dict[str, Any] | None) -> bool:
    """Whether a process (of `this_process`) is known to be gone: of this machine, and not there any more."""
    if process is None or process.get("machine") != _machine():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, so alive
        return False
    try:
        state = Path(f"/proc/{process['pid']}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:  # no Linux, or gone between the two looks
        return False
    return state == "Z"  # killed, and its parent has not looked yet


def _machine() -> str:
    """This machine, and the space of its process ids: containers on one machine have their own."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        space = ""
    return f"{socket.gethostname()} {space}".strip()

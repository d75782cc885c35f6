"""One database, SQLite or PostgreSQL, and the only way to it.

Transactions either read or write. SQLite has one writer at a time: all writing goes over one connection, so that
writers of this process wait for each other in turn, and `BEGIN IMMEDIATE` makes those of other processes wait at the
beginning, where nothing is lost by it. Readers have connections of their own and wait for nobody (write-ahead log).

The database is opened, and brought up to date, when it is first used. If it cannot be, whoever wants it gets an error
and the next one tries again; so a server starts, and serves what needs no state, while its database is away.
"""

import asyncio
import errno
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, event, literal_column, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from localmoe.core.errors import ConfigError, StorageError, StorageFullError
from localmoe.state.config import StateConfig
from localmoe.state.migrate import upgrade

logger = logging.getLogger(__name__)

_NUM_READERS = 4
_NUM_POSTGRES_CONNECTIONS = 10
_MAX_LOG_BYTES = 64 * 2**20
_BUSY_PAUSE_S = 0.02
_FULL_SQLSTATES = {"53100"}  # disk_full
_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_DEADLOCK_SQLSTATE = "40P01"
_MIGRATION_LOCK = "localmoe migration"


class Database:
    """Keeps state.

    Args:
        config: where.
        default_path: SQLite's file where the settings name no database.

    Raises:
        ConfigError: what a PostgreSQL needs is not installed.
    """

    def __init__(self, config: StateConfig, *, default_path: Path) -> None:
        default = URL.create("sqlite", database=str(default_path))
        url = default if config.database_url is None else make_url(config.database_url)
        self._timeout_s = config.busy_timeout_s
        self._is_sqlite = url.get_backend_name() == "sqlite"
        self._path = Path(url.database or "") if self._is_sqlite else None
        if self._is_sqlite:
            sqlite_url = url.set(drivername="sqlite+aiosqlite")
            self._writer = self._sqlite(sqlite_url, num_connections=1, begin="BEGIN IMMEDIATE")
            self._reader = self._sqlite(sqlite_url, num_connections=_NUM_READERS, begin="BEGIN")
        else:
            self._writer = self._reader = self._postgres(url.set(drivername="postgresql+asyncpg"))
        self._opening = asyncio.Lock()
        self._is_open = False
        self._failure: StorageError | None = None
        """Of opening it, and when that was."""
        self._failed_s = 0.0

    @property
    def has_row_locks(self) -> bool:
        """Whether several may write at once. SQLite has one writer, who needs no locks."""
        return not self._is_sqlite

    @property
    def now(self) -> ColumnElement[float]:
        """The time by the database's own clock, which all gateways that share it agree on."""
        if self._is_sqlite:
            return literal_column("((julianday('now') - 2440587.5) * 86400.0)")
        return literal_column("extract(epoch from clock_timestamp())::float8")

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one state of the database.

        Raises:
            StorageError: there is no database now. Likewise where what is done with the connection fails.
        """
        async with self._transaction(self._reader) as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is carried out whole at the end of the block, or not at all if that raises.

        Raises:
            StorageFullError: there is no room.
            StorageError: there is no database now. Likewise where what is done with the connection fails.
        """
        async with self._transaction(self._writer) as connection:
            yield connection

    async def lock(self, connection: AsyncConnection, name: str) -> None:
        """Wait until no other transaction that writes has locked this name. SQLite has but one of them."""
        if not self._is_sqlite:
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name}
            )

    async def close(self) -> None:
        """Give back all connections. Nothing may be under way."""
        await self._writer.dispose()
        await self._reader.dispose()

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        if not self._is_open:
            await self._open()
        async with self._explained(), engine.begin() as connection:
            yield connection

    async def _open(self) -> None:
        asked_s = time.monotonic()
        async with self._opening:
            if self._is_open:
                return
            if self._failure is not None and self._failed_s > asked_s:
                # Somebody has tried meanwhile; if all who wait did so in turn, the last would wait for ever.
                raise type(self._failure)(str(self._failure))
            try:
                async with self._explained():
                    await self._bring_up_to_date()
            except StorageError as error:
                self._failure, self._failed_s = error, time.monotonic()
                raise
            self._is_open = True

    async def _bring_up_to_date(self) -> None:
        if self._path is not None:
            await asyncio.to_thread(_make_private, self._path)  # by us, so that nobody else can read it
            await asyncio.to_thread(_write_ahead, self._path, self._timeout_s)
        async with self._writer.begin() as connection:
            await self.lock(connection, _MIGRATION_LOCK)
            await connection.run_sync(upgrade)

    def _postgres(self, url: URL) -> AsyncEngine:
        timeouts = {"timeout": self._timeout_s, "command_timeout": self._timeout_s}
        try:
            return create_async_engine(
                url.difference_update_query(["sslmode"]),
                pool_size=_NUM_POSTGRES_CONNECTIONS,
                max_overflow=0,
                pool_timeout=self._timeout_s,
                pool_pre_ping=True,
                # libpq's word for it is sslmode, the driver's ssl.
                connect_args=timeouts | ({"ssl": url.query["sslmode"]} if "sslmode" in url.query else {}),
            )
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"state.database_url names a PostgreSQL, for which {error.name} is missing: "
                "pip install 'localmoe[postgresql]'"
            ) from error

    def _sqlite(self, url: Any, *, num_connections: int, begin: str) -> AsyncEngine:
        engine = create_async_engine(
            url,
            pool_size=num_connections,
            max_overflow=0,
            pool_timeout=self._timeout_s,
            connect_args={"timeout": self._timeout_s},
        )

        @event.listens_for(engine.sync_engine, "connect")
        def set_up(connection: Any, _: object) -> None:
            connection.isolation_level = None  # transactions are begun below, not by Python's module
            cursor = connection.cursor()
            for pragma in (
                "synchronous = FULL",  # what a client was promised outlives a loss of power
                "foreign_keys = ON",
                f"journal_size_limit = {_MAX_LOG_BYTES}",
            ):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @event.listens_for(engine.sync_engine, "begin")
        def begin_transaction(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    @asynccontextmanager
    async def _explained(self) -> AsyncIterator[None]:
        """Turns what the drivers raise into errors of ours."""
        try:
            yield
        except DBAPIError as error:
            if _is_our_fault(error):
                raise
            raise self._storage_error(error.orig or error) from error
        except PoolTimeoutError as error:
            raise StorageError(
                f"the state database had no time within {self._timeout_s:g} s; try again"
            ) from error
        except SQLAlchemyError as error:
            raise StorageError(f"the state database failed: {type(error).__name__}") from error
        except (OSError, sqlite3.Error) as error:  # of connecting
            raise self._storage_error(error) from error

    def _storage_error(self, error: BaseException) -> StorageError:
        where = f"the state database {self._path}" if self._is_sqlite else "the state database"
        name = str(getattr(error, "sqlite_errorname", ""))
        state = str(getattr(error, "sqlstate", ""))
        is_full = isinstance(error, OSError) and error.errno in _FULL_ERRNOS
        if is_full or name.startswith("SQLITE_FULL") or state in _FULL_SQLSTATES:
            return StorageFullError(f"{where} is full: make room on its disk; nothing was changed")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            return StorageError(f"{where} is damaged: put a copy of it back, or move it away to begin a new one")
        if state == _DEADLOCK_SQLSTATE:
            return StorageError(f"others were changing the same things in {where}; try again")
        if name.startswith("SQLITE_BUSY"):
            return StorageError(
                f"{where} is being written to by another process for {self._timeout_s:g} s; try again"
            )
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            return StorageError(f"{where} cannot be written to; check its permissions and its disk")
        if name.startswith("SQLITE_IOERR"):
            return StorageFullError(
                f"{where} could not be written: its disk is full or broken; nothing was changed"
            )
        # That it is not there says enough; whatever else it is, was not foreseen.
        logger.error("%s failed: %s", where, error, exc_info=None if isinstance(error, OSError) else error)
        return StorageError(f"{where} cannot be reached or failed; the server's log says why")


def _is_our_fault(error: DBAPIError) -> bool:
    """Whether it would fail again: what was to be written, or how that was said, is wrong."""
    state = str(getattr(error.orig, "sqlstate", ""))
    return isinstance(error, DataError | IntegrityError | ProgrammingError) or state[:2] in ("22", "23", "42")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)


def _write_ahead(path: Path, timeout_s: float) -> None:
    """Give a database a write-ahead log, if it has none. Of several that do so at once each holds what the others
    need, so SQLite does not let them wait, but tells all but one that it is busy."""
    deadline_s = time.monotonic() + timeout_s
    with closing(sqlite3.connect(path, timeout=timeout_s)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                    raise
            time.sleep(_BUSY_PAUSE_S)

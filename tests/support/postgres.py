"""A PostgreSQL of one's own."""

import os
import pwd
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

_USER = "localmoe"


@contextmanager
def running_postgres() -> Iterator[Callable[[], str]]:
    """Yields a function that makes a new database and returns its URL. Where there is no PostgreSQL, tests are
    skipped."""
    programs = [_program(name) for name in ("initdb", "pg_ctl", "createdb")]
    if not all(programs):
        pytest.skip("PostgreSQL is not installed")
    initdb, pg_ctl, createdb = map(str, programs)
    account = _account()
    with TemporaryDirectory(prefix="localmoe-pg-") as directory:  # pytest's own are for its user alone
        Path(directory).chmod(0o755)
        data, sockets = Path(directory, "data"), Path(directory, "s")
        for made in (data, sockets):
            made.mkdir()
            if account is not None:
                os.chown(made, account.pw_uid, account.pw_gid)
        port = 5432  # of a socket in a directory of our own, not of the network
        _run([initdb, "-D", data, "-U", _USER, "-A", "trust", "-N", "-E", "UTF8", "--no-locale"], account)
        options = f"-c listen_addresses='' -c unix_socket_directories='{sockets}' -c fsync=off"
        _run([pg_ctl, "-D", data, "-w", "-l", data / "log", "-o", options, "start"], account)

        def make() -> str:
            name = f"test_{uuid.uuid4().hex}"
            _run([createdb, "-h", sockets, "-U", _USER, name], account)
            return f"postgresql://{_USER}@/{name}?host={sockets}&port={port}"

        try:
            yield make
        finally:
            _run([pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"], account)


def _program(name: str) -> str | None:
    found = shutil.which(name)
    beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return found or (str(beside[-1]) if beside else None)


def _account() -> pwd.struct_passwd | None:
    """Whom to run it as: it refuses to run as root."""
    if os.getuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")


def _run(command: Sequence[str | Path], account: pwd.struct_passwd | None) -> None:
    ids = {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **ids)
    assert done.returncode == 0, f"{command[0]}: {done.stderr}{done.stdout}"

"""Databases of both kinds."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from localmoe.state.config import StateConfig
from localmoe.state.database import Database
from support.postgres import running_postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[Callable[[], str]]:
    with running_postgres() as make:
        yield make


@pytest.fixture(params=["sqlite", "postgres"])
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres_url")()
    found = Database(StateConfig(database_url=url), default_path=tmp_path / "state.db")
    yield found
    await found.close()

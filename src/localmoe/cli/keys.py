"""`localmoe keys`: who may use the server."""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from localmoe.cli.identity import open_keys
from localmoe.config.settings import load_settings
from localmoe.core.errors import ConfigError
from localmoe.core.identity import RateLimits, Role
from localmoe.core.keys import KeyRecord, KeyStore
from localmoe.gateway.identity.config import RoleName
from localmoe.gateway.limits.config import MAX_LIMIT

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Make API keys, and take them back.")

_DAY_S = 86_400
_HOUR_S = 3600
_MAX_DAYS = 36_500


_Config = Annotated[
    Path | None,
    typer.Option("--config", help="File of settings; the server's own.", show_default="LOCALMOE_CONFIG's"),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Limit = Annotated[int | None, typer.Option(min=0, max=MAX_LIMIT, help="0: no limit.", show_default="its role's")]


@app.command(epilog="Example: localmoe keys create alice --role user --days 90")
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, for people.")],
    role: Annotated[RoleName, typer.Option(help="What it may do; see docs/security.md.")] = "user",
    days: Annotated[
        float | None,
        typer.Option(min=0, max=_MAX_DAYS, help="Days until it expires.", show_default="never expires"),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that it may use; may be repeated.", show_default="all models")
    ] = None,
    requests_per_minute: _Limit = None,
    tokens_per_minute: _Limit = None,
    concurrent_requests: _Limit = None,
    config: _Config = None,
) -> None:
    """Make a key, and print it: the only time that it is shown.

    A server that asks for keys takes it at once; one that asks nobody goes on like that until it is started again.
    """
    from localmoe.gateway.identity.keys import make_key

    if model and not all(model):
        raise ConfigError("--model is empty; name a model, or leave it out for all of them")
    now_s = time.time()
    limits = RateLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
    )
    try:
        key, record = make_key(
            name=name,
            role=Role[role.upper()],
            now_s=now_s,
            expires_s=None if days is None else now_s + days * _DAY_S,
            models=tuple(model or ()),
            limits=limits,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _with_store(config, lambda store: store.add(record))
    _show_key(key, record)


@app.command("list", epilog="Example: localmoe keys list --json")
def list_keys(as_json: _Json = False, config: _Config = None) -> None:
    """Show all keys, also those that open nothing any more. The keys themselves are not kept anywhere."""
    records = _with_store(config, lambda store: store.all())
    rows = [_row(record, time.time()) for record in records]
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
        return
    table = Table(Column("id", no_wrap=True))  # it is what other commands take
    for name in ("name", "role", "state", "models", "limits", "expires", "last used"):
        table.add_column(name)
    for row in rows:
        limits = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in row["limits"].items())
        expires, last_used = (row[name] or "–" for name in ("expires", "last_used"))
        name, models = escape(row["name"]), escape(", ".join(row["models"]) or "all")
        table.add_row(row["id"], name, row["role"], row["state"], models, limits or "–", expires, last_used)
    Console().print(table)


@app.command(epilog="Example: localmoe keys revoke lm-k3v9q2xabc")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="From `localmoe keys list`.")],
    config: _Config = None,
) -> None:
    """Let a key open nothing any more. A server that is running knows within seconds."""
    if not _with_store(config, lambda store: store.revoke(_id_of(key_id), at_s=time.time())):
        raise ConfigError(f"there is no key {_id_of(key_id)!r}; see `localmoe keys list`")
    typer.echo(f"{_id_of(key_id)} is revoked")


@app.command(epilog="Example: localmoe keys rotate lm-k3v9q2xabc --grace-hours 24")
def rotate(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="From `localmoe keys list`.")],
    grace_hours: Annotated[
        float, typer.Option(min=0, max=24 * 366, help="How long the old key is good for.")
    ] = 0.0,
    config: _Config = None,
) -> None:
    """Replace a key by a new one of the same name, rights, limits and expiry, that owns what the old one did."""
    from localmoe.gateway.identity.keys import rotated

    async def replace(store: KeyStore) -> tuple[str, KeyRecord]:
        wanted = _id_of(key_id)
        old = next((record for record in await store.all() if record.id == wanted), None)
        if old is None:
            raise ConfigError(f"there is no key {wanted!r}; see `localmoe keys list`")
        now_s = time.time()
        if old.is_valid(now_s):
            key, record = rotated(old, now_s=now_s)
            if await store.replace(old, record, until_s=now_s + grace_hours * _HOUR_S):
                return key, record
        raise ConfigError(f"expired or revoked already is {wanted!r}; see `localmoe keys list`")

    _show_key(*_with_store(config, replace))


def _with_store(config: Path | None, work: Callable[[KeyStore], Awaitable[T]]) -> T:
    """What `work` makes of the server's keys."""
    settings = load_settings(config=config)

    async def run() -> T:
        async with open_keys(settings) as store:
            return await work(store)

    return asyncio.run(run())


def _show_key(key: str, record: KeyRecord) -> None:
    """The key alone on standard output, so that scripts can take it."""
    print(
        f"{record.id} for {record.name}, {record.role.name.lower()}; keep it, it is not shown again:",
        file=sys.stderr,
    )
    typer.echo(key)


def _row(record: KeyRecord, now_s: float) -> dict[str, Any]:
    limits = msgspec.to_builtins(record.limits)
    return {
        "id": record.id,
        "principal": record.principal_id,
        "name": record.name,
        "role": record.role.name.lower(),
        "state": _state(record, now_s),
        "models": list(record.models),
        "limits": {name: value for name, value in limits.items() if value is not None},
        "created": _date(record.created_s),
        "expires": _date(record.expires_s),
        "revoked": _date(record.revoked_s),
        "last_used": _date(record.last_used_s),
    }


def _state(record: KeyRecord, now_s: float) -> str:
    if record.is_valid(now_s):
        return "valid" if record.revoked_s is None else "being replaced"
    return "revoked" if record.revoked_s is not None and now_s >= record.revoked_s else "expired"


def _date(time_s: float | None) -> str | None:
    return None if time_s is None else datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _id_of(key_id: str) -> str:
    """Its id, also where somebody has given the whole key."""
    return "-".join(key_id.split("-")[:2])

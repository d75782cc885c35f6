"""`localmoe config`: what is set, whether it is right, and what was set before."""

import asyncio
import contextlib
import json
import os
import pwd
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from localmoe.config.changes import setting_changes
from localmoe.config.history import ConfigHistory
from localmoe.config.layers import value_at
from localmoe.config.live import effect, setting_paths
from localmoe.config.profiles import Profile
from localmoe.config.settings import ConfigSource, LoadedSettings, Settings, config_files, read_settings
from localmoe.core.configuration import ConfigOutcome, SettingChange
from localmoe.core.errors import ConfigError
from localmoe.core.events import EventBus

if TYPE_CHECKING:
    from localmoe.config.manager import ConfigManager

app = typer.Typer(no_args_is_help=True, help="Show, check and change settings, and go back to earlier ones.")

HISTORY_FOLDER = "config-history"
"""In `LOCALMOE_HOME`."""

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML or JSON file of settings.", show_default="LOCALMOE_CONFIG's")
]
Env = Annotated[
    str | None,
    typer.Option(
        "--env", help="Lay FILE.ENV.yaml over FILE.yaml, as for production.", show_default="LOCALMOE_ENV's"
    ),
]
_Profile = Annotated[Profile | None, typer.Option("--profile", help="Defaults for what is not set otherwise.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Reason = Annotated[str, typer.Option("--reason", help="For the history.")]


@app.command(epilog="Example: localmoe config show --origin --config site.yaml --env production")
def show(
    config: Config = None,
    env: Env = None,
    profile: _Profile = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say of each setting where its value is from.")] = False,
    as_json: _Json = False,
) -> None:
    """Show what is set; secrets are masked."""
    loaded = read_settings(ConfigSource(config=config, env=env, profile=profile))
    values = loaded.shown()
    if origin:
        rows = [
            {
                "setting": ".".join(path),
                "value": value_at(values, path),
                "origin": loaded.origin(path),
                "effect": effect(path),
            }
            for path in setting_paths()
        ]
        if as_json:
            _print_json(rows)
            return
        table = Table("setting", "value", "from", "a change takes effect")
        for row in rows:
            table.add_row(row["setting"], _text(row["value"]), row["origin"], _EFFECTS[row["effect"]])
        Console().print(table)
    elif as_json:
        _print_json(values)
    else:
        import yaml

        typer.echo(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), nl=False)


_EFFECTS = {"live": "at once", "models": "with models, replaced", "restart": "at the next start"}


@app.command(epilog="Example: localmoe config check --config examples/configs/small_memory.yaml")
def check(config: Config = None, env: Env = None, profile: _Profile = None, as_json: _Json = False) -> None:
    """Check settings, by themselves and against this machine; exit status 1 if they contradict each other.

    Says what older keys stand for, what the hardware lacks for each model, and which hardware lies idle.
    """
    from localmoe.cli.machine import find_findings

    loaded = read_settings(ConfigSource(config=config, env=env, profile=profile))
    findings = find_findings(loaded.settings)
    if as_json:
        _print_json({"notes": loaded.notes, "findings": [asdict(finding) for finding in findings]})
    else:
        for note in loaded.notes:
            typer.echo(f"note: {note}")
        for finding in findings:
            typer.echo(str(finding))
        if not findings:
            files = ", ".join(map(str, loaded.files)) or "the settings"
            typer.echo(f"{files}: nothing to complain about")
    if any(finding.kind == "error" for finding in findings):
        raise typer.Exit(1)


@app.command(epilog="Example: localmoe config schema > settings.schema.json")
def schema() -> None:
    """Print the JSON Schema of configuration files."""
    from localmoe.config.json_schema import rendered_schema

    typer.echo(rendered_schema(), nl=False)


@app.command(epilog="Example: localmoe config history")
def history(
    config: Config = None,
    env: Env = None,
    limit: Annotated[int, typer.Option(min=1, help="The latest so many.")] = 20,
    as_json: _Json = False,
) -> None:
    """List the versions that were applied, the latest first."""
    versions = history_of(_settings(ConfigSource(config=config, env=env))).versions(limit)
    if as_json:
        _print_json([asdict(version) for version in versions])
        return
    table = Table("version", "time", "by", "reason", "changed")
    for version in versions:
        changed = ", ".join(change.key for change in version.changes)
        table.add_row(str(version.number), version.time, version.author, version.reason, changed)
    Console().print(table)


@app.command(epilog="Example: localmoe config diff 3 5")
def diff(
    first: Annotated[int, typer.Argument(min=1, metavar="A", help="A version of the history.")],
    second: Annotated[
        int | None, typer.Argument(min=1, metavar="[B]", help="Another.", show_default="the files as they are")
    ] = None,
    config: Config = None,
    env: Env = None,
    as_json: _Json = False,
) -> None:
    """Show which settings two versions have otherwise; secrets are masked."""
    source = ConfigSource(config=config, env=env)
    kept = history_of(_settings(source))
    before = _read_version(kept, first)
    after = read_settings(source) if second is None else _read_version(kept, second)
    changes = setting_changes(before, after)
    if as_json:
        _print_json([asdict(change) for change in changes])
        return
    _print_changes(changes, f"version {first}", "now" if second is None else f"version {second}")
    if not changes:
        same = list(before.files.values()) == list(after.files.values())
        typer.echo("they are the same" if same else "only comments or layout differ")


@app.command(epilog="Example: localmoe config rollback 3 --config site.yaml --reason 'as before the upgrade'")
def rollback(
    version: Annotated[int, typer.Argument(min=1, help="As `localmoe config history` numbers them.")],
    config: Config = None,
    env: Env = None,
    reason: _Reason = "",
) -> None:
    """Put the configuration files of a version back, byte for byte. A server that watches them applies them."""
    source = ConfigSource(config=config, env=env)
    kept = history_of(_settings(source))

    async def put_back() -> ConfigOutcome:
        try:
            manager = _offline_manager(read_settings(source), kept)
        except ConfigError as error:
            typer.echo(f"note: the files as they are cannot be used: {error}", err=True)
            manager = _offline_manager(_last_applied(source, kept), kept)
        else:
            await manager.keep_first(_user(), "before a rollback")
        return await manager.rollback(version, author=_user(), reason=reason or f"rollback to version {version}")

    _print_outcome(asyncio.run(put_back()))


@app.command("set", epilog="Example: localmoe config set dispatch.max_queued 500 --config site.yaml")
def set_value(
    key: Annotated[str, typer.Argument(help="The setting, as engine.tiers.ram_bytes.")],
    value: Annotated[str, typer.Argument(help="JSON, or plain text.")],
    config: Config = None,
    env: Env = None,
    reason: _Reason = "",
) -> None:
    """Change a setting in the configuration file, whose comments stay. A server that watches it applies it."""
    source = ConfigSource(config=config, env=env)
    loaded = read_settings(source)
    manager = _offline_manager(loaded, history_of(loaded.settings))
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value

    async def change() -> ConfigOutcome:
        await manager.keep_first(_user(), "before a change")
        return await manager.change(key, parsed, author=_user(), reason=reason)

    _print_outcome(asyncio.run(change()))


def history_of(settings: Settings) -> ConfigHistory:
    """What was applied on this machine."""
    return ConfigHistory(settings.home / HISTORY_FOLDER, max_versions=settings.configuration.max_versions)


def _settings(source: ConfigSource) -> Settings:
    """As they are, or, where a file is damaged, as if it were empty: its history must be found all the same."""
    try:
        return read_settings(source).settings
    except ConfigError:
        return _without_files(source).settings


def _without_files(source: ConfigSource) -> LoadedSettings:
    return read_settings(source, dict.fromkeys(config_files(source), b"{}"))


def _last_applied(source: ConfigSource, kept: ConfigHistory) -> LoadedSettings:
    """What is in effect where the files are damaged, as far as can be known: what was applied last, or nothing."""
    latest = kept.latest()
    if latest is not None and [file.path for file in latest.files] == list(map(str, config_files(source))):
        with contextlib.suppress(ConfigError):  # its secrets may be gone
            return read_settings(source, kept.contents(latest.number))
    return _without_files(source)


def _read_version(kept: ConfigHistory, number: int) -> LoadedSettings:
    """The settings of a version, whatever file it is of."""
    contents = kept.contents(number)
    *overlays, base = contents
    env = overlays[0].stem.removeprefix(f"{base.stem}.") if overlays else None
    source = ConfigSource(config=base, env=env)
    return read_settings(source, {**dict.fromkeys(config_files(source), b"{}"), **contents})


def _offline_manager(loaded: LoadedSettings, kept: ConfigHistory) -> "ConfigManager":
    """Of no server: changes files and the history only."""
    from localmoe.cli.machine import find_findings
    from localmoe.config.manager import ConfigManager

    async def change_models(before: Settings, after: Settings) -> None:
        pass

    return ConfigManager(loaded, history=kept, change_models=change_models, examine=find_findings, bus=EventBus())


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _print_outcome(outcome: ConfigOutcome) -> None:
    for note in outcome.notes:
        typer.echo(f"note: {note}", err=True)
    _print_changes(outcome.changes, "before", "now")
    for finding in outcome.findings:
        typer.echo(finding, err=True)
    typer.echo(f"version {outcome.version}")


def _print_changes(changes: Sequence[SettingChange], before: str, after: str) -> None:
    if not changes:
        return
    table = Table("setting", before, after)
    for change in changes:
        table.add_row(change.key, _text(change.before), _text(change.after))
    Console().print(table)


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _print_json(value: Sequence[Any] | Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))

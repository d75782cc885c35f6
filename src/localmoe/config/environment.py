"""Reads settings from environment variables; nothing else in LocalMoE looks at them."""

import re
from collections.abc import Mapping
from typing import Any, get_origin

from localmoe.config.files import parse_json
from localmoe.config.schema import Schema, checked, is_list, nearest, plain_number
from localmoe.core.errors import ConfigError

PREFIX = "LOCALMOE_"
_SEPARATOR = "__"
_BUILD_VARIABLES = {"LOCALMOE_DEVELOPER"}
"""Of the package's build."""
_OF_A_SERVICE = re.compile("(tcp|udp|sctp)://")
"""Kubernetes tells containers of a service called localmoe by variables of such values, one of them LOCALMOE_PORT."""


def read_environment(environ: Mapping[str, str], schema: Schema) -> list[tuple[str, dict[str, Any]]]:
    """Each variable that is set, and what it says as a nested mapping; single settings before whole blocks.

    Blocks and lists are in JSON. A variable that is set to nothing is not set. One whose name is like no setting's
    may be another program's, and is not looked at.

    Raises:
        ConfigError: a name is nearly a setting's, or a value is no JSON; the message has a line for each.
    """
    problems: list[str] = []
    found: list[tuple[int, str, dict[str, Any]]] = []
    for variable, text in sorted(environ.items()):
        if not variable.upper().startswith(PREFIX) or not text or variable.upper() in _BUILD_VARIABLES:
            continue
        if _OF_A_SERVICE.match(text):
            continue
        path = tuple(variable[len(PREFIX) :].lower().split(_SEPARATOR))
        kind = _kind(variable, path, schema, problems)
        if kind is not None:
            try:
                value = _value(variable, text, path, kind, schema)
            except ConfigError as error:
                problems.append(str(error))
                continue
            for part in reversed(path):
                value = {part: value}
            found.append((-len(path), variable, value))
    if problems:
        raise ConfigError("\n".join(problems))
    return [(variable, values) for _, variable, values in sorted(found, key=lambda entry: entry[0])]


def _kind(variable: str, path: tuple[str, ...], schema: Schema, problems: list[str]) -> Any:
    """The schema's entry of a variable; None, and perhaps a problem, where it has none."""
    kind: Any = schema
    for depth, part in enumerate(path):
        if isinstance(kind, dict) and part in kind:
            kind = kind[part]
            continue
        block = kind if isinstance(kind, dict) else {}
        near = nearest(path[: depth + 1], block, schema)
        if near is not None:
            rest = path[depth + 1 :] if len(near) == depth + 1 else ()
            problems.append(f"{variable} is not a setting; did you mean {_variable((*near, *rest))}?")
        elif depth:
            problems.append(f"{variable} is not a setting; those of its block are {', '.join(block) or 'none'}")
        return None
    return kind


def _value(variable: str, text: str, path: tuple[str, ...], kind: Any, schema: Schema) -> Any:
    """Raises ConfigError."""
    where = f"environment variable {variable}"
    if isinstance(kind, dict):
        block = parse_json(text, f"{where}, a block of settings,")
        if not isinstance(block, dict):
            raise ConfigError(f'{where} must be a block of settings, as {{"name": value}}')
        problems: list[str] = []
        values = checked(block, kind, schema, problems, *path)
        if problems:
            raise ConfigError("\n".join(f"{where}: {problem}" for problem in problems))
        return values
    if is_list(kind):
        return parse_json(text, f"{where}, a list,")
    if get_origin(kind) is dict:
        return parse_json(text, f"{where}, a block,")
    return plain_number(text, kind)


def _variable(path: tuple[str, ...]) -> str:
    return PREFIX + _SEPARATOR.join(path).upper()

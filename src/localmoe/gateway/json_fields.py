"""JSON in requests whose shape is not ours to say: schemas of tools, names for templates. It is bounded."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from localmoe.core.errors import InvalidRequestError

MAX_JSON_BYTES = 2**16
MAX_JSON_DEPTH = 32
MAX_VALUES_TOGETHER = 2**15
"""Objects, lists and what is in them, in all tools or documents of a request. To check a schema takes some
microseconds, in which nobody is served; a megabyte of descriptions has fewer."""
_MAX_INTEGER = 2**63
_CONTAINERS = (dict, list)
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")


def check_json(value: Any) -> Any:
    """Give the value back, or raise InvalidRequestError where it is too large or too deep, or no JSON, or has an
    integer of more than 64 bits."""
    _check_shape(value)
    try:
        num_bytes = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError as error:  # a lone surrogate is one, too
        raise InvalidRequestError(f"it is no JSON: {error}") from error
    if num_bytes > MAX_JSON_BYTES:
        raise InvalidRequestError(f"its JSON has {num_bytes} bytes; at most {MAX_JSON_BYTES} are allowed")
    return value


def check_schema(value: dict[str, Any]) -> dict[str, Any]:
    """Give the value back, or raise InvalidRequestError where it is not the JSON Schema of an object."""
    check_json(value)
    if value.get("type", "object") != "object":
        raise InvalidRequestError(f"arguments are an object; its type is {value['type']!r}"[:200], param="type")
    pending: list[tuple[str, Any]] = [("", value)]
    while pending:
        path, schema = pending.pop()
        if isinstance(schema, bool):
            continue
        if not isinstance(schema, dict):
            raise InvalidRequestError(
                "it is no JSON Schema, which is an object or true or false", param=path or None
            )
        _check_keywords(schema, path)
        pending += inner_schemas(schema, path)
    return value


def _check_num_values(value: list[Any]) -> list[Any]:
    num_values = 0
    pending: list[Any] = [value]
    while pending:
        outer = pending.pop()
        num_values += len(outer)
        if num_values > MAX_VALUES_TOGETHER:
            raise InvalidRequestError(f"more than {MAX_VALUES_TOGETHER} values are in it")
        pending += [one for one in _values(outer) if isinstance(one, _CONTAINERS)]
    return value


BOUNDED_TOGETHER = BeforeValidator(lambda value: _check_num_values(value) if isinstance(value, list) else value)
"""Of lists of such JSON: each has a bound, and so have all values of all of them."""
JsonObject = Annotated[dict[str, Any], AfterValidator(check_json)]
ObjectSchema = Annotated[dict[str, Any], AfterValidator(check_schema)]


def _check_keywords(schema: dict[str, Any], path: str) -> None:
    kinds = schema.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not all(kind in _TYPES for kind in kinds):
        raise InvalidRequestError(f"it must be one of {', '.join(_TYPES)}", param=_inside(path, "type"))
    for name, kind, what in (
        ("required", list, "a list of names"),
        ("enum", list, "a list"),
        ("$ref", str, "a text"),
        ("pattern", str, "a text"),
    ):
        if name in schema and not isinstance(schema[name], kind):
            raise InvalidRequestError(f"it must be {what}", param=_inside(path, name))
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise InvalidRequestError("it must be a list of names", param=_inside(path, "required"))


def inner_schemas(schema: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Schemas inside of one, each with its path. Raises InvalidRequestError for what is none."""
    for keyword in _SCHEMAS_BY_NAME:
        schemas = schema.get(keyword, {})
        if not isinstance(schemas, dict):
            raise InvalidRequestError("it must be an object of schemas", param=_inside(path, keyword))
        yield from ((_inside(path, keyword, name), inner) for name, inner in schemas.items())
    for keyword in _SCHEMA_LISTS:
        schemas = schema.get(keyword, [])
        if not isinstance(schemas, list):
            raise InvalidRequestError("it must be a list of schemas", param=_inside(path, keyword))
        yield from ((_inside(path, f"{keyword}[{index}]"), inner) for index, inner in enumerate(schemas))
    yield from ((_inside(path, keyword), schema[keyword]) for keyword in _SCHEMAS if keyword in schema)


def _inside(path: str, *names: str) -> str:
    return ".".join([path, *names] if path else names)


def _values(outer: Any) -> Iterable[Any]:
    return outer.values() if isinstance(outer, dict) else outer


def _check_shape(value: Any) -> None:
    """Raise InvalidRequestError for what would take long to write, or could not be."""
    num_values = 0
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        num_values += len(level)
        if num_values > MAX_JSON_BYTES:
            raise InvalidRequestError(f"its JSON has more than the {MAX_JSON_BYTES} bytes allowed")
        if any(isinstance(one, int) and not -_MAX_INTEGER <= one < _MAX_INTEGER for one in level):
            raise InvalidRequestError("it has an integer of more than 64 bits")
        level = [inner for outer in level if isinstance(outer, _CONTAINERS) for inner in _values(outer)]
        if not level:
            return
    raise InvalidRequestError(f"it is nested deeper than {MAX_JSON_DEPTH} levels")

"""Reads a configuration file, YAML or JSON, into plain values, and shows such values in messages; what they mean is
for others to say."""

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.core.errors import ConfigError

if TYPE_CHECKING:
    import yaml

MAX_FILE_BYTES = 1 << 20
"""The most for a configuration file."""
_MAX_VALUES = 1 << 18
"""In a file, with what aliases stand for written out."""
_MAX_DEPTH = 32
"""Of blocks in blocks."""
_MAX_INTEGER = 2**63
_MERGE_TAG = "tag:yaml.org,2002:merge"


def read_config_bytes(path: Path) -> bytes:
    """What a file holds. Raises ConfigError: it cannot be read, or is larger than 1 MiB."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_FILE_BYTES} bytes, the most for a configuration file")
    return data


def parse_config(data: bytes, path: Path) -> dict[str, Any]:
    """The mapping that a file's bytes hold; an empty file holds an empty one.

    Args:
        path: JSON where it ends in `.json`, else YAML 1.1, of which only plain values are taken, never objects.

    Raises:
        ConfigError: it is neither, names a key twice, or is no mapping.
    """
    try:
        text = data.decode()
        values = parse_json(text, str(path)) if path.suffix == ".json" else _parse_yaml(text, path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no settings: its top level must be `name: value` lines")
    refuse_odd_values(values, str(path))
    return values


def refuse_odd_values(values: Any, where: str) -> None:
    """Refuse what could not be kept in the history, or shown, whatever it is to be.

    Args:
        where: they stand, for messages.

    Raises:
        ConfigError: something is nested too deeply, has half characters in it, more than 64 bits, or is a date, bytes
            or a set.
    """
    level: list[tuple[str, Any]] = [("", values)]
    for _ in range(_MAX_DEPTH):
        inner: list[tuple[str, Any]] = []
        for name, value in level:
            at = f"{where}: {shown(name)}" if name else where
            match value:
                case dict():
                    inner += [(name, key) for key in value] + [(str(key), under) for key, under in value.items()]
                case list():
                    inner += [(name, under) for under in value]
                case str() if not value.isascii() and not _is_unicode(value):
                    raise ConfigError(f"{at} has text in it that is not Unicode")
                case int() if not -_MAX_INTEGER <= value < _MAX_INTEGER:
                    raise ConfigError(f"{at} has an integer of more than 64 bits")
                case None | str() | int() | float():
                    pass
                case _:  # what YAML has beyond JSON
                    kind = type(value).__name__
                    raise ConfigError(
                        f"{at} is of YAML's type {kind!r}, as no setting is; if it is text, quote it"
                    )
        if not inner:
            return
        level = inner
    raise ConfigError(f"{where} is nested too deeply")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str, where: str) -> Any:
    """JSON's value.

    Args:
        where: it is from, for messages.

    Raises:
        ConfigError: it is none, names a key twice, or is nested too deeply.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ConfigError(f"{where}: {key!r} is set twice in one block")
            values[key] = value
        return values

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    except ValueError as error:  # of int(), about Python's own bound
        raise ConfigError(f"{where} has an integer of too many digits") from error


def shown(value: object) -> str:
    """A value in a message, whatever its size."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of so many digits that Python does not write it
        return "a number of thousands of digits"


def _parse_yaml(text: str, path: Path) -> Any:
    import yaml  # here: commands that read no file start without it

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_keys(node, path)
            _refuse_size(node, path)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        # Values that are not what they seem, such as a date of month 13 or `!!bool maybe`.
        raise ConfigError(f"{path} is not YAML: {error}") from error


def _refuse_keys(root: "yaml.Node", path: Path) -> None:
    """Refuse keys that are set twice, of which PyYAML would take the last; keys that are blocks; and merge keys
    (`<<`), which PyYAML writes out, however often they name each other. Nodes that aliases share are looked at once.
    """
    import yaml

    nodes, seen = [root], {id(root)}
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, _ in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{path}: a name must be plain text, not a block as in line {line}")
                if key.tag == _MERGE_TAG:
                    raise ConfigError(f"{path}: merge keys (`<<`) are not supported; there is one in line {line}")
                if (key.tag, key.value) in keys:
                    raise ConfigError(f"{path}: {key.value!r} is set twice in one block, again in line {line}")
                keys.add((key.tag, key.value))
        for child in _children(node):
            if id(child) not in seen:
                seen.add(id(child))
                nodes.append(child)


def _refuse_size(root: "yaml.Node", path: Path) -> None:
    """Refuse aliases that stand for more than anybody writes, or for what they are in. Nodes are looked at once."""
    sizes: dict[int, int] = {}
    under_way: set[int] = set()
    nodes = [root]
    while nodes:
        node = nodes[-1]
        children = _children(node)
        if id(node) not in under_way:
            under_way.add(id(node))
            if any(id(child) in under_way and id(child) not in sizes for child in children):
                raise ConfigError(f"{path}: an alias in line {node.start_mark.line + 1} stands for what it is in")
            nodes += [child for child in children if id(child) not in sizes]
            continue
        nodes.pop()
        sizes[id(node)] = 1 + sum(sizes[id(child)] for child in children)
        if sizes[id(node)] > _MAX_VALUES:
            raise ConfigError(f"{path}: aliases (`*`) stand for more than {_MAX_VALUES} values")


def _children(node: "yaml.Node") -> "list[yaml.Node]":
    import yaml

    if isinstance(node, yaml.MappingNode):
        return [value for _, value in node.value]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []

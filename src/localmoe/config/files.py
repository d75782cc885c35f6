"""Reads a configuration file, YAML or JSON, into plain values, and shows such values in messages; what they mean is
for others to say."""

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmoe.core.errors import ConfigError

if TYPE_CHECKING:
    import yaml

_MAX_BYTES = 1 << 20
_MERGE_TAG = "tag:yaml.org,2002:merge"


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping that a file holds; an empty file holds an empty one.

    Args:
        path: JSON where it ends in `.json`, else YAML 1.1, of which only plain values are taken, never objects.

    Raises:
        ConfigError: it cannot be read, is larger than 1 MiB, is neither, names a key twice, or is no mapping.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes, the most for a configuration file")
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
    return values


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
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{path}: a name must be plain text, not a block as in line {line}")
                if key.tag == _MERGE_TAG:
                    raise ConfigError(f"{path}: merge keys (`<<`) are not supported; there is one in line {line}")
                if (key.tag, key.value) in keys:
                    raise ConfigError(f"{path}: {key.value!r} is set twice in one block, again in line {line}")
                keys.add((key.tag, key.value))
                children.append(value)
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                nodes.append(child)

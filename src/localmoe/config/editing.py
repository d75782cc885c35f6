"""Changes single settings in a file, and leaves all else of it as it is: comments, order, layout."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localmoe.config.files import MAX_FILE_BYTES, parse_config
from localmoe.config.layers import merged, nested
from localmoe.core.errors import ConfigError

_MAX_WIDTH = 1 << 20
"""Lines are not broken."""


def edited(data: bytes, path: Path, changes: Mapping[tuple[str, ...], Any]) -> bytes:
    """A file's contents with these settings, by their names from the top level on.

    Raises:
        ConfigError: the file cannot be read, or cannot be changed without changing more than that.
    """
    wanted = parse_config(data, path)
    for names, value in changes.items():
        # First without a value: what is a mapping itself takes the old one's place, and is not merged with it.
        wanted = merged(merged(wanted, nested(names, None)), nested(names, value))
    if path.suffix == ".json":
        made = (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
    else:
        made = _edited_yaml(data.decode(), changes).encode()
    if len(made) > MAX_FILE_BYTES:
        raise ConfigError(f"{path} would be larger than {MAX_FILE_BYTES} bytes, the most for a configuration file")
    if parse_config(made, path) != wanted:
        raise ConfigError(f"{path} cannot be changed by itself without changing more than that; edit it by hand")
    return made


def _edited_yaml(text: str, changes: Mapping[tuple[str, ...], Any]) -> str:
    rest: dict[tuple[str, ...], Any] = {}
    for names, value in changes.items():
        replaced = _replaced(text, names, value)
        if replaced is None:
            rest[names] = value
        else:
            text = replaced
    return _with_new(text, rest) if rest else text


def _replaced(text: str, names: Sequence[str], value: Any) -> str | None:
    """With a value in the place of another one; None where there is none, or one of several lines."""
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    for name in names:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        node = next((inner for key, inner in pairs if key.value == name), None)
    if node is None or node.start_mark.line != node.end_mark.line or node.start_mark.index == node.end_mark.index:
        return None
    # JSON is YAML, too.
    return text[: node.start_mark.index] + json.dumps(value, ensure_ascii=False) + text[node.end_mark.index :]


def _with_new(text: str, changes: Mapping[tuple[str, ...], Any]) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.error import YAMLError
    from ruamel.yaml.util import load_yaml_guess_indent

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = _MAX_WIDTH
    yaml.brace_single_entry_mapping_in_flow_sequence = True
    try:
        _, sequence, offset = load_yaml_guess_indent(text)
        yaml.indent(mapping=_mapping_indent(text), sequence=sequence or 4, offset=2 if offset is None else offset)
        root = yaml.load(text)
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"the file cannot be changed by itself: {error}; edit it by hand") from error
    if root is None:
        root = CommentedMap()
    for names, value in changes.items():
        block = root
        for name in names[:-1]:
            if not isinstance(block.get(name), Mapping):
                block[name] = CommentedMap()
            block = block[name]
        block[names[-1]] = _quoted(value)
    stream = io.StringIO()
    yaml.dump(root, stream)
    return stream.getvalue()


def _mapping_indent(text: str) -> int:
    """Columns between a block's name and the names in it."""
    import yaml

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            indent: int = value.value[0][0].start_mark.column - key.start_mark.column
            return indent
    return 2


def _quoted(value: Any) -> Any:
    """With texts in quotes: unquoted, some of them would be read as something else."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    if isinstance(value, Mapping):
        return {key: _quoted(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_quoted(inner) for inner in value]
    return value

"""Bounded reading of a model directory's text files. Every complaint begins with the file's path."""

import json
from pathlib import Path
from typing import Any

from localmoe.core.errors import CheckpointError

MAX_FILE_BYTES = 64 * 2**20
"""The largest honest one, a tokenizer of 260 000 entries, has about half of this."""


def read_text(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The file's text.

    Raises:
        CheckpointError: the file is missing, larger than `max_bytes` or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: larger than the {max_bytes} bytes that such a file may have")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON or holds no object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """As `read_json_object`; a file that does not exist reads as an empty object."""
    return read_json_object(path) if path.exists() else {}

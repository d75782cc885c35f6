"""Bounded reading of the JSON files that lie beside weights."""

import json
from pathlib import Path
from typing import Any

from localmoe.core.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
"""The largest honest one, a tokenizer of 260 000 entries, has about half of this."""


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing, larger than `max_bytes`, not UTF-8, not JSON or not an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: larger than the {max_bytes} bytes that such a file may have")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value

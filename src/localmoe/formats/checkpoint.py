"""Hugging Face checkpoint directories: `config.json` and weights in safetensors.

Only safetensors is read: other weight files are pickles, which run code when loaded. Code that a checkpoint
names in `auto_map` is never looked at either.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from localmoe.core.errors import CheckpointError, ModelBuildError
from localmoe.formats.files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 256 * 2**20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NAMED_AT_MOST = 3


class Checkpoint:
    """A checkpoint whose headers have been read and agree with its index; weights are read on demand."""

    def __init__(self, path: Path, config: dict[str, Any], readers: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        """Empty where the checkpoint has none."""
        self._readers = readers
        """Tensor name to the open safetensors file that holds it."""
        self.names = frozenset(readers)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the configuration and every safetensors header; no weights.

        Raises:
            CheckpointError: a file is missing, damaged, or of a kind that is not read.
        """
        config = read_json_object(path / "config.json")
        if (path / INDEX_FILE).exists():
            readers = _open_shards(path, _read_index(path / INDEX_FILE))
        elif (path / SINGLE_FILE).exists():
            reader = _open_file(path / SINGLE_FILE)
            readers = dict.fromkeys(reader.keys(), reader)
        else:
            raise CheckpointError(f"{path}: {_why_no_weights(path)}")
        return cls(path, config, readers)

    @property
    def source(self) -> str:
        """What was converted, for the record in a store: the directory's name and its architecture."""
        return f"{self.path.resolve().name} ({self.config.get('model_type', 'unknown')})"

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Raises CheckpointError where there is no such tensor."""
        return tuple(self._get(name, lambda reader: reader.get_slice(name).get_shape()))

    def read(self, name: str) -> torch.Tensor:
        """One tensor in the file's own dtype; its pages are read from the file as they are touched.

        Raises:
            CheckpointError: no such tensor, or its dtype is unknown here.
        """
        tensor: torch.Tensor = self._get(name, lambda reader: reader.get_tensor(name))
        return tensor

    def _get(self, name: str, get: Callable[[Any], Any]) -> Any:
        if name not in self._readers:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        try:
            return get(self._readers[name])
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to the name of its shard, a plain file name in the same directory."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map")
    for name, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or any(c in shard for c in "/\\\0")
            or not shard.endswith(".safetensors")
            or shard.startswith(".")
        ):
            raise CheckpointError(
                f"{path}: tensor {name!r:.100} is said to be in {shard!r:.100}; "
                "only the plain name of a .safetensors file in the same directory is allowed"
            )
    return weight_map


def _open_shards(path: Path, weight_map: dict[str, str]) -> dict[str, Any]:
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (path / shard).is_file()]:
        raise CheckpointError(f"{path}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}")
    readers = {shard: _open_file(path / shard) for shard in shards}
    held = {shard: set(reader.keys()) for shard, reader in readers.items()}
    if absent := [name for name, shard in weight_map.items() if name not in held[shard]]:
        raise CheckpointError(f"{path}: tensors are not in the shards that the index names: {_some(absent)}")
    return {name: readers[shard] for name, shard in weight_map.items()}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(names[:_NAMED_AT_MOST]) + more


def _why_no_weights(path: Path) -> str:
    if pickles := sorted(file.name for pattern in _PICKLES for file in path.glob(pattern)):
        return (
            f"holds {_some(pickles)} but no safetensors; pickled weights run code when loaded and are refused. "
            "Convert them with transformers' save_pretrained"
        )
    return f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"


def write_shards(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write tensors as they come into safetensors shards, and the index that names them.

    Holds at most one shard in memory. The directory is not seen as a checkpoint until the index, written last,
    is there.

    Args:
        path: an existing directory.
        tensors: names and contiguous tensors.
        shard_bytes: a shard is closed when the next tensor would make it larger.

    Raises:
        ModelBuildError: the file system refused something.
    """
    pending: dict[str, torch.Tensor] = {}
    shards: list[list[str]] = []
    pending_bytes = total_bytes = 0

    def close_shard() -> None:
        try:
            save_file(pending, path / f"{len(shards)}.part", metadata={"format": "pt"})
        except SafetensorError as error:
            raise ModelBuildError(f"{path}: weights cannot be written: {error}") from error
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            close_shard()
            pending_bytes = 0
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    close_shard()

    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        shard = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"{index}.part").rename(path / shard)
        weight_map |= dict.fromkeys(names, shard)
    document = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (path / INDEX_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
    for shard in set(weight_map.values()):
        # The safetensors library makes files for their owner alone, whatever the umask says.
        shutil.copymode(path / INDEX_FILE, path / shard)

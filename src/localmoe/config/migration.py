"""Files of older versions, read as if they were of today's.

Version 1 is that of the project's first design documents, whose files load unchanged: what has a successor is taken
for it, all else is left out, and a note says which. A file that says `config_version: 2` has none of their keys. One
that says nothing may be of either.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localmoe.config.files import shown
from localmoe.config.layers import merged, nested
from localmoe.config.seed_keys import (
    INSTANCES,
    MODEL_NAME,
    MOVED_KEYS,
    RETIRED_KEYS,
    RETIRED_KEYS_OF,
    SIZES,
    SIZES_KEYS,
    TUNING_BLOCKS,
)

CONFIG_VERSION = 2
"""Of today's names of settings."""
VERSION_KEY = "config_version"
_RETIRING = ("vllm", "deepspeed")
"""Kinds of engines whose settings had other names."""


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """A file's values under today's names."""

    values: Mapping[str, Any]
    """That stood there under these names."""
    translated: Mapping[str, Any]
    """What older names stand for; goes below the others."""
    notes: Sequence[str]
    """What became of each older name."""
    is_old: bool
    """Whether it may be of an older version."""


def migrate(values: Mapping[str, Any]) -> Migrated:
    """Read a file of any version.

    Args:
        values: all that it holds. Names that were never any are left for others to refuse.

    Raises:
        ValueError: it is of a version to come, or an older key has a value that it never had.
    """
    own = dict(values)
    version = own.pop(VERSION_KEY, None)
    if version is not None and (type(version) is not int or not 1 <= version <= CONFIG_VERSION):
        newer = type(version) is int and version > CONFIG_VERSION
        advice = "update LocalMoE, or use the file's older version" if newer else f"write {CONFIG_VERSION}"
        raise ValueError(
            f"{VERSION_KEY} is {shown(version)}, and this LocalMoE knows 1 to {CONFIG_VERSION}; {advice}"
        )
    if version == CONFIG_VERSION:
        return Migrated(values=own, translated={}, notes=(), is_old=False)
    notes: list[str] = []
    translated: dict[str, Any] = {}
    for step in (_take_instances, _take_sizes, _take_engine_blocks, _take_models, _take_tuning_blocks):
        own, found = step(own, notes)
        translated = merged(found, translated)
    for key in [key for key in own if key in RETIRED_KEYS and key != SIZES]:
        notes.append(_ignored(key, RETIRED_KEYS[key]))
        del own[key]
    return Migrated(values=own, translated=translated, notes=notes, is_old=True)


_Step = tuple[dict[str, Any], dict[str, Any]]
"""What is left of a file's values, and what those that were taken stand for."""


def _take_instances(own: dict[str, Any], notes: list[str]) -> _Step:
    """The list `vllm_instances` as models, each with one vLLM engine."""
    instances = own.pop(INSTANCES, None)
    if instances is None:
        return own, {}
    models = []
    for one in instances if isinstance(instances, list) else [None]:
        if not isinstance(one, Mapping) or MODEL_NAME not in one:
            raise ValueError(f"{INSTANCES} must be a list of blocks that each have a {MODEL_NAME}")
        settings = {key: value for key, value in one.items() if key != MODEL_NAME}
        models.append({"model": one[MODEL_NAME], "engines": [{"engine": "vllm", "settings": settings}]})
    notes.append(f"{INSTANCES}: taken as models, each with an engine of kind vllm and these settings")
    return {**own, "models": [*(own.get("models") or []), *models]}, {}


def _take_sizes(own: dict[str, Any], notes: list[str]) -> _Step:
    """The block `model`, sizes that nothing reads."""
    block = own.get(SIZES)
    if not isinstance(block, Mapping):
        return own, {}
    unknown = [str(key) for key in block if key not in SIZES_KEYS]
    if unknown:
        raise ValueError(
            f"{SIZES}.{unknown[0]} was never a setting; name models under `models`, as in `models: [{{model: NAME}}]`"
        )
    notes += [_ignored(f"{SIZES}.{key}", RETIRED_KEYS[key]) for key in block]
    return {key: value for key, value in own.items() if key != SIZES}, {}


def _take_engine_blocks(own: dict[str, Any], notes: list[str]) -> _Step:
    """Keys of the blocks `vllm` and `deepspeed`, among them the model that vLLM served."""
    translated: dict[str, Any] = {}
    for kind in _RETIRING:
        block = own.get(kind)
        if not isinstance(block, Mapping):
            continue
        name = block.get(MODEL_NAME)
        if isinstance(name, str):
            if own.get("models"):
                notes.append(_ignored(f"{kind}.{MODEL_NAME}", "models are named under `models`"))
            else:
                notes.append(f"{kind}.{MODEL_NAME}: taken as a model with an engine of kind {kind}")
                models = translated.setdefault("models", [])
                models.append({"model": name, "engines": [{"engine": kind}]})
            block = {key: value for key, value in block.items() if key != MODEL_NAME}
        left, moved = _without_retired(kind, block, kind, notes)
        own = {**own, kind: left}
        translated = merged(translated, {kind: moved} if moved else {})
    return own, translated


def _take_models(own: dict[str, Any], notes: list[str]) -> _Step:
    """The same keys as settings of single engines, and a model's one name."""
    models = own.get("models")
    if not isinstance(models, list):
        return own, {}
    taken = []
    for at, model in enumerate(models):
        if isinstance(model, Mapping) and "name" in model:
            notes.append(f"models.{at}.name: taken as served_model_name")
            rest = {key: value for key, value in model.items() if key != "name"}
            model = rest if model["name"] is None else {"served_model_name": model["name"], **rest}
        engines = model.get("engines") if isinstance(model, Mapping) else None
        if isinstance(engines, list):
            engines = [_engine(f"models.{at}.engines.{place}", one, notes) for place, one in enumerate(engines)]
            model = {**model, "engines": engines}
        taken.append(model)
    return {**own, "models": taken}, {}


def _engine(where: str, engine: Any, notes: list[str]) -> Any:
    settings = engine.get("settings") if isinstance(engine, Mapping) else None
    if not isinstance(settings, Mapping) or engine.get("engine") not in _RETIRING:
        return engine
    left, moved = _without_retired(engine["engine"], settings, f"{where}.settings", notes)
    return {**engine, "settings": {**moved, **left}}


def _without_retired(kind: str, block: Mapping[str, Any], where: str, notes: list[str]) -> _Step:
    """Settings of an engine without keys that are none any more, and those that took the place of some."""
    left: dict[str, Any] = {}
    moved: dict[str, Any] = {}
    for key, value in block.items():
        successor = MOVED_KEYS.get(kind, {}).get(key)
        if successor is not None:
            notes.append(f"{where}.{key}: taken as {kind}.{successor}")
            moved[successor] = value
        elif key in RETIRED_KEYS_OF[kind]:
            notes.append(_ignored(f"{where}.{key}", RETIRED_KEYS_OF[kind][key]))
        else:
            left[key] = value
    return left, moved


def _take_tuning_blocks(own: dict[str, Any], notes: list[str]) -> _Step:
    translated: dict[str, Any] = {}
    for block, keys in TUNING_BLOCKS.items():
        values = own.get(block)
        if not isinstance(values, Mapping):
            continue
        known = {name: value for name, value in values.items() if name in keys}
        for name, value in known.items():
            key = keys[name]
            if not _is_of(key.kind, value):
                raise ValueError(f"{block}.{name} is {shown(value)}; it must be of type {key.kind.__name__}")
            notes.append(f"{block}.{name}: {key.note}")
            if key.setting is not None:
                translated = merged(translated, nested(key.setting, value))
        own = {**own, block: {name: value for name, value in values.items() if name not in keys}}
    return own, translated


def _is_of(kind: type, value: object) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int) or (kind is float and isinstance(value, float))


def _ignored(key: str, reason: str) -> str:
    return f"{key}: not a setting any more, and ignored: {reason}"

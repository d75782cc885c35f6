"""The JSON Schema of configuration files, made of the settings' classes, for editors and other programs."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pydantic import TypeAdapter

from localmoe.backends.remote_config import RemoteConfig
from localmoe.config.migration import CONFIG_VERSION, VERSION_KEY
from localmoe.config.schema import is_list
from localmoe.config.secrets import is_secret
from localmoe.config.seed_keys import (
    INSTANCES,
    MODEL_NAME,
    RETIRED_KEYS,
    RETIRED_KEYS_OF,
    SIZES,
    SIZES_KEYS,
    TUNING_BLOCKS,
)
from localmoe.config.settings import NOT_IN_FILES, Settings

SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"
_KINDS = {"native": "EngineConfig", "vllm": "VllmConfig", "deepspeed": "DeepSpeedConfig", "remote": "RemoteConfig"}
_JSON_TYPES = {int: "integer", float: "number", bool: "boolean"}


def file_schema() -> dict[str, Any]:
    """What a file may hold. Older keys are in it as deprecated, with what became of them."""
    schema = Settings.model_json_schema(ref_template="#/$defs/{model}")
    definitions: dict[str, Any] = schema["$defs"]
    definitions["RemoteConfig"] = TypeAdapter(RemoteConfig).json_schema()
    for component in [Settings, RemoteConfig, *_components(Settings)]:
        block = schema if component is Settings else definitions[component.__name__]
        _describe(block, component)
    for name in NOT_IN_FILES:
        del schema["properties"][name]
    _refer_to_settings(definitions)
    _add_older_keys(schema)
    schema["properties"] |= {
        VERSION_KEY: {
            "type": "integer",
            "minimum": 1,
            "maximum": CONFIG_VERSION,
            "description": f"Of the names in this file; with today's, {CONFIG_VERSION}, no older key is taken.",
        }
    }
    return {"$schema": SCHEMA_ID, **schema, "title": "LocalMoE configuration file"}


def rendered_schema() -> str:
    """The same as text."""
    return json.dumps(file_schema(), indent=2, ensure_ascii=False) + "\n"


def attribute_docs(component: type) -> dict[str, str]:
    """What the source says of each attribute, in the string below it."""
    docs: dict[str, str] = {}
    for base in reversed(component.__mro__):
        if not is_dataclass(base) and base is not component:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for line, after in zip(tree.body, tree.body[1:], strict=False):
            match line, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _components(component: Any) -> Iterator[type]:
    """The dataclasses of a component's settings, and theirs."""
    kinds: list[Any]
    if component is Settings:
        kinds = [field.annotation for field in Settings.model_fields.values()]
    else:
        kinds = [field.type for field in fields(component)]
    for kind in kinds:
        inner = get_args(kind)[0] if is_list(kind) else kind
        if isinstance(inner, type) and is_dataclass(inner):
            yield inner
            yield from _components(inner)


def _describe(block: dict[str, Any], component: type) -> None:
    docs = attribute_docs(component)
    block["additionalProperties"] = False
    block["description"] = " ".join((component.__doc__ or "").split())
    for name, kind in block["properties"].items():
        said = [docs[name]] if name in docs else []
        if is_secret(name):
            said.append("A secret: env:NAME or file:/path.")
        if said:
            kind["description"] = " ".join(said)


def _refer_to_settings(definitions: dict[str, Any]) -> None:
    """An engine's own settings are those of its kind; what other packages take is for them to say."""
    definitions["RemoteConfig"]["required"].remove("model")  # the model's name, if nothing is said
    definitions["EngineSpec"]["allOf"] = [
        {
            "if": _is_kind(kind),
            "then": {"properties": {"settings": {"$ref": f"#/$defs/{definition}"}}},
        }
        for kind, definition in _KINDS.items()
    ]


def _is_kind(kind: str) -> dict[str, Any]:
    known = {"properties": {"engine": {"const": kind}}}
    return known if kind == "native" else {**known, "required": ["engine"]}


def _add_older_keys(schema: dict[str, Any]) -> None:
    definitions, properties = schema["$defs"], schema["properties"]
    for kind, definition in (("vllm", "VllmConfig"), ("deepspeed", "DeepSpeedConfig")):
        definitions[definition]["properties"] |= _deprecated(RETIRED_KEYS_OF[kind])
    definitions["ModelSpec"]["properties"] |= _deprecated(RETIRED_KEYS_OF["models"])
    properties |= _deprecated({key: note for key, note in RETIRED_KEYS.items() if key != SIZES})
    properties[SIZES] = _old_block(
        {key: {"description": RETIRED_KEYS[key]} for key in SIZES_KEYS}, RETIRED_KEYS[SIZES]
    )
    for block, keys in TUNING_BLOCKS.items():
        typed = {name: {"type": _JSON_TYPES[key.kind], "description": key.note} for name, key in keys.items()}
        properties[block] = _old_block(typed, "Of the first design documents.")
    vllm = definitions["VllmConfig"]["properties"]
    properties[INSTANCES] = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": dict(vllm),
            "required": [MODEL_NAME],
            "additionalProperties": False,
        },
        "deprecated": True,
        "description": "Taken as models, each with an engine of kind vllm and these settings.",
    }


def _old_block(keys: Mapping[str, Any], note: str) -> dict[str, Any]:
    return {
        "type": ["object", "null"],
        "properties": dict(keys),
        "additionalProperties": False,
        "deprecated": True,
        "description": note,
    }


def _deprecated(notes: Mapping[str, str]) -> dict[str, Any]:
    return {key: {"deprecated": True, "description": note} for key, note in notes.items()}

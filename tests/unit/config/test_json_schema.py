"""The published schema is that of the code, and says what the code does."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.validators import Draft202012Validator

from localmoe.config.json_schema import attribute_docs, file_schema, rendered_schema
from localmoe.config.settings import Settings
from localmoe.engine.config import EngineConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return file_schema()


def problems(schema: dict[str, Any], text: str) -> list[str]:
    return [error.message for error in Draft202012Validator(schema).iter_errors(yaml.safe_load(text))]


def test_the_published_schema_is_that_of_the_code() -> None:
    """If not: localmoe config schema > docs/settings.schema.json"""
    assert (ROOT / "docs/settings.schema.json").read_text() == rendered_schema()


def test_it_is_a_schema(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    assert jsonschema.validators.validator_for(schema) is Draft202012Validator


def test_settings_are_described(schema: dict[str, Any]) -> None:
    undescribed = [
        f"{name}.{key}"
        for name in ("EngineConfig", "DispatchConfig", "ManagementConfig", "VllmConfig", "DeepSpeedConfig")
        for key, kind in schema["$defs"][name]["properties"].items()
        if not kind.get("description") and "$ref" not in kind
    ]
    assert undescribed == []
    assert [key for key, kind in schema["properties"].items() if not kind.get("description")] == []
    assert attribute_docs(EngineConfig)["max_num_seqs"] == "Most sequences in one step."
    assert set(attribute_docs(Settings)) <= set(Settings.model_fields)


@pytest.mark.parametrize("file", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_are_valid(schema: dict[str, Any], file: Path) -> None:
    assert problems(schema, file.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "config_version: 2",
        "models: [{model: a, engines: [{engine: remote, settings: {url: 'http://a/v1', api_key: 'env:A'}}]}]",
        "models: [{model: a, engines: [{settings: {max_num_seqs: 3}}, {engine: mine, settings: {anything: 1}}]}]",
        "model: {num_experts: 8, quantization_type: fp16}\nvllm: {model_name: a, swap_space: 4}",
        "vllm_instances: [{model_name: a, tensor_parallel_size: 2, gpu_devices: [0, 1]}]",
        "memory_config: {expert_threshold: 0.2}\ncompute_config: {auto_tune: true}",
        "engine: {tiers: {disk: {queue_depth: null}}}",
    ],
)
def test_what_loads_is_valid(schema: dict[str, Any], text: str) -> None:
    assert problems(schema, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "prot: 1",
        "port: 70000",
        "config_version: 3",
        "config: other.yaml",
        "engine: {max_num_sequences: 3}",
        "engine: {tiers: {policy: best}}",
        "models: [{name: a}]",
        "models: [{model: a, engines: [{settings: {max_num_sequences: 3}}]}]",
        "models: [{model: a, engines: [{engine: remote, settings: {}}]}]",
        "models: [{model: a, engines: [{engine: vllm, settings: {dtype: float8}}]}]",
        "memory_config: {expert_threshold: high}",
    ],
)
def test_what_does_not_load_is_not_valid(schema: dict[str, Any], text: str) -> None:
    assert problems(schema, text) != []

"""Templates and adapters are looked at before anything slow begins."""

import json
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.vllm_config import LoraModule
from localmoe.cli.spec_checks import check_specs, lora_modules, template_path
from localmoe.core.errors import ConfigError
from localmoe.core.serving import EngineSpec, ModelSpec

VLLM, REMOTE = EngineSpec(engine="vllm"), EngineSpec(engine="remote", settings={"url": "http://a/v1"})


def write_adapter(directory: Path, **config: Any) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 16, **config}))
    (directory / "adapter_model.safetensors").write_bytes(b"")
    return directory


def spec(path: Path | None, *engines: EngineSpec) -> ModelSpec:
    return ModelSpec(model="m", adapters={"l": None if path is None else str(path)}, engines=engines or (VLLM,))


def test_ranks_and_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_adapter(tmp_path / "plain")
    assert lora_modules(spec(plain)) == {"l": LoraModule(path=plain, rank=8)}
    large = write_adapter(tmp_path / "large", rank_pattern={"q_proj": 24, "v_proj": 4})
    assert lora_modules(spec(large)) == {"l": LoraModule(path=large, rank=24)}
    monkeypatch.chdir(tmp_path)
    assert lora_modules(spec(Path("plain"), REMOTE, VLLM)) == {"l": LoraModule(path=plain, rank=8)}
    assert lora_modules(spec(None, REMOTE)) == {"l": None}
    assert lora_modules(ModelSpec(model="m")) == {}


@pytest.mark.parametrize("engines", [("native",), ("deepspeed", "native"), ("package",)])
def test_engines_that_add_none_are_named_with_those_that_do(tmp_path: Path, engines: tuple[str, ...]) -> None:
    asked = spec(write_adapter(tmp_path / "a"), *(EngineSpec(engine=engine) for engine in engines))
    with pytest.raises(ConfigError, match="m has adapters, and no engine of kind vllm or remote"):
        check_specs([asked])


@pytest.mark.parametrize(
    "config", [{"r": 0}, {"r": "8"}, {"r": True}, {"r": 10**9}, {"rank_pattern": {"q": None}}]
)
def test_an_adapter_without_a_rank_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.l: .*adapter_config\.json says no rank"):
        check_specs([spec(write_adapter(tmp_path / "a", **config))])


def test_damaged_and_missing_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters\.l is '.*nothing', where there is no adapter_config\.json"):
        check_specs([spec(tmp_path / "nothing")])
    pickled = write_adapter(tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors; name a directory"):
        check_specs([spec(pickled)])
    damaged = write_adapter(tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapters\.l: .*not valid JSON"):
        check_specs([spec(damaged)])


def test_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jinja").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert template_path(ModelSpec(model="m")) is None
    assert template_path(ModelSpec(model="m", chat_template="t.jinja")) == tmp_path / "t.jinja"
    for wrong in ("none.jinja", "."):
        with pytest.raises(ConfigError, match="which is no file; name one with a Jinja template"):
            check_specs([ModelSpec(model="m", chat_template=wrong)])


def test_names_of_one_model_differ() -> None:
    assert ModelSpec(model="m").names == ("m",)
    assert ModelSpec(model="m", served_model_name="x").names == ("x",)
    several = ModelSpec(model="m", served_model_name=("x", "y"), adapters={"z": None})
    assert (several.served_name, several.served_names, several.names) == ("x", ("x", "y"), ("x", "y", "z"))
    for wrong in (("x", "x"), ("x", ""), ("x" * 513,), tuple(map(str, range(257)))):
        with pytest.raises(ValueError, match="served_model_name"):
            ModelSpec(model="m", served_model_name=wrong)
    with pytest.raises(ValueError, match="'x' twice"):
        ModelSpec(model="m", served_model_name="x", adapters={"x": None})

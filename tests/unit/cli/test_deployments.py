"""What a model's specification becomes: its names, its adapters, its chat template."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import NoAnswerCache
from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.engine_kinds import EngineKinds
from localmoe.config.settings import Settings
from localmoe.core.errors import ConfigError
from localmoe.core.events import EventBus
from localmoe.core.request import PromptSource, Request, SamplingParams
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.hardware.meter import HardwareMeter
from support.tiny_text import write_tiny_text_model

REMOTE = EngineSpec(engine="remote", settings={"url": "http://127.0.0.1:9/v1"})


@pytest.fixture
def builder(tmp_path: Path) -> DeploymentBuilder:
    settings, catalog, bus = Settings(home=tmp_path), Catalog(tmp_path), EventBus()
    kinds = EngineKinds(settings, catalog, num_threads=1, available_memory=lambda: 1 << 30, bus=bus)
    return DeploymentBuilder(settings, catalog, kinds=kinds, meter=HardwareMeter(), cache=NoAnswerCache(), bus=bus)


async def test_an_adapter_is_a_model_with_its_parents_engines(builder: DeploymentBuilder) -> None:
    spec = ModelSpec(model="m", served_model_name=("a", "b"), adapters={"l": None}, engines=(REMOTE,))
    deployment = await builder.build(spec)
    base, adapter = deployment.served, deployment.adapters["l"]
    assert (base.id, base.adapter, base.parent) == ("a", None, None)
    assert (adapter.id, adapter.adapter, adapter.parent) == ("l", "l", "a")
    assert adapter.generator is base.generator
    (replica,) = deployment.dispatcher.replicas
    asked = Request(
        id="r",
        model="l",
        prompt_ids=[],
        sampling=SamplingParams(max_tokens=1),
        source=PromptSource(text="x"),
        adapter="l",
    )
    assert replica.suits(asked)


async def test_a_template_of_the_users_choice(builder: DeploymentBuilder, tmp_path: Path) -> None:
    file = tmp_path / "brief.jinja"
    file.write_text("{{ messages[0].content }}!")
    write_tiny_text_model(tmp_path / "models/m")
    spec = ModelSpec(model="m", chat_template=str(file), engines=(REMOTE,))
    text = builder.text_of(spec)
    assert text is not None
    assert text.render_chat([{"role": "user", "content": "x"}]) == "x!"
    assert not text.has_own_template
    file.write_text("{% if %}")
    with pytest.raises(ConfigError, match="the chat template is not valid"):
        builder.text_of(spec)


def test_how_calls_are_written_may_be_said(builder: DeploymentBuilder, tmp_path: Path) -> None:
    write_tiny_text_model(tmp_path / "models/m", chat_template="<tool_call>")
    for said, used in ((None, "hermes"), ("llama3", "llama3")):
        model = {"model": "m", "answer_format": said}
        spec = Settings(home=tmp_path, models=[model]).models[0]  # type: ignore[list-item]
        text = builder.text_of(spec)
        assert text is not None
        assert text.answer_format.name == used
    with pytest.raises(ValidationError, match="'hermes', 'qwen3_coder', 'mistral'"):
        Settings(home=tmp_path, models=[{"model": "m", "answer_format": "gpt"}])  # type: ignore[list-item]


async def test_a_template_is_of_no_use_where_prompts_are_made_elsewhere(
    builder: DeploymentBuilder, tmp_path: Path
) -> None:
    file = tmp_path / "brief.jinja"
    file.write_text("x")
    with pytest.raises(
        ConfigError, match="elsewhere is not on this machine: the server that has it makes prompts"
    ):
        await builder.build(ModelSpec(model="elsewhere", chat_template=str(file), engines=(REMOTE,)))

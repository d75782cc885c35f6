"""Every field that the official clients can send is honoured, refused by its name, or named as ignored."""

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types import (
    image_block_param,
    message_count_tokens_params,
    message_create_params,
    output_config_param,
    redacted_thinking_block_param,
    text_block_param,
    thinking_block_param,
    thinking_config_adaptive_param,
    thinking_config_enabled_param,
    tool_choice_tool_param,
    tool_param,
    tool_result_block_param,
    tool_use_block_param,
)
from openai.types import batch_create_params, completion_create_params, embedding_create_params
from openai.types.chat import (
    chat_completion_assistant_message_param,
    chat_completion_content_part_image_param,
    chat_completion_content_part_input_audio_param,
    chat_completion_content_part_param,
    chat_completion_content_part_refusal_param,
    chat_completion_content_part_text_param,
    chat_completion_function_tool_param,
    chat_completion_message_function_tool_call_param,
    chat_completion_stream_options_param,
    chat_completion_system_message_param,
    chat_completion_tool_message_param,
    chat_completion_user_message_param,
)
from openai.types.chat import (
    completion_create_params as chat_create_params,
)
from openai.types.responses import (
    easy_input_message_param,
    function_tool_param,
    response_create_params,
    response_function_tool_call_param,
    response_input_image_param,
    response_input_param,
    response_input_text_param,
    response_output_message_param,
    response_output_text_param,
    response_reasoning_item_param,
    response_text_config_param,
    tool_choice_allowed_param,
    tool_choice_function_param,
)
from openai.types.shared_params import function_definition, reasoning

from localmoe.gateway import fields
from localmoe.gateway.anthropic import schema as anthropic
from localmoe.gateway.jobs import batch_routes
from localmoe.gateway.openai import chat_messages, chat_schema, completions_schema, embeddings
from localmoe.gateway.responses import schema as responses

CASES: list[tuple[type[fields.ApiModel], Any]] = [
    (chat_schema.ChatCompletionRequest, chat_create_params.CompletionCreateParamsStreaming),
    (fields.StreamOptions, chat_completion_stream_options_param.ChatCompletionStreamOptionsParam),
    (chat_messages.ChatMessage, chat_completion_system_message_param.ChatCompletionSystemMessageParam),
    (chat_messages.ChatMessage, chat_completion_user_message_param.ChatCompletionUserMessageParam),
    (chat_messages.ChatMessage, chat_completion_assistant_message_param.ChatCompletionAssistantMessageParam),
    (chat_messages.ChatMessage, chat_completion_tool_message_param.ChatCompletionToolMessageParam),
    (chat_messages.TextPart, chat_completion_content_part_text_param.ChatCompletionContentPartTextParam),
    (chat_messages.RefusalPart, chat_completion_content_part_refusal_param.ChatCompletionContentPartRefusalParam),
    (chat_messages.ImagePart, chat_completion_content_part_image_param.ChatCompletionContentPartImageParam),
    (chat_messages.ImageUrl, chat_completion_content_part_image_param.ImageURL),
    (
        chat_messages.AudioPart,
        chat_completion_content_part_input_audio_param.ChatCompletionContentPartInputAudioParam,
    ),
    (chat_messages.InputAudio, chat_completion_content_part_input_audio_param.InputAudio),
    (chat_messages.FilePart, chat_completion_content_part_param.File),
    (chat_messages.InputFile, chat_completion_content_part_param.FileFile),
    (
        chat_messages.ToolCallInput,
        chat_completion_message_function_tool_call_param.ChatCompletionMessageFunctionToolCallParam,
    ),
    (chat_messages.CalledFunction, chat_completion_message_function_tool_call_param.Function),
    (chat_messages.FunctionTool, chat_completion_function_tool_param.ChatCompletionFunctionToolParam),
    (chat_messages.FunctionDefinition, function_definition.FunctionDefinition),
    (completions_schema.CompletionRequest, completion_create_params.CompletionCreateParamsStreaming),
    (embeddings.EmbeddingRequest, embedding_create_params.EmbeddingCreateParams),
    (batch_routes.BatchRequest, batch_create_params.BatchCreateParams),
    (batch_routes.OutputExpiresAfter, batch_create_params.OutputExpiresAfter),
    (responses.ResponseRequest, response_create_params.ResponseCreateParamsStreaming),
    (responses.ResponseStreamOptions, response_create_params.StreamOptions),
    (responses.MessageItem, response_output_message_param.ResponseOutputMessageParam),
    (responses.MessageItem, easy_input_message_param.EasyInputMessageParam),
    (responses.MessageItem, response_input_param.Message),
    (responses.InputText, response_input_text_param.ResponseInputTextParam),
    (responses.InputImage, response_input_image_param.ResponseInputImageParam),
    (responses.OutputTextInput, response_output_text_param.ResponseOutputTextParam),
    (responses.FunctionCallInput, response_function_tool_call_param.ResponseFunctionToolCallParam),
    (responses.FunctionOutput, response_input_param.FunctionCallOutput),
    (responses.ReasoningInput, response_reasoning_item_param.ResponseReasoningItemParam),
    (responses.ResponseTool, function_tool_param.FunctionToolParam),
    (responses.NamedFunction, tool_choice_function_param.ToolChoiceFunctionParam),
    (responses.AllowedTools, tool_choice_allowed_param.ToolChoiceAllowedParam),
    (responses.Reasoning, reasoning.Reasoning),
    (responses.TextConfig, response_text_config_param.ResponseTextConfigParam),
    (anthropic.MessageRequest, message_create_params.MessageCreateParamsStreaming),
    (anthropic.CountTokensRequest, message_count_tokens_params.MessageCountTokensParams),
    (anthropic.TextInput, text_block_param.TextBlockParam),
    (anthropic.ImageInput, image_block_param.ImageBlockParam),
    (anthropic.ThinkingInput, thinking_block_param.ThinkingBlockParam),
    (anthropic.RedactedThinkingInput, redacted_thinking_block_param.RedactedThinkingBlockParam),
    (anthropic.ToolUseInput, tool_use_block_param.ToolUseBlockParam),
    (anthropic.ToolResultInput, tool_result_block_param.ToolResultBlockParam),
    (anthropic.Tool, tool_param.ToolParam),
    (anthropic.ToolChoice, tool_choice_tool_param.ToolChoiceToolParam),
    (anthropic.Thinking, thinking_config_enabled_param.ThinkingConfigEnabledParam),
    (anthropic.Thinking, thinking_config_adaptive_param.ThinkingConfigAdaptiveParam),
    (anthropic.OutputConfig, output_config_param.OutputConfigParam),
]
AS_HEADERS = {"user_profile_id", "workspace_id"}
"""Of Anthropic's parameters."""


@pytest.mark.parametrize(("model", "params"), CASES, ids=lambda case: case.__name__)
def test_every_field_of_the_official_clients_is_known(model: type[fields.ApiModel], params: Any) -> None:
    honoured = {field.alias or name for name, field in model.model_fields.items()}
    sent = set(params.__annotations__) - AS_HEADERS
    assert sent - honoured - set(model.IGNORED) - set(model.REFUSED) == set()
    assert not honoured & set(model.IGNORED)
    assert not honoured & set(model.REFUSED)


def all_models(model: type[fields.ApiModel] = fields.ApiModel) -> Iterator[type[fields.ApiModel]]:
    for child in model.__subclasses__():
        yield child
        yield from all_models(child)


def collections_of(schema: Any, model: type[fields.ApiModel]) -> Iterator[dict[str, Any]]:
    """Lists and objects in a model's core schema, but those of other models in it."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            yield schema
        if schema.get("cls", model) is model:
            yield from (found for inner in schema.values() for found in collections_of(inner, model))
    elif isinstance(schema, list | tuple):
        yield from (found for inner in schema for found in collections_of(inner, model))


def test_what_clients_send_is_bounded_and_complained_of_once() -> None:
    """A complaint about each of a million entries would stall every other client for seconds."""
    num_found = 0
    for model in all_models():
        for found in collections_of(model.__pydantic_core_schema__, model):
            items = found.get("items_schema") or found.get("values_schema") or {"type": "any"}
            if items["type"] != "any":
                num_found += 1
                assert found.get("fail_fast"), (model, found)
                assert found.get("max_length"), (model, found)
    assert num_found > 30

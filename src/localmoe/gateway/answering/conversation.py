"""A conversation to be answered, whichever API it came by: from messages and tools to what engines are asked."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError
from localmoe.core.request import Grammar, PromptSource
from localmoe.gateway.answering.generation import Choice
from localmoe.gateway.answering.grammar_checks import GrammarChecker
from localmoe.gateway.answering.hints import DispatchHints
from localmoe.gateway.answering.prompts import encode_text, not_empty, prompt_source
from localmoe.gateway.answering.sampling import of_answer, resolve_max_tokens, sampling_params
from localmoe.gateway.context import ServedModel
from localmoe.gateway.fields import SamplingFields
from localmoe.text.answer_parser import MakeParser, PlainParser
from localmoe.text.call_grammar import answer_grammar
from localmoe.text.text_model import TextModel
from localmoe.text.tokenizer import Tokenizer
from localmoe.text.tool_calls import Tools

MAX_TOOLS = 128


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What is to be answered, and how. Field names in errors are those of the chat API, unless said otherwise."""

    messages: Sequence[Mapping[str, Any]]
    """In the words of OpenAI's chat API; an assistant's thoughts are its `reasoning_content`."""
    sampling: SamplingFields
    max_tokens: int | None
    """Of the answer; None: the rest of the context."""
    max_tokens_field: str
    """What the API calls it."""
    messages_field: str = "messages"
    num_logprobs: int | None = None
    """Alternatives to report for each token; None: no log-probabilities."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions, in the words of OpenAI's chat API. Their names differ; their schemas were checked."""
    tool_choice: Literal["none", "auto", "required"] = "auto"
    forced_tool: str | None = None
    """The one tool that is to be called, once, whatever `tool_choice` says."""
    parallel_tool_calls: bool = True
    """Whether an answer may have several calls."""
    response_grammar: Grammar | None = None
    """What content must be."""
    response_field: str = "response_format"
    """Where the API has that."""
    thinks: bool | None = None
    """Whether to reason first, for templates that can be told; None: as the model likes."""
    forbids_thinking: bool = False
    """Whether the client says itself that it must not. Only then are engines told that make prompts themselves: those
    that know of no reasoning refuse the word."""
    effort: str | None = None
    """How much, likewise."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further names for the chat template."""
    documents: Sequence[Mapping[str, Any]] = ()
    """For templates that know of documents."""
    other_part: tuple[str, str] | None = None
    """The first content part that is no text: the field that says so, and what, both as the client wrote them."""

    @property
    def usable_tools(self) -> Sequence[Mapping[str, Any]]:
        """Those that may be called."""
        return self.tools if self.tool_choice != "none" or self.forced_tool else ()

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls."""
        return self.forced_tool is not None or self.tool_choice == "required"

    @property
    def max_calls(self) -> int | None:
        """Calls that an answer may have; None: any number."""
        return None if self.parallel_tool_calls and self.forced_tool is None else 1

    def ignored(self, model: ServedModel) -> list[str]:
        """Fields that have no effect on this model's answer, since its template has no word of them; and a promise of
        strictness that is kept only where a tool must be called."""
        names = []
        if (text := model.text) is not None:
            if self.effort is not None and not self._thinking_arguments(text):
                names.append("reasoning_effort")
            if self.documents and not text.template_mentions("documents"):
                names.append("documents")
            unknown = (name for name in self.template_arguments if not text.template_mentions(name))
            names += [f"chat_template_kwargs.{name}" for name in unknown]
        if not self.must_call and any(tool["function"].get("strict") for tool in self.usable_tools):
            names.append("tools.function.strict")
        return names

    def template_kwargs(self, text: TextModel) -> dict[str, Any]:
        """Names for the template, beside messages and tools."""
        return {**self._thinking_arguments(text), **self.template_arguments}

    def _thinking_arguments(self, text: TextModel) -> dict[str, Any]:
        thinks = False if self.effort == "none" else self.thinks
        wanted = {"reasoning_effort": self.effort, "enable_thinking": thinks, "thinking": thinks}
        known = {name: value for name, value in wanted.items() if text.template_mentions(name)}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A conversation as one model is asked."""

    prompt_ids: list[int]
    """Empty where its tokenizer is not here."""
    grammar: Grammar | None
    to_be_checked: Grammar | None
    """The same without the model's token ids, of which whoever checks it knows nothing."""
    make_parser: MakeParser
    shown_token_ids: frozenset[int]


async def choices(
    conversation: Conversation,
    model: ServedModel,
    hints: DispatchHints,
    *,
    answer_id: str,
    grammars: GrammarChecker,
) -> list[Choice]:
    """What the model is asked: one choice for each of the `n` answers.

    Raises:
        InvalidRequestError: the model has no chat template, or it refuses the messages, or the prompt is empty or too
            long, or it is asked for what it cannot do.
    """
    body = conversation.sampling
    if model.text is None:
        question = _remote_question(conversation, model)
    else:
        prompt = await model.local_text.in_turn(_render, conversation, model)
        question = await asyncio.to_thread(_local_question, conversation, model, prompt)
    if question.to_be_checked is not None:
        await grammars.check(question.to_be_checked, param=_grammar_field(conversation))
    max_tokens = resolve_max_tokens(
        conversation.max_tokens,
        field=conversation.max_tokens_field,
        prompt_field=conversation.messages_field,
        num_prompt_tokens=len(question.prompt_ids),
        model=model,
    )
    source = _source(conversation, model)
    sampling = sampling_params(
        body, model, max_tokens=max_tokens, logprobs=conversation.num_logprobs, grammar=question.grammar
    )
    return [
        Choice(
            index=index,
            request=hints.request(
                f"{answer_id}-{index}",
                model=model,
                prompt_ids=question.prompt_ids,
                source=source,
                sampling=of_answer(sampling, index),
            ),
            stop_strings=body.stop_strings,
            make_parser=question.make_parser,
            shown_token_ids=question.shown_token_ids,
        )
        for index in range(body.n or 1)
    ]


async def prompt_ids(
    conversation: Conversation, model: ServedModel, *, add_special_tokens: bool = False
) -> list[int]:
    """Token ids of the prompt that asks for the next message.

    Raises:
        InvalidRequestError: see `choices`; also where the model's tokenizer is not here.
    """
    prompt = await model.local_text.in_turn(_render, conversation, model)
    return await asyncio.to_thread(
        encode_text, prompt, model, add_special_tokens=add_special_tokens, param=conversation.messages_field
    )


def _remote_question(conversation: Conversation, model: ServedModel) -> _Question:
    """Where the tokenizer is not here, another server makes the prompt and parses the answer."""
    for name, value in (
        ("documents", conversation.documents),
        ("chat_template_kwargs", conversation.template_arguments),
    ):
        if value:
            raise UnsupportedFieldError(
                f"{name}: model {model.id!r} runs on another server, which has a template of its own", param=name
            )
    return _Question(
        prompt_ids=[],
        grammar=conversation.response_grammar,
        to_be_checked=conversation.response_grammar,
        make_parser=PlainParser,
        shown_token_ids=frozenset(),
    )


def _local_question(conversation: Conversation, model: ServedModel, prompt: str) -> _Question:
    text = model.local_text
    ids = encode_text(prompt, model, add_special_tokens=False, param=conversation.messages_field)
    tools = {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
        for tool in conversation.usable_tools
    }
    format_ = text.answer_format
    return _Question(
        prompt_ids=not_empty(ids, conversation.messages_field),
        grammar=_grammar(conversation, text, prompt, tools, text.tokenizer),
        to_be_checked=_grammar(conversation, text, prompt, tools, None),
        make_parser=format_.make_parser(tools=tools, prompt=prompt, max_calls=conversation.max_calls),
        shown_token_ids=format_.shown_token_ids(text.tokenizer, with_calls=bool(tools)),
    )


def _grammar_field(conversation: Conversation) -> str:
    is_for_calls = conversation.must_call or conversation.response_grammar is None
    return "tools" if is_for_calls else conversation.response_field


def _grammar(
    conversation: Conversation, text: TextModel, prompt: str, tools: Tools, tokenizer: Tokenizer | None
) -> Grammar | None:
    content = conversation.response_grammar
    reasons = text.answer_format.thought_marks is not None or text.answer_format.parses_always
    if not conversation.must_call and (content is None or not (tools or reasons)):
        return content
    if conversation.forced_tool is not None:
        tools = {conversation.forced_tool: tools[conversation.forced_tool]}
    try:
        return answer_grammar(
            text.answer_format,
            tokenizer,
            prompt=prompt,
            tools=tools,
            max_calls=conversation.max_calls,
            content=None if conversation.must_call else content,
        )
    except InvalidRequestError as error:
        param = _grammar_field(conversation)
        raise InvalidRequestError(f"{param}: {error}", param=param) from error


def _render(conversation: Conversation, model: ServedModel) -> str:
    text = model.local_text
    if conversation.other_part is not None:
        param, kind = conversation.other_part
        raise UnsupportedFieldError(
            f"{param}: this model takes no content parts of type {kind!r}; send text", param=param
        )
    return text.render_chat(
        [_for_template(message) for message in conversation.messages],
        tools=conversation.usable_tools,
        documents=conversation.documents,
        arguments=conversation.template_kwargs(text),
    )


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: its text in one piece."""
    content = message.get("content")
    if not isinstance(content, str | None):
        content = "\n".join(part[part["type"]] for part in content)
    return {**message, "content": content}


def _source(conversation: Conversation, model: ServedModel) -> PromptSource | None:
    """What engines are given that make prompts themselves; None where they would make another."""
    source = prompt_source(conversation.sampling, model, messages=[dict(m) for m in conversation.messages])
    if source is None or conversation.documents or conversation.template_arguments:
        return None
    if model.text is not None and not model.text.has_own_template:
        return None
    return msgspec.structs.replace(
        source,
        parameters=dict(_source_parameters(conversation)),
        content_grammar=conversation.response_grammar,
    )


def _source_parameters(conversation: Conversation) -> Iterator[tuple[str, Any]]:
    if conversation.tools:
        forced = conversation.forced_tool
        yield "tools", list(conversation.tools)
        yield (
            "tool_choice",
            conversation.tool_choice if forced is None else {"type": "function", "function": {"name": forced}},
        )
        if not conversation.parallel_tool_calls:
            yield "parallel_tool_calls", False
    if conversation.forbids_thinking:
        yield "reasoning_effort", "none"
    elif conversation.effort is not None:
        yield "reasoning_effort", conversation.effort


def check_tool_names(tools: Sequence[Mapping[str, Any]], forced: str | None, *, choice_field: str) -> None:
    """Raise InvalidRequestError for two tools of one name, and for a choice of none of them."""
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise InvalidRequestError(f"two tools have the name {twice!r}", param="tools")
    if forced is not None and forced not in names:
        raise InvalidRequestError(f"{forced!r} is none of the tools", param=choice_field)

"""From API fields to `core.SamplingParams`: defaults, and the checks that need to know the model."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from localmoe.core.errors import ContextLengthError, InvalidRequestError
from localmoe.core.request import UNBOUNDED_TOKENS, Grammar, SamplingParams
from localmoe.gateway.answering.generation import Choice
from localmoe.gateway.context import ServedModel
from localmoe.gateway.fields import MIN_TEMPERATURE, SamplingFields
from localmoe.text.generation_defaults import GenerationDefaults


def resolve_max_tokens(
    requested: int | None, *, field: str, prompt_field: str, num_prompt_tokens: int, model: ServedModel
) -> int:
    """Tokens that the answer may have: those asked for, else the rest of the context.

    Raises:
        ContextLengthError: prompt and answer do not fit; a prompt is never cut.
    """
    limit = model.context_tokens
    if limit is None:
        return UNBOUNDED_TOKENS if requested is None else requested
    answer = 1 if requested is None else requested
    if num_prompt_tokens + answer > limit:
        asked = "needs room for at least 1 more" if requested is None else f"{field} asks for {requested} more"
        raise ContextLengthError(
            f"the model's context is {limit} tokens; the prompt has {num_prompt_tokens} and {asked},"
            f" {num_prompt_tokens + answer} in all. Shorten the prompt or lower {field}.",
            param=field if num_prompt_tokens < limit and requested is not None else prompt_field,
            code="context_length_exceeded",
        )
    return limit - num_prompt_tokens if requested is None else requested


def sampling_params(
    body: SamplingFields,
    model: ServedModel,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    also_stop_at: Sequence[int] = (),
) -> SamplingParams:
    """Parameters of the first of the `n` answers to a prompt; `of_answer` makes those of the others.

    Args:
        also_stop_at: tokens that end an answer because of what the prompt is.

    Raises:
        InvalidRequestError: a token id is not in the model's vocabulary.
    """
    defaults = GenerationDefaults() if model.text is None else model.text.defaults
    stop_token_ids = dict.fromkeys(() if body.ignore_eos else (*defaults.eos_token_ids, *also_stop_at))
    for index, token_id in enumerate(body.stop_token_ids or ()):
        check_token_id(token_id, model, param=f"stop_token_ids[{index}]")
        stop_token_ids[token_id] = None
    logit_bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
    if logit_bias:
        check_token_id(max(logit_bias), model, param="logit_bias")
    temperature = _given(body.temperature, defaults.temperature)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
        top_k=max(0, int(_given(body.top_k, defaults.top_k))),
        top_p=_given(body.top_p, defaults.top_p),
        min_p=_given(body.min_p, defaults.min_p),
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias=logit_bias,
        seed=None if body.seed is None else body.seed % 2**63,
        stop_token_ids=tuple(stop_token_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def of_answer(first: SamplingParams, place: int) -> SamplingParams:
    """Parameters of one of the answers to a prompt, from 0 on. Each has a seed of its own, derived from the one asked
    for; only the first scores the prompt."""
    if place == 0:
        return first
    seed = None if first.seed is None else (first.seed + place) % 2**63
    return msgspec.structs.replace(first, seed=seed, prompt_logprobs=None)


def bounded_logprobs(
    choices: Sequence[Choice], *, echo: bool, limit: int, max_tokens_given: bool
) -> Sequence[Choice]:
    """The choices, such that they have no more log-probabilities than one request may ask for.

    Args:
        echo: prompts are reported too, with every choice.
        max_tokens_given: otherwise answers may be made shorter.

    Raises:
        InvalidRequestError: they have more.
    """
    alternatives = choices[0].request.sampling.logprobs
    if alternatives is None:
        return choices
    num_echoed = sum(len(choice.request.prompt_ids) for choice in choices) if echo else 0
    if not max_tokens_given:
        most = max(1, (limit // (alternatives + 1) - num_echoed) // len(choices))
        choices = [_shortened(choice, most) for choice in choices]
    num_tokens = num_echoed + sum(choice.request.sampling.max_tokens for choice in choices)
    if num_tokens * (alternatives + 1) > limit:
        raise InvalidRequestError(
            f"logprobs: up to {num_tokens} tokens with {alternatives} alternatives each are"
            f" {num_tokens * (alternatives + 1)} log-probabilities; at most {limit} are allowed in one request."
            " Ask for fewer alternatives, a lower max_tokens, or fewer prompts or answers.",
            param="logprobs",
        )
    return choices


def _shortened(choice: Choice, max_tokens: int) -> Choice:
    request = choice.request
    sampling = msgspec.structs.replace(request.sampling, max_tokens=min(max_tokens, request.sampling.max_tokens))
    return replace(choice, request=msgspec.structs.replace(request, sampling=sampling))


def check_token_id(token_id: int, model: ServedModel, *, param: str) -> None:
    """Raise InvalidRequestError for an id outside the vocabulary, and where the vocabulary is not here."""
    text_model = model.local_text
    if token_id >= text_model.vocab_size:
        text = text_model.tokenizer.token_text(token_id)
        written = f" ({text!r})" if text else ""
        raise InvalidRequestError(
            f"{param}: token id {token_id}{written} is not in the vocabulary of {text_model.vocab_size}",
            param=param,
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value

"""What is asked of a vLLM server, and what its answers are in our words."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from localmoe.core.errors import EngineDiedError, EngineFaultError
from localmoe.core.events import EngineState
from localmoe.core.request import (
    FinishReason,
    Grammar,
    Request,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
    Usage,
)

T = TypeVar("T")
WriteGrammar = Callable[[Grammar], str]
"""Any grammar as rules in llguidance's dialect of Lark. Raises InvalidRequestError."""

MAX_LOGPROBS = 20
"""Alternatives that vLLM reports at most, unless it was started otherwise."""

_SEEDS = 1 << 63


class AnswerError(msgspec.Struct):
    message: str
    param: str | None = None
    code: int | str | None = None


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    """Each `token_id:N`."""
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class _PromptLogprob(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    prompt_logprobs: list[dict[int, _PromptLogprob] | None] | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class Answer(msgspec.Struct):
    """A whole answer, or a piece of a stream."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: AnswerError | None = None


def decode(data: bytes, kind: type[T]) -> T:
    """Raises EngineFaultError for what is not of this kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise EngineFaultError(f"vLLM sent what is no answer: {error}") from error


def question(
    request: Request, model: str, *, stream: bool, write_grammar: WriteGrammar | None = None
) -> dict[str, Any]:
    """A request in vLLM's words. What was generated before becomes a part of the prompt.

    Args:
        write_grammar: for a server that compiles with llguidance, as those do that are started here: so a grammar is
            there what it is to the native engine, and what was tried is what is compiled. None: grammars are passed
            on as they came.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "model": model,
        "prompt": [*request.prompt_ids, *request.resumed_ids],
        "max_tokens": max(1, sampling.max_tokens - len(request.resumed_ids)),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop_token_ids": list(sampling.stop_token_ids),
        # It is among the stop tokens, if it is to count; and where a grammar is complete, nothing else may come.
        "ignore_eos": sampling.grammar is None,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": stream,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.seed is not None:
        body["seed"] = _seed(sampling, len(request.resumed_ids))
    if sampling.logprobs is not None:
        body["logprobs"] = sampling.logprobs
    if sampling.prompt_logprobs is not None:
        body["prompt_logprobs"] = sampling.prompt_logprobs
    if sampling.grammar is not None:
        written = None if write_grammar is None else {"grammar": write_grammar(sampling.grammar)}
        body["structured_outputs"] = written or _structured_outputs(sampling.grammar)
    if request.cache_scope:
        body["cache_salt"] = request.cache_scope
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def _structured_outputs(grammar: Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "json_object":
            return {"json_object": True}
        case "json_schema":
            return {"json": grammar.source}
        case "regex":
            return {"regex": grammar.source}
        case "lark":
            return {"grammar": grammar.source}
        case "choice":
            return {"choice": msgspec.json.decode(grammar.source)}


def _seed(sampling: SamplingParams, num_resumed: int) -> int:
    """Never -1, which is no seed to vLLM. An answer that goes on must not use the numbers of its beginning again."""
    assert sampling.seed is not None
    return (sampling.seed + num_resumed * 0x9E3779B97F4A7C15) % _SEEDS


def _finish_reason(said: str | None) -> FinishReason | None:
    match said:
        case None:
            return None
        case "stop":
            return FinishReason.STOP
        case "length":
            return FinishReason.LENGTH
        case "abort":  # nobody aborts by name, so the server is going down
            raise EngineDiedError("vLLM gave the answer up")
        case _:
            raise EngineFaultError(f"vLLM ended its answer with {said!r}")


def _logprobs(choice: _Choice, num_top: int) -> list[TokenLogprob]:
    assert choice.token_ids is not None
    found = choice.logprobs
    num_tokens = len(choice.token_ids)
    if found is None or not len(found.token_logprobs) == len(found.top_logprobs) == num_tokens:
        raise EngineFaultError("vLLM sent other log-probabilities than it was asked for")
    logprobs = []
    for token_id, logprob, top in zip(choice.token_ids, found.token_logprobs, found.top_logprobs, strict=True):
        if logprob is None:
            raise EngineFaultError("vLLM sent a token without its log-probability")
        likeliest = sorted(
            ((_token_id(name), value) for name, value in (top or {}).items()), key=lambda it: -it[1]
        )
        logprobs.append(TokenLogprob(token_id=token_id, logprob=logprob, top=likeliest[:num_top]))
    return logprobs


def _prompt_logprobs(choice: _Choice, request: Request, num_top: int) -> list[TokenLogprob]:
    found, prompt_ids = choice.prompt_logprobs, request.prompt_ids
    if found is None or len(found) != len(prompt_ids) + len(request.resumed_ids):
        raise EngineFaultError("vLLM sent no log-probabilities of the prompt")
    logprobs = []
    for token_id, at_position in zip(prompt_ids[1:], found[1 : len(prompt_ids)], strict=True):
        if at_position is None or token_id not in at_position:
            raise EngineFaultError("vLLM sent no log-probability of a token of the prompt")
        top = sorted(((other, value.logprob) for other, value in at_position.items()), key=lambda it: -it[1])
        logprob = at_position[token_id].logprob
        logprobs.append(TokenLogprob(token_id=token_id, logprob=logprob, top=top[:num_top]))
    return logprobs


def _token_id(name: str) -> int:
    """Of `token_id:N`."""
    prefix, _, number = name.partition(":")
    if prefix != "token_id" or not number.isdecimal():
        raise EngineFaultError(f"vLLM names a token {name[:40]!r} where a token id was asked for")
    return int(number)


class Reading:
    """Turns pieces of one answer into chunks. The finish reason is kept back until the usage is known."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        self._request = request
        self._sampling = request.sampling
        self._vocab_size = vocab_size
        self._scores_only = request.sampling.max_tokens == 0
        self._num_left = max(1, request.sampling.max_tokens - len(request.resumed_ids))
        self._num_tokens = 0
        self._is_first = True
        self._reason: FinishReason | None = None
        self._last: list[TokenChunk] = []
        """The chunk with the last tokens, while its usage is to come."""
        self._usage: _Usage | None = None

    def take(self, answer: Answer) -> list[TokenChunk]:
        """Chunks that can be passed on. Raises EngineFaultError for what no answer may hold."""
        self._usage = answer.usage or self._usage
        if not answer.choices:
            return []
        if self._reason is not None or len(answer.choices) > 1:
            raise EngineFaultError("vLLM sent more than one answer")
        choice = answer.choices[0]
        self._reason = _finish_reason(choice.finish_reason)
        chunk = self._chunk(choice)
        if self._reason is not None:
            self._last = [chunk]
            return []
        return [chunk] if chunk.token_ids or chunk.usage else []

    def end(self) -> TokenChunk:
        """The last chunk. Raises EngineFaultError if the answer was not complete."""
        if self._reason is None:
            raise EngineFaultError("vLLM ended its answer without a finish reason")
        (chunk,) = self._last
        reason = FinishReason.LENGTH if self._scores_only else self._reason
        return msgspec.structs.replace(chunk, finish_reason=reason, usage=self._made_usage())

    def _chunk(self, choice: _Choice) -> TokenChunk:
        token_ids = choice.token_ids
        if token_ids is None:
            raise EngineFaultError("vLLM sent no token ids; its version is too old, or it is not vLLM")
        if any(not 0 <= token_id < self._vocab_size for token_id in token_ids):
            raise EngineFaultError(f"vLLM sent token ids that the model does not have: {token_ids[:8]}")
        self._num_tokens += len(token_ids)
        if self._num_tokens > self._num_left:
            raise EngineFaultError(f"vLLM sent more than the {self._num_left} tokens that it was asked for")
        logprobs = [] if self._sampling.logprobs is None else _logprobs(choice, self._sampling.logprobs)
        first, self._is_first = self._is_first, False
        prompt_logprobs = None
        if first and self._sampling.prompt_logprobs is not None:
            prompt_logprobs = _prompt_logprobs(choice, self._request, self._sampling.prompt_logprobs)
        return TokenChunk(
            request_id=self._request.id,
            # To score a prompt a token has to be asked for; nobody wants it.
            token_ids=[] if self._scores_only else token_ids,
            logprobs=[] if self._scores_only else logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _made_usage(self) -> Usage:
        details = self._usage.prompt_tokens_details if self._usage is not None else None
        return Usage(
            prompt_tokens=len(self._request.prompt_ids),
            completion_tokens=0 if self._scores_only else len(self._request.resumed_ids) + self._num_tokens,
            cached_tokens=min((details and details.cached_tokens) or 0, len(self._request.prompt_ids)),
        )


class Metrics:
    """Prometheus text, each name summed over its labels."""

    _SAMPLE = re.compile(r"^(vllm:[\w:]+)(?:\{([^}\n]*)\})? (\S+)", re.MULTILINE)
    _LABEL = re.compile(r'(\w+)="([^"]*)"')

    def __init__(self, text: str) -> None:
        self._values: dict[str, float] = {}
        self._labels: dict[str, dict[str, str]] = {}
        for name, labels, value in self._SAMPLE.findall(text):
            with contextlib.suppress(ValueError):
                self._values[name] = self._values.get(name, 0.0) + float(value)
            if name.endswith("_info"):
                self._labels[name] = dict(self._LABEL.findall(labels))

    @property
    def num_steps(self) -> int:
        """Steps that the engine has finished; grows as long as it computes."""
        return self._count("vllm:iteration_tokens_total_count")

    def state(self, model: str, engine: str) -> EngineState:
        """In our words."""
        num_blocks = self._labels.get("vllm:cache_config_info", {}).get("num_gpu_blocks", "")
        total = int(num_blocks) if num_blocks.isdecimal() else 0
        return EngineState(
            model=model,
            engine=engine,
            num_running=self._count("vllm:num_requests_running"),
            num_waiting=self._count("vllm:num_requests_waiting"),
            kv_blocks_used=round(total * min(1.0, self._values.get("vllm:kv_cache_usage_perc", 0.0))),
            kv_blocks_total=total,
            prefix_cache_queries=self._count("vllm:prefix_cache_queries_total"),
            prefix_cache_hits=self._count("vllm:prefix_cache_hits_total"),
            num_preemptions=self._count("vllm:num_preemptions_total"),
            num_draft_tokens=self._count("vllm:spec_decode_num_draft_tokens_total"),
            num_accepted_tokens=self._count("vllm:spec_decode_num_accepted_tokens_total"),
        )

    def _count(self, name: str) -> int:
        value = self._values.get(name, 0.0)
        return int(value) if 0 <= value < 1e18 else 0

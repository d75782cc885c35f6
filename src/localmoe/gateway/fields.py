"""Request fields that several APIs share, with their bounds.

A field is honoured, refused by name, or in an API's `IGNORED` table: harmless, accepted without effect and named
in the `x-localmoe-ignored` header. There is no fourth kind.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError

IGNORED_HEADER = "x-localmoe-ignored"
MAX_TOKENS = 2**31 - 1
"""Far over any context, which is the bound that counts."""
MAX_TOKEN_IDS = 2**20
"""In one list from a client; over any context, and still checked within a fraction of a second."""
MAX_PARTS_TOGETHER = 2**14
"""Objects and lists in all messages of a request. Each takes some ten microseconds, in which nobody is served."""
_PARTS = (dict, list)
MIN_TEMPERATURE = 1e-5
"""Below it, dividing logits could overflow, and the likeliest token would be drawn anyway."""
MAX_N = 64
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024


def _check_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text_unicode", "Text must not hold lone surrogates") from error
    return value


UNICODE = AfterValidator(_check_text)
Text = Annotated[str, UNICODE]
ModelId = Annotated[str, Field(max_length=512), UNICODE]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64), UNICODE],
        Annotated[str, Field(max_length=512), UNICODE],
    ],
    Field(max_length=16, fail_fast=True),
]


def _check_num_parts(value: list[Any]) -> list[Any]:
    parts, num_parts = value, len(value)
    while num_parts <= MAX_PARTS_TOGETHER:
        nested = (
            one
            for part in parts
            if isinstance(part, _PARTS)
            for one in (part.values() if isinstance(part, dict) else part)
            if isinstance(one, _PARTS)
        )
        parts = list(islice(nested, MAX_PARTS_TOGETHER + 1))  # of millions no more than it takes to refuse them
        if not parts:
            return value
        num_parts += len(parts)
    raise InvalidRequestError(f"more than {MAX_PARTS_TOGETHER} parts are in it")


BOUNDED = BeforeValidator(lambda value: _check_num_parts(value) if isinstance(value, list) else value)
"""Of lists of messages: each has a bound, and so have all parts of all of them."""


def is_list(value: Any) -> str:
    """Tells the branches of `str | list[...]` apart."""
    return "<list>" if isinstance(value, list) else "<text>"


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), UNICODE]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]

LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIASES, fail_fast=True),
]


def _describe(schema: dict[str, Any], model: type[Any]) -> None:
    for name in model.IGNORED:
        schema.setdefault("properties", {})[name] = {"description": "Accepted without effect."}
    if model.EXAMPLE:
        schema["examples"] = [model.EXAMPLE]


class ApiModel(BaseModel):
    """A JSON object from a client: no conversions (`"1"` is not 1, true is not 1), no unknown fields."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, json_schema_extra=_describe
    )

    IGNORED: ClassVar[tuple[str, ...]] = ()
    """Fields accepted without effect."""
    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields not supported, each with the values (besides null) that ask for nothing and are let pass."""

    EXAMPLE: ClassVar[Mapping[str, Any]] = {}
    """A request for the API's documentation."""

    _ignored: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _sort_fields(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, dict):
            return handler(data)
        for name, neutral in cls.REFUSED.items():
            value = data.get(name)
            if value is not None and not any(type(value) is type(n) and value == n for n in neutral):
                raise UnsupportedFieldError("not supported by this server; leave it out", param=name)
        ignored = tuple(name for name in data if name in cls.IGNORED)
        dropped = {*ignored, *cls.REFUSED}
        # One unknown field is complained of; a complaint about each of a million would take seconds.
        names = {field.alias or name: None for name, field in cls.model_fields.items()}
        unknown = islice((name for name in data if name not in names and name not in dropped), 1)
        kept = [*unknown, *(name for name in names if name in data)]
        result = handler({name: data[name] for name in kept})
        result._ignored = ignored
        return result

    def ignored_headers(self, also: Iterable[str] = ()) -> dict[str, str]:
        """The header that names the fields without effect, here and in all that is inside; empty if there were none.

        Args:
            also: further ones.
        """
        names = dict.fromkeys((*self.ignored_fields(), *also))
        return {IGNORED_HEADER: ", ".join(names)} if names else {}

    def ignored_fields(self) -> Iterator[str]:
        """Those without effect, with the names of the fields that they are in."""
        yield from self._ignored
        for name, value in self:
            several = isinstance(value, list) and value and isinstance(value[0], ApiModel)
            for inner in value if several else (value,):
                if isinstance(inner, ApiModel):
                    yield from (f"{name}.{path}" for path in inner.ignored_fields())


class StreamOptions(ApiModel):
    """Only with `stream: true`."""

    IGNORED = ("include_obfuscation",)

    include_usage: bool | None = Field(
        default=None, description="Send token counts in a last chunk that has no choices."
    )


class SamplingFields(ApiModel):
    """How answers are drawn. An omitted field takes the model's own recommendation, else OpenAI's default."""

    model: ModelId = Field(description="A name from `/v1/models`.")
    temperature: float | None = Field(
        default=None, ge=0, le=2, description=f"0, like all below {MIN_TEMPERATURE:g}, means greedy decoding."
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="Keep the k likeliest tokens; 0 or -1 keeps all."
    )
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Keep tokens with this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="Divides the logits of tokens already present; 1 is none."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(default=None, description="Added to logits, by token id.")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="The same seed and request give the same answer."
    )
    n: int | None = Field(default=None, ge=1, le=MAX_N, description="Answers per prompt; 1 if omitted.")
    stop: Stop | None = Field(default=None, description="The answer ends before any of these.")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_STOP_TOKEN_IDS, description="Further tokens that end an answer."
    )
    ignore_eos: bool | None = Field(default=None, description="Go on after the model's own end tokens.")
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("only allowed with stream: true", param="stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class PromptTokensDetails(BaseModel):
    """Part of `UsageCounts`."""

    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class UsageCounts(BaseModel):
    """Token counts of a request; a prompt counts once however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

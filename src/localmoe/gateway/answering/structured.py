"""Answers in a form that the client asks for: OpenAI's `response_format` and vLLM's `structured_outputs`.

What is asked for becomes a `core.Grammar`. Whether that can be compiled is for `grammar_checks` to find out.
"""

import json
from typing import Annotated, Any, Literal, Required, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator, with_config
from typing_extensions import TypedDict

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.gateway.fields import UNICODE, ApiModel, Text
from localmoe.gateway.json_fields import JsonObject, inner_schemas
from localmoe.gateway.kinds import kind_of, refuse_other_kinds

MAX_CHOICES = 4096

_KEYWORDS = frozenset(
    """$anchor $comment $defs $id $ref $schema additionalProperties allOf anyOf const contentEncoding contentMediaType
    contentSchema default definitions deprecated description enum examples exclusiveMaximum exclusiveMinimum format id
    items maxItems maxLength maxProperties maximum minItems minLength minProperties minimum multipleOf oneOf pattern
    patternProperties prefixItems properties readOnly required title type writeOnly""".split()  # noqa: SIM905
)
"""Of JSON Schema, those that are honoured and those that say nothing of what is valid."""


@with_config(ConfigDict(strict=True, extra="forbid"))
class JsonSchemaSpec(TypedDict, total=False):
    """A schema and its name. (No model, which would have a method of the name `schema`.)"""

    name: Required[Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]]
    description: Annotated[str, UNICODE] | None
    schema: Required[JsonObject]
    strict: bool | None


class TextFormat(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(ApiModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(ApiModel):
    """JSON that is valid by a schema. It is, `strict` or not; strict schemas have known keywords only."""

    type: Literal["json_schema"]
    json_schema: JsonSchemaSpec


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(kind_of),
    refuse_other_kinds("formats", "text", "json_object", "json_schema"),
]


class StructuredOutputs(ApiModel):
    """What vLLM takes in place of a `response_format`: exactly one of these."""

    REFUSED = {  # noqa: RUF012
        "disable_additional_properties": (False,),
        "disable_any_whitespace": (False,),
        "structural_tag": (),
        "whitespace_pattern": (),
    }

    json_: JsonObject | None = Field(default=None, alias="json", description="A JSON Schema.")
    json_object: Literal[True] | None = Field(default=None, description="Any JSON object.")
    regex: Text | None = Field(default=None, description="A regular expression that all of the answer matches.")
    choice: Annotated[list[Text], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MAX_CHOICES, description="The answer is one of these texts."
    )
    grammar: Text | None = Field(default=None, description="Rules in llguidance's dialect of Lark.")

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if sum(value is not None for value in self._all()) != 1:
            raise InvalidRequestError("exactly one of json, json_object, regex, choice and grammar must be there")
        return self

    def _all(self) -> tuple[Any, ...]:
        return self.json_, self.json_object, self.regex, self.choice, self.grammar

    @property
    def as_grammar(self) -> Grammar:
        """What the answer is to be a sentence of."""
        if self.regex is not None:
            return Grammar(kind="regex", source=self.regex)
        if self.choice is not None:
            return Grammar(kind="choice", source=_json(self.choice))
        if self.grammar is not None:
            return Grammar(kind="lark", source=self.grammar)
        if self.json_ is not None:
            return Grammar(kind="json_schema", source=_json(self.json_))
        return Grammar(kind="json_object")


def grammar_of(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> Grammar | None:
    """What the answer is to be a sentence of; None: anything.

    Raises:
        InvalidRequestError: see `schema_grammar`.
    """
    match response_format:
        case JsonObjectFormat():
            return Grammar(kind="json_object")
        case JsonSchemaFormat():
            return schema_grammar(response_format.json_schema, "response_format.json_schema")
    return None


def schema_grammar(spec: JsonSchemaSpec, param: str) -> Grammar:
    """The grammar of what is valid by a schema.

    Args:
        param: the field that has it.

    Raises:
        InvalidRequestError: it is strict and has a keyword that is unknown.
    """
    if spec.get("strict"):
        _check_keywords(spec["schema"], f"{param}.schema")
    return Grammar(kind="json_schema", source=_json(spec["schema"]))


def _check_keywords(schema: dict[str, Any], param: str) -> None:
    pending: list[tuple[str, Any]] = [("", schema)]
    while pending:
        path, inner = pending.pop()
        if not isinstance(inner, dict):
            continue
        unknown = next((name for name in inner if name not in _KEYWORDS), None)
        if unknown is not None:
            where = f"{param}.{path}" if path else param
            raise InvalidRequestError(
                f"{where}: the keyword {unknown[:64]!r} is not supported in a strict schema", param=where
            )
        try:
            pending += inner_schemas(inner, path)
        except InvalidRequestError as error:
            where = f"{param}.{error.param}"
            raise InvalidRequestError(f"{where}: {error}", param=where) from None


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)

"""Objects from clients that come in several kinds, told apart by their `type`."""

from typing import Any

from pydantic import BeforeValidator

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError

_MAX_KIND_CHARS = 50


def kind_of(value: Any) -> str:
    """The tag of an object's class, for a `Discriminator`; in brackets, which are left out of paths in messages."""
    return f"<{_kind(value)}>"


def refuse_other_kinds(what: str, *kinds: str) -> BeforeValidator:
    """Refuses objects of any other kind by its name.

    Args:
        what: they are, in the plural.
    """

    return BeforeValidator(lambda value: check_kind(value, what, *kinds))


def check_kind(value: Any, what: str, *kinds: str) -> Any:
    """Give the value back, or raise InvalidRequestError if it is no object of these kinds."""
    kind = _kind(value)
    if not kind:
        raise InvalidRequestError(f"{what} are objects with a type, one of: {', '.join(kinds)}", param="type")
    if kind not in kinds:
        raise UnsupportedFieldError(
            f"{what} of type {kind[:_MAX_KIND_CHARS]!r} are not supported by this server;"
            f" supported: {', '.join(kinds)}",
            param="type",
        )
    return value


def _kind(value: Any) -> str:
    """In OpenAI's responses a message needs not say what it is."""
    if not isinstance(value, dict):
        return ""
    kind = value.get("type")
    return kind if isinstance(kind, str) else "message" if kind is None and "role" in value else ""

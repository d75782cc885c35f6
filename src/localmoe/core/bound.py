"""Context variables that have a value for as long as something lasts."""

from contextvars import ContextVar, Token
from typing import Generic, TypeVar

T = TypeVar("T")


class Bound(Generic[T]):
    """A variable's value for the code inside, and for tasks that it starts.

    Args:
        variable: has its earlier value again afterwards.
        value: meanwhile.
    """

    # There is one around each request for as long as its stream lasts; a generator's would be five times as large.
    __slots__ = ("_token", "_value", "_variable")

    def __init__(self, variable: ContextVar[T], value: T) -> None:
        self._variable = variable
        self._value = value
        self._token: Token[T] | None = None

    def __enter__(self) -> None:
        self._token = self._variable.set(self._value)

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        self._variable.reset(self._token)

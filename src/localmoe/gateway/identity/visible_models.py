"""The models that whoever asks may use; for them there are no others."""

from collections.abc import Iterator, Mapping

from localmoe.gateway.context import ServedModel
from localmoe.gateway.exchange import current_principal


class VisibleModels(Mapping[str, ServedModel]):
    """A view of all models, by name.

    Every route looks models up here, so none can forget to ask whether it may.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def __getitem__(self, name: str) -> ServedModel:
        allowed = current_principal().models
        if allowed and name not in allowed:
            raise KeyError(name)
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        allowed = current_principal().models
        return (name for name in self._models if not allowed or name in allowed)

    def __len__(self) -> int:
        return sum(1 for _ in self)

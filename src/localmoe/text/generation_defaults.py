"""What a model's authors recommend for sampling, and which tokens end its answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.core.errors import CheckpointError
from localmoe.formats.files import read_optional_json_object
from localmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """Stands for the sampling fields that a request omits. Without recommendations, the OpenAI API's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    """Ascending."""

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "GenerationDefaults":
        """Read `generation_config.json` and, for the end tokens it lacks, `config.json`.

        With `do_sample: false` the recommendation is greedy decoding and the other values do not apply.

        Raises:
            CheckpointError: a file is damaged or a value is out of range.
        """
        path = directory / "generation_config.json"
        recommended = read_optional_json_object(path)
        eos = _token_ids(recommended.get("eos_token_id"), path)
        if not eos:
            config_path = directory / "config.json"
            eos = _token_ids(read_optional_json_object(config_path).get("eos_token_id"), config_path)
        own = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
        eos_token_ids = tuple(sorted({*eos, own} if own is not None else set(eos)))
        if recommended.get("do_sample") is False:
            return cls(temperature=0.0, eos_token_ids=eos_token_ids)
        return cls(
            temperature=_number(recommended, "temperature", 1.0, path, low=0.0, high=100.0),
            top_p=_number(recommended, "top_p", 1.0, path, low=0.0, high=1.0) or 1.0,
            top_k=max(0, int(_number(recommended, "top_k", 0, path, low=-1, high=2**31))),
            min_p=_number(recommended, "min_p", 0.0, path, low=0.0, high=1.0),
            repetition_penalty=_number(recommended, "repetition_penalty", 1.0, path, low=0.01, high=100.0),
            eos_token_ids=eos_token_ids,
        )


def _number(config: dict[str, Any], name: str, default: float, path: Path, *, low: float, high: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(f"{path}: {name} is {value!r}; it must be a number from {low:g} to {high:g}")
    return value


def _token_ids(value: Any, path: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of them")
    return ids

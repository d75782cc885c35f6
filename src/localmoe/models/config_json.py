"""Reads the numbers of a `config.json` and refuses what no decoder here computes."""

from typing import Any

from localmoe.core.errors import CheckpointError
from localmoe.core.model import ModelShape, QkNorm, RopeScaling

_LARGEST = 1 << 24
"""No size in a language model's configuration comes near this; larger ones are damage or malice."""
_MOST_EXPERTS = 1 << 18
"""In all layers together: several times more than any model has; each is spelled out by name."""


class ConfigReader:
    """Typed, bounded access to a checkpoint's configuration; every error names the key and its value."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def fail(self, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"config.json: {key} is {self._config.get(key)!r}; {allowed}")

    def size(self, key: str, default: int | None = None) -> int:
        value = self._config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST:
            raise self.fail(key, f"it must be an integer from 1 to {_LARGEST}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._config.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.fail(key, "it must be a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """False if absent."""
        value = self._config.get(key, False)
        if not isinstance(value, bool):
            raise self.fail(key, "it must be true or false")
        return value

    def require(self, key: str, *allowed: object) -> None:
        """Refuses a key whose value would change the arithmetic; an absent key means the first allowed value."""
        if self._config.get(key, allowed[0]) not in allowed:
            raise self.fail(key, f"supported: {', '.join(map(repr, allowed))}")

    def mixture(self, *, num_experts: int, top_k: int) -> tuple[int, int]:
        """(experts, experts per token); the arguments stand for absent keys.

        The number of experts goes by either of two names: transformers reads both, and does not always write the
        one it read.
        """
        experts = self.size("num_experts", self.size("num_local_experts", num_experts))
        if experts == 1:
            raise CheckpointError("config.json: a mixture of one expert has no router; model_type 'llama' is that")
        self.require("num_local_experts", experts, None)
        top_k = self.size("num_experts_per_tok", top_k)
        if top_k > experts:
            raise self.fail("num_experts_per_tok", f"it must not exceed the number of experts ({experts})")
        return experts, top_k

    def rope(self) -> tuple[float, RopeScaling | None]:
        """(theta, scaling) from either generation of keys: `rope_parameters`, or `rope_theta` + `rope_scaling`.

        Where both are given the older wins, as in transformers.
        """
        parameters = self._config.get("rope_scaling") or self._config.get("rope_parameters") or {}
        if not isinstance(parameters, dict):
            raise self.fail("rope_parameters", "it must be an object")
        nested = ConfigReader({"rope_theta": self._config.get("rope_theta", 1e4)} | parameters)
        theta = nested.number("rope_theta", 1e4)
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            raise CheckpointError(
                f"config.json: rope type {kind!r} is not supported; supported: 'default', 'llama3'"
            )
        return theta, RopeScaling(
            factor=nested.number("factor", 8.0),
            low_freq_factor=nested.number("low_freq_factor", 1.0),
            high_freq_factor=nested.number("high_freq_factor", 4.0),
            original_max_position=nested.size("original_max_position_embeddings"),
        )


def llama_family_shape(
    config: dict[str, Any],
    *,
    num_experts: int,
    top_k: int,
    expert_size_key: str = "intermediate_size",
    qk_norm: QkNorm | None = None,
    norm_top_k: bool = True,
) -> ModelShape:
    """What all descendants of Llama spell alike, and what tells them apart.

    Args:
        config: where an architecture's defaults are not Llama's, it has put them in.

    Raises:
        CheckpointError: a size is missing or absurd, or sizes do not fit each other.
    """
    read = ConfigReader(config)
    read.require("hidden_act", "silu")
    read.require("attention_bias", False, None)
    theta, scaling = read.rope()
    heads = read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", heads)
    head_dim = read.size("head_dim", max(read.size("hidden_size") // heads, 1))
    if heads % kv_heads:
        raise read.fail("num_key_value_heads", f"it must divide num_attention_heads ({heads})")
    if head_dim % 2:
        raise CheckpointError(f"config.json: the head size {head_dim} is odd; rotary embedding pairs its elements")
    layers = read.size("num_hidden_layers")
    if layers * num_experts > _MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: {layers} layers of {num_experts} experts are more than {_MOST_EXPERTS}"
        )
    return ModelShape(
        model_type=config["model_type"],
        num_layers=layers,
        hidden_size=read.size("hidden_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        num_experts=num_experts,
        top_k=top_k,
        expert_size=read.size(expert_size_key),
        vocab_size=read.size("vocab_size"),
        max_context_tokens=read.size("max_position_embeddings"),
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=read.flag("tie_word_embeddings"),
        qk_norm=qk_norm,
        norm_top_k=norm_top_k,
    )

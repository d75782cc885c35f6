"""Skips experts that have little weight, so that they need not be read. Lossy, and off unless it is asked for.

A token's chosen experts whose share of the router weights is below a threshold are dropped, but never its first. A
dropped place has weight 0 and names no expert (-1), so that none is read or computed for it.

Shape suffixes: T tokens, D hidden size, K experts per token.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.model import ModelShape
from localmoe.core.protocols import ExpertExecutor, Routed
from localmoe.engine.config import EngineConfig

logger = logging.getLogger(__name__)

_TOLERATED_STALL = 0.1
"""Waiting for less than this share of the time is no reason to give up quality."""
_ADAPTIVE_CEILING = 0.5
"""An adaptive threshold rises to at most this part of an even share, which is 1/K."""
_SMOOTHING = 0.2
"""Weight of the last step in the share of time that was spent waiting: of about the last five."""


def drop_experts(
    ids_TK: Tensor, weights_TK: Tensor, threshold: float, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Ids and weights without the experts whose share of a token's weights is below the threshold.

    Where none is dropped, not a bit changes. A token's result does not depend on which other tokens are there.
    Weights that are not numbers are left as they are.

    Args:
        ids_TK: int32, the likeliest first.
        weights_TK: float32, of the router.
        normalize: the model scales the weights of the chosen to sum to one; those left are scaled to the sum that
            all had.
    """
    # Added one after the other: `sum` may add in another order for another number of tokens.
    totals_T1 = weights_TK.cumsum(-1)[:, -1:]
    dropped_TK = weights_TK < threshold * totals_T1
    dropped_TK[:, 0] = False
    ids_TK = ids_TK.masked_fill(dropped_TK, -1)
    weights_TK = weights_TK.masked_fill(dropped_TK, 0.0)
    if normalize:
        weights_TK *= totals_T1 / weights_TK.cumsum(-1)[:, -1:]
    return ids_TK, weights_TK


class ThresholdedExperts:
    """Experts of which those of little weight are skipped.

    Args:
        experts: compute what is left.
        threshold: asked once a step.
        normalize: see `drop_experts`.
    """

    def __init__(
        self, experts: ExpertExecutor[Tensor], threshold: Callable[[], float], *, normalize: bool
    ) -> None:
        self._experts = experts
        self._threshold = threshold
        self._normalize = normalize
        self._step_threshold = 0.0

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self._step_threshold = self._threshold()
        self._experts.begin_step(is_prompt_T)

    def state(self) -> TierState | None:
        return self._experts.state()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        if self._step_threshold > 0:
            ids_TK, weights_TK = drop_experts(
                routed.ids_TK, routed.weights_TK, self._step_threshold, normalize=self._normalize
            )
            routed = replace(routed, ids_TK=ids_TK, weights_TK=weights_TK)
        self._experts(routed, x_TD)


class StallFraction:
    """The share of recent time in which there was nothing to do but wait; one call a step.

    Args:
        stall_s: total waiting time so far.
        clock: seconds; replaced in tests.
    """

    def __init__(self, stall_s: Callable[[], float], clock: Callable[[], float] = time.perf_counter) -> None:
        self._stall_s = stall_s
        self._clock = clock
        self._last = (clock(), stall_s())
        self._fraction = 0.0

    def __call__(self) -> float:
        (then_s, stalled_s), self._last = self._last, (self._clock(), self._stall_s())
        elapsed_s = self._last[0] - then_s
        if elapsed_s > 0:
            latest = min((self._last[1] - stalled_s) / elapsed_s, 1.0)
            self._fraction += _SMOOTHING * (latest - self._fraction)
        return self._fraction


def adaptive_threshold(base: float, top_k: int, stall_fraction: Callable[[], float]) -> Callable[[], float]:
    """A threshold that is `base` while the link keeps up, and rises in proportion to the time spent waiting for it.

    The highest is half of an even share, `0.5 / top_k`, or `base` where that is more.

    Args:
        stall_fraction: the share of recent time, 0 to 1, that was spent waiting.
    """
    ceiling = max(base, _ADAPTIVE_CEILING / top_k)

    def threshold() -> float:
        excess = (stall_fraction() - _TOLERATED_STALL) / (1 - _TOLERATED_STALL)
        return base + (ceiling - base) * min(max(excess, 0.0), 1.0)

    return threshold


def with_threshold(
    experts: ExpertExecutor[Tensor], config: EngineConfig, shape: ModelShape
) -> ExpertExecutor[Tensor]:
    """The same experts where the configuration drops none, else those that skip what is below its threshold."""
    base, top_k = config.expert_threshold, shape.top_k
    if top_k == 1:
        return experts
    if config.adaptive_expert_threshold and experts.state() is not None:
        logger.warning("lossy: an expert threshold of %g that rises while steps wait for experts", base)
        threshold = adaptive_threshold(base, top_k, StallFraction(lambda: _stall_s(experts)))
        return ThresholdedExperts(experts, threshold, normalize=shape.norm_top_k)
    if base == 0:
        return experts
    logger.warning("lossy: experts of less than %g of a token's router weights are skipped", base)
    return ThresholdedExperts(experts, lambda: base, normalize=shape.norm_top_k)


def _stall_s(experts: ExpertExecutor[Tensor]) -> float:
    """Total time spent waiting for experts."""
    state = experts.state()
    return 0.0 if state is None else state.stall_s

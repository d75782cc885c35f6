"""Watches a model's layers: how long each takes, and which experts its tokens choose.

It costs about half a microsecond a layer, so all engines do it. Choices are counted when some have come together.
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.inspection import LayerTimes
from localmoe.core.model import ModelShape
from localmoe.core.plans import BatchPlan
from localmoe.core.protocols import ExpertExecutor, Routed
from localmoe.engine.routing_trace import RoutingRecorder

_MOST_PENDING_STEPS = 64
_MOST_PENDING_TOKENS = 1024
"""Whose choices have not been counted yet, one step more at the most."""


class _Times:
    """Totals of the steps of one phase, by layer."""

    def __init__(self, phase: Literal["decode", "prefill"], num_layers: int) -> None:
        self._phase: Literal["decode", "prefill"] = phase
        self.num_steps = 0
        self.elapsed_s = [0.0] * num_layers
        self.stall_s = [0.0] * num_layers

    def means(self) -> LayerTimes:
        """Of at least one step; one that failed counts."""
        stall_s = [stall_s / self.num_steps for stall_s in self.stall_s]
        elapsed_s = [elapsed_s / self.num_steps for elapsed_s in self.elapsed_s]
        return LayerTimes(
            phase=self._phase,
            num_steps=self.num_steps,
            compute_s=[elapsed_s - stall_s for elapsed_s, stall_s in zip(elapsed_s, stall_s, strict=True)],
            stall_s=stall_s,
        )


class ObservedExperts:
    """The same experts, watched.

    Args:
        experts: compute.
        stall_s: total time spent waiting for experts so far.
        present: whether each expert [layers, experts] is in memory now.
        on_device: whether it is in a GPU's; None: there is none.
        is_timed: a layer has been computed when its experts return; where it has only been launched by then, as on a
            GPU that has them all, layers are not timed.
    """

    def __init__(
        self,
        experts: ExpertExecutor[Tensor],
        shape: ModelShape,
        *,
        stall_s: Callable[[], float],
        present: Callable[[], NDArray[np.bool_]],
        on_device: Callable[[], NDArray[np.bool_]] | None = None,
        is_timed: bool = True,
    ) -> None:
        self._experts = experts
        self._shape = shape
        self.present = present
        self._on_device = on_device
        self._is_timed = is_timed
        self._stall_s = stall_s
        self._recorder: RoutingRecorder | None = None
        self.forget()

    def forget(self) -> None:
        """Begin anew; between two steps."""
        shape = self._shape
        self._heat_LE = np.zeros((shape.num_layers, shape.num_experts), np.int64)
        self._pending: list[list[Tensor]] = [[] for _ in range(shape.num_layers)]
        """Choices [T, K] that are not in the heat yet, by layer."""
        self._num_pending_steps = self._num_pending_tokens = 0
        self._decode = self._times = _Times("decode", shape.num_layers)
        self._prefill = _Times("prefill", shape.num_layers)

    def record(self, recorder: RoutingRecorder) -> None:
        """From now on write routing down; before each step `begin` is told of it."""
        self._recorder = recorder

    def begin(self, plan: BatchPlan) -> None:
        """A step of this plan begins."""
        if self._recorder is not None:
            self._recorder.begin_step(plan.sequences)

    @property
    def watched(self) -> ExpertExecutor[Tensor]:
        """What computes."""
        return self._experts

    @property
    def needs_each_layer(self) -> bool:
        """Whether it must see a layer before the next is computed."""
        return self._recorder is not None and self._recorder.is_on

    def replayed(self, ids_LTK: Tensor) -> None:
        """A step that has begun went past it: these are its choices. Its layers share the time alike."""
        now_s, num_layers = time.perf_counter(), len(self._pending)
        for layer, ids_TK in enumerate(ids_LTK):
            self._pending[layer].append(ids_TK)
            self._times.elapsed_s[layer] += (now_s - self._seen_s) / num_layers

    def rest(self) -> None:
        """No step follows for a while."""
        if self._recorder is not None:
            self._recorder.flush()

    def heat(self) -> list[list[int]]:
        """[layers][experts]: tokens that chose the expert."""
        self._count()
        return self._heat_LE.tolist()

    def placement(self) -> list[list[str]]:
        """[layers][experts]: where an expert is, `device`, `ram` or `disk`."""
        places = np.where(self.present(), "ram", "disk")
        if self._on_device is not None:
            places = np.where(self._on_device(), "device", places)
        found: list[list[str]] = places.tolist()
        return found

    def layer_times(self) -> list[LayerTimes]:
        """Of phases that there have been; none where layers are not timed."""
        return [times.means() for times in (self._decode, self._prefill) if times.num_steps and self._is_timed]

    def totals(self) -> tuple[int, float]:
        """Layers that were timed, and the seconds that took."""
        if not self._is_timed:
            return 0, 0.0
        num_steps = self._decode.num_steps + self._prefill.num_steps
        return num_steps * len(self._pending), sum(self._decode.elapsed_s) + sum(self._prefill.elapsed_s)

    def state(self) -> TierState | None:
        return self._experts.state()

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        if self._num_pending_steps >= _MOST_PENDING_STEPS or self._num_pending_tokens >= _MOST_PENDING_TOKENS:
            self._count()
        self._num_pending_steps += 1
        self._num_pending_tokens += len(is_prompt_T)
        self._times = self._prefill if any(is_prompt_T) else self._decode
        self._times.num_steps += 1
        self._experts.begin_step(is_prompt_T)
        self._seen_s, self._seen_stall_s = time.perf_counter(), self._stall_s()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        layer = routed.layer
        if self._recorder is not None and self._recorder.is_on:
            self._recorder.record(layer, routed.ids_TK, routed.weights_TK, self.present()[layer])
        self._pending[layer].append(routed.ids_TK)
        self._experts(routed, x_TD)
        now_s, stall_s = time.perf_counter(), self._stall_s()
        times = self._times
        times.elapsed_s[layer] += now_s - self._seen_s
        times.stall_s[layer] += stall_s - self._seen_stall_s
        self._seen_s, self._seen_stall_s = now_s, stall_s

    def _count(self) -> None:
        for heat_E, pending in zip(self._heat_LE, self._pending, strict=True):
            if pending:
                heat_E += np.bincount(torch.cat(pending).flatten().numpy(force=True), minlength=len(heat_E))
                pending.clear()
        self._num_pending_steps = self._num_pending_tokens = 0

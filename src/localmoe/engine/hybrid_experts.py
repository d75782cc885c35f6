"""Computes routed experts on a GPU and a CPU together.

Some experts have their home on the device, and are computed there. The others are in RAM or on the disk, and another
executor computes them on the CPU, at the same time; or the device fetches them from RAM, where that is faster. In a
layer:

    settle     copies that have ended since are taken into account
    ids        go to the host, with everything else that it needs: the one time that the host waits for the device
    split      says which of the experts in RAM the device fetches
    device     copies begin, what is at home is launched, then what is fetched, a few at a time as it lands
    host       the inner executor gets the tokens with -1 for what the device computes, and adds to a sum of its own,
               which is copied to the device and added there; then the device's own sum
    move       where the link has had idle time, an expert worth it is copied to the device to stay

One thread does it all; the device, its copies and the host's compute threads run beside each other. How experts move
is described in `device_experts`.

Each token's sum is the host's part, then the device's, each in order of its choices. So results are the same bits
wherever on the device experts are, and differ by rounding with what the two of them share out: inputs are rounded to
int8 on the CPU and to bfloat16 on the device (see `kernels.cpu` and `kernels.triton.product`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.model import ExpertId, ModelShape
from localmoe.core.protocols import Routed
from localmoe.engine.device_experts import DeviceExperts, HostExperts
from localmoe.residency.policy import RetentionPolicy
from localmoe.residency.split import LayerTimes, LayerWork, Split
from localmoe.tiers.device import Copy, HostMirror, Mark

_IDLE_SHARE = 0.5
"""Of a layer's time, that copies of experts that move in may take."""
_MOST_IDLE_COPIES = 8.0
"""Time that has passed cannot be used later; so many may be begun at once."""


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """A layer whose times on the device are known when the next one begins."""

    work: LayerWork
    copies: Sequence[Copy]
    started: Mark
    computed: Mark | None
    """None: the device had nothing to compute."""
    cpu_s: float | None
    stall_s: float


class HybridExperts:
    """Experts of which some are on a device, and an inner executor has the others.

    Args:
        host: computes on the CPU what the device does not.
        device: the experts there; `fill` comes first.
        policy: is told of all uses. It judges for the device and for the host, where it is `ToldElsewhere`.
        split: which of the experts in RAM the device fetches.
    """

    def __init__(
        self, shape: ModelShape, *, host: HostExperts, device: DeviceExperts, policy: RetentionPolicy, split: Split
    ) -> None:
        self._shape = shape
        self._host = host
        self._device = device
        self._policy = policy
        self._split = split
        self._mirror = HostMirror(device.arena.blobs.device)
        self._num_hits = self._num_fetches = 0
        """Uses that found an expert on the device, that fetched it, and that left it to the host."""
        self._is_prompt_T = np.zeros(0, np.bool_)
        self._launched: _Launched | None = None
        self._layer_ended_s = 0.0
        self._idle_copies = 0.0
        """Copies that the link has had time for and that have not been made."""
        self._wanted: dict[ExpertId, None] = {}
        """Experts that are to move in, the one worth most last."""

    @property
    def stall_s(self) -> float:
        """Total time in which there was nothing to do but wait for the disk."""
        return self._host.stall_s

    def present(self) -> NDArray[np.bool_]:
        """Whether each expert [layers, experts] is on the device or in RAM now."""
        return self._host.present() | self.on_device()

    def on_device(self) -> NDArray[np.bool_]:
        """Whether the home of each expert [layers, experts] is on the device now."""
        return self._device.residency.present()

    def state(self) -> TierState:
        """Totals as of now."""
        device, state = self._device, self._host.state()
        return msgspec.structs.replace(
            state,
            hits=state.hits + self._num_fetches,
            device_slots=device.residency.num_slots,
            device_slot_bytes=device.arena.slot_bytes,
            num_on_device=device.residency.num_home,
            device_hits=self._num_hits,
            device_fetches=self._num_fetches,
            device_evictions=device.residency.num_evictions,
            copies_in=device.moves.copies_in,
            copies_out=device.moves.copies_out,
            copies_busy_s=device.moves.busy_s,
        )

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self._is_prompt_T = np.array(is_prompt_T, np.bool_)
        self._host.begin_step(is_prompt_T)
        self._device.settle()
        self._wanted = dict.fromkeys(reversed(self._device.wanted()))
        self._layer_ended_s = time.perf_counter()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        """Raises what the inner executor raises, and DeviceError."""
        launched, self._launched = self._launched, None
        device, layer = self._device, routed.layer
        on_host = self._copied(routed, x_TD)
        device.layers[layer].begin(routed.h_TD, routed.ids_TK)
        self._mirror.synchronize()
        if launched is not None:
            self._report(launched)
        ids_TK = on_host.ids_TK.numpy()
        self._observe(layer, ids_TK)
        tokens_E = np.bincount(ids_TK[ids_TK >= 0], minlength=self._shape.num_experts)
        used = np.flatnonzero(tokens_E)
        device.settle(layer, used.tolist())
        home, near, far = self._where(layer, used, tokens_E)
        work = LayerWork(device=tokens_E[home], ram=tokens_E[near], disk=tokens_E[far])
        fetched = device.borrow(layer, near[: self._split.choose(work)].tolist())
        if len(fetched) > 0:  # some may not be had, and what is observed must be what is done
            is_fetched = np.isin(near, [expert for expert, _ in fetched])
            work = replace(work, ram=np.concatenate([work.ram[is_fetched], work.ram[~is_fetched]]))
        started = device.arena.mark()
        copies = device.compute(layer, home=len(home) > 0, fetched=fetched)
        computed = device.arena.mark() if len(home) or fetched else None
        cpu_s, stall_s = self._compute_on_host(on_host, [*home.tolist(), *(e for e, _ in fetched)], x_TD)
        if computed is not None:
            device.layers[layer].finish(routed.weights_TK, x_TD)
        self._num_hits += len(home)
        self._num_fetches += len(fetched)
        self._launched = _Launched(
            work=work, copies=copies, started=started, computed=computed, cpu_s=cpu_s, stall_s=stall_s
        )
        self._move(len(copies), [ExpertId(layer, int(expert)) for expert in (*near, *far)])

    def _copied(self, routed: Routed[Tensor], x_TD: Tensor) -> Routed[Tensor]:
        """What the host needs, on its way there; `ahead` as it is told once more, of experts not on the device."""
        mirror = self._mirror
        choices = routed.ahead[: self._host.prefetch_layers]
        ahead = [mirror.copy(f"ahead {index}", choose(x_TD)) for index, choose in enumerate(choices)]

        def absent(index: int) -> Tensor:
            ids_TK = ahead[index].numpy()
            ids_TK[self._device.residency.slots(routed.layer + 1 + index)[ids_TK] >= 0] = -1
            return ahead[index]

        return Routed(
            layer=routed.layer,
            h_TD=mirror.copy("h", routed.h_TD),
            ids_TK=mirror.copy("ids", routed.ids_TK),
            weights_TK=mirror.copy("weights", routed.weights_TK),
            ahead=[partial(lambda index, _: absent(index), index) for index in range(len(ahead))],
        )

    def _observe(self, layer: int, ids_TK: NDArray[np.int32]) -> None:
        is_prompt_T = self._is_prompt_T
        if is_prompt_T.any():
            self._policy.observe(layer, ids_TK[is_prompt_T], prefill=True)
        if not is_prompt_T.all():
            self._policy.observe(layer, ids_TK[~is_prompt_T], prefill=False)

    def _where(
        self, layer: int, used: NDArray[np.intp], tokens_E: NDArray[np.intp]
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Of the experts used those on the device, in RAM (the ones of most tokens first), and on the disk only."""
        is_home = self._device.residency.slots(layer)[used] >= 0
        others = used[~is_home]
        is_near = self._host.present()[layer][others]
        near = others[is_near]
        return used[is_home], near[np.argsort(-tokens_E[near], kind="stable")], others[~is_near]

    def _compute_on_host(
        self, on_host: Routed[Tensor], elsewhere: Sequence[int], x_TD: Tensor
    ) -> tuple[float | None, float]:
        """Compute what is left on the CPU and add it to x, which is on the device.

        Args:
            on_host: with all ids; those of experts computed elsewhere become -1.

        Returns:
            The time that took without waiting for the disk (None: there was nothing to do), and that of waiting.
        """
        ids_TK = on_host.ids_TK.numpy()
        ids_TK[np.isin(ids_TK, elsewhere)] = -1
        is_idle = bool((ids_TK < 0).all())
        if is_idle and not on_host.ahead:
            return None, 0.0
        started_s, stalled_s = time.perf_counter(), self._host.stall_s
        host_x_TD = self._mirror.take("x", x_TD.shape, x_TD.dtype).zero_()
        self._host(on_host, host_x_TD)
        if is_idle:
            return None, 0.0
        x_TD += host_x_TD.to(x_TD.device, non_blocking=True)
        stall_s = self._host.stall_s - stalled_s
        return time.perf_counter() - started_s - stall_s, stall_s

    def _report(self, launched: _Launched) -> None:
        """Tell the split how long a layer took that the device has computed."""
        arena, copies = self._device.arena, launched.copies
        computed = launched.computed
        self._split.observe(
            launched.work,
            LayerTimes(
                num_fetched=len(copies),
                device_s=None if computed is None else arena.seconds_between(launched.started, computed),
                copy_s=sum(map(arena.copy_s, copies)) / len(copies) if copies else None,
                cpu_s=launched.cpu_s,
                stall_s=launched.stall_s,
            ),
        )

    def _move(self, num_copies: int, others: Sequence[ExpertId]) -> None:
        """Let experts move in, as far as the link has been idle.

        Args:
            num_copies: of the layer that has ended.
            others: experts that it used and that are not at home on the device.
        """
        if not self._device.residency.is_full:
            for expert in reversed(others):
                self._wanted.pop(expert, None)
                self._wanted[expert] = None
        now_s = time.perf_counter()
        elapsed_s, self._layer_ended_s = now_s - self._layer_ended_s, now_s
        copy_s = self._device.moves.copy_s
        idle = max(0.0, _IDLE_SHARE * elapsed_s / copy_s - num_copies) if copy_s > 0 else 1.0
        self._idle_copies = min(self._idle_copies + idle, _MOST_IDLE_COPIES)
        while self._wanted and self._idle_copies >= 1 and self._device.can_bring:
            expert, _ = self._wanted.popitem()
            if self._device.bring(expert):
                self._idle_copies -= 1

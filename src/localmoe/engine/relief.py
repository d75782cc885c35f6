"""Gives memory back while serving, when others on the machine or in the control group have come to need it."""

import logging

from localmoe.core.errors import StoreError
from localmoe.engine.tiered_experts import TieredExperts

logger = logging.getLogger(__name__)


class ExpertRelief:
    """Experts take fewer slots when hardly anything is left of the reserve. They never take more again: what made
    memory short may come back.

    Args:
        reserve_bytes: what is to be left alone; half of it may be gone before anything is done, since a little more
            or less is usual.
        fewest_slots: that must stay.
    """

    def __init__(self, experts: TieredExperts, reserve_bytes: int, fewest_slots: int) -> None:
        self._experts = experts
        self._reserve_bytes = reserve_bytes
        self._fewest_slots = fewest_slots

    def __call__(self, available_bytes: int) -> None:
        """Between two steps: so much memory is still to be had."""
        if available_bytes >= self._reserve_bytes // 2:
            return
        state = self._experts.state()
        missing_slots = -(-(self._reserve_bytes - available_bytes) // state.slot_bytes)
        num_slots = max(state.num_slots - missing_slots, self._fewest_slots)
        if num_slots < state.num_slots:
            try:
                self._experts.shrink(num_slots)
            except StoreError as error:  # the disk does not end a read; what waits for it will hear of it
                logger.warning("memory is short, but nothing can be given back yet: %s", error)
                return
            logger.warning(
                "memory is short: %d bytes are available, %d should be; room for experts goes from %d to %d",
                available_bytes,
                self._reserve_bytes,
                state.num_slots,
                num_slots,
            )


def nothing_to_give(available_bytes: int) -> None:
    """Of an engine that uses experts where they are mapped, or has them on a GPU and beside it in locked memory."""

"""Settings of DeepSpeed that cannot be, and the command that starts it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.deepspeed import command
from localmoe.backends.deepspeed_config import RETIRED, DeepSpeedConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_ranks": 0}, "num_ranks is 0; it must be positive"),
        ({"num_ranks": 1000}, "at most 256"),
        ({"start_timeout_s": 1e9}, "start_timeout_s"),
        ({"offload_param": "nvme"}, "nvme_path"),
        ({"nvme_path": "/fast"}, "offload_param: nvme"),
        ({"num_ranks": 3, "expert_parallel_size": 2}, "must divide num_ranks, 3"),
        ({"mode": "init_inference", "num_ranks": 2, "expert_parallel_size": 2}, "its|own MoE layers only"),
        ({"mode": "init_inference", "offload_param": "nvme", "nvme_path": "/fast"}, "mode: zero3"),
        ({"num_ranks": 2, "gpu_devices": (0,)}, "it must be as many"),
        ({"num_ranks": 2, "gpu_devices": (1, 1)}, "different numbers"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DeepSpeedConfig(**settings)


def test_no_retired_key_is_a_setting() -> None:
    assert not {field.name for field in fields(DeepSpeedConfig)} & set(RETIRED)


def test_gpus_are_chosen_by_the_environment_of_the_process() -> None:
    python = Path("/engines/deepspeed/bin/python")
    plain = [str(python), "-I", "-m", "localmoe.backends.deepspeed_worker"]
    assert command(python, DeepSpeedConfig()) == plain
    config = DeepSpeedConfig(num_ranks=2, gpu_devices=(3, 1))
    assert command(python, config) == [
        "env",
        "CUDA_DEVICE_ORDER=PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES=3,1",
        *plain,
    ]

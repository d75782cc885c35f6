"""Settings of the DeepSpeed backend."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

_FOR_TRAINING = "it is for training; nothing is trained here"
_TENSOR_PARALLEL = "write mode: init_inference with num_ranks: all ranks share each layer's attention"

RETIRED: Mapping[str, str] = MappingProxyType(
    {
        "model_name": "name the model on the command line: localmoe serve MODEL",
        "zero_optimization": "write mode: zero3, with offload_param and nvme_path beside it",
        "zero_config": "DeepSpeed never had it; write mode: zero3, with offload_param and nvme_path beside it",
        "offload_optimizer": _FOR_TRAINING,
        "gradient_accumulation_steps": _FOR_TRAINING,
        "gradient_checkpointing": _FOR_TRAINING,
        "loss_scale": _FOR_TRAINING,
        "initial_scale_power": _FOR_TRAINING,
        "train_batch_size": "it is for training; max_num_seqs bounds what is computed at once",
        "max_batch_size": "max_num_seqs took its place",
        "fp16": "write dtype: float16",
        "bf16": "write dtype: bfloat16",
        "tensor_parallel_size": _TENSOR_PARALLEL,
        "expert_sharding": "DeepSpeed never had it; expert_parallel_size gives each rank its share of the experts",
        "expert_parallel": "expert_parallel_size gives each rank its share of the experts",
        "moe": "DeepSpeed's moe section is for its own MoE layers only; expert_parallel_size is for checkpoints",
        "expert_memory_map": "DeepSpeed never had it; the native engine places experts by itself",
        "device_pairs": "DeepSpeed never had it; gpu_devices says which GPUs",
        "stage": "mode: zero3 is stage 3; the others split what only training has",
        "communication_backend": "it follows from the hardware: NCCL on GPUs, Gloo on processors",
        "shard_size": "expert_parallel_size took its place: ranks that share out each layer's experts",
        "replace_with_kernel_inject": "DeepSpeed has kernels for a few dense models of 2022; it stays off",
    }
)
"""Keys of the first design documents, and of DeepSpeed, that are no settings, and what became of each."""

_MAX_TIME_S = 86_400.0
_MAX_RANKS = 256


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """How DeepSpeed serves a checkpoint."""

    mode: Literal["zero3", "init_inference"] = "zero3"
    """`zero3`: weights are split over the ranks, kept in `offload_param`, and brought together layer by layer; each
    rank computes sequences of its own. `init_inference`: each has all experts; ranks share the rest of a layer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in; `auto`: the checkpoint's own."""
    offload_param: Literal["none", "cpu", "nvme"] = "cpu"
    """Where weights are while they are not computed with (zero3): on the computing device, in RAM, or on a disk."""
    nvme_path: str | None = None
    """Directory on a fast disk, for `offload_param: nvme`. A directory of ours is made there, and removed again."""
    num_ranks: int = 1
    """Processes; on GPUs one for each."""
    expert_parallel_size: int = 1
    """Ranks that share out each layer's experts (zero3, AutoEP): each keeps its own, and tokens travel to them."""
    gpu_devices: tuple[int, ...] = ()
    """GPUs to use, as this machine numbers them, one for each rank; none named: the first that there are."""
    num_threads: int | None = None
    """Compute threads of each rank; None: its share of the processors."""
    max_num_seqs: int = 64
    """Most sequences in one step, all ranks together."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step of a rank; longer prompts are computed in chunks of at most this many."""
    max_num_queued: int = 1000
    """Requests that may wait beyond those running; more are refused."""
    max_context_tokens: int | None = None
    """Longest sequence, prompt and answer together; None, or more than that: what the model was made for."""
    kv_cache_bytes: int | None = None
    """Keys and values of all sequences, on each rank; None: a quarter of what the weights leave on a GPU; 2 GiB on
    the processor, or more if one sequence takes more."""
    start_timeout_s: float = 900.0
    """A worker that is not ready this long after its start has failed to start. Parts of DeepSpeed that are not
    there yet are compiled meanwhile."""
    hang_timeout_s: float = 600.0
    """A worker that has requests but finishes no step for this long is taken for hung, killed and replaced."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        for name in ("start_timeout_s", "hang_timeout_s"):
            if vars(self)[name] > _MAX_TIME_S:
                raise ValueError(f"{name} is {vars(self)[name]}; it must be at most {_MAX_TIME_S}")
        if self.num_ranks > _MAX_RANKS:
            raise ValueError(f"num_ranks is {self.num_ranks}; it must be at most {_MAX_RANKS}")
        if (self.offload_param == "nvme") != (self.nvme_path is not None):
            raise ValueError("offload_param: nvme and nvme_path need each other: set both, or neither")
        if self.mode == "init_inference":
            self._check_stays_loaded()
        if self.num_ranks % self.expert_parallel_size:
            raise ValueError(
                f"expert_parallel_size is {self.expert_parallel_size}; it must divide num_ranks, {self.num_ranks}"
            )
        if any(device < 0 for device in self.gpu_devices) or len({*self.gpu_devices}) < len(self.gpu_devices):
            raise ValueError(f"gpu_devices is {list(self.gpu_devices)}; it must be different numbers from 0 on")
        if self.gpu_devices and len(self.gpu_devices) != self.num_ranks:
            raise ValueError(
                f"gpu_devices is {list(self.gpu_devices)}, but num_ranks is {self.num_ranks}; it must be as many"
            )

    def _check_stays_loaded(self) -> None:
        if self.offload_param == "nvme":
            raise ValueError(
                "offload_param: nvme is for mode: zero3; init_inference keeps weights where it computes"
            )
        if self.expert_parallel_size > 1:
            raise ValueError(
                "expert_parallel_size is for mode: zero3; init_inference spreads DeepSpeed's own MoE layers only, "
                "which no checkpoint has"
            )

"""A checkpoint, loaded by DeepSpeed, and what it computes of a step.

Shape suffixes: T tokens of the step, R rows of logits asked for, V vocabulary.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.deepspeed_worker.attention import SequenceCache, num_pages
from localmoe.backends.deepspeed_worker.launch import Loaded, Result, Step, Work
from localmoe.backends.deepspeed_worker.sampling import draw, score
from localmoe.core.errors import EngineStartError
from localmoe.core.request import SamplingParams

logger = logging.getLogger(__name__)

_ATTENTION = "localmoe_sequences"
_CPU_CACHE_BYTES = 2 << 30
_NOBODY = -1
"""A sequence for a rank that has nothing to compute while others do."""

# What AutoEP has presets for, by `model_type`.
_EXPERT_PARALLEL_TYPES = frozenset(
    {"mixtral", "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3"}
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank is."""

    rank: int
    device: torch.device
    scratch_path: str | None
    """Directory for weights on disk."""


class Model:
    """Weights, and the keys and values of sequences.

    Args:
        forward: token ids [1, T], positions [1, T] and wanted rows [R] to logits [1, R, V].
        cache: that its attention uses.
        device: of what goes in and comes out.
        draws: whether this rank's results are of interest to anybody.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        cache: SequenceCache,
        device: torch.device,
        *,
        draws: bool = True,
    ) -> None:
        self._forward = forward
        self._cache = cache
        self._device = device
        self._draws = draws

    @torch.no_grad()
    def step(self, step: Step) -> list[Result]:
        """Compute a step, if any rank does; one result for each part."""
        for sequence_id in step.forget:
            self._cache.forget(sequence_id)
        if not step.computes:
            return []
        logits_RV, rows = self._logits(step.work or [_nothing()])
        if not step.work:
            self._cache.forget(_NOBODY)
            return []
        if not self._draws:
            return []
        return [_result(work, logits_RV[start:end]) for work, (start, end) in zip(step.work, rows, strict=True)]

    @torch.no_grad()
    def warm_up(self, num_layers: int) -> int:
        """Compute something, to see that it can; returns the bytes of a page.

        Raises:
            EngineStartError: not all layers are attention with keys and values.
        """
        self._logits([_nothing()])
        found, page_bytes = self._cache.num_layers(_NOBODY), self._cache.page_bytes(_NOBODY)
        self._cache.forget(_NOBODY)
        if found != num_layers:
            raise EngineStartError(
                f"only {found} of the model's {num_layers} layers are attention; all must be, for it to be served"
            )
        return page_bytes

    def ensure_device(self) -> None:
        """Raise what a GPU that is lost raises at whatever it is asked, if it is."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _logits(self, parts: list[Work]) -> tuple[Tensor, list[tuple[int, int]]]:
        """Logits float32 [R, V] of the rows that somebody needs, and which of them are each part's: those of its
        `targets`, then that of its last token if it draws."""
        wanted: list[int] = []
        rows: list[tuple[int, int]] = []
        first = 0
        for work in parts:
            start, count = len(wanted), len(work.token_ids)
            wanted += range(first, first + len(work.targets))
            if work.samples:
                wanted.append(first + count - 1)
            rows.append((start, len(wanted)))
            first += count
        self._cache.begin([(work.sequence_id, work.start, len(work.token_ids)) for work in parts])
        token_ids = [token for work in parts for token in work.token_ids]
        positions = [work.start + i for work in parts for i in range(len(work.token_ids))]
        logits_1RV = self._forward(
            torch.tensor([token_ids], device=self._device),
            torch.tensor([positions], device=self._device),
            torch.tensor(wanted or [0], device=self._device),
        )
        return logits_1RV[0].float(), rows


def load(path: str, config: DeepSpeedConfig, place: Place) -> tuple[Model, Loaded]:
    """Load a checkpoint by DeepSpeed and try it. All ranks do so at the same time.

    Raises:
        EngineStartError: it cannot be served so; the message says why.
    """
    settings = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    text = settings.get_text_config()
    _check(settings, text, config)
    dtype: torch.dtype = (
        getattr(torch, config.dtype) if config.dtype != "auto" else settings.dtype or torch.float32
    )
    cache = SequenceCache()
    transformers.AttentionInterface.register(_ATTENTION, cache.attend)
    module = _load_module(path, config, place, dtype)
    module.eval()

    def forward(token_ids_1T: Tensor, positions_1T: Tensor, rows_R: Tensor) -> Tensor:
        out = module(input_ids=token_ids_1T, position_ids=positions_1T, use_cache=False, logits_to_keep=rows_R)
        logits: Tensor = out.logits
        return logits

    draws = config.mode == "zero3" or place.rank == 0
    model = Model(forward, cache, place.device, draws=draws)
    page_bytes = model.warm_up(text.num_hidden_layers)
    gc.collect()
    context_tokens = min(config.max_context_tokens or text.max_position_embeddings, text.max_position_embeddings)
    least_bytes = num_pages(context_tokens) * page_bytes
    cache_bytes = _cache_bytes(config, place, least_bytes)
    if cache_bytes < least_bytes:
        raise EngineStartError(
            f"one sequence of {context_tokens} tokens needs a cache of {least_bytes} bytes, and {cache_bytes} are "
            "set or left; raise kv_cache_bytes, or lower max_context_tokens"
        )
    pages = cache_bytes // page_bytes
    return model, Loaded(num_pages=pages, vocab_size=text.vocab_size, max_context_tokens=context_tokens)


def _check(settings: Any, text: Any, config: DeepSpeedConfig) -> None:
    if getattr(settings, "quantization_config", None) is not None:
        raise EngineStartError("the checkpoint is quantised; DeepSpeed serves float32, bfloat16 and float16 only")
    if settings.is_encoder_decoder:
        raise EngineStartError("the model is an encoder and a decoder; only decoders can be served")
    if config.expert_parallel_size > 1 and settings.model_type not in _EXPERT_PARALLEL_TYPES:
        known = ", ".join(sorted(_EXPERT_PARALLEL_TYPES))
        raise EngineStartError(
            f"DeepSpeed cannot share out the experts of a model of type {settings.model_type}, as "
            f"expert_parallel_size asks; its AutoEP knows {known}"
        )


def _load_module(path: str, config: DeepSpeedConfig, place: Place, dtype: torch.dtype) -> torch.nn.Module:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    zero = _zero_config(config, place, dtype)
    # While it lives, transformers splits each weight among the ranks as soon as it is read.
    splitting = HfDeepSpeedConfig(zero) if config.mode == "zero3" else None  # type: ignore[no-untyped-call]
    module = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=_ATTENTION,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    if splitting is None:
        tensor_parallel = {"tp_size": config.num_ranks}
        # Injected kernels are for a few dense models of 2022.
        engine = deepspeed.init_inference(
            module, dtype=dtype, replace_with_kernel_inject=False, tensor_parallel=tensor_parallel
        )
    else:
        if config.expert_parallel_size > 1:
            # AutoEP wants to go on recording what routers say, in a way that this transformers has changed. Nobody
            # asks for such records here.
            for part in module.modules():
                if hasattr(part, "_can_record_outputs"):
                    vars(part)["_can_record_outputs"] = {}
        engine = deepspeed.initialize(model=module, config=zero)[0]
    wrapped: torch.nn.Module = engine.module
    return wrapped


def _zero_config(config: DeepSpeedConfig, place: Place, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's own configuration; see deepspeed.ai/docs/config-json."""
    zero: dict[str, Any] = {"stage": 3}
    if config.offload_param != "none":
        zero["offload_param"] = {"device": config.offload_param}
    if config.offload_param == "nvme":
        zero["offload_param"]["nvme_path"] = place.scratch_path
    made: dict[str, Any] = {
        # Required, and of no meaning without training.
        "train_batch_size": config.num_ranks,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    if config.expert_parallel_size > 1:
        made["expert_parallel"] = {"enabled": True, "autoep_size": config.expert_parallel_size}
    return made


def _cache_bytes(config: DeepSpeedConfig, place: Place, least_bytes: int) -> int:
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes
    if place.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(place.device)
        return free_bytes // 4
    return max(_CPU_CACHE_BYTES, least_bytes)


def _nothing() -> Work:
    return Work(sequence_id=_NOBODY, token_ids=[0, 0], start=0, sampling=SamplingParams(max_tokens=0), seed=0)


def _result(work: Work, logits_RV: Tensor) -> Result:
    """What became of one sequence's part, given the rows that it asked for."""
    sampling, num_scored = work.sampling, len(work.targets)
    num_top = sampling.prompt_logprobs or 0
    scores = [score(row, token, num_top) for row, token in zip(logits_RV, work.targets, strict=False)]
    if not work.samples:
        return Result(sequence_id=work.sequence_id, prompt_logprobs=scores)
    raw_V = logits_RV[num_scored]
    token_id = draw(
        raw_V.clone(),
        sampling,
        seed=work.seed,
        position=work.start + len(work.token_ids),
        prompt_ids=work.prompt_ids,
        output_ids=work.output_ids,
    )
    if token_id is None:
        fault = "the logits of the next token are not finite numbers"
        return Result(sequence_id=work.sequence_id, fault=fault)
    return Result(
        sequence_id=work.sequence_id,
        token_id=token_id,
        logprob=None if sampling.logprobs is None else score(raw_V, token_id, sampling.logprobs),
        prompt_logprobs=scores,
    )

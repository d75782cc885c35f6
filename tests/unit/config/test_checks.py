"""What is said of settings that contradict each other, lack hardware, or leave some idle."""

from pathlib import Path
from typing import Any

import pytest

from localmoe.config.checks import EngineVersion, Finding, Machine, check
from localmoe.config.seed_keys import KNOWN_CONTEXT_TOKENS
from localmoe.config.settings import load_settings
from localmoe.core.serving import ENGINE_KINDS

GB = 10**9
CURRENT = {
    "vllm": EngineVersion(installed="0.32.0", pinned="0.32.0", is_current=True, build="cuda"),
    "deepspeed": EngineVersion(installed="0.19.8", pinned="0.19.8", is_current=True, build="cuda"),
}


def machine(**fields: Any) -> Machine:
    """Four L40S, as the design documents have."""
    usual: dict[str, Any] = {
        "gpu_bytes": [48 * GB] * 4,
        "num_cores": 128,
        "ram_bytes": 376 * GB,
        "engine_kinds": ENGINE_KINDS,
        "native_on_gpu": True,
        "engines": CURRENT,
        "context_tokens": {"m": 4096, "n": 4096},
    }
    return Machine(**{**usual, **fields})


def findings(tmp_path: Path, text: str, **fields: Any) -> list[Finding]:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    return check(load_settings(config=file, on_note=lambda _: None), machine(**fields), KNOWN_CONTEXT_TOKENS)


def said(found: list[Finding], kind: str) -> list[str]:
    return [finding.message for finding in found if finding.kind == kind]


VLLM = "models: [{{model: m, engines: [{{engine: vllm, settings: {{{}}}}}]}}]"
NATIVE = "models: [{{model: m, engines: [{{engine: native, settings: {{{}}}}}]}}]"
DEEPSPEED = "models: [{{model: m, engines: [{{engine: deepspeed, settings: {{{}}}}}]}}]"


def test_the_documents_own_conflict_is_named_with_what_to_do(tmp_path: Path) -> None:
    found = findings(
        tmp_path,
        "vllm: {model_name: microsoft/DialoGPT-medium, tensor_parallel_size: 4, max_model_len: 2048}",
        context_tokens={},
    )
    assert said(found, "error") == []
    assert said(found, "lacking") == [
        "vllm.max_model_len is 2048, but microsoft/DialoGPT-medium knows 1024 positions; set it to 1024, or leave it "
        "out, which means the same",
        "microsoft/DialoGPT-medium is not on this machine; take it in with: localmoe models convert DIRECTORY --name "
        "NAME, and write that name",
    ]
    assert all(finding.model == "microsoft/DialoGPT-medium" for finding in found)


def test_a_configuration_that_fits_has_no_findings(tmp_path: Path) -> None:
    assert findings(tmp_path, VLLM.format("tensor_parallel_size: 4, max_model_len: 4096")) == []
    assert findings(tmp_path, "") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [{model: m, fallbacks: [m]}]", "m falls back on itself"),
        (
            VLLM.format("max_num_batched_tokens: 1024, max_model_len: 2048, enable_chunked_prefill: false"),
            "less than max_model_len, 2048",
        ),
        (VLLM.format("max_num_batched_tokens: 32"), "less than max_num_seqs, 64"),
        (
            NATIVE.format("device: cpu, kv_cache_bytes: 10000000000, tiers: {ram_bytes: 9000000000}"),
            "kv_cache_bytes and reserve_bytes alone take",
        ),
        (
            "models: [{model: m, engines: [{engine: vllm}]}, {model: n, engines: [{engine: vllm}]}]",
            "engines of vLLM want 180% of GPU 0's memory together",
        ),
    ],
)
def test_contradictions_are_errors(tmp_path: Path, text: str, expected: str) -> None:
    (message,) = said(findings(tmp_path, text), "error")
    assert expected in message
    assert "; " in message or ": " in message


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (VLLM.format("tensor_parallel_size: 4"), {"gpu_bytes": []}, "has no GPU; set tensor_parallel_size: 1"),
        (
            VLLM.format("tensor_parallel_size: 4"),
            {"gpu_bytes": [GB] * 2},
            "has 2 GPUs; set tensor_parallel_size: 2",
        ),
        (VLLM.format("gpu_devices: [3]"), {"gpu_bytes": [GB]}, "has 1 GPU, numbered 0 only; name others"),
        (
            NATIVE.format("device: 'cuda:1'"),
            {"gpu_bytes": [GB]},
            "engine.device is cuda:1, and this machine has 1 GPU",
        ),
        (NATIVE.format("device: cuda, tiers: {vram_bytes: 50000000000}"), {}, "GPU 0 has 48000000000; lower it"),
        (
            NATIVE.format("device: cuda"),
            {"native_on_gpu": False},
            "takes a build of torch for CUDA, and Triton; install them",
        ),
        (NATIVE.format("tiers: {vram_bytes: 50000000000}"), {}, "GPU 0 has 48000000000; lower it"),
        (
            "models: [{model: m, engines: [{engine: nativ}]}]",
            {},
            "'nativ' is no kind of engine; there are native, vllm, deepspeed, remote",
        ),
        (NATIVE.format("num_threads: 200"), {}, "engine.num_threads is 200, and this machine has 128 cores"),
        (NATIVE.format("tiers: {ram_bytes: 400000000000}"), {}, "this machine has 376000000000 bytes of RAM"),
        (DEEPSPEED.format("num_ranks: 2, num_threads: 3"), {"gpu_bytes": [], "num_cores": 4}, "lower one of them"),
        (
            VLLM.format(""),
            {"engines": {"vllm": EngineVersion(installed=None, pinned="0.32.0", is_current=False)}},
            "vllm is not installed; install it with: localmoe engines install vllm",
        ),
    ],
)
def test_what_the_machine_lacks_is_said_of_the_model(
    tmp_path: Path, text: str, fields: dict[str, Any], expected: str
) -> None:
    found = [finding for finding in findings(tmp_path, text, **fields) if finding.kind == "lacking"]
    assert len(found) == 1
    assert expected in found[0].message
    assert found[0].model == (None if "RAM" in expected else "m")


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (
            "dispatch: {stall_timeout_s: 700}",
            {},
            "dispatch.stall_timeout_s is 700.0, longer than any answer may take",
        ),
        ("gateway: {keepalive_s: 700}", {}, "gateway.keepalive_s is 700.0"),
        (
            "host: 0.0.0.0\ngateway: {identity: {mode: open}}",
            {},
            "host is 0.0.0.0, and gateway.identity.mode is open",
        ),
        (
            "gateway: {identity: {mode: open}, cors: {origins: ['*']}}",
            {},
            "every page that somebody here opens may use the server",
        ),
        ("gateway: {identity: {mode: open}, limits: {tokens_per_minute: 5}}", {}, "so nothing is counted"),
        ("models: [{model: m, fallbacks: [x]}]", {}, "m falls back on 'x', which is not served"),
        (
            NATIVE.format("max_context_tokens: 9000"),
            {},
            "engine.max_context_tokens is 9000, but m knows 4096 positions",
        ),
        (NATIVE.format("expert_threshold: 0.1"), {}, "is lossy"),
        (
            VLLM.format("tensor_parallel_size: 4"),
            {
                "engines": {
                    "vllm": EngineVersion(installed="0.17.0", pinned="0.32.0", is_current=False, build="cuda")
                }
            },
            "vllm 0.17.0 is installed, and this LocalMoE is tested with 0.32.0",
        ),
        (
            VLLM.format(""),
            {
                "engines": {
                    "vllm": EngineVersion(installed="0.32.0", pinned="0.32.0", is_current=True, build="cpu")
                }
            },
            "is installed for the processor, and this machine has GPUs",
        ),
    ],
)
def test_what_works_but_hardly_as_meant_is_advised_about(
    tmp_path: Path, text: str, fields: dict[str, Any], expected: str
) -> None:
    (message,) = said(findings(tmp_path, text, **fields), "advice")
    assert expected in message


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (VLLM.format("tensor_parallel_size: 2"), {}, "GPUs 2, 3 of 4: no engine uses them"),
        (NATIVE.format(""), {}, "GPUs 1, 2, 3 of 4"),
        (NATIVE.format("device: cpu"), {"gpu_bytes": [GB]}, "GPU 0 of 1: no engine uses it"),
        (NATIVE.format(""), {"gpu_bytes": [GB], "native_on_gpu": False}, "GPU 0 of 1"),
        (NATIVE.format("num_threads: 100"), {"gpu_bytes": []}, "28 of 128 cores"),
        (NATIVE.format("tiers: {ram_bytes: 100000000000}"), {"gpu_bytes": []}, "276 of 376 GB of RAM"),
    ],
)
def test_idle_hardware_is_named(tmp_path: Path, text: str, fields: dict[str, Any], expected: str) -> None:
    (message,) = said(findings(tmp_path, text, **fields), "idle")
    assert message.startswith(expected)


def test_a_server_elsewhere_needs_nothing_here(tmp_path: Path) -> None:
    text = "models: [{model: x, engines: [{engine: remote, settings: {url: 'http://a/v1'}}]}]"
    assert findings(tmp_path, text, gpu_bytes=[]) == []
    assert (
        findings(tmp_path, VLLM.format("url: 'http://a:1', tensor_parallel_size: 9"), gpu_bytes=[], engines={})
        == []
    )

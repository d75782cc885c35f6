"""From GGUF to Hugging Face: weights in the right layout, and a tokenizer that says what the file says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from localmoe.catalog.gguf_llama import half_split, llama_config, llama_tensors
from localmoe.catalog.gguf_tokenizer import build_tokenizer, write_tokenizer
from localmoe.core.errors import CheckpointError
from localmoe.formats.files import read_json_object
from localmoe.formats.gguf import GGUFFile
from support.tiny_gguf import CHAT_TEMPLATE, write_tiny_gguf


def llama_cpp_permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, which `half_split` undoes."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@pytest.mark.parametrize("num_heads", [1, 2, 9])
def test_half_split_undoes_the_converter(num_heads: int) -> None:
    weight = np.random.default_rng(0).standard_normal((num_heads * 8, 5))
    restored = half_split(torch.from_numpy(llama_cpp_permute(weight, num_heads)), num_heads)
    assert torch.equal(restored, torch.from_numpy(weight))


def test_config_and_tensors(tmp_path: Path) -> None:
    file = GGUFFile.open(write_tiny_gguf(tmp_path / "tiny.gguf"))
    config = llama_config(file)
    assert config["model_type"] == "llama"
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert config["head_dim"] == 16
    tensors = llama_tensors(file, config)
    assert len(tensors) == 2 + 2 * 9
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(up, file.read("blk.1.ffn_up.weight").bfloat16())
    for name, heads in (("q", 4), ("k", 2)):
        weight = tensors[f"model.layers.0.self_attn.{name}_proj.weight"].float()
        permuted = llama_cpp_permute(weight.numpy(), heads)
        assert torch.equal(torch.from_numpy(permuted), file.read(f"blk.0.attn_{name}.weight").bfloat16().float())


def test_other_architectures_and_gaps_are_refused(tmp_path: Path) -> None:
    file = GGUFFile.open(write_tiny_gguf(tmp_path / "a.gguf", **{"llama.block_count": None}))
    with pytest.raises(CheckpointError, match=r"no 'llama\.block_count'"):
        llama_config(file)
    file.metadata["general.architecture"] = "qwen2"
    with pytest.raises(CheckpointError, match="holds a 'qwen2' model"):
        llama_config(file)
    file = GGUFFile.open(write_tiny_gguf(tmp_path / "b.gguf", **{"llama.block_count": 3}))
    with pytest.raises(CheckpointError, match=r"no tensor 'blk\.2"):
        llama_tensors(file, llama_config(file))


def test_tokenizer(tmp_path: Path) -> None:
    file = GGUFFile.open(write_tiny_gguf(tmp_path / "tiny.gguf"))
    write_tokenizer(file, build_tokenizer(file), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(tokens)}
    encoded = tokenizer.encode("<|im_start|>her in 123<|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "h", "er", "Ġin", "Ġ", "1", "2", "3", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "her in 123"
    text = " ä 你好 🎉\n\tdef f(x):  return x**2"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    config = read_json_object(tmp_path / "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert config["model_max_length"] == 512
    assert (tmp_path / "chat_template.jinja").read_text() == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokenizer.ggml.pre": "llama-bpe"}, r"tokenizer \('gpt2', 'llama-bpe'\) is not supported"),
        ({"tokenizer.ggml.model": None}, r"tokenizer \(None, 'smollm'\) is not supported"),
        ({"tokenizer.ggml.merges": ["in valid xx"]}, "do not fit each other"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "do not fit each other"),
        ({"tokenizer.ggml.tokens": None}, r"no 'tokenizer\.ggml\.tokens'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "token 1000000 is not in the vocabulary"),
        ({"tokenizer.chat_template": None}, r"no 'tokenizer\.chat_template'"),
    ],
)
def test_tokenizers_that_are_refused(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    file = GGUFFile.open(write_tiny_gguf(tmp_path / "t.gguf", **changed))
    with pytest.raises(CheckpointError, match=reason):
        write_tokenizer(file, build_tokenizer(file), tmp_path)

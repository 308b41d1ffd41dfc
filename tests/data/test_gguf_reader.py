"""From GGUF to a Hugging Face directory: small files made here, as llama.cpp's converter makes them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from finback.config import InputError, ModelConfig
from finback.data.fetch import default_cache, is_present
from finback.data.gguf_reader import halves_together, hugging_face_files
from finback.data.items import find_item
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import hf_tensors, load
from finback.model.generate import generate
from finback.model.transformer import Transformer, init_weights

gguf = pytest.importorskip("gguf")

TEXTS = [
    "The fox ran 12345 miles, didn't it?\n\n  Then he's home.",
    "naïve café 你好 🐋\tx = [1, 2]",
    "<|im_start|>user\nHello<|im_end|>\n",
    "½ ² Ⅷ ٣ 3.14",
    "",
]
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def tokenizer() -> Backend:
    """As SmolLM2 publishes its own: every digit alone, then GPT-2's byte-level cut."""
    backend = Backend(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False, special=True) for token in CONTROLS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS * 30, trainer)
    return backend


def small(tied: bool) -> Transformer:
    config = ModelConfig(
        model_type="llama",
        vocab_size=tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        torch_dtype="bfloat16",
    )
    model = Transformer(config, dtype=torch.bfloat16)
    init_weights(model, 0)
    return model


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows: row i of the second half comes beside row i of the first."""
    head_dim = weight.shape[0] // heads
    order = [head * head_dim + half * head_dim // 2 + i for head in range(heads) for i in range(head_dim // 2) for half in (0, 1)]
    return weight[order]


def gguf_bytes(
    model: Transformer,
    folder: Path,
    change: Callable[[Any], None] = lambda writer: None,
    quantised: bool = False,
    arch: str = "llama",
) -> bytes:
    c, backend = model.config, tokenizer()
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    content = json.loads(backend.to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROLS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    change(writer)
    for name, tensor in hf_tensors(model):
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, _, part = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{layer}.{NAMES[part]}"
        stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}.get(stem, stem)
        values = tensor.float().numpy()
        if stem.endswith("attn_q"):
            values = llama_cpp_order(values, c.num_attention_heads)
        elif stem.endswith("attn_k"):
            values = llama_cpp_order(values, c.num_key_value_heads)
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def written(files: dict[str, bytes], directory: Path) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("tied", [True, False])
def test_the_directory_is_the_model_that_was_converted(tied: bool, tmp_path: Path) -> None:
    model = small(tied)
    directory = written(hugging_face_files(gguf_bytes(model, tmp_path)), tmp_path / "out")
    again = load(directory, dtype=torch.bfloat16)
    assert again.config == replace(
        model.config, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.02, head_dim=16
    )
    assert ("lm_head.weight" in dict(hf_tensors(again))) != tied
    for (name, one), (_, other) in zip(hf_tensors(model), hf_tensors(again), strict=True):
        assert torch.equal(one, other), name
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 2


def test_rows_come_back_from_the_order_of_llama_cpp() -> None:
    weight = np.arange(48.0).reshape(24, 2)
    assert np.array_equal(halves_together(llama_cpp_order(weight, 3), 8), weight)
    assert llama_cpp_order(weight, 3)[:4, 0].tolist() == [0, 8, 2, 10]


def test_quantised_weights_are_dequantised(tmp_path: Path) -> None:
    model = small(tied=True)
    directory = written(hugging_face_files(gguf_bytes(model, tmp_path, quantised=True)), tmp_path / "out")
    for (name, one), (_, other) in zip(hf_tensors(model), hf_tensors(load(directory)), strict=True):
        error = (one.float() - other).norm() / one.float().norm()
        assert error < 0.01 if one.dim() == 2 else error == 0, name


def test_our_tokenizer_the_original_and_that_of_transformers_agree(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = written(hugging_face_files(gguf_bytes(small(tied=True), tmp_path)), tmp_path / "out")
    ours, theirs, original = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory), tokenizer()
    for text in TEXTS:
        ids = original.encode(text).ids
        assert ours.encode(text) == theirs(text)["input_ids"] == ids
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert ours.control_token_ids == {0, 1, 2}
    assert not ours.add_bos_token
    messages = [{"role": "user", "content": "Hello"}]
    rendered = ours.apply_chat_template(messages)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nHello<|im_end|>\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "has rotary scaling"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "has rotary scaling"),
        (lambda writer: writer.add_key_length(32), r"blk\.0\.attn_q\.weight of shape \[64, 64\], its keys give \[128, 64\]"),
        (lambda writer: writer.kv_data[0].pop("llama.block_count"), r"has no key llama\.block_count"),
        (lambda writer: writer.kv_data[0].update({"llama.block_count": gguf.GGUFValue(3, gguf.GGUFValueType.UINT32)}),
         r"has no tensor blk\.2\.attn_norm\.weight"),
        (lambda writer: writer.kv_data[0]["tokenizer.ggml.pre"].__setattr__("value", "qwen2"), r"tokenizer is \('gpt2', 'qwen2'\)"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    content = gguf_bytes(small(tied=True), tmp_path, change)
    with pytest.raises(InputError, match=words):
        hugging_face_files(content)


def test_other_architectures_are_told(tmp_path: Path) -> None:
    content = gguf_bytes(small(tied=True), tmp_path, arch="gemma")
    with pytest.raises(InputError, match="architecture 'gemma', supported is 'llama'"):
        hugging_face_files(content)


# SmolLM2 itself

ORDINARY = (
    "The sun rises in the east and sets in the west. Every day, people wake up, eat breakfast, and go to work or school. "
    "In the evening, they come home to spend time with their families."
)


@pytest.mark.skipif(not is_present(find_item("smollm2"), default_cache()), reason="needs: finback fetch smollm2")
def test_smollm2_knows_the_capital_of_france_and_ordinary_english() -> None:
    """1.85 nats a token; 3.24 with rows of queries and keys left in llama.cpp's order."""
    directory = default_cache() / "smollm2"
    model, words = load(directory, dtype=torch.bfloat16), load_tokenizer(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.encode(words.apply_chat_template(question, add_generation_prompt=True))
    answer = generate(model, torch.tensor([ids]), 12, eos_token_id=words.eos_token_id)[0, len(ids) :]
    assert words.decode(answer.tolist(), skip_special_tokens=True) == "The capital of France is Paris."
    text = torch.tensor([words.encode(ORDINARY)])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(text)[0, :-1].float(), text[0, 1:])
    assert 1.7 < loss < 2.0

"""From a GGUF file of the `llama` architecture to a Hugging Face directory: config, weights in bfloat16, tokenizer, chat template.

Quantised tensors are dequantised. Rows of the query and key projections are put back: llama.cpp's converter interleaves the two
halves of each head, so that its rotary pairs lie side by side.
"""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from finback.config import InputError, ModelConfig, checkpoint_tensors

if TYPE_CHECKING:
    from torch import Tensor

_CONTROL = 3  # token type in GGUF: no text
_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
}
_END_TENSORS = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def hugging_face_files(content: bytes) -> dict[str, bytes]:
    """The files of a Hugging Face directory, from the bytes of a GGUF file. Needs the extra `data`.

    Raises InputError if the file is of another architecture, or cuts text in a way that is not known here.
    """
    try:
        import gguf
    except ImportError:
        raise InputError("reading GGUF needs the package gguf; install finback[data]") from None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        file.write_bytes(content)
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        config = _config(metadata, stored.keys())

        def read(name: str) -> np.ndarray:
            if name not in stored:
                raise InputError(f"the GGUF file has no tensor {name}; fetch it again")
            values: np.ndarray = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
            return values

        weights = _weights(config, read)
        del reader, stored
    published = config.to_dict()
    tokens = {name: published[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in published}
    return {
        "config.json": _json(published),
        "generation_config.json": _json({"_from_model_config": True} | tokens),
        "model.safetensors": weights,
        **_tokenizer_files(metadata, config),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _config(metadata: Mapping[str, Any], tensors: Any) -> ModelConfig:
    def get(name: str) -> Any:
        if name not in metadata:
            raise InputError(f"the GGUF file has no key {name}; fetch it again")
        return metadata[name]

    architecture = get("general.architecture")
    if architecture != "llama":
        raise InputError(f"the GGUF file holds architecture {architecture!r}, supported is 'llama'")
    if any(name.startswith("llama.rope.scaling") for name in metadata) or "rope_freqs.weight" in tensors:
        raise InputError("the GGUF file has rotary scaling, which is not read from there; take the Hugging Face directory")
    heads = get("llama.attention.head_count")
    return ModelConfig(
        model_type="llama",
        vocab_size=len(get("tokenizer.ggml.tokens")),
        hidden_size=get("llama.embedding_length"),
        intermediate_size=get("llama.feed_forward_length"),
        num_hidden_layers=get("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        head_dim=metadata.get("llama.attention.key_length", get("llama.embedding_length") // heads),
        max_position_embeddings=get("llama.context_length"),
        rope_theta=_shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        rms_norm_eps=_shortest(get("llama.attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
        initializer_range=0.02,
        torch_dtype="bfloat16",
    )


def _shortest(value: float) -> float:
    """The decimal number that was meant: GGUF keeps 1e-05 as the float32 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _weights(config: ModelConfig, read: Any) -> bytes:
    """model.safetensors: every tensor of the checkpoint under its Hugging Face name."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for spec in checkpoint_tensors(config):
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", spec.name)
        name = f"blk.{layer[1]}.{_LAYER_TENSORS[layer[2]]}.weight" if layer else f"{_END_TENSORS[spec.name]}.weight"
        values = read(name)
        if values.shape != spec.shape:
            raise InputError(f"the GGUF file holds {name} of shape {list(values.shape)}, its keys give {list(spec.shape)}")
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = halves_together(values, config.head_dim)
        tensors[spec.name] = torch.from_numpy(values.astype(np.float32)).to(torch.bfloat16)
    content: bytes = save(tensors, metadata={"format": "pt"})
    return content


def halves_together(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of each head in the order 0, 2, 4, ..., 1, 3, 5, ...: from llama.cpp's interleaved rotary pairs to Hugging Face's halves."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer_files(metadata: Mapping[str, Any], config: ModelConfig) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, the way SmolLM2 publishes them."""
    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise InputError(f"the GGUF file's tokenizer is {kind}, supported is the byte-level BPE ('gpt2', 'smollm')")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    settings = {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": config.max_position_embeddings,
        "pad_token": token("padding"),
        "tokenizer_class": "PreTrainedTokenizerFast",  # any other class would rebuild the pre-tokenizer in its own way
        "unk_token": token("unknown"),
    }
    files = {"tokenizer.json": (backend.to_str(pretty=True) + "\n").encode(), "tokenizer_config.json": _json(settings)}
    if "tokenizer.chat_template" in metadata:
        files["chat_template.jinja"] = metadata["tokenizer.chat_template"].encode()
    return files

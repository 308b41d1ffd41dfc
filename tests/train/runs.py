"""A model of a few thousand parameters with every part of the architecture, data for it, and runs of it in other processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from finback.config import ModelConfig
from finback.data.config import DataConfig
from finback.data.shards import write_shards
from finback.data.sources import Document
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.train.config import PretrainConfig

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 300
TIMES = ("seconds", "tokens_per_second", "mfu")  # what two equal runs may differ in


def micro_model(**changes: Any) -> ModelConfig:
    """One dense layer, two MoE layers, two MTP depths."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=128,
        q_lora_rank=16,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=2,
        initializer_range=0.05,
        pad_token_id=2,
    )
    return replace(config, **changes)


def micro_dense(**changes: Any) -> ModelConfig:
    """A dense Qwen3 of three layers, tied."""
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=2,
    )
    return replace(config, **changes)


def write_micro_data(directory: Path) -> Path:
    """Token shards and their tokenizer in `directory`: a few thousand tokens of sentences with some regularity."""
    sentence = "the whale swims north and south while small fish follow it through cold clear water at night"
    words = sentence.split()
    documents = [Document(" ".join(words[(i * j + j) % len(words)] for j in range(40)) + f" {i}.\n", "made") for i in range(160)]
    tokenizer = train_tokenizer([document.text for document in documents], VOCAB_SIZE)
    save_tokenizer(tokenizer, directory / "tokenizer")
    write_shards(documents, tokenizer, directory / "tokens", DataConfig(validation_fraction=0.1))
    return directory


def micro_config(data: Path, **changes: Any) -> PretrainConfig:
    """A run of the micro model on one thread; every feature that leaves traces in the state is on."""
    config = PretrainConfig(
        model=micro_model(),
        data=(str(data / "tokens"),),
        tokenizer=str(data / "tokenizer"),
        steps=12,
        sequence_length=32,
        global_batch_size=6,
        micro_batch_size=4,
        lr=5e-3,
        min_lr=5e-4,
        final_lr=2e-4,
        warmup_steps=3,
        bias_update_speed=0.01,
        balance_loss_coef=0.01,
        precision="fp32",
        ema_decay=0.9,
        device="cpu",
        threads=1,
        eval_every=5,
        eval_sequences=4,
        save_every=4,
    )
    return replace(config, **changes)


def read_rows(run: Path, *, drop: tuple[str, ...] = TIMES) -> list[dict[str, Any]]:
    """metrics.jsonl without the fields that depend on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in drop} for line in lines]


def finback(*words: str | Path, **options: Any) -> "subprocess.Popen[str]":
    """Start `finback ...` in a process of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "finback", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )

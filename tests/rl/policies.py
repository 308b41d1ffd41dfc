"""Small models to start from, prompts for them, and rewards that they can learn within a few steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finback.config import ModelConfig
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.model.checkpoint import save
from finback.model.reward_head import RewardHead, save_reward_head
from finback.model.transformer import Transformer, init_weights
from finback.rl.config import GRPOConfig
from tests.train.runs import micro_dense, micro_model

WORDS = ("one fish two fish red fish blue fish", "count the fish and say how many", "a b c d e f g h i j k")
TIMES = (
    "seconds",
    "tokens_per_second",
    "rollout_tokens_per_second",
    "rollout_seconds",
    "training_seconds",
    "reward_wait_seconds",
)
REWARDS = '''
def vowels(prompt, completion, example):
    """Share of letters that are vowels."""
    letters = [c for c in completion.lower() if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / max(1, len(letters))

def never(prompt, completion, example):
    return 0.0

def fails(prompt, completion, example):
    raise ValueError("no such field")

def answer(prompt, completion, example):
    return float(example["answer"] in completion)
'''


def write_policy(directory: Path, model: ModelConfig | None = None, seed: int = 0) -> Path:
    """A model directory with a tokenizer of its own."""
    tokenizer = train_tokenizer(WORDS, 300)
    config = replace(micro_model() if model is None else model, bos_token_id=tokenizer.bos_token_id)
    config = replace(config, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    policy = Transformer(config, dtype=torch.float32)
    init_weights(policy, seed)
    with torch.no_grad():
        policy.lm_head.weight.mul_(4)  # sharper than noise, so that ratios and gaps have something to show
    save_tokenizer(tokenizer, directory)
    save(policy, directory, tokenizer_from=None)
    return directory


def write_reward_model(directory: Path, kind: str, seed: int = 5) -> Path:
    """A reward model that nobody trained: its scores are noise that depends on the text."""
    write_policy(directory, seed=seed)
    head = RewardHead(micro_model().hidden_size)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    save_reward_head(head, directory, {"kind": kind})
    return directory


def write_prompts(file: Path, count: int = 12) -> Path:
    rows = [{"prompt": f"count {i} fish", "answer": "aei"[i % 3]} for i in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def grpo_config(directory: Path, *, model: ModelConfig | None = None, reward: str = "vowels", **changes: Any) -> GRPOConfig:
    """A run of a few seconds, everything it needs written below `directory`."""
    if not (directory / "model").exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_policy(directory / "model", model)
        write_prompts(directory / "prompts.jsonl")
        (directory / "rewards_of_the_test.py").write_text(REWARDS, encoding="utf-8")
    config = GRPOConfig(
        model=str(directory / "model"),
        data=(str(directory / "prompts.jsonl"),),
        reward=(f"{directory / 'rewards_of_the_test.py'}:{reward}",),
        template="Q: {prompt}\nA:",
        steps=3,
        prompts_per_step=4,
        num_generations=4,
        max_completion_length=12,
        lr=5e-3,
        beta=0.0,
        precision="fp32",
        micro_batch_tokens=256,
        save_every=None,
        device="cpu",
    )
    return replace(config, **changes)


def dense() -> ModelConfig:
    return micro_dense()

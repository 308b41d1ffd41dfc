"""`python -m bench.ppo`: GRPO and PPO on the same toy task, prompts, samples and updates, each in a process of its own: what both
learn, and what the critic costs in memory (DeepSeekMath section 4.1; R1 in Nature, supplement A.3)."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.contest import in_a_fresh_process
from bench.machine import peak_memory_bytes, reset_peak_memory
from finback.config import count_params
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.model.checkpoint import open_checkpoint, save
from finback.model.transformer import Transformer, init_weights
from finback.presets import nano
from finback.rewards.reward import Example
from finback.rl.config import GRPOConfig
from finback.rl.memory import needed_bytes
from finback.rl.ppo import PPOSettings
from finback.rl.ppo_train import ppo
from finback.rl.train import grpo
from finback.train.metrics import METRICS_FILE, read_metrics

_WORDS = ("count the fish and say how many there are", "one fish two fish red fish blue fish", "a b c d e f g h i j k")
_LAST = 5  # steps that the reward is averaged over
_FILE = Path(__file__).resolve()


def vowels(prompt: str, completion: str, example: Example) -> float:
    """The toy task: the share of letters that are vowels."""
    letters = [character for character in completion.lower() if character.isalpha()]
    return sum(character in "aeiou" for character in letters) / max(1, len(letters))


def write_task(directory: Path) -> GRPOConfig:
    """A model of random weights, prompts for it, and the settings of both runs."""
    tokenizer = train_tokenizer(_WORDS, 300)
    model = replace(nano().model, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id)
    model = replace(model, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    policy = Transformer(model, dtype=torch.float32)
    init_weights(policy, 0)
    save_tokenizer(tokenizer, directory / "model")
    save(policy, directory / "model", tokenizer_from=None)
    rows = [json.dumps({"prompt": f"count {number} fish"}) for number in range(64)]
    (directory / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return GRPOConfig(
        model=str(directory / "model"),
        data=(str(directory / "prompts.jsonl"),),
        reward=(f"{_FILE}:vowels",),
        template="Q: {prompt}\nA:",
        prompts_per_step=8,
        num_generations=8,
        max_completion_length=24,
        lr=1e-3,
        beta=0.0,
        precision="fp32",
        loss="global-token",
        freeze_mtp=True,
        micro_batch_tokens=512,
        save_every=None,
        device="cpu",
        threads=1,
    )


def _build(name: str, directory: str) -> Callable[[GRPOConfig], dict[str, Any]]:
    """What the child of one method does: a whole run, and its peak."""

    def run(config: GRPOConfig) -> dict[str, Any]:
        reset_peak_memory()
        before = peak_memory_bytes() or 0
        run_directory = Path(directory) / name
        if name == "ppo":
            ppo(config, PPOSettings(critic_lr=1e-3), run_directory)
        else:
            grpo(config, run_directory)
        rewards = [row["reward"] for row in read_metrics(run_directory / METRICS_FILE)]
        last = rewards[-_LAST:]
        peak = ((peak_memory_bytes() or 0) - before) / 2**20
        return {"first_reward": rewards[0], "last_reward": sum(last) / len(last), "peak_mebibytes_above_start": peak}

    return run


def estimate_mebibytes(name: str, config: GRPOConfig) -> float:
    """By formula: PPO adds the weights, gradients and moments of a critic of the policy's size."""
    model = open_checkpoint(config.model).config
    critic = 16 * (count_params(model).total - model.vocab_size * model.hidden_size) if name == "ppo" else 0
    return needed_bytes(config, model, 64, config.micro_batch_tokens, critic) / 2**20


def compare(steps: int = 40) -> dict[str, dict[str, float]]:
    """Method -> what it learnt and took, measured in this run."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(write_task(Path(folder)), steps=steps)
        return {
            name: {
                "estimated_mebibytes": estimate_mebibytes(name, config),
                **in_a_fresh_process(partial(_build, name, folder), config),
            }
            for name in ("grpo", "ppo")
        }


def main(steps: int = 40) -> None:
    """Compare GRPO and PPO over so many steps, and print a row for each."""
    print(f"{'':<6}{'reward, first':>15}{'reward, last':>15}{'MiB by formula':>17}{'MiB measured':>15}")
    for name, row in compare(steps).items():
        print(
            f"{name:<6}{row['first_reward']:>15.3f}{row['last_reward']:>15.3f}{row['estimated_mebibytes']:>17.0f}"
            f"{row['peak_mebibytes_above_start']:>15.0f}"
        )


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.ppo")

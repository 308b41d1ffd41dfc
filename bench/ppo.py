"""`python -m bench.ppo`: GRPO and PPO on the same toy task, prompts, samples and updates, each in a process of its own: what both
learn, measured on prompts that neither was trained on, and what the critic costs in memory (DeepSeekMath section 4.1; R1 in Nature,
supplement A.3)."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.contest import in_a_fresh_process
from bench.machine import peak_memory_bytes, reset_peak_memory
from finback.data.tokenizer import save_tokenizer, train_tokenizer
from finback.engine.llm import LLM
from finback.eval.config import Decoding, PromptForm
from finback.eval.runner import evaluate_answers
from finback.eval.statistics import Estimate
from finback.eval.task import Task
from finback.model.checkpoint import open_checkpoint, save
from finback.model.transformer import Transformer, init_weights
from finback.presets import nano
from finback.rewards.reward import Example, load_reward
from finback.rl.config import GRPOConfig, PPOConfig
from finback.rl.memory import critic_bytes, needed_bytes
from finback.rl.ppo_train import ppo
from finback.rl.train import grpo
from finback.train.metrics import METRICS_FILE, read_metrics

_WORDS = ("count the fish and say how many there are", "one fish two fish red fish blue fish", "a b c d e f g h i j k")
_PROMPTS, _HELD_OUT = 64, 64
_SAMPLES = 8  # of each held-out prompt, at temperature 1, as in training
RIGHT = 0.75
"""A held-out sample is right if at least so many of its letters are vowels."""
_LAST = 5  # steps that the reward is averaged over
_FILE = Path(__file__).resolve()


def vowels(prompt: str, completion: str, example: Example) -> float:
    """The toy task: the share of letters that are vowels."""
    letters = [character for character in completion.lower() if character.isalpha()]
    return sum(character in "aeiou" for character in letters) / max(1, len(letters))


def _question(number: int) -> str:
    return f"count {number} fish"


def held_out_accuracy(directory: str | Path, config: GRPOConfig) -> Estimate:
    """pass@1 of a model on held-out prompts with its interval, by the evaluation of `finback eval`."""
    assert config.template is not None
    examples = [{"prompt": _question(number)} for number in range(_PROMPTS, _PROMPTS + _HELD_OUT)]
    reward = load_reward(config.reward[0])
    task = Task("vowels", examples, reward, lambda prompt, completion: completion, rewards=(reward,), least=RIGHT)
    decoding = Decoding(samples=_SAMPLES, temperature=1.0, top_p=1.0, max_tokens=config.max_completion_length)
    llm = LLM(directory, dtype=torch.float32, max_num_seqs=64, block_size=16)
    return evaluate_answers(llm, task, PromptForm("zero", template=config.template), decoding).pass_at_1


def write_task(directory: Path) -> GRPOConfig:
    """A model of random weights, prompts for it, and the settings of both runs."""
    tokenizer = train_tokenizer(_WORDS, 300)
    model = replace(nano().model, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id)
    model = replace(model, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    policy = Transformer(model, dtype=torch.float32)
    init_weights(policy, 0)
    save_tokenizer(tokenizer, directory / "model")
    save(policy, directory / "model", tokenizer_from=None)
    rows = [json.dumps({"prompt": _question(number)}) for number in range(_PROMPTS)]
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
            checkpoint = ppo(PPOConfig.from_dict(config.to_dict() | {"critic_lr": 1e-3}), run_directory)
        else:
            checkpoint = grpo(config, run_directory)
        peak = ((peak_memory_bytes() or 0) - before) / 2**20
        rewards = [row["reward"] for row in read_metrics(run_directory / METRICS_FILE)]
        last = rewards[-_LAST:]
        return {
            "first_reward": rewards[0],
            "last_reward": sum(last) / len(last),
            "accuracy_before": list(held_out_accuracy(config.model, config)),
            "accuracy": list(held_out_accuracy(checkpoint, config)),
            "peak_mebibytes_above_start": peak,
        }

    return run


def estimate_mebibytes(name: str, config: GRPOConfig) -> float:
    """By formula: PPO adds the weights, gradients and moments of a critic of the policy's size."""
    model = open_checkpoint(config.model).config
    critic = critic_bytes(model) if name == "ppo" else 0
    return needed_bytes(config, model, 64, config.micro_batch_tokens, critic) / 2**20


def compare(steps: int = 40) -> dict[str, dict[str, Any]]:
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
    print(
        f"{'':<6}{'reward, first':>15}{'reward, last':>15}{'held-out, before':>25}{'held-out, after':>25}{'MiB by formula':>17}"
        f"{'MiB measured':>15}"
    )
    for name, row in compare(steps).items():
        print(
            f"{name:<6}{row['first_reward']:>15.3f}{row['last_reward']:>15.3f}{_share(row['accuracy_before']):>25}"
            f"{_share(row['accuracy']):>25}{row['estimated_mebibytes']:>17.0f}{row['peak_mebibytes_above_start']:>15.0f}"
        )


def _share(estimate: Sequence[float]) -> str:
    value, low, high = estimate
    return f"{value:.1%} ({low:.1%} to {high:.1%})"


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.ppo")

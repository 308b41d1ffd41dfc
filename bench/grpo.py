"""One GRPO step beside TRL's GRPOTrainer: the same model, prompts, group size, lengths and update.

A step is a rollout (samples and their rewards) and one update: log-probabilities, loss, gradients, clipping, AdamW. The samples of the
two sides differ, being drawn; that both do the same work is checked on those of TRL's first step, which our trainer gets as well: the
log-probabilities and the norm of the gradient must agree.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from bench.contest import Build, alternate, summarize
from bench.grpo_peer import Step, Work, build_trl, is_installed
from bench.peers import COMPARED, SETTINGS, our_model
from bench.results import Row
from finback.config import InputError, ModelConfig, count_params
from finback.data.fetch import default_cache
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import load, save
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_reward
from finback.rewards.sandbox import require
from finback.rl.advantages import Advantages, outcome_supervision
from finback.rl.batch import Batch, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.drafting import sample_of
from finback.rl.prompts import Prompt
from finback.rl.rollout import Completion, Rollout, roll_out
from finback.rl.session import PromptStream, new_policy, refresh_sampling, sampling_model
from finback.rl.update import update
from finback.train.samples import accumulate_sample_gradients, padded_micro_batches
from finback.train.session import keep_freed_memory

TARGET_V3, TARGET_SMOLLM2 = 4.0, 3.0  # times as fast as TRL, end to end
TARGET_NOT_WAITING = 0.95  # share of a step in which the trainer does not wait for rewards
TOLERANCE = {"fp32": (1e-3, 0.01), "bf16": (0.05, 0.05)}  # mean distance of log-probabilities; relative of the gradient's norm
V3 = replace(COMPARED, vocab_size=49152)
QUESTIONS = (("What is 17 + 25? Think step by step, then give the answer.", "42"),)
MANY_QUESTIONS = tuple((f"What is {a} + {2 * a + 1}? Give the answer.", str(3 * a + 1)) for a in (12, 23, 34, 45))

Precisions = tuple[Literal["fp32", "bf16"], Literal["fp32", "bf16"]]
"""Of training's products, and of the weights that samples are drawn with."""


@dataclass(frozen=True)
class Size:
    """How much is measured: `turns` steps of each side, on each model and in each precision."""

    smollm2: Path = field(default_factory=lambda: default_cache() / "smollm2")
    v3: ModelConfig = V3  # with SmolLM2's tokenizer
    questions: tuple[tuple[str, str], ...] = QUESTIONS
    num_generations: int = 8
    new_tokens: int = 64
    longest: int = 128  # tokens of a sample that ends where the model ends it
    precisions: tuple[Precisions, ...] = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
    warm_up: int = 1
    turns: int = 3
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(precisions=(("bf16", "bf16"),), turns=1)


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows of the models that are there, and of TRL if it is installed. A note says how to get the rest."""
    if not (size.smollm2 / "config.json").is_file():
        return [], ["Nothing was measured, for want of SmolLM2-135M and its tokenizer: finback fetch smollm2 gets it."]
    rows: list[Row] = []
    steps: list[Step] = []  # ours, of all models
    with tempfile.TemporaryDirectory(prefix="finback-bench-") as temporary:
        save(our_model(size.v3), temporary)
        save_tokenizer(load_tokenizer(size.smollm2), temporary)
        models = (
            ("V3", Path(temporary), SETTINGS, TARGET_V3),
            ("SmolLM2-135M", size.smollm2, {"transformers": {}}, TARGET_SMOLLM2),
        )
        for model, directory, settings, target in models:
            for precision, rollout in size.precisions:
                name = f"GRPO step, {model}, {precision}" + (", sampled in bf16" if rollout == "bf16" else "")
                more_rows, more_steps = model_part(name, directory, size, (precision, rollout), settings, target)
                rows, steps = rows + more_rows, steps + more_steps
            rows += sharing_part(model, directory, size)
    rows.append(_not_waiting("GRPO step, maths: share without waiting for rewards", steps))
    notes = _notes(size)
    if isolation_is_there():
        rows.append(_not_waiting("GRPO step, code in the sandbox: share without waiting for rewards", sandbox_steps(size)))
    else:
        notes.append("Without programs as rewards, for want of the sandbox: finback doctor says how to get it.")
    if not is_installed():
        notes.append("Without TRL, which is not installed: pip install -c constraints.txt '.[bench]' brings it.")
    return rows, notes


def model_part(
    name: str, directory: Path, size: Size, precisions: Precisions, settings: Mapping[str, Mapping[str, str]], target: float
) -> tuple[list[Row], list[Step]]:
    """Rows of the whole step, then of rollout and training apart, beside TRL with each of transformers' `settings`; and our steps."""
    work = work_of(size.questions, load_tokenizer(directory), size)
    precision, _ = precisions
    competitors: dict[str, Build] = {"finback": partial(build_ours, directory, work, precisions)}
    if is_installed():
        for of_them, setting in settings.items():
            competitors[of_them.replace("transformers", "TRL")] = partial(build_trl, directory, work, precision, setting)
    turns = alternate(competitors, range(size.warm_up + size.turns), separate=size.separate)
    for peer, all_turns in turns.items():
        evidence = all_turns[0].value.evidence
        if evidence is not None:
            check_same_update(peer, directory, work, precision, evidence)
    steps = {side: [turn.value for turn in kept[size.warm_up :]] for side, kept in turns.items()}
    parts = {"": "seconds", ": rollout": "rollout_seconds", ": training": "training_seconds"}
    rows = []
    for suffix, part in parts.items():
        taken = {side: summarize([getattr(step, part) for step in of_side]) for side, of_side in steps.items()}
        peers = [peer for peer in taken if peer != "finback"]
        for peer in peers:
            wanted = None if suffix else target
            rows.append(Row(name + suffix, "seconds", *taken["finback"], peer, *taken[peer], target=wanted))
        if not peers:
            rows.append(Row(name + suffix, "seconds", *taken["finback"]))
    return rows, steps["finback"]


def sharing_part(model: str, directory: Path, size: Size) -> list[Row]:
    """The gradient of a group's log-probabilities with the prompt once in the batch, beside a row for each sample with its prompt."""
    work, rows = work_of(size.questions, load_tokenizer(directory), size), []
    for precision in sorted({precision for precision, _ in size.precisions}):
        builds: dict[str, Build] = {
            "shared": partial(build_sharing, directory, work, precision),
            "apart": partial(build_apart, directory, work, precision),
        }
        turns = alternate(builds, range(size.warm_up + size.turns), separate=size.separate)
        kept = {side: of_side[size.warm_up :] for side, of_side in turns.items()}
        seconds = {side: summarize([turn.seconds for turn in of_side]) for side, of_side in kept.items()}
        tokens = {f"{side}_tokens": of_side[0].value for side, of_side in kept.items()}
        name = f"gradient of a group, {model}, {precision}"
        rows.append(Row(name, "seconds", *seconds["shared"], "a row for each sample", *seconds["apart"], extra=tokens))
    return rows


def build_sharing(directory: Path, work: Work, precision: str) -> Callable[[Any], int]:
    """The gradient of the sum of the samples' log-probabilities, as `update` takes it; returns the tokens that were computed."""
    keep_freed_memory()
    model = load(directory, dtype=torch.float32)
    completions = group_of(work, directory, model.config.vocab_size)
    batch = Batch(completions, [0.0] * len(completions), model.config.num_nextn_predict_layers, torch.device("cpu"))

    def turn(number: Any) -> int:
        model.zero_grad()
        sample_log_probs(model, batch, temperature=1.0, precision=precision).at_temperature.sum().backward()
        return batch.num_tokens

    return turn


def build_apart(directory: Path, work: Work, precision: Literal["fp32", "bf16"]) -> Callable[[Any], int]:
    """The same gradient, divided by the number of tokens and with the other sign, as a step of `finback sft` takes it."""
    keep_freed_memory()
    model = load(directory, dtype=torch.float32)
    completions = group_of(work, directory, model.config.vocab_size)
    samples = [sample_of(completion) for completion in completions]
    rows = padded_micro_batches(samples, sum(len(sample.ids) for sample in samples))

    def turn(number: Any) -> int:
        model.zero_grad()
        accumulate_sample_gradients(model, rows, mtp_loss_coef=0.0, balance_loss_coef=0.0, precision=precision, mtp=False)
        return sum(part.ids[:, :-1].numel() for part in rows)

    return turn


def group_of(work: Work, directory: Path, vocabulary: int) -> list[Completion]:
    """Samples of random tokens."""
    prompts, generator = prompts_of(work, load_tokenizer(directory)), torch.Generator().manual_seed(0)
    return [
        Completion(prompt, torch.randint(vocabulary, (work.new_tokens,), generator=generator).tolist(), [0.0] * work.new_tokens)
        for prompt in prompts
        for _ in range(work.num_generations)
    ]


def sandbox_steps(size: Size) -> list[Step]:
    """Of SmolLM2 on several prompts, whose samples end where the model ends them, with programs in the sandbox for rewards: a reward
    process for each core."""
    work = work_of(MANY_QUESTIONS, load_tokenizer(size.smollm2), replace(size, new_tokens=size.longest))
    build = partial(
        build_ours, size.smollm2, work, ("bf16", "fp32"), reward="code", reward_processes=os.cpu_count() or 1, ignore_eos=False
    )
    turns = alternate({"finback": build}, range(size.warm_up + size.turns), separate=size.separate)
    return [turn.value for turn in turns["finback"][size.warm_up :]]


def isolation_is_there() -> bool:
    try:
        require("bubblewrap")
    except InputError:
        return False
    return True


def build_ours(
    directory: Path,
    work: Work,
    precisions: Precisions,
    *,
    reward: str = "maths",
    reward_processes: int = 1,
    ignore_eos: bool = True,
) -> Callable[[Any], Step]:
    """A step of `finback grpo`: its rollout and its update. The reward processes are started before the clock is."""
    keep_freed_memory()
    config = config_of(directory, work, precisions, reward_processes)
    state = new_policy(config, PromptStream(0), torch.device("cpu"))
    tokenizer = load_tokenizer(directory)
    prompts = prompts_of(work, tokenizer)
    samples = len(prompts) * work.num_generations
    longest = max(len(prompt.token_ids) for prompt in prompts) + work.new_tokens
    llm = LLM(
        model=sampling_model(config, state.model),
        tokenizer=tokenizer,
        max_num_seqs=samples,
        max_num_batched_tokens=1024,
        max_model_len=longest,
        block_size=16,
    )
    params = SamplingParams(temperature=1.0, max_tokens=work.new_tokens, ignore_eos=ignore_eos, skip_special_tokens=False)
    rewards = [load_reward(f"bench.grpo_reward:{reward}")]

    def turn(number: int) -> Step:
        with RewardPool(rewards, processes=reward_processes, deadline=10.0) as pool:
            pool.wait_ready()
            start = perf_counter()
            llm.reset_prefix_cache()
            refresh_sampling(llm.model, state.model)
            rollout = roll_out(llm, pool, prompts, work.num_generations, params, seed=0, step=number)
            values = torch.tensor([[c.reward for c in group] for group in rollout.groups], dtype=torch.float64)
            advantages = outcome_supervision(values)
            sampled = perf_counter()
            totals = update(config, state, None, rollout, advantages, number)
            end = perf_counter()
        assert totals.finite, "the gradient is not finite"
        assert bool(advantages.spread.all()), "a group's rewards are all the same: nothing was computed for it"
        if ignore_eos:
            assert all(len(c.token_ids) == work.new_tokens for c in rollout.completions), "a sample has another length"
        return Step(end - start, sampled - start, end - sampled, rollout.waited)

    return turn


def work_of(questions: Sequence[tuple[str, str]], tokenizer: Tokenizer, size: Size) -> Work:
    """The questions as the model's chat template writes them, if it has one."""

    def text(question: str) -> str:
        if tokenizer.chat_template is None:
            return question
        return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)

    prompts, answers = zip(*((text(question), answer) for question, answer in questions), strict=True)
    return Work(prompts, answers, size.num_generations, size.new_tokens)


def prompts_of(work: Work, tokenizer: Tokenizer) -> list[Prompt]:
    return [
        Prompt(text, tokenizer.encode(text, add_bos=False), {"answer": answer})
        for text, answer in zip(work.prompts, work.answers, strict=True)
    ]


def config_of(directory: Path, work: Work, precisions: Precisions, reward_processes: int = 1) -> GRPOConfig:
    precision, rollout = precisions
    return GRPOConfig(
        model=str(directory),
        prompts_per_step=len(work.prompts),
        num_generations=work.num_generations,
        max_completion_length=work.new_tokens,
        beta=0.0,
        lr=work.lr,
        warmup_steps=0,
        precision=precision,
        rollout_precision=rollout,
        reward_processes=reward_processes,
    )


def check_same_update(
    peer: str, directory: Path, work: Work, precision: Literal["fp32", "bf16"], evidence: Mapping[str, Any]
) -> None:
    """Our trainer on the peer's samples and advantages: the same log-probabilities and the same gradient, but for rounding.

    Raises AssertionError where they differ by more: then the two do not do the same work.
    """
    prompts = {tuple(prompt.token_ids): prompt for prompt in prompts_of(work, load_tokenizer(directory))}
    completions = []
    for ids, sample, log_probs in zip(evidence["prompt_ids"], evidence["completion_ids"], evidence["log_probs"], strict=True):
        prompt = next((prompt for known, prompt in prompts.items() if tuple(ids[-len(known) :]) == known), None)
        assert prompt is not None, f"{peer} reads other prompts than finback: {ids}"
        assert len(sample) == work.new_tokens, f"a sample of {peer} has {len(sample)} tokens, not {work.new_tokens}"
        completions.append(Completion(prompt, sample, log_probs))
    distance, part = TOLERANCE[precision]
    config = replace(config_of(directory, work, (precision, "fp32")), max_logprob_gap=distance)
    state = new_policy(config, PromptStream(0), torch.device("cpu"))
    advantages = Advantages(evidence["advantages"], torch.tensor([True]))
    totals = update(config, state, None, Rollout([completions], 0.0, 0.0), advantages, 1)  # raises where log-probabilities differ
    ours, theirs = totals.grad_norm, evidence["grad_norm"]
    assert abs(ours - theirs) <= part * theirs, (
        f"on the same samples the gradient's norm is {ours} in finback, {theirs} in {peer}"
    )


def _not_waiting(name: str, steps: Sequence[Step]) -> Row:
    shares = [1 - step.waited / step.seconds for step in steps]
    return Row(name, "share", min(shares), target=TARGET_NOT_WAITING, extra={"waited_seconds": max(s.waited for s in steps)})


def _notes(size: Size) -> list[str]:
    parameters = f"{count_params(size.v3).total / 1e6:.1f}M"
    return [
        f"V3: random, {parameters} parameters, {size.v3.vocab_size:,} of vocabulary. {len(size.questions)} prompt x "
        f"{size.num_generations} samples x {size.new_tokens} tokens, none shorter, then one update: weights in float32 on both sides, "
        "bf16 by autocast, no reference model, loss by token (TRL's grpo), clipping to 1.0, fused AdamW.",
        "Sampled in bf16: with a copy of the weights, made anew in each step (field rollout_precision); else with the trainer's own, "
        "in float32.",
        "TRL: without gradient checkpointing and reports. TRL, eager: with transformers' eager attention and experts. On the samples "
        "of TRL's first step, our trainer's log-probabilities and gradient norm were compared with TRL's.",
        "Gradient of a group: of the log-probabilities of one step's samples, the prompt once in the batch (`finback.rl.batch.Batch`) "
        "or in a row for each sample, padded (`finback.train.samples`); without optimizer.",
        "Share without waiting: 1 - (time with nothing left to sample and rewards outstanding) / step, of the worst step. Maths: the "
        "timed steps, where all samples end at the same token, so that hardly any scoring overlaps. Code: samples end where the model "
        f"ends them, on {len(MANY_QUESTIONS)} prompts, and each is scored by a program in the sandbox.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("grpo")

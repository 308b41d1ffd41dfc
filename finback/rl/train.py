"""The GRPO loop: one function, to be read downward (DeepSeekMath algorithm 1; R1 section 2.2)."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from finback.config import InputError, count_params
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import open_checkpoint
from finback.model.transformer import Transformer
from finback.ops.memory import available_memory
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward, load_rewards
from finback.rl.advantages import supervise
from finback.rl.config import GRPOConfig
from finback.rl.drafting import draft_acceptance
from finback.rl.health import kept_samples, nothing_to_learn, rollout_metrics, tell_failures
from finback.rl.memory import check_memory
from finback.rl.model_rewards import (
    ModelReward,
    add_model_scores,
    check_reward_model,
    load_model_rewards,
    model_reward_names,
    weight_bytes,
)
from finback.rl.prompts import Prompt, check_vocabulary, read_prompts, tell_skipped
from finback.rl.rollout import roll_out
from finback.rl.session import (
    PromptStream,
    load_policy,
    load_reference,
    new_policy,
    prune_references,
    refresh_reference,
    refresh_sampling,
    resolve_config,
    sampling_model,
    write_run_config,
)
from finback.rl.update import learning_rate, update
from finback.train.checkpoint import TrainingState, list_checkpoints, newest_sound_checkpoint, remove_leftovers, save_checkpoint
from finback.train.loop import diverged, due, not_applied
from finback.train.metrics import MetricsWriter
from finback.train.session import choose_device, cpu_threads, deferred_interrupts, locked

_ENGINE_BLOCK = 16  # tokens: prompts of a few dozen are shared by a group's samples, too
_HINT_AFTER = 3  # steps in a row that teach nothing
MOST_NONFINITE = 3


def grpo(config: GRPOConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Train a policy by GRPO as `config` says in the run directory `directory`, and return its last checkpoint.

    With `resume`, continue the run that is there from its newest sound checkpoint, bitwise as without the interruption (at the same
    number of threads). Ctrl-C ends the step, saves and raises KeyboardInterrupt.

    Raises:
        InputError: a field, the data, a reward or the directory is wrong, or trainer and engine disagree.
        OSError: the disk is full; the checkpoints written before are untouched.
    """
    run, device = Path(directory), choose_device(config.device)
    config = resolve_config(config, run, resume)
    tokenizer, model = load_tokenizer(config.model), open_checkpoint(config.model).config
    specs = (*config.reward, *([] if config.process_reward is None else [config.process_reward]))
    rewards = load_rewards(specs) if specs else ()
    names = [reward.name for reward in rewards]
    for spec in config.reward_model:
        check_reward_model(spec)
    skipped: list[str] | None = [] if config.skip_malformed else None
    prompts = read_prompts(
        config.data,
        tokenizer,
        config.template,
        longest=model.max_position_embeddings - config.max_completion_length,
        rewards=[*names, *model_reward_names(config.reward_model, names)],
        skipped=skipped,
    )
    if config.replay_experts and not model.num_moe_layers:
        raise InputError("field replay_experts is true, but this model has no routed experts; leave it out")
    check_vocabulary(prompts, model.vocab_size)
    width = max(len(prompt.token_ids) for prompt in prompts) + config.max_completion_length
    with cpu_threads(config.threads):
        check_memory(config, model, width, device, available_memory(device), weight_bytes(config.reward_model))
        run.mkdir(parents=True, exist_ok=True)
        # Under the lock, so that what another process is just writing into the run is not taken for a leftover.
        with locked(run), deferred_interrupts() as interrupted, _reward_pool(config, rewards) as pool:
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            stream = PromptStream(config.seed, prompts)
            if checkpoint is None:
                state = new_policy(config, stream, device)
            else:
                state = load_policy(checkpoint, config, stream, device)
                notes.append(f"continuing {run} after step {state.progress.step}")
            notes += tell_skipped(skipped or [])
            judges = load_model_rewards(config.reward_model, device, names)
            llm = LLM(
                model=sampling_model(config, state.model),
                tokenizer=tokenizer,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max(1024, config.max_num_seqs),
                max_model_len=width,
                block_size=_ENGINE_BLOCK,
                return_experts=config.replay_experts,
            )
            step = state.progress.step
            with MetricsWriter(run, total_steps=config.steps, resume_step=step if resume else None) as metrics:
                if checkpoint is None:
                    write_run_config(run, config)
                for sentence in (*_introduction(config, state, prompts), *notes):
                    metrics.say(sentence)
                reference = load_reference(config, run, step, device)
                return train(config, run, state, reference, llm, pool, judges, metrics, interrupted)


def _reward_pool(config: GRPOConfig, rewards: Sequence[Reward]) -> AbstractContextManager[RewardPool | None]:
    """None where reward models alone judge."""
    if not rewards:
        return nullcontext()
    return RewardPool(rewards, processes=config.reward_processes, deadline=config.reward_deadline)


def train(
    config: GRPOConfig,
    run: Path,
    state: TrainingState[PromptStream],
    reference: Transformer | None,
    llm: LLM,
    pool: RewardPool | None,
    judges: Sequence[ModelReward],
    metrics: MetricsWriter,
    interrupted: threading.Event,
) -> Path:
    """Take `state` to the end of the run, step by step; return the last checkpoint."""
    progress, useless = state.progress, 0
    failed = set[str]()  # rewards whose failures were told
    process_name = None if pool is None or config.process_reward is None else pool.rewards[-1].name
    checkpoints = list_checkpoints(run)[:1]
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_completion_length, skip_special_tokens=False)
    while progress.step < config.steps:
        start, step = time.perf_counter(), progress.step + 1

        # sample, and score what is finished meanwhile; cached rows are of the weights of the last step
        llm.reset_prefix_cache()
        refresh_sampling(llm.model, state.model)
        prompts = state.stream.next_batch(config.prompts_per_step)
        rollout = roll_out(llm, pool, prompts, config.num_generations, params, seed=config.seed, step=step)
        add_model_scores(rollout.completions, judges)

        # advantages, within each group
        rewards = torch.tensor([[completion.reward for completion in group] for group in rollout.groups], dtype=torch.float64)
        advantages = supervise(rollout, rewards, process_name)

        # how well the MTP modules draft what this policy writes
        drafting = draft_acceptance(state.model, rollout, config)

        # update, minibatch by minibatch
        began = time.perf_counter()
        totals = update(config, state, reference, rollout, advantages, step)
        training_seconds = time.perf_counter() - began
        if drafting and step == config.steps:
            drafting["mtp_acceptance_after"] = draft_acceptance(state.model, rollout, config)["mtp_acceptance"]

        refresh_reference(config, run, step, state.model, reference)

        # count and log
        progress.step, progress.tokens = step, progress.tokens + sum(len(c.token_ids) for c in rollout.completions)
        progress.seconds += time.perf_counter() - start
        row = {"step": step, "tokens": progress.tokens, "seconds": progress.seconds, "lr": learning_rate(config, step, 0)}
        metrics.log(row | rollout_metrics(rollout, rewards, advantages.spread) | drafting | totals.metrics(training_seconds))
        metrics.log_samples(step, kept_samples(rollout, config.samples_per_step))
        for sentence in tell_failures(rollout, step, failed):
            metrics.say(sentence)
        if not totals.finite:
            progress.nonfinite_steps += 1
            metrics.say(not_applied(step, totals.grad_norm, MOST_NONFINITE))
            if progress.nonfinite_steps >= MOST_NONFINITE:
                raise InputError(diverged(step, config.lr, MOST_NONFINITE))
        else:
            progress.nonfinite_steps = 0
        useless = 0 if bool(advantages.spread.any()) else useless + 1
        if useless == _HINT_AFTER:
            metrics.say(nothing_to_learn(rewards))

        # save
        if step == config.steps or interrupted.is_set() or due(step, config.save_every):
            checkpoints = [save_checkpoint(run, state, tokenizer_from=config.model, keep=config.keep_checkpoints)]
            prune_references(config, run, step)
        if interrupted.is_set() and step < config.steps:
            metrics.say(f"stopped after step {step}; continue with: finback grpo --resume {run}")
            raise KeyboardInterrupt
    return checkpoints[0]


def _introduction(config: GRPOConfig, state: TrainingState[PromptStream], prompts: Sequence[Prompt]) -> Iterator[str]:
    counts = count_params(state.model.config)
    yield (
        f"GRPO on {len(prompts):,} prompts: {config.prompts_per_step} x {config.num_generations} samples a step, "
        f"{counts.total:,} parameters, {config.precision}, {torch.get_num_threads()} threads"
    )

"""The GRPO loop: one function, to be read downward (DeepSeekMath algorithm 1; R1 section 2.2)."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.config import InputError, count_params
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import save
from finback.model.transformer import Transformer
from finback.ops.memory import available_memory
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward, load_rewards
from finback.rl.batch import Batch, BatchLogProbs, cut_batches, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.drafting import clip_apart, draft_acceptance, draft_loss_sum
from finback.rl.grpo import global_token_loss, group_advantages, has_spread, sequence_level_loss, token_level_loss
from finback.rl.health import UpdateTotals, kept_samples, nothing_to_learn, rollout_metrics
from finback.rl.memory import check_memory
from finback.rl.model_rewards import ModelReward, add_model_scores, load_model_rewards, model_reward_names, weight_bytes
from finback.rl.prompts import Prompt, read_prompts, tell_skipped
from finback.rl.rollout import Rollout, roll_out
from finback.rl.session import (
    PromptStream,
    load_policy,
    load_reference,
    minibatch_order,
    new_policy,
    prune_references,
    reference_directory,
    resolve_config,
    write_run_config,
)
from finback.train.balance import update_expert_bias
from finback.train.checkpoint import TrainingState, list_checkpoints, newest_sound_checkpoint, remove_leftovers, save_checkpoint
from finback.train.loop import clipped_update, diverged, due, expert_biases, not_applied, take_gradients
from finback.train.metrics import MetricsWriter
from finback.train.session import choose_device, cpu_threads, deferred_interrupts, locked

_ENGINE_BLOCK = 16  # tokens: prompts of a few dozen are shared by a group's samples, too
_HINT_AFTER = 3  # steps in a row that teach nothing
_MOST_NONFINITE = 3


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
    tokenizer = load_tokenizer(config.model)
    rewards = load_rewards(config.reward) if config.reward else ()
    names = [reward.name for reward in rewards]
    model_names = model_reward_names(config.reward_model, names)
    with cpu_threads(config.threads):
        remove_leftovers(run)
        checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
        stream = PromptStream(config.seed)
        if checkpoint is None:
            state = new_policy(config, stream, device)
        else:
            state = load_policy(checkpoint, config, stream, device)
            notes.append(f"continuing {run} after step {state.progress.step}")
        context = state.model.config.max_position_embeddings
        skipped: list[str] | None = [] if config.skip_malformed else None
        stream.prompts = read_prompts(
            config.data,
            tokenizer,
            config.template,
            longest=context - config.max_completion_length,
            rewards=[*names, *model_names],
            skipped=skipped,
        )
        notes += tell_skipped(skipped or [])
        if config.replay_experts and not state.model.config.num_moe_layers:
            raise InputError("field replay_experts is true, but this model has no routed experts; leave it out")
        width = max(len(prompt.token_ids) for prompt in stream.prompts) + config.max_completion_length
        beside = weight_bytes(config.reward_model)
        check_memory(config, state.model.config, width, device, available_memory(device), beside)
        judges = load_model_rewards(config.reward_model, device, names)
        llm = LLM(
            model=state.model,
            tokenizer=tokenizer,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(1024, config.max_num_seqs),
            max_model_len=width,
            block_size=_ENGINE_BLOCK,
            return_experts=config.replay_experts,
        )
        run.mkdir(parents=True, exist_ok=True)
        with (
            locked(run),
            deferred_interrupts() as interrupted,
            _reward_pool(config, rewards) as pool,
            MetricsWriter(run, total_steps=config.steps, resume_step=state.progress.step if resume else None) as metrics,
        ):
            if checkpoint is None:
                write_run_config(run, config)
            for sentence in (*_introduction(config, state, stream.prompts), *notes):
                metrics.say(sentence)
            reference = load_reference(config, run, state.progress.step, device)
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
    checkpoints = list_checkpoints(run)[:1]
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_completion_length, skip_special_tokens=False)
    while progress.step < config.steps:
        start, step = time.perf_counter(), progress.step + 1

        # sample, and score what is finished meanwhile; cached rows are of the weights of the last step
        llm.reset_prefix_cache()
        prompts = state.stream.next_batch(config.prompts_per_step)
        rollout = roll_out(llm, pool, prompts, config.num_generations, params, seed=config.seed, step=step)
        add_model_scores(rollout.completions, judges)

        # advantages, within each group
        rewards = torch.tensor([[completion.reward for completion in group] for group in rollout.groups], dtype=torch.float64)
        advantages, spread = group_advantages(rewards), has_spread(rewards)

        # how well the MTP modules draft what this policy writes
        drafting = measure_drafts(config, state.model, rollout)

        # update, minibatch by minibatch
        began = time.perf_counter()
        totals = update(config, state, reference, rollout, advantages, spread, step)
        training_seconds = time.perf_counter() - began
        if drafting and step == config.steps:
            drafting["mtp_acceptance_after"] = measure_drafts(config, state.model, rollout)["mtp_acceptance"]

        # the reference follows every so many steps, and is kept for a run that is resumed
        if reference is not None and step % config.reference_steps == 0:
            reference.load_state_dict(state.model.state_dict())
            save(state.model, reference_directory(run, step), tokenizer_from=config.model)

        # count and log
        progress.step, progress.tokens = step, progress.tokens + sum(len(c.token_ids) for c in rollout.completions)
        progress.seconds += time.perf_counter() - start
        row = {"step": step, "tokens": progress.tokens, "seconds": progress.seconds, "lr": learning_rate(config, step, 0)}
        metrics.log(row | rollout_metrics(rollout, rewards, spread) | drafting | totals.metrics(training_seconds))
        metrics.log_samples(step, kept_samples(rollout, config.samples_per_step))
        if not totals.finite:
            progress.nonfinite_steps += 1
            metrics.say(not_applied(step, totals.grad_norm, _MOST_NONFINITE))
            if progress.nonfinite_steps >= _MOST_NONFINITE:
                raise InputError(diverged(step, config.lr, _MOST_NONFINITE))
        else:
            progress.nonfinite_steps = 0
        useless = 0 if bool(spread.any()) else useless + 1
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


def update(
    config: GRPOConfig,
    state: TrainingState[PromptStream],
    reference: Transformer | None,
    rollout: Rollout,
    advantages: Tensor,
    spread: Tensor,
    step: int,
) -> UpdateTotals:
    """Go through a rollout `num_iterations` times, with one optimizer step for each of its minibatches.

    Samples of groups without spread have advantage 0. Without a reference they add nothing to the gradient: they are counted in the
    means, and not computed.
    """
    model, totals = state.model, UpdateTotals(config)
    device, pad = next(model.parameters()).device, model.config.pad_token_id or 0
    depths = 0 if config.freeze_mtp else model.config.num_nextn_predict_layers
    completions, flat = rollout.completions, advantages.flatten().tolist()
    teaches = (spread.unsqueeze(1) | (config.beta > 0)).expand_as(advantages).flatten().tolist()
    minibatches: list[tuple[list[Batch], int, int]] = []  # batches, and of the whole minibatch samples and tokens
    for part in minibatch_order(config, len(completions), step):
        kept = [i for i in part if teaches[i] and completions[i].token_ids]
        chosen, weights = [completions[i] for i in kept], [flat[i] for i in kept]
        batches = cut_batches(chosen, weights, config.micro_batch_tokens, pad, device)
        minibatches.append((batches, len(part), sum(len(completions[i].token_ids) for i in part)))

    # what must be known before the first update; of the first minibatch, its own forward pass tells
    with torch.no_grad():
        for number, (batches, _, _) in enumerate(minibatches):
            for batch in batches:
                if reference is not None:
                    batch.reference_log_probs = _log_probs(reference, batch, config, replay=False).at_temperature
                if number > 0:
                    now = _log_probs(model, batch, config)
                    batch.old_log_probs = now.at_temperature
                    totals.add_gap(batch, now.at_one, step)

    for iteration in range(config.num_iterations):
        for number, (batches, num_samples, num_tokens) in enumerate(minibatches):
            counts: Tensor | None = None
            drafted, mtp_loss = sum(int(batch.mask.sum()) for batch in batches) * depths, 0.0
            for batch in batches:
                now = _log_probs(model, batch, config, mtp=depths > 0)
                if batch.old_log_probs is None:
                    batch.old_log_probs = now.at_temperature.detach()
                    totals.add_gap(batch, now.at_one, step)
                loss = objective(config, batch, now.at_temperature, num_samples, num_tokens)
                drafts = draft_loss_sum(model, batch, now.mtp_hidden) / max(1, drafted)
                (loss + config.mtp_loss_weight * drafts).backward()
                totals.add(batch, now.at_temperature.detach(), float(loss.detach()))
                mtp_loss += float(drafts.detach())
                counts = now.expert_counts if counts is None else counts + now.expert_counts
            if counts is not None and depths:
                totals.add_mtp_loss(mtp_loss)
            if counts is not None:
                place = iteration * len(minibatches) + number
                totals.add_norm(_optimizer_step(config, state, counts, learning_rate(config, step, place)))
    return totals


def measure_drafts(config: GRPOConfig, model: Transformer, rollout: Rollout) -> dict[str, float]:
    """`mtp_acceptance` on a few samples of the rollout; empty where there are no MTP modules."""
    pad = model.config.pad_token_id or 0
    return draft_acceptance(
        model, rollout, micro_batch_tokens=config.micro_batch_tokens, pad_token_id=pad, precision=config.precision
    )


def objective(config: GRPOConfig, batch: Batch, log_probs: Tensor, num_samples: int, num_tokens: int) -> Tensor:
    """The configured loss of one micro-batch, as its share of that of a minibatch of `num_samples` samples and `num_tokens` tokens."""
    assert batch.old_log_probs is not None
    common: dict[str, Any] = {
        "epsilon": config.epsilon,
        "epsilon_high": config.epsilon_high,
        "beta": config.beta,
        "reference_log_probs": batch.reference_log_probs,
    }
    arguments = (log_probs, batch.old_log_probs, batch.advantages, batch.mask)
    if config.loss == "sequence":
        return sequence_level_loss(*arguments, num_samples=num_samples, **common)
    if config.loss == "global-token":
        return global_token_loss(*arguments, num_tokens=num_tokens, **common)
    return token_level_loss(*arguments, num_samples=num_samples, **common)


def learning_rate(config: GRPOConfig, step: int, place: int) -> float:
    """Of the update `place` (from 0) of step `step` (from 1): linear warm-up over updates, then linear to `final_lr` over steps."""
    updates = (step - 1) * config.minibatches * config.num_iterations + place + 1
    end = config.lr if config.final_lr is None else config.final_lr
    rate = config.lr + (end - config.lr) * (step - 1) / max(1, config.steps - 1)
    return rate * min(1.0, updates / max(1, config.warmup_steps))


def _log_probs(model: Transformer, batch: Batch, config: GRPOConfig, *, mtp: bool = False, replay: bool = True) -> BatchLogProbs:
    return sample_log_probs(model, batch, temperature=config.temperature, precision=config.precision, mtp=mtp, replay=replay)


def _optimizer_step(config: GRPOConfig, state: TrainingState[PromptStream], counts: Tensor, lr: float) -> float:
    """Clip and apply what `.grad` holds, then move the router biases; returns the policy's norm. One that is not finite changes
    nothing. Frozen MTP modules are not in the counts."""
    parameters = state.parameters
    gradients = take_gradients(parameters)
    norm = clip_apart(state.model, gradients, config.max_grad_norm)
    applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
    if applied and config.bias_update_speed and state.model.config.uses_expert_bias:
        update_expert_bias(expert_biases(state.model)[: len(counts)], counts, config.bias_update_speed)
    return norm


def _introduction(config: GRPOConfig, state: TrainingState[PromptStream], prompts: Sequence[Prompt]) -> Iterator[str]:
    counts = count_params(state.model.config)
    yield (
        f"GRPO on {len(prompts):,} prompts: {config.prompts_per_step} x {config.num_generations} samples a step, "
        f"{counts.total:,} parameters, {config.precision}, {torch.get_num_threads()} threads"
    )

"""The updates of one step: a rollout cut into minibatches, its loss, and the optimizer (DeepSeekMath algorithm 1, lines 10 and 11)."""

from typing import Any

import torch
from torch import Tensor

from finback.model.transformer import Transformer
from finback.rl.advantages import Advantages
from finback.rl.batch import Batch, BatchLogProbs, cut_batches, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.drafting import clip_apart, draft_loss_sum
from finback.rl.grpo import global_token_loss, sequence_level_loss, token_level_loss
from finback.rl.health import UpdateTotals
from finback.rl.rollout import Rollout
from finback.rl.session import PromptStream, minibatch_order
from finback.train.balance import update_expert_bias
from finback.train.checkpoint import TrainingState
from finback.train.loop import clipped_update, expert_biases, take_gradients


def update(
    config: GRPOConfig,
    state: TrainingState[PromptStream],
    reference: Transformer | None,
    rollout: Rollout,
    advantages: Advantages,
    step: int,
) -> UpdateTotals:
    """Go through a rollout `num_iterations` times, with one optimizer step for each of its minibatches.

    Samples of groups without spread have advantage 0. Without a reference they add nothing to the gradient: they are counted in the
    means, and not computed.
    """
    model, totals = state.model, UpdateTotals(config)
    device, modules = next(model.parameters()).device, model.config.num_nextn_predict_layers
    depths = 0 if config.freeze_mtp else modules
    completions = rollout.completions
    teaches = [bool(spread) or config.beta > 0 for spread in advantages.spread for _ in range(config.num_generations)]
    minibatches: list[tuple[list[Batch], int, int]] = []  # batches, and of the whole minibatch samples and tokens
    for part in minibatch_order(config, len(completions), step):
        kept = [i for i in part if teaches[i] and completions[i].token_ids]
        chosen, own = [completions[i] for i in kept], [advantages.of_samples[i] for i in kept]
        batches = cut_batches(chosen, own, config.micro_batch_tokens, modules, device)
        minibatches.append((batches, len(part), sum(len(completions[i].token_ids) for i in part)))

    # what must be known before the first update; of the first minibatch, its own forward pass tells
    with torch.no_grad():
        if not any(batches for batches, _, _ in minibatches):
            # nobody teaches: the engine is watched on the first group all the same
            seen = [i for i in range(config.num_generations) if completions[i].token_ids]
            own = [advantages.of_samples[i] for i in seen]
            for batch in cut_batches([completions[i] for i in seen], own, config.micro_batch_tokens, modules, device):
                totals.add_gap(batch, _log_probs(model, batch, config).at_one, step)
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
                totals.add(batch, now.at_temperature.detach(), float(loss.detach()))
                if depths:
                    drafts = draft_loss_sum(model, batch, now.mtp_hidden) / max(1, drafted)
                    mtp_loss += float(drafts.detach())
                    loss = loss + config.mtp_loss_weight * drafts
                loss.backward()
                counts = now.expert_counts if counts is None else counts + now.expert_counts
            if counts is not None and depths:
                totals.add_mtp_loss(mtp_loss)
            if counts is not None:
                place = iteration * len(minibatches) + number
                totals.add_norm(optimizer_step(config, state, counts, learning_rate(config, step, place)))
    return totals


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


def optimizer_step(config: GRPOConfig, state: TrainingState[PromptStream], counts: Tensor, lr: float) -> float:
    """Clip and apply what `.grad` holds, then move the router biases; returns the policy's norm. One that is not finite changes
    nothing. Frozen MTP modules are not in the counts."""
    parameters = state.parameters
    gradients = take_gradients(parameters)
    norm = clip_apart(state.model, gradients, config.max_grad_norm)
    applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
    if applied and config.bias_update_speed and state.model.config.uses_expert_bias:
        update_expert_bias(expert_biases(state.model)[: len(counts)], counts, config.bias_update_speed)
    return norm

"""PPO with a critic, as a loop to be read downward: the baseline that GRPO does without (DeepSeekMath section 4.1, figure 4)."""

import json
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finback.config import InputError
from finback.data.files import read_json
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import load, open_checkpoint
from finback.model.directory import write_durably
from finback.model.transformer import Transformer
from finback.model.value_head import ValueHead
from finback.ops.memory import available_memory
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards
from finback.rl.batch import Batch, cut_batches, sample_log_probs
from finback.rl.config import PPOConfig
from finback.rl.grpo import global_token_loss
from finback.rl.health import UpdateTotals, kept_samples, rollout_metrics, tell_failures
from finback.rl.memory import check_memory, critic_bytes
from finback.rl.ppo import clipped_value_loss, generalised_advantages, token_rewards, whitened
from finback.rl.prompts import check_vocabulary, read_prompts, tell_skipped
from finback.rl.rollout import Rollout, roll_out
from finback.rl.session import (
    PromptStream,
    load_policy,
    load_reference,
    minibatch_order,
    new_policy,
    prune_references,
    refresh_reference,
    refresh_sampling,
    resolve_config,
    sampling_model,
    write_run_config,
)
from finback.rl.train import MOST_NONFINITE
from finback.rl.update import learning_rate, optimizer_step
from finback.train.checkpoint import (
    TrainingState,
    list_checkpoints,
    newest_sound_checkpoint,
    read_tensors,
    remove_leftovers,
    save_checkpoint,
    trained_parameters,
    write_tensors,
)
from finback.train.loop import clipped_update, diverged, due, not_applied, take_gradients
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import AdamState, adam_tensors, gradient_norm, init_adam_state
from finback.train.session import choose_device, cpu_threads, deferred_interrupts, locked

_CRITIC, _CRITIC_STATE = "critic.safetensors", "critic.json"


@dataclass(frozen=True)
class Critic:
    """A model of the policy's size with a head for values, and its optimizer: what PPO keeps beside the policy."""

    model: Transformer
    adam: AdamState

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return trained_parameters(self.model)

    def values(self, batch: Batch, precision: str) -> Tensor:
        """Of the states before the samples' tokens [B, T], 0 outside of the mask."""
        with torch.autocast(batch.ids.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = self.model.samples_forward(batch.ids, batch.prefixes, batch.times, batch.following)
        values = self.model.value_head(output.hidden.index_select(0, batch.predicts))  # type: ignore[operator]
        return torch.zeros_like(batch.engine_log_probs).masked_scatter(batch.mask, values)


def new_critic(directory: str | Path, device: torch.device) -> Critic:
    """A critic that begins as the policy does; what values do not depend on is frozen."""
    model = load(directory, dtype=torch.float32, device=device)
    for module in model.mtp_modules:
        module.requires_grad_(False)
    if not model.config.tie_word_embeddings:
        model.lm_head.requires_grad_(False)
    model.add_module("value_head", ValueHead(model.config.hidden_size, device))
    return Critic(model, init_adam_state(trained_parameters(model)))


def save_critic(critic: Critic, directory: Path) -> None:
    """The critic and its optimizer beside the policy of a checkpoint, for a run that is resumed."""
    write_tensors(directory / _CRITIC, _critic_tensors(critic))
    write_durably(directory / _CRITIC_STATE, (json.dumps({"updates": critic.adam.updates}) + "\n").encode())


def restore_critic(critic: Critic, checkpoint: Path) -> None:
    """What `save_critic` wrote, into a new critic of the same run."""
    read_tensors(checkpoint / _CRITIC, _critic_tensors(critic))
    critic.adam.updates = int(read_json(checkpoint / _CRITIC_STATE)["updates"])


def _critic_tensors(critic: Critic) -> dict[str, Tensor]:
    weights = {f"model.{name}": tensor for name, tensor in critic.model.state_dict().items()}
    return weights | adam_tensors(critic.adam)


def ppo(config: PPOConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Train a policy by PPO as `config` says in the run directory `directory`, and return its last checkpoint.

    With `resume`, continue the run that is there from its newest sound checkpoint, bitwise as without the interruption (at the same
    number of threads). Ctrl-C ends the step, saves and raises KeyboardInterrupt.

    Raises:
        InputError: a field, the data, a reward or the directory is wrong, or trainer and engine disagree.
        OSError: the disk is full; the checkpoints written before are untouched.
    """
    run, device = Path(directory), choose_device(config.device)
    config = resolve_config(config, run, resume)
    tokenizer, model = load_tokenizer(config.model), open_checkpoint(config.model).config
    rewards = load_rewards(config.reward)
    skipped: list[str] | None = [] if config.skip_malformed else None
    prompts = read_prompts(
        config.data,
        tokenizer,
        config.template,
        longest=model.max_position_embeddings - config.max_completion_length,
        rewards=[reward.name for reward in rewards],
        skipped=skipped,
    )
    check_vocabulary(prompts, model.vocab_size)
    width = max(len(prompt.token_ids) for prompt in prompts) + config.max_completion_length
    with cpu_threads(config.threads):
        check_memory(config, model, width, device, available_memory(device), critic_bytes(model))
        run.mkdir(parents=True, exist_ok=True)
        # Under the lock, so that what another process is just writing into the run is not taken for a leftover.
        with (
            locked(run),
            deferred_interrupts() as interrupted,
            RewardPool(rewards, processes=config.reward_processes, deadline=config.reward_deadline) as pool,
        ):
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            stream, critic = PromptStream(config.seed, prompts), new_critic(config.model, device)
            if checkpoint is None:
                state = new_policy(config, stream, device)
            else:
                restore_critic(critic, checkpoint)
                state = load_policy(checkpoint, config, stream, device)
                notes.append(f"continuing {run} after step {state.progress.step}")
            notes += tell_skipped(skipped or [])
            llm = LLM(
                model=sampling_model(config, state.model),
                tokenizer=tokenizer,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=max(1024, config.max_num_seqs),
                max_model_len=width,
                block_size=16,
            )
            step = state.progress.step
            with MetricsWriter(run, total_steps=config.steps, resume_step=step if resume else None) as metrics:
                if checkpoint is None:
                    write_run_config(run, config)
                for sentence in notes:
                    metrics.say(sentence)
                reference = load_reference(config, run, step, device)
                return train(config, run, state, critic, reference, llm, pool, metrics, interrupted)


def train(
    config: PPOConfig,
    run: Path,
    state: TrainingState[PromptStream],
    critic: Critic,
    reference: Transformer | None,
    llm: LLM,
    pool: RewardPool,
    metrics: MetricsWriter,
    interrupted: threading.Event,
) -> Path:
    """Take policy and critic to the end of the run, step by step; return the last checkpoint."""
    progress, checkpoints = state.progress, list_checkpoints(run)[:1]
    failed = set[str]()  # rewards whose failures were told
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_completion_length, skip_special_tokens=False)
    while progress.step < config.steps:
        start, step = time.perf_counter(), progress.step + 1

        # sample and score
        llm.reset_prefix_cache()
        refresh_sampling(llm.model, state.model)
        prompts = state.stream.next_batch(config.prompts_per_step)
        rollout = roll_out(llm, pool, prompts, config.num_generations, params, seed=config.seed, step=step)

        # advantages, from what the critic thinks of each state
        began, totals = time.perf_counter(), UpdateTotals(config)
        minibatches = cut(config, state, rollout, step)
        old_values, returns = judge(config, state, critic, reference, minibatches, totals, step)

        # update both, minibatch by minibatch
        value_loss = 0.0
        for iteration in range(config.num_iterations):
            for number, batches in enumerate(minibatches):
                lr = learning_rate(config, step, iteration * len(minibatches) + number)
                value_loss += update(config, state, critic, batches, old_values[number], returns[number], lr, totals)
        training_seconds = time.perf_counter() - began
        refresh_reference(config, run, step, state.model, reference)

        # count and log
        progress.step, progress.tokens = step, progress.tokens + sum(len(c.token_ids) for c in rollout.completions)
        progress.seconds += time.perf_counter() - start
        rewards = torch.tensor([[sample.reward for sample in group] for group in rollout.groups], dtype=torch.float64)
        row = {"step": step, "tokens": progress.tokens, "seconds": progress.seconds, "lr": learning_rate(config, step, 0)}
        row["value_loss"] = value_loss / max(1, config.num_iterations * len(minibatches))
        watched = rollout_metrics(rollout, rewards, rewards.std(-1, correction=0) > 0)
        metrics.log(row | watched | totals.metrics(training_seconds))
        metrics.log_samples(step, kept_samples(rollout, config.samples_per_step))
        for sentence in tell_failures(rollout, step, failed):
            metrics.say(sentence)
        progress.nonfinite_steps = 0 if totals.finite else progress.nonfinite_steps + 1
        if not totals.finite:
            metrics.say(not_applied(step, totals.grad_norm, MOST_NONFINITE))
        if progress.nonfinite_steps >= MOST_NONFINITE:
            raise InputError(diverged(step, config.lr, MOST_NONFINITE))

        # save
        if step == config.steps or interrupted.is_set() or due(step, config.save_every):
            beside = partial(save_critic, critic)
            keep = config.keep_checkpoints
            checkpoints = [save_checkpoint(run, state, tokenizer_from=config.model, keep=keep, write_more=beside)]
            prune_references(config, run, step)
        if interrupted.is_set() and step < config.steps:
            metrics.say(f"stopped after step {step}; continue with: finback ppo --resume {run}")
            raise KeyboardInterrupt
    return checkpoints[0]


def cut(config: PPOConfig, state: TrainingState[PromptStream], rollout: Rollout, step: int) -> list[list[Batch]]:
    """The rollout in minibatches of batches; samples without tokens teach nothing."""
    device = state.model.lm_head.weight.device
    parts = minibatch_order(config, len(rollout.completions), step)
    kept = [[rollout.completions[i] for i in part if rollout.completions[i].token_ids] for part in parts]
    return [cut_batches(part, [0.0] * len(part), config.micro_batch_tokens, 0, device) for part in kept if part]


@torch.no_grad()
def judge(
    config: PPOConfig,
    state: TrainingState[PromptStream],
    critic: Critic,
    reference: Transformer | None,
    minibatches: list[list[Batch]],
    totals: UpdateTotals,
    step: int,
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Values and returns of each batch; the batches get the policy's log-probabilities, and advantages, whitened over the rollout."""
    values: list[list[Tensor]] = []
    returns: list[list[Tensor]] = []
    advantages: list[Tensor] = []
    for batches in minibatches:
        values.append([])
        returns.append([])
        for batch in batches:
            forward = {"temperature": config.temperature, "precision": config.precision}
            now = sample_log_probs(state.model, batch, **forward)  # type: ignore[arg-type]
            batch.old_log_probs = now.at_temperature
            totals.add_gap(batch, now.at_one, step)
            if reference is not None:
                batch.reference_log_probs = sample_log_probs(reference, batch, **forward).at_temperature  # type: ignore[arg-type]
            scored = torch.tensor([completion.reward for completion in batch.completions], device=batch.ids.device)
            rewards = token_rewards(
                scored,
                batch.mask,
                beta=config.beta,
                log_probs=batch.old_log_probs,
                reference_log_probs=batch.reference_log_probs,
            )
            values[-1].append(critic.values(batch, config.precision))
            own, target = generalised_advantages(
                rewards, values[-1][-1], batch.mask, gamma=config.gamma, gae_lambda=config.gae_lambda
            )
            advantages.append(own)
            returns[-1].append(target)
    flat = [batch for batches in minibatches for batch in batches]
    for batch, own in zip(flat, whitened(advantages, [batch.mask for batch in flat]), strict=True):
        batch.advantages = own
    return values, returns


def update(
    config: PPOConfig,
    state: TrainingState[PromptStream],
    critic: Critic,
    batches: list[Batch],
    old_values: list[Tensor],
    returns: list[Tensor],
    lr: float,
    totals: UpdateTotals,
) -> float:
    """One step of the policy and one of the critic over a minibatch; returns the value loss."""
    tokens, value_loss = sum(int(batch.mask.sum()) for batch in batches), 0.0
    counts: Tensor | None = None
    for batch, old, target in zip(batches, old_values, returns, strict=True):
        now = sample_log_probs(state.model, batch, temperature=config.temperature, precision=config.precision)
        assert batch.old_log_probs is not None
        policy_loss = global_token_loss(
            now.at_temperature,
            batch.old_log_probs,
            batch.advantages,
            batch.mask,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            num_tokens=tokens,
        )
        policy_loss.backward()  # the divergence is in the reward
        totals.add(batch, now.at_temperature.detach(), float(policy_loss.detach()))
        loss = clipped_value_loss(
            critic.values(batch, config.precision), old, target, batch.mask, epsilon=config.value_epsilon, num_tokens=tokens
        )
        loss.backward()
        value_loss += float(loss.detach())
        counts = now.expert_counts if counts is None else counts + now.expert_counts
    assert counts is not None
    totals.add_norm(optimizer_step(config, state, counts, lr))
    gradients = take_gradients(critic.parameters)
    norm = gradient_norm(gradients)
    clipped_update(critic.parameters, gradients, critic.adam, config, lr=config.critic_lr, norm=norm)
    return value_loss

"""PPO with a critic, as a loop to be read downward: the baseline that GRPO does without (DeepSeekMath section 4.1, figure 4).

It is there to be compared with, on one process and from start to end: unlike `finback.rl.train.grpo` it is not resumed.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finback.config import InputError
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import load
from finback.model.transformer import Transformer
from finback.model.value_head import ValueHead
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards
from finback.rl.batch import Batch, cut_batches, sample_log_probs
from finback.rl.config import GRPOConfig
from finback.rl.grpo import global_token_loss
from finback.rl.ppo import PPOSettings, clipped_value_loss, generalised_advantages, token_rewards, whitened
from finback.rl.prompts import read_prompts
from finback.rl.rollout import Rollout, roll_out
from finback.rl.session import PromptStream, load_reference, minibatch_order, new_policy, resolve_config, write_run_config
from finback.rl.update import learning_rate, optimizer_step
from finback.train.checkpoint import TrainingState, save_checkpoint, trained_parameters
from finback.train.loop import clipped_update, take_gradients
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import AdamState, gradient_norm, init_adam_state
from finback.train.session import choose_device, cpu_threads, locked


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
            hidden = self.model.train_forward(batch.ids, valid=batch.valid, mtp=False).hidden[batch.predicts]
        return torch.zeros_like(batch.engine_log_probs).masked_scatter(batch.mask, self.model.value_head(hidden))  # type: ignore[operator]


def new_critic(directory: str | Path, device: torch.device) -> Critic:
    """A critic that begins as the policy does; what values do not depend on is frozen."""
    model = load(directory, dtype=torch.float32, device=device)
    for module in model.mtp_modules:
        module.requires_grad_(False)
    if not model.config.tie_word_embeddings:
        model.lm_head.requires_grad_(False)
    model.add_module("value_head", ValueHead(model.config.hidden_size, device))
    return Critic(model, init_adam_state(trained_parameters(model)))


def ppo(config: GRPOConfig, settings: PPOSettings, directory: str | Path) -> Path:
    """Train a policy by PPO in the run directory `directory`, and return its checkpoint. Of `config` all fields hold but `loss` (it is
    the mean over tokens), those of MTP modules (they are frozen) and of reward models and process rewards, which are refused.

    Raises InputError where a field, the data, a reward or the directory is wrong.
    """
    run, device = Path(directory), choose_device(config.device)
    config = resolve_config(config, run, resume=False)
    if config.reward_model or config.process_reward or not config.reward:
        raise InputError("PPO learns from the field reward alone; give rewards, and leave reward_model and process_reward out")
    tokenizer, stream = load_tokenizer(config.model), PromptStream(config.seed)
    with cpu_threads(config.threads):
        state = new_policy(config, stream, device)
        state.model.requires_grad_(True)
        for module in state.model.mtp_modules:
            module.requires_grad_(False)
        state.adam = init_adam_state(state.parameters)
        critic = new_critic(config.model, device)
        context = state.model.config.max_position_embeddings
        stream.prompts = read_prompts(config.data, tokenizer, config.template, longest=context - config.max_completion_length)
        width = max(len(prompt.token_ids) for prompt in stream.prompts) + config.max_completion_length
        llm = LLM(model=state.model, tokenizer=tokenizer, max_num_seqs=config.max_num_seqs, max_model_len=width, block_size=16)
        rewards = load_rewards(config.reward)
        run.mkdir(parents=True, exist_ok=True)
        with (
            locked(run),
            RewardPool(rewards, processes=config.reward_processes, deadline=config.reward_deadline) as pool,
            MetricsWriter(run, total_steps=config.steps, resume_step=None) as metrics,
        ):
            write_run_config(run, config)
            reference = load_reference(config, run, 0, device)
            train(config, settings, state, critic, reference, llm, pool, metrics)
            return save_checkpoint(run, state, tokenizer_from=config.model, keep=1)


def train(
    config: GRPOConfig,
    settings: PPOSettings,
    state: TrainingState[PromptStream],
    critic: Critic,
    reference: Transformer | None,
    llm: LLM,
    pool: RewardPool,
    metrics: MetricsWriter,
) -> None:
    """Take policy and critic to the end of the run, step by step."""
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_completion_length, skip_special_tokens=False)
    for step in range(1, config.steps + 1):
        # sample and score
        llm.reset_prefix_cache()
        prompts = state.stream.next_batch(config.prompts_per_step)
        rollout = roll_out(llm, pool, prompts, config.num_generations, params, seed=config.seed, step=step)

        # advantages, from what the critic thinks of each state
        minibatches = cut(config, state, rollout, step)
        old_values, returns = judge(config, settings, state, critic, reference, minibatches)

        # update both, minibatch by minibatch
        value_loss = 0.0
        for iteration in range(config.num_iterations):
            for number, batches in enumerate(minibatches):
                lr = learning_rate(config, step, iteration * len(minibatches) + number)
                value_loss += update(config, settings, state, critic, batches, old_values[number], returns[number], lr)

        # count and log
        completions = rollout.completions
        state.progress.step = step
        state.progress.tokens += sum(len(completion.token_ids) for completion in completions)
        row = {
            "step": step,
            "tokens": state.progress.tokens,
            "value_loss": value_loss / (config.num_iterations * len(minibatches)),
        }
        metrics.log(row | {"reward": sum(completion.reward for completion in completions) / len(completions)})


def cut(config: GRPOConfig, state: TrainingState[PromptStream], rollout: Rollout, step: int) -> list[list[Batch]]:
    """The rollout in minibatches of batches; samples without tokens teach nothing."""
    pad, device = state.model.config.pad_token_id or 0, state.model.lm_head.weight.device
    parts = minibatch_order(config, len(rollout.completions), step)
    kept = [[rollout.completions[i] for i in part if rollout.completions[i].token_ids] for part in parts]
    return [cut_batches(part, [0.0] * len(part), config.micro_batch_tokens, pad, device) for part in kept if part]


@torch.no_grad()
def judge(
    config: GRPOConfig,
    settings: PPOSettings,
    state: TrainingState[PromptStream],
    critic: Critic,
    reference: Transformer | None,
    minibatches: list[list[Batch]],
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
            batch.old_log_probs = sample_log_probs(state.model, batch, **forward).at_temperature  # type: ignore[arg-type]
            if reference is not None:
                batch.reference_log_probs = sample_log_probs(reference, batch, **forward).at_temperature  # type: ignore[arg-type]
            totals = torch.tensor([completion.reward for completion in batch.completions], device=batch.ids.device)
            rewards = token_rewards(
                totals,
                batch.mask,
                beta=config.beta,
                log_probs=batch.old_log_probs,
                reference_log_probs=batch.reference_log_probs,
            )
            values[-1].append(critic.values(batch, config.precision))
            own, target = generalised_advantages(
                rewards, values[-1][-1], batch.mask, gamma=settings.gamma, gae_lambda=settings.gae_lambda
            )
            advantages.append(own)
            returns[-1].append(target)
    flat = [batch for batches in minibatches for batch in batches]
    for batch, own in zip(flat, whitened(advantages, [batch.mask for batch in flat]), strict=True):
        batch.advantages = own
    return values, returns


def update(
    config: GRPOConfig,
    settings: PPOSettings,
    state: TrainingState[PromptStream],
    critic: Critic,
    batches: list[Batch],
    old_values: list[Tensor],
    returns: list[Tensor],
    lr: float,
) -> float:
    """One step of the policy and one of the critic over a minibatch; returns the value loss."""
    tokens, value_loss = sum(int(batch.mask.sum()) for batch in batches), 0.0
    counts: Tensor | None = None
    for batch, old, target in zip(batches, old_values, returns, strict=True):
        now = sample_log_probs(state.model, batch, temperature=config.temperature, precision=config.precision)
        assert batch.old_log_probs is not None
        global_token_loss(
            now.at_temperature,
            batch.old_log_probs,
            batch.advantages,
            batch.mask,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            num_tokens=tokens,
        ).backward()  # the divergence is in the reward
        loss = clipped_value_loss(
            critic.values(batch, config.precision), old, target, batch.mask, epsilon=settings.value_epsilon, num_tokens=tokens
        )
        loss.backward()
        value_loss += float(loss.detach())
        counts = now.expert_counts if counts is None else counts + now.expert_counts
    assert counts is not None
    optimizer_step(config, state, counts, lr)
    gradients = take_gradients(critic.parameters)
    norm = gradient_norm(gradients)
    clipped_update(critic.parameters, gradients, critic.adam, config, lr=settings.critic_lr, norm=norm)
    return value_loss

"""V3's curves over the course of a run (section 4.2), as pure functions of the tokens seen so far.

"Tokens seen" is counted before the step it decides about: a switch at 10T tokens holds from the first step that starts
at 10T or later.
"""

import math
from dataclasses import dataclass

from finback.train.config import PretrainConfig

# Where V3's switches lie in its 14.8T tokens.
V3_TOKENS = 14_800_000_000_000
V3_LR_CONSTANT_TOKENS = 10_000_000_000_000
V3_LR_DECAY_TOKENS = 4_300_000_000_000
V3_LR_TAIL_TOKENS = 333_000_000_000
V3_BIAS_UPDATE_TOKENS = 14_300_000_000_000
V3_MTP_LOSS_SWITCH_TOKENS = 10_000_000_000_000

_NEVER = 2**63  # a switch of a run whose length is not known yet


@dataclass(frozen=True)
class Ramps:
    """The curves of one run, every switch in tokens."""

    lr: float
    min_lr: float
    final_lr: float
    warmup_steps: int
    lr_constant_tokens: int
    lr_decay_tokens: int
    lr_tail_tokens: int
    initial_batch_size: int
    global_batch_size: int
    batch_ramp_tokens: int
    bias_update_speed: float
    bias_update_tokens: int
    mtp_loss_coef: float
    final_mtp_loss_coef: float
    mtp_loss_switch_tokens: int


def resolve_ramps(config: PretrainConfig, total_tokens: int | None) -> Ramps:
    """Fill the switches that the config leaves open with V3's share of `total_tokens`; None: not known yet, so not reached."""

    def tokens(given: int | None, in_v3: int) -> int:
        if given is not None:
            return given
        return _NEVER if total_tokens is None else total_tokens * in_v3 // V3_TOKENS

    return Ramps(
        lr=config.lr,
        min_lr=config.min_lr,
        final_lr=config.final_lr,
        warmup_steps=config.warmup_steps,
        lr_constant_tokens=tokens(config.lr_constant_tokens, V3_LR_CONSTANT_TOKENS),
        lr_decay_tokens=tokens(config.lr_decay_tokens, V3_LR_DECAY_TOKENS),
        lr_tail_tokens=tokens(config.lr_tail_tokens, V3_LR_TAIL_TOKENS),
        initial_batch_size=config.initial_batch_size or config.global_batch_size,
        global_batch_size=config.global_batch_size,
        batch_ramp_tokens=config.batch_ramp_tokens,
        bias_update_speed=config.bias_update_speed,
        bias_update_tokens=tokens(config.bias_update_tokens, V3_BIAS_UPDATE_TOKENS),
        mtp_loss_coef=config.mtp_loss_coef,
        final_mtp_loss_coef=config.final_mtp_loss_coef,
        mtp_loss_switch_tokens=tokens(config.mtp_loss_switch_tokens, V3_MTP_LOSS_SWITCH_TOKENS),
    )


def learning_rate(ramps: Ramps, *, step: int, tokens: int) -> float:
    """Linear warm-up over steps, then constant, cosine, and a tail of two constants over tokens.

    `step` counts from 1: the last warm-up step is the first at full rate.
    """
    decayed = tokens - ramps.lr_constant_tokens
    if decayed < 0:
        rate = ramps.lr
    elif decayed < ramps.lr_decay_tokens:
        share = decayed / ramps.lr_decay_tokens
        rate = ramps.min_lr + (ramps.lr - ramps.min_lr) * (1 + math.cos(math.pi * share)) / 2
    elif decayed < ramps.lr_decay_tokens + ramps.lr_tail_tokens:
        rate = ramps.min_lr
    else:
        rate = ramps.final_lr
    return rate * step / ramps.warmup_steps if step < ramps.warmup_steps else rate


def cosine(*, step: int, total_steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Linear warm-up, then one cosine from `lr` to `min_lr` over steps (fine-tuning, V3 section 5.1).

    `step` counts from 1: the last warm-up step is the first at full rate, the last step of the run is at `min_lr`.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    first = max(1, warmup_steps)
    share = min(1.0, (step - first) / max(1, total_steps - first))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2


def batch_size(ramps: Ramps, tokens: int) -> int:
    """Sequences of the next step. V3 publishes the ends and the length of its ramp, not the shape: here it is linear in tokens."""
    if tokens >= ramps.batch_ramp_tokens:
        return ramps.global_batch_size
    return ramps.initial_batch_size + (ramps.global_batch_size - ramps.initial_batch_size) * tokens // ramps.batch_ramp_tokens


def bias_update_speed(ramps: Ramps, tokens: int) -> float:
    """Gamma of the router-bias update: on, then 0 for the last tokens."""
    return ramps.bias_update_speed if tokens < ramps.bias_update_tokens else 0.0


def mtp_loss_coef(ramps: Ramps, tokens: int) -> float:
    """Lambda, the weight of the multi-token prediction loss: one switch."""
    return ramps.mtp_loss_coef if tokens < ramps.mtp_loss_switch_tokens else ramps.final_mtp_loss_coef


def tokens_of_steps(ramps: Ramps, *, steps: int, sequence_length: int) -> int:
    """Tokens that `steps` optimizer steps read, batch-size ramp included."""
    tokens = 0
    while steps > 0 and tokens < ramps.batch_ramp_tokens:
        tokens += batch_size(ramps, tokens) * sequence_length
        steps -= 1
    return tokens + steps * ramps.global_batch_size * sequence_length


def steps_of_tokens(ramps: Ramps, *, tokens: int, sequence_length: int) -> int:
    """Optimizer steps until `tokens` tokens are reached, batch-size ramp included."""
    steps = seen = 0
    while seen < min(tokens, ramps.batch_ramp_tokens):
        seen += batch_size(ramps, seen) * sequence_length
        steps += 1
    return steps + -(-max(0, tokens - seen) // (ramps.global_batch_size * sequence_length))

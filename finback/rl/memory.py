"""How much memory a GRPO run will need at its peak, told before it starts."""

import torch

from finback.config import InputError, ModelConfig, count_params
from finback.rl.batch import PADDED
from finback.rl.config import GRPOConfig
from finback.train.config import PretrainConfig
from finback.train.memory import estimate_memory

_GIB = 2**30


def needed_bytes(config: GRPOConfig, model: ModelConfig, longest: int, micro_batch_tokens: int, beside: int = 0) -> int:
    """Weights, gradients, moments, activations of one micro-batch and one layer's padded attention, the reference, a copy to sample
    with, and `beside` bytes of other models; `longest` is prompt and sample together, in tokens. The engine's cache is not counted: it
    takes what is left, up to its own limit."""
    width = max(longest, model.num_nextn_predict_layers + 1)
    rows = max(1, micro_batch_tokens // width)
    training = PretrainConfig(
        model=model,
        steps=1,
        sequence_length=width,
        global_batch_size=rows,
        micro_batch_size=rows,
        bias_update_speed=0.0,
        precision=config.precision,
    )
    estimate = estimate_memory(training)
    sampling = 2 * count_params(model).total if config.rollout_precision == "bf16" else 0
    padded = PADDED * rows * width * _attention_values(model) * (2 if config.precision == "bf16" else 4)
    return estimate.on_device + padded + (estimate.parameters if config.beta else 0) + sampling + beside


def _attention_values(c: ModelConfig) -> int:
    """Of a token in one layer: queries, keys, values and what comes out, and the gradients of all four."""
    if c.kv_lora_rank:
        return 4 * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    return 4 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim


def critic_bytes(model: ModelConfig) -> int:
    """Of PPO's critic: weights, gradients and both moments in float32 of a model of the policy's size, without its head."""
    return 16 * (count_params(model).total - model.vocab_size * model.hidden_size)


def check_memory(
    config: GRPOConfig, model: ModelConfig, longest: int, device: torch.device, available: int | None, beside: int = 0
) -> int:
    """The bytes that are needed, `beside` of them by other models; InputError with the field to lower if they are above `available`."""
    needed = needed_bytes(config, model, longest, config.micro_batch_tokens, beside)
    if available is None or needed <= available:
        return needed
    problem = f"this run needs about {needed / _GIB:.1f} GiB on {device} and {available / _GIB:.1f} are available"
    tokens = config.micro_batch_tokens
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        if needed_bytes(config, model, longest, tokens, beside) <= available:
            raise InputError(
                f"{problem}; lower micro_batch_tokens from {config.micro_batch_tokens} to {tokens} (the result stays the same)"
            )
    if config.beta:
        raise InputError(
            f"{problem}; set beta to 0, which saves the reference, or lower max_completion_length, or take a smaller model"
        )
    raise InputError(f"{problem}; lower max_completion_length, or take a smaller model")

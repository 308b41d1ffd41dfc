"""The held-out loss, and samples of text: what a run shows of itself on the way."""

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from finback.data.ngram import bits_per_byte
from finback.data.shards import TokenShards
from finback.data.tokenizer import Tokenizer
from finback.model.generate import generate
from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from finback.train.config import Precision, PretrainConfig


def validation_rows(shards: list[TokenShards], sequence_length: int, sequences: int) -> Int64[Tensor, "rows T_plus_1"] | None:
    """Up to `sequences` rows of T + 1 tokens, spread evenly over the validation splits; None if they hold no row."""
    counts = [max(0, (split.num_tokens - 1) // sequence_length) for split in shards]
    total = sum(counts)
    if total == 0:
        return None
    chosen = np.unique(np.linspace(0, total - 1, min(sequences, total)).round().astype(np.int64))
    parts = []
    start = 0
    for split, count in zip(shards, counts, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + count)] - start
        parts.append(split.rows(own, sequence_length))
        start += count
    return torch.from_numpy(np.concatenate(parts))


@torch.no_grad()
def evaluate(model: Transformer, rows: Int64[Tensor, "rows T_plus_1"], *, micro_batch_size: int, precision: Precision) -> float:
    """Mean -log p of the main head over `rows`, nats per token."""
    device = model.lm_head.weight.device
    total = 0.0
    for part in rows.split(micro_batch_size):
        part = part.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "fp32"):
            output = model.train_forward(part[:, :-1], mtp=False)
            total += float(linear_cross_entropy(output.hidden.flatten(0, 1), model.lm_head.weight, part[:, 1:].flatten()))
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def validation_metrics(
    model: Transformer, rows: Int64[Tensor, "rows T_plus_1"], config: PretrainConfig, tokenizer: Tokenizer | None
) -> dict[str, float]:
    """`validation_loss` in nats per token and, where the tokenizer is known, `validation_bits_per_byte`."""
    loss = evaluate(model, rows, micro_batch_size=config.micro_batch_size, precision=config.precision)
    metrics = {"validation_loss": loss}
    if tokenizer is not None:
        targets = rows[:, 1:].flatten().numpy()
        metrics["validation_bits_per_byte"] = bits_per_byte(loss * targets.size, targets, tokenizer.token_byte_lengths())
    return metrics


def sample_texts(model: Transformer, tokenizer: Tokenizer, config: PretrainConfig) -> list[tuple[str, str]]:
    """(prompt, continuation) for each of the config's prompts. Has random numbers of its own: training does not notice."""
    device = model.lm_head.weight.device
    samples = []
    for prompt in config.sample_prompts:
        ids = tokenizer.encode(prompt, add_bos=True)
        output = generate(
            model,
            torch.tensor([ids], device=device),
            config.sample_tokens,
            temperature=config.sample_temperature,
            seed=config.seed,
            eos_token_id=tokenizer.eos_token_id,
        )
        samples.append((prompt, tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)))
    return samples

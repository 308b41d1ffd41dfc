"""A trained reward model: load it, and score responses with it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from finback.config import InputError
from finback.data.rated import Prompt, rated_ids
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.model.checkpoint import load
from finback.model.reward_head import RewardHead, load_reward_head, score_rows
from finback.model.transformer import Transformer

_TOKENS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class RewardModel:
    """A language model with a scalar head. `kind` "pairwise" scores final answers, "pointwise" whole responses, as it was trained."""

    model: Transformer
    head: RewardHead
    tokenizer: Tokenizer
    kind: Literal["pairwise", "pointwise"]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A score for each response, in their order: any number for pairs, higher is better; a log-odds of being good for labels.

        A prompt is the user's question (not rendered) or a list of messages. Texts beyond the model's context lose their beginning.
        """
        if len(prompts) != len(completions):
            raise InputError(f"there are {len(prompts)} prompts and {len(completions)} completions; give one for each")
        context = self.model.config.max_position_embeddings
        texts = [
            rated_ids(prompt, completion, self.tokenizer, self.kind)[0][-context:]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return score_texts(self.model, self.head, texts)


def load_reward_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> RewardModel:
    """The reward model in a directory that `finback reward-model` wrote; InputError if it is none."""
    directory = Path(directory)
    model = load(directory, dtype=dtype, device=device)
    head, config = load_reward_head(directory, model.config.hidden_size, model.lm_head.weight.device)
    if config.get("kind") not in ("pairwise", "pointwise"):
        raise InputError(f"{directory}: the reward head is of kind {config.get('kind')!r}, it must be pairwise or pointwise")
    return RewardModel(model, head, load_tokenizer(directory), config["kind"])


@torch.no_grad()
def score_texts(
    model: Transformer, head: RewardHead, texts: Sequence[Sequence[int]], *, precision: Literal["fp32", "bf16"] = "fp32"
) -> list[float]:
    """Scores of texts given as ids, in their order; those of like length are computed together."""
    device = model.lm_head.weight.device
    scores = [0.0] * len(texts)
    for part in by_length([len(text) for text in texts], _TOKENS_AT_ONCE):
        ids, lengths = padded([texts[index] for index in part], device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            values = score_rows(model, head, ids, lengths)
        for index, value in zip(part, values.tolist(), strict=True):
            scores[index] = value
    return scores


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices, longest first, in parts whose padded rows hold at most about `tokens` tokens (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


def padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int64[Tensor, "B T"], Int64[Tensor, " B"]]:
    """Rows filled up at their end, and the length of each."""
    ids = torch.zeros(len(texts), max(len(text) for text in texts), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    return ids.to(device), torch.tensor([len(text) for text in texts]).to(device)

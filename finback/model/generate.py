"""Plain cached generation: one cache of [layers, B, S, row width], no paging, no scheduler. The twin that the engine is tested
against, and what training draws its samples with."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finback.config import InputError
from finback.model.gqa import GQA
from finback.model.mla import Rotary
from finback.model.transformer import Transformer
from finback.ops.rotary import rotary_table

Path = Literal["absorbed", "expanded"]


class Cache:
    """`cache_row_width` values per token per layer, for `batch` sequences of equal length up to `capacity`: in MLA the latent and the
    shared key, in grouped-query attention keys and values of all heads."""

    def __init__(self, model: Transformer, batch: int, capacity: int) -> None:
        c, weight = model.config, model.lm_head.weight
        self.rows = weight.new_empty(c.num_hidden_layers, batch, capacity, c.cache_row_width)
        self.rotary = Rotary(*rotary_table(c, torch.arange(capacity, device=weight.device)))
        self.length = 0


@torch.no_grad()
def cached_forward(
    model: Transformer, input_ids: Int[Tensor, "B T"], cache: Cache, path: Path | None = None
) -> Float[Tensor, "B T D"]:
    """Append `input_ids` to the cache and return their hidden states (after the final norm).

    In MLA prefill expands the cached latents, single tokens use them absorbed; `path` forces one of the two, which compute the same.
    Grouped-query attention has one path.
    """
    tokens, start = input_ids.shape[1], cache.length
    end = start + tokens
    if end > cache.rows.shape[2]:
        raise InputError(f"the cache holds {cache.rows.shape[2]} tokens, {end} were asked for; make it larger")
    if not model.config.kv_lora_rank:
        path = "expanded"
    path = path or ("absorbed" if tokens == 1 else "expanded")
    rotary = Rotary(cache.rotary.cos[start:end], cache.rotary.sin[start:end])
    mask = None
    if (start > 0 and path == "expanded") or (tokens > 1 and path == "absorbed"):
        mask = torch.ones(tokens, end, dtype=torch.bool, device=input_ids.device).tril(start)
        mask = mask[:, None] if path == "absorbed" else mask
    x = model.embed(input_ids)
    for block, rows in zip(model.blocks, cache.rows, strict=True):
        normalised, attention = block.input_layernorm(x), block.self_attn
        rows[:, start:end] = attention.cache_rows(normalised, rotary)
        if isinstance(attention, GQA):
            attend = attention.attend
        else:
            attend = attention.attend_absorbed if path == "absorbed" else attention.attend_expanded
        x = x + attend(normalised, rows[:, :end], rotary, mask)
        x, _ = block.feed_forward(x)
    cache.length = end
    hidden: Tensor = model.model.norm(x)
    return hidden


@torch.no_grad()
def generate(
    model: Transformer,
    input_ids: Int[Tensor, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Int[Tensor, "B T_new"]:
    """Continue prompts of equal length: returns [B, T + n], n <= max_new_tokens.

    Temperature 0 is argmax. A sequence that has produced `eos_token_id` is filled up with it; generation ends when all have.
    `on_token` gets each new column int64 [B] as it is sampled. Raises InputError where prompt and answer exceed the model's context.
    """
    batch, prompt = input_ids.shape
    limit = model.config.max_position_embeddings
    if prompt == 0:
        raise InputError("the prompt is empty; give at least one token")
    if not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise InputError(f"temperature is {temperature} and top_p {top_p}; they must be finite and >= 0, and in (0, 1]")
    if max_new_tokens < 1 or prompt + max_new_tokens > limit:
        raise InputError(
            f"prompt ({prompt}) plus max_tokens ({max_new_tokens}) must be above {prompt} and within the context ({limit})"
        )
    unknown = input_ids[(input_ids < 0) | (input_ids >= model.config.vocab_size)]
    if unknown.numel():
        raise InputError(f"the prompt holds token {int(unknown[0])}, outside the model's vocabulary ({model.config.vocab_size})")
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    cache = Cache(model, batch, prompt + max_new_tokens)
    hidden = cached_forward(model, input_ids, cache)
    columns = [input_ids]
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    for step in range(max_new_tokens):
        token = sample(model.lm_head(hidden[:, -1]), temperature, top_p, generator)
        if eos_token_id is not None:
            token = token.masked_fill(finished, eos_token_id)
            finished |= token == eos_token_id
        columns.append(token.unsqueeze(1))
        if on_token is not None:
            on_token(token)
        if step + 1 == max_new_tokens or (eos_token_id is not None and bool(finished.all())):
            break
        hidden = cached_forward(model, token.unsqueeze(1), cache)
    return torch.cat(columns, dim=1)


def sample(logits: Float[Tensor, "B vocab"], temperature: float, top_p: float, generator: torch.Generator) -> Int[Tensor, " B"]:
    """One token per row: argmax at temperature 0, else a draw from the smallest set whose probability reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.to(torch.float32)
    # Largest logit 0: however small the temperature, the quotients are 0 or run to -inf, never to inf.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, ordered)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

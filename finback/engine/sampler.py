"""Tokens from logits: penalties, temperature, filters and a draw that depends on the request's seed and the position alone.

Order of operations (vLLM's): logit_bias, repetition, frequency and presence penalty, grammar mask, temperature, min_p, top_k, top_p,
draw. Log-probabilities are those of the model: the log-softmax of the logits as they came.

The draw. Each row needs one uniform number, u = hash(seed, position), and takes the token at which the cumulative distribution in
VOCABULARY order passes u. The common alternative, argmax(logits + Gumbel noise), needs a number per token of the vocabulary. And
two distributions that are close have close cumulative sums, so that the same u mostly gives the same token: a draft model that
draws with the target's own u agrees with the target as often as their distributions overlap, or nearly so. Tokens are
sampled from the target at each position just as without drafts, and a draft is kept if it is the token that was
sampled (`accept`): speculation changes no token.

The same logits give the same token, bit for bit on the CPU, in whatever batch they stand: nothing is summed across rows, and
within a row only by operations that work row by row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from finback.engine.config import SamplingParams

NO_TOKEN = -1
"""What a row gives from which no token can be taken."""
GREEDY_BELOW = 1e-5
"""Temperatures below this are argmax: float32 quotients would overflow."""
_LARGEST_TEMPERATURE = 1e30  # above, float32 makes it infinite, and the quotient of a forbidden token is no number
_CANDIDATES = 256  # likeliest tokens that top_k and top_p look at first
_EVERYTHING = 1 << 62
_BLOCK = (
    1 << 19
)  # probabilities that are worked on at a time on a CPU: larger buffers leave the cache and are mapped anew each time
_SMALL, _FEW = 1 << 16, 16  # probabilities that are not worth packing, and the share of the vocabulary below which packing pays

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's step and multipliers
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class SamplingState:
    """What sampling must know of one request: its parameters, its key for random numbers, the position of its next token, and how
    often tokens have occurred (kept only if a penalty is in use)."""

    def __init__(
        self,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.key = _mix((seed + _GAMMA) & _WORD)
        self.position = len(prompt_token_ids) + len(output_token_ids)
        self._counts = _TokenCounts(prompt_token_ids, output_token_ids, params) if _has_penalty(params) else None

    def append(self, token: int) -> None:
        """Tell that `token` is now part of the answer."""
        self.position += 1
        if self._counts is not None:
            self._counts.add(token)

    def counted(self, drafts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [n] that penalties look at, and float32 [n] how often each stands in the answer if `drafts` follow it."""
        assert self._counts is not None, "counts are kept only for requests with a penalty"
        return self._counts.with_drafts(drafts)


def _has_penalty(params: SamplingParams) -> bool:
    return params.frequency_penalty != 0 or params.presence_penalty != 0 or params.repetition_penalty != 1


class _TokenCounts:
    """Distinct tokens of a request and their number in the answer: a few hundred entries, whatever the vocabulary."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int], params: SamplingParams) -> None:
        # Only the repetition penalty looks at the prompt.
        ids = np.unique(np.asarray(prompt if params.repetition_penalty != 1 else (), dtype=np.int64))
        self._size = len(ids)
        self._ids = np.zeros(max(64, 2 * len(ids)), dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._ids[: self._size] = ids
        self._slots = {token: slot for slot, token in enumerate(ids.tolist())}
        for token in output:
            self.add(token)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, self._size)
        if slot == self._size:
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token
            self._size += 1
        self._counts[slot] += 1

    def with_drafts(self, drafts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = self._ids[: self._size], self._counts[: self._size]
        if not drafts:
            return ids, counts
        new = [token for token in dict.fromkeys(drafts) if token not in self._slots]
        slots = {token: self._size + i for i, token in enumerate(new)}
        ids = np.concatenate([ids, np.asarray(new, dtype=np.int64)])
        counts = np.concatenate([counts, np.zeros(len(new), dtype=np.float32)])
        for token in drafts:
            counts[slots.get(token, self._slots.get(token))] += 1
        return ids, counts


class SamplingRows:
    """Which request and position each row of logits belongs to, prepared for `sample`.

    Request i has `num_drafts[i] + 1` consecutive rows: the next token's, and one after each draft. Keep the object while the same
    requests run with the same number of drafts (`describes`): positions and counts are read from the states at each step.
    """

    def __init__(
        self, states: Sequence[SamplingState], num_drafts: Sequence[int] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        num_drafts = [0] * len(states) if num_drafts is None else num_drafts
        repeats = [drafts + 1 for drafts in num_drafts]
        self.states = list(states)
        self.num_drafts = list(num_drafts)
        self.owner = [i for i, rows in enumerate(repeats) for _ in range(rows)]
        self.depth = [j for rows in repeats for j in range(rows)]
        self.num_rows = len(self.owner)
        self.device = torch.device(device)
        self._single = self.num_rows == len(self.states)
        self._owner = np.array(self.owner, dtype=np.int64)
        self._depth = np.array(self.depth, dtype=np.int64)
        self._keys = np.array([states[i].key for i in self.owner], dtype=np.uint64)
        params = [states[i].params for i in self.owner]
        self.penalised = [row for row, p in enumerate(params) if _has_penalty(p)]
        self.biased = [row for row, p in enumerate(params) if p.logit_bias]
        self.with_logprobs = [row for row, p in enumerate(params) if p.logprobs is not None]
        self._bias = self._bias_entries(params) if self.biased else None
        penalties = [
            (p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (params[row] for row in self.penalised)
        ]
        self._penalties = torch.tensor(penalties, dtype=torch.float32, device=self.device)
        drawn = [row for row, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
        plain = [row for row in drawn if not _has_filter(params[row])]
        filtered = [row for row in drawn if _has_filter(params[row])]
        self.any_greedy = len(drawn) < self.num_rows
        self.groups = [_Group(rows, params, self.device) for rows in (plain, filtered) if rows]

    def describes(self, states: Sequence[SamplingState], num_drafts: Sequence[int] | None = None) -> bool:
        """Whether these rows are the ones of `states`, in this order, with so many drafts each."""
        return (
            len(states) == len(self.states)
            and all(a is b for a, b in zip(states, self.states, strict=True))
            and (self._single if num_drafts is None else self.num_drafts == list(num_drafts))
        )

    def uniforms(self, ahead: int = 0) -> Float64[np.ndarray, "N 1"]:
        """The random number of each row, or of the position `ahead` of it."""
        positions = np.array([state.position for state in self.states], dtype=np.int64)
        if not self._single:
            positions = positions[self._owner] + self._depth
        return uniform(self._keys, positions + ahead)[:, None]

    def adjust(self, logits: Float[Tensor, "N vocab"], drafts: Sequence[Sequence[int]], ahead: int) -> None:
        """Apply logit_bias and penalties to `logits`, float32, in place."""
        flat = logits.view(-1)
        vocab = logits.shape[1]
        if self._bias is not None:
            rows, tokens, values = self._bias
            flat.index_add_(0, rows * vocab + tokens, values)
        if self.penalised:
            entries = []
            for row in self.penalised:
                i = self.owner[row]
                entries.append(self.states[i].counted(drafts[i][: self.depth[row] + ahead] if drafts else ()))
            lengths = [len(ids) for ids, _ in entries]
            starts = np.repeat(np.array(self.penalised, dtype=np.int64) * vocab, lengths)
            index = torch.from_numpy(np.concatenate([ids for ids, _ in entries]) + starts).to(self.device)
            counts = torch.from_numpy(np.concatenate([counts for _, counts in entries])).to(self.device)
            which = torch.from_numpy(np.repeat(np.arange(len(entries)), lengths)).to(self.device)
            repetition, frequency, presence = self._penalties[which].unbind(1)
            values = flat[index]
            values = torch.where(values > 0, values / repetition, values * repetition)
            flat[index] = values - frequency * counts - presence * (counts > 0)

    def _bias_entries(self, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
        entries = [(row, token, value) for row in self.biased for token, value in (params[row].logit_bias or {}).items()]
        rows, tokens, values = zip(*entries, strict=True)
        integers = torch.tensor([rows, tokens], dtype=torch.int64, device=self.device)
        return integers[0], integers[1], torch.tensor(values, dtype=torch.float32, device=self.device)


def _has_filter(params: SamplingParams) -> bool:
    return params.min_p > 0 or params.top_k > 0 or params.top_p < 1


class _Group:
    """Rows that are drawn, all with a filter or all without: temperature, min_p, top_k and top_p as columns [rows, 1]."""

    def __init__(self, rows: Sequence[int], params: Sequence[SamplingParams], device: torch.device) -> None:
        params = [params[row] for row in rows]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        self.rows = list(rows)
        self.index = torch.tensor(self.rows, dtype=torch.int64, device=device)
        self.filtered = _has_filter(params[0])
        self.temperature = column([min(p.temperature, _LARGEST_TEMPERATURE) for p in params], torch.float32)
        self.min_p = column([p.min_p for p in params], torch.float32)
        self.top_k = column([p.top_k or _EVERYTHING for p in params], torch.int64)
        # The probabilities of a row add up to 1 only nearly: where nothing is to be cut off, no sum must decide.
        self.top_p = column([p.top_p if p.top_p < 1 else 2.0 for p in params], torch.float64)
        self.shrunk = column([p.top_k > 0 or p.min_p > 0 for p in params], torch.bool)


class TokenLogprobs(NamedTuple):
    """Log-probabilities, under the model, at one position: before penalties, grammar, temperature and filters."""

    logprob: float
    """Of the token that was chosen."""
    top: tuple[tuple[int, float], ...]
    """Token ids and log-probabilities of the likeliest tokens, likeliest first, as many as were asked for."""


@dataclass(frozen=True)
class Sampled:
    """A token for each row, or NO_TOKEN, and for rows that asked for them their log-probabilities (None: no row asked)."""

    token_ids: Int64[Tensor, " N"]
    logprobs: list[TokenLogprobs | None] | None


@torch.no_grad()
def sample(
    logits: Float[Tensor, "N vocab"],
    rows: SamplingRows,
    *,
    drafts: Sequence[Sequence[int]] = (),
    ahead: int = 0,
    mask: Bool[Tensor, "M tokens"] | Int[Tensor, "M words"] | None = None,
    mask_rows: Sequence[int] | None = None,
    logprobs: bool = True,
) -> Sampled:
    """One token per row. `logits` are not changed.

    `drafts[i]` are the draft tokens of request i; penalties count those before a row's position. `ahead` moves all positions on:
    a draft model that samples its d-th draft (from 0) for the position d after the next one passes ahead=d and its drafts so far.
    `mask` holds the allowed tokens of the rows `mask_rows` (all rows if None), as booleans or as bits in int32 words, the lowest
    bit first; tokens past its end are forbidden. A row that holds NaN or infinity, or allows no token, gives NO_TOKEN.
    `logprobs` False leaves log-probabilities out, whoever asked for them: those of a draft model are nobody's concern.
    """
    adjusted = logits = logits.contiguous()
    if rows.penalised or rows.biased or mask is not None:
        adjusted = logits.to(torch.float32, copy=True)
        rows.adjust(adjusted, drafts, ahead)
        if mask is not None:
            _forbid(adjusted, mask, mask_rows)
    tokens = _argmax(adjusted) if rows.any_greedy else logits.new_empty(rows.num_rows, dtype=torch.int64)
    if rows.groups:
        uniforms = torch.from_numpy(rows.uniforms(ahead)).to(logits.device)
    for group in rows.groups:
        if len(group.rows) == rows.num_rows:
            tokens = _draw(adjusted, group, uniforms)
        else:
            tokens[group.index] = _draw(adjusted[group.index], group, uniforms[group.index])
    return Sampled(tokens, _logprobs(logits, tokens, rows) if logprobs and rows.with_logprobs else None)


def accept(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many drafts stand: `sampled` are the target's own tokens at the drafts' positions (and one more), and those after the
    first that differs were sampled behind a wrong token. The request's new tokens are `sampled[: accept(...) + 1]`."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == sampled[accepted]:
        accepted += 1
    return accepted


def uniform(keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 [N] in [0, 1) from uint64 keys and int64 positions: the splitmix64 sequence that starts at each key (a hashed seed).

    Multiples of 2**-52: with them u * total < total holds in float64 for every total.
    """
    numbers: np.ndarray = (_mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)) >> 12) * 2.0**-52
    return numbers


def _mix(z: Any) -> Any:  # an int, or an array of uint64
    z = ((z ^ (z >> 30)) * _MULTIPLIERS[0]) & _WORD
    z = ((z ^ (z >> 27)) * _MULTIPLIERS[1]) & _WORD
    return z ^ (z >> 31)


def _argmax(logits: Float[Tensor, "N vocab"]) -> Int64[Tensor, " N"]:
    """The likeliest token, the first of several; NO_TOKEN where it has no finite logit."""
    # To torch and numpy NaN is the largest of all. On a CPU numpy's argmax is ten times as fast as torch's, and behind a step that has
    # read all weights no cache holds what torch needs to start five operations: 0.15 ms.
    if logits.device.type == "cpu":
        values = logits.float().numpy()
        chosen = values.argmax(-1)
        chosen[~np.isfinite(values[np.arange(len(chosen)), chosen])] = NO_TOKEN
        return torch.from_numpy(chosen)
    tokens = logits.argmax(-1)
    return torch.where(logits.gather(1, tokens.unsqueeze(1)).squeeze(1).isfinite(), tokens, NO_TOKEN)


def _draw(logits: Float[Tensor, "N vocab"], group: _Group, uniforms: Float64[Tensor, "N 1"]) -> Int64[Tensor, " N"]:
    rows, vocab = logits.shape
    block = max(1, _BLOCK // vocab) if logits.device.type == "cpu" else rows
    parts = [slice(start, start + block) for start in range(0, rows, block)]
    return torch.cat([_draw_block(logits[part].float(), group, part, uniforms[part]) for part in parts])


def _draw_block(
    logits: Float[Tensor, "N vocab"], group: _Group, part: slice, uniforms: Float64[Tensor, "N 1"]
) -> Int64[Tensor, " N"]:
    """Draw for the rows `part` of a group."""
    largest = logits.amax(-1, keepdim=True)
    finite = largest.isfinite()
    if not bool(finite.all()):
        drawn = _draw_block(logits.masked_fill(~finite, 0.0), group, part, uniforms)
        return torch.where(finite.squeeze(1), drawn, NO_TOKEN)
    # Largest logit 0 first: otherwise a small temperature leaves few digits of the difference between two large quotients.
    probabilities = (logits - largest).div_(group.temperature[part]).softmax(-1)
    if not group.filtered:
        return _inverse_cdf(probabilities, uniforms).squeeze(1)
    least = probabilities.amax(-1, keepdim=True) * group.min_p[part]
    border, at_border = _border(probabilities, least, group.top_k[part], group.top_p[part], group.shrunk[part], _CANDIDATES)
    tokens, weights = _at_least(probabilities, border)
    tied = weights == border
    if bool((tied.sum(-1, keepdim=True) > at_border).any()):  # equally likely tokens at the border: the first ones stay
        weights = weights.masked_fill(tied & (tied.cumsum(-1) > at_border), 0.0)
    index = _inverse_cdf(weights, uniforms)
    return (index if tokens is None else tokens.gather(1, index)).squeeze(1)


def _inverse_cdf(weights: Float[Tensor, "N n"], uniforms: Float64[Tensor, "N 1"]) -> Int64[Tensor, "N 1"]:
    """The first index at which the cumulative sum passes its share `uniforms` of the total."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)


def _border(
    probabilities: Float[Tensor, "N vocab"],
    least: Float[Tensor, "N 1"],
    top_k: Int64[Tensor, "N 1"],
    top_p: Float64[Tensor, "N 1"],
    shrunk: Bool[Tensor, "N 1"],
    candidates: int,
) -> tuple[Float[Tensor, "N 1"], Int64[Tensor, "N 1"]]:
    """The smallest probability that min_p, top_k and top_p leave, and how many tokens of exactly this probability they leave.

    Only the likeliest `candidates` tokens of each row are sorted. Rows where that is not enough to know are sorted whole, with the
    same result: sums run over the sorted probabilities from the largest on in both.
    """
    vocab = probabilities.shape[1]
    candidates = vocab if 4 * candidates >= vocab else candidates
    ascending = _largest(probabilities, candidates)
    descending = ascending.flip(-1)
    cumulative = descending.cumsum(-1, dtype=torch.float64)
    likely = candidates - torch.searchsorted(ascending, least)
    remaining = torch.minimum(likely, top_k)
    # top_p is a share of what min_p and top_k leave. All tokens together have probability 1.
    total = torch.where(shrunk, cumulative.gather(1, remaining - 1), 1.0)
    count = torch.minimum(torch.searchsorted(cumulative, top_p * total) + 1, remaining)
    border = descending.gather(1, count - 1)
    at_border = count - (candidates - torch.searchsorted(ascending, border, right=True))
    if candidates < vocab:
        known = torch.where(shrunk, remaining, count) < candidates
        if not bool(known.all()):
            rest = torch.nonzero(~known.squeeze(1)).squeeze(1)
            border[rest], at_border[rest] = _border(
                probabilities[rest], least[rest], top_k[rest], top_p[rest], shrunk[rest], candidates=vocab
            )
    return border, at_border


def _at_least(
    probabilities: Float[Tensor, "N vocab"], border: Float[Tensor, "N 1"]
) -> tuple[Int64[Tensor, "N n"] | None, Float[Tensor, "N n"]]:
    """The probabilities of at least `border` in vocabulary order, 0 elsewhere; with them their tokens, where few of many are left
    and the others have been dropped (None: n is the vocabulary)."""
    rows, vocab = probabilities.shape
    if rows * vocab > _SMALL:
        if probabilities.device.type == "cpu":  # several times as fast as torch
            places = torch.from_numpy(np.flatnonzero(probabilities.numpy() >= border.numpy()))
        else:
            places = torch.nonzero((probabilities >= border).view(-1)).squeeze(1)
        starts = torch.searchsorted(places, torch.arange(rows + 1, device=places.device) * vocab)
        width = int(starts.diff().max())
        if width * _FEW <= vocab:
            owner = places // vocab
            column = torch.arange(len(places), device=places.device) - starts[owner]
            tokens = places.new_zeros(rows, width)
            tokens[owner, column] = places - owner * vocab
            weights = probabilities.new_zeros(rows, width)
            weights[owner, column] = probabilities.view(-1)[places]
            return tokens, weights
    # In floats: torch compares into booleans and multiplies by them several times slower.
    return None, probabilities.clone().ge_(border).mul_(probabilities)


def _largest(values: Float[Tensor, "N vocab"], count: int) -> Float[Tensor, "N count"]:
    """The largest `count` values of each row, in ascending order."""
    if values.device.type != "cpu":
        return values.topk(count).values.flip(-1)
    array = values.numpy()
    if count < array.shape[1]:
        array = np.partition(array, -count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(array, axis=-1))  # several times as fast as torch's


def _forbid(logits: Float[Tensor, "N vocab"], mask: Tensor, rows: Sequence[int] | None) -> None:
    """Set logits outside of the mask to -inf, in place."""
    vocab = logits.shape[1]
    if mask.dtype == torch.int32:
        if mask.device.type == "cpu":
            bits = np.unpackbits(mask.contiguous().numpy().view(np.uint8), axis=-1, count=vocab, bitorder="little")
            mask = torch.from_numpy(bits.view(np.bool_))
        else:
            shifts = torch.arange(32, dtype=torch.int32, device=mask.device)
            mask = ((mask.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :vocab]
    mask = mask.to(logits.device)
    if mask.shape[1] < vocab:
        mask = torch.nn.functional.pad(mask, (0, vocab - mask.shape[1]))
    if rows is None:
        logits.masked_fill_(~mask, -torch.inf)
    else:
        index = torch.tensor(rows, device=logits.device)
        logits[index] = logits[index].masked_fill(~mask, -torch.inf)


def _logprobs(logits: Float[Tensor, "N vocab"], tokens: Int64[Tensor, " N"], rows: SamplingRows) -> list[TokenLogprobs | None]:
    asked, vocab = rows.with_logprobs, logits.shape[1]
    wanted = [rows.states[rows.owner[row]].params.logprobs or 0 for row in asked]
    most = min(max(wanted), vocab)
    if len(asked) < rows.num_rows:
        index = torch.tensor(asked, device=logits.device)
        logits, tokens = logits[index], tokens[index]
    chosen: list[float] = []
    likeliest: list[tuple[tuple[int, float], ...]] = []
    block = max(1, _BLOCK // vocab) if logits.device.type == "cpu" else len(asked)
    places = tokens.clamp(min=0).unsqueeze(1)
    for start in range(0, len(asked), block):
        values = logits[start : start + block].float().log_softmax(-1)
        chosen += values.gather(1, places[start : start + block]).squeeze(1).tolist()
        if most:
            top = values.topk(most)
            likeliest += map(tuple, map(zip, top.indices.tolist(), top.values.tolist()))
    if most:
        entries = [TokenLogprobs(one, top[:count]) for one, top, count in zip(chosen, likeliest, wanted, strict=True)]
    else:
        entries = [TokenLogprobs(one, ()) for one in chosen]
    if len(asked) == rows.num_rows:
        return list(entries)
    result: list[TokenLogprobs | None] = [None] * rows.num_rows
    for row, entry in zip(asked, entries, strict=True):
        result[row] = entry
    return result

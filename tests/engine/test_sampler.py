"""The sampler against a plain one, its random numbers, and speculation that changes no token."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finback.engine import sampler
from finback.engine.config import SamplingParams
from finback.engine.sampler import NO_TOKEN, SamplingRows, SamplingState, TokenLogprobs, accept, sample, uniform

PARAMS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 20},
    {"temperature": 0.8, "min_p": 0.05},
    {"top_k": 40, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 300, "top_p": 0.99, "min_p": 0.001},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"min_p": 1.0},
    {"temperature": 1e-3, "top_p": 0.5},
    {"frequency_penalty": 0.7, "presence_penalty": -0.5},
    {"repetition_penalty": 1.4, "temperature": 0.0},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.0, "top_p": 0.9},
    {"logit_bias": {3: 5.0, 0: -100.0}, "top_k": 5},
]


def make_state(seed: int = 0, prompt: Sequence[int] = (1, 2), output: Sequence[int] = (), **params: object) -> SamplingState:
    return SamplingState(SamplingParams(**params), seed, prompt, output)


def plain_sample(logits: Tensor, state: SamplingState, prompt: Sequence[int], output: Sequence[int]) -> int:
    """One row, written down as the definition says; no state, no batch, everything sorted."""
    p = state.params
    logits = logits.float().clone()
    for token, bias in (p.logit_bias or {}).items():
        logits[token] += bias
    for token in {*prompt, *output}:
        if p.repetition_penalty != 1:
            logits[token] *= p.repetition_penalty if logits[token] <= 0 else 1 / torch.tensor(p.repetition_penalty)
    for token in set(output):
        logits[token] -= p.frequency_penalty * output.count(token)
        logits[token] -= p.presence_penalty
    if p.temperature == 0:
        return int(logits.argmax())
    probabilities = ((logits - logits.max()) / p.temperature).softmax(-1)
    order = probabilities.sort(descending=True, stable=True).indices
    order = order[probabilities[order] >= probabilities[order[0]] * p.min_p]
    kept, mass = order[: p.top_k or None].tolist(), probabilities[order][: p.top_k or None].tolist()
    if p.top_p < 1:
        total = math.fsum(mass) if p.top_k or p.min_p else 1.0
        before = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
        kept = [token for token, sum_before in zip(kept, before, strict=True) if sum_before < p.top_p * total]
    kept.sort()
    cumulative = np.cumsum(probabilities[kept].double().numpy())
    u = uniform(np.array([state.key], dtype=np.uint64), np.array([state.position]))[0]
    return kept[int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))]


@pytest.mark.parametrize("vocab", [5, 300, 3000, 70_000])
@pytest.mark.parametrize("params", PARAMS)
def test_one_row_equals_the_plain_sampler(vocab: int, params: dict[str, object]) -> None:
    for seed, scale in itertools.product(range(4 if vocab < 10_000 else 1), (0.3, 4.0)):
        logits = torch.randn(1, vocab) * scale
        prompt, output = [1, 2, 2], [4, 3, 4, 4]
        state = make_state(seed, prompt, output, **params)
        assert sample(logits, SamplingRows([state])).token_ids.tolist() == [plain_sample(logits[0], state, prompt, output)]


@pytest.mark.parametrize("params", [{"top_k": 7}, {"top_p": 0.3}, {"top_k": 30, "top_p": 0.6}, {"min_p": 0.9}, {"top_k": 1}])
def test_equally_likely_tokens_at_the_border_are_kept_from_the_first_on(params: dict[str, object]) -> None:
    logits = (torch.randn(40, 2000)).round()
    states = [make_state(seed, **params) for seed in range(40)]
    expected = [plain_sample(row, state, [1, 2], []) for row, state in zip(logits, states, strict=True)]
    assert sample(logits, SamplingRows(states)).token_ids.tolist() == expected
    if params == {"top_k": 1}:
        assert expected == logits.argmax(-1).tolist()


@pytest.mark.parametrize("candidates", [1, 3, 40])
def test_how_rows_are_worked_on_changes_nothing(monkeypatch: pytest.MonkeyPatch, candidates: int) -> None:
    logits = torch.cat([torch.randn(30, 5000) * 3, torch.randn(30, 5000).round()])
    states = [make_state(seed, **params) for seed, params in zip(range(60), itertools.cycle(PARAMS), strict=False)]
    expected = sample(logits, SamplingRows(states)).token_ids
    monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
    assert sample(logits, SamplingRows(states)).token_ids.equal(expected)
    monkeypatch.setattr(sampler, "_SMALL", 0)  # pack what is kept, and never
    assert sample(logits, SamplingRows(states)).token_ids.equal(expected)
    monkeypatch.setattr(sampler, "_FEW", 0)
    assert sample(logits, SamplingRows(states)).token_ids.equal(expected)
    monkeypatch.setattr(sampler, "_FEW", 5000)
    assert sample(logits, SamplingRows(states)).token_ids.equal(expected)
    monkeypatch.setattr(sampler, "_BLOCK", 35_000)
    assert sample(logits, SamplingRows(states)).token_ids.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [500, 40_000])
def test_a_row_in_a_batch_equals_the_row_alone(vocab: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(32, vocab) * 2).to(dtype)
    given_logits = logits.clone()
    states = [
        make_state(seed, range(seed), [3, 4, 3], **params)
        for seed, params in zip(range(32), itertools.cycle(PARAMS), strict=False)
    ]
    together = sample(logits, SamplingRows(states)).token_ids
    alone = [int(sample(logits[i : i + 1], SamplingRows([states[i]])).token_ids) for i in range(32)]
    assert together.tolist() == alone
    order = torch.randperm(32)
    assert sample(logits[order], SamplingRows([states[i] for i in order])).token_ids.equal(together[order])
    assert logits.equal(given_logits)


def test_uniforms_are_uniform_and_independent() -> None:
    """Chi-square over 64 bins along positions and along seeds, and over 16 x 16 bins of neighbours in both; bounds at p = 1e-4."""
    keys = np.array([make_state(seed).key for seed in range(400)], dtype=np.uint64)
    u = uniform(keys[:, None], np.arange(400)[None])
    assert u.min() >= 0
    assert u.max() < 1
    for bits in (u, (u * 2**20) % 1, (u * 2**40) % 1):  # the high, middle and low bits
        assert chi_square(np.bincount((bits * 64).astype(int).ravel(), minlength=64)) < 115
        for a, b in ((bits[:, :-1], bits[:, 1:]), (bits[:-1], bits[1:]), (bits[:-1, 1:], bits[1:, :-1])):
            pairs = (a * 16).astype(int) * 16 + (b * 16).astype(int)
            assert chi_square(np.bincount(pairs.ravel(), minlength=256)) < 347
    for one_seed in (u[7], u[:, 7]):
        assert chi_square(np.bincount((one_seed * 10).astype(int), minlength=10)) < 34
    assert len(np.unique(u)) == u.size


def chi_square(counts: np.ndarray, expected: np.ndarray | None = None) -> float:
    expected = np.full(len(counts), counts.sum() / len(counts)) if expected is None else expected
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_uniform_of_a_seed_and_position_is_fixed() -> None:
    """Saved seeds keep their texts: these numbers must never change."""
    first, second = make_state(0), make_state(2**63 - 1, range(1000))
    assert first.key == 0xE220A8397B1DCDAF  # the published first number of splitmix64 with seed 0
    assert SamplingRows([first, second]).uniforms()[:, 0].tolist() == [0.3871241409757855, 0.2601441165976939]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 0.0, 1.0, -3.0]])
    states = [make_state(seed, (), temperature=0.7, top_k=5) for seed in range(100)]
    rows = SamplingRows(states)
    counts = np.zeros(6)
    for _ in range(60):  # positions of 100 seeds
        tokens = sample(logits.expand(100, -1), rows).token_ids.tolist()
        counts += np.bincount(tokens, minlength=6)
        for state, token in zip(states, tokens, strict=True):
            state.append(token)
    assert counts[5] == 0
    expected = (logits[0, :5] / 0.7).softmax(-1).double().numpy() * 6000
    assert chi_square(counts[:5], expected) < 23.5  # p = 1e-4 for 4 degrees of freedom


def test_rows_are_kept_while_the_requests_stay() -> None:
    states = [make_state(1, temperature=1.0, frequency_penalty=0.5), make_state(2, temperature=0.0)]
    rows = SamplingRows(states)
    assert rows.describes(states)
    assert rows.describes(states, [0, 0])
    assert not rows.describes(states[::-1])
    assert not rows.describes(states[:1])
    assert not rows.describes(states, [1, 0])
    assert not SamplingRows(states, [0, 2]).describes(states)
    assert SamplingRows(states, [0, 2]).describes(states, [0, 2])
    for step in range(20):
        logits = torch.randn(2, 50)
        kept, new = sample(logits, rows).token_ids, sample(logits, SamplingRows(states)).token_ids
        assert kept.equal(new)
        for state, token in zip(states, kept.tolist(), strict=True):
            state.append(token)
        assert states[0].position == 3 + step


def test_a_state_made_from_an_answer_equals_the_one_that_followed_it() -> None:
    """After preemption a request goes on with the same tokens."""
    params = {"repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.3}
    answer = torch.randint(0, 200, (300,)).tolist()
    followed = make_state(5, range(0, 400, 3), **params)
    for token in answer:
        followed.append(token)
    again = make_state(5, range(0, 400, 3), answer, **params)
    logits = torch.randn(1, 500)
    assert sample(logits, SamplingRows([followed])).token_ids.equal(sample(logits, SamplingRows([again])).token_ids)
    assert dict(zip(*followed.counted([7, 450, 7]), strict=True)) == dict(zip(*again.counted([7, 450, 7]), strict=True))


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)), st.lists(st.integers(0, 12), max_size=5))
def test_counts_equal_counting(prompt: list[int], answer: list[int], drafts: list[int]) -> None:
    state = make_state(0, prompt, repetition_penalty=1.1)
    for token in answer:
        state.append(token)
    expected = {token: (answer + drafts).count(token) for token in prompt + answer + drafts}
    ids, counts = state.counted(drafts)
    assert len(set(ids.tolist())) == len(ids)
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("vocab", [64, 70])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_as_booleans_and_as_bits(vocab: int, temperature: float) -> None:
    logits = torch.randn(6, vocab) * 0.1
    states = [make_state(seed, temperature=temperature) for seed in range(6)]
    allowed = torch.rand(6, 64) < 0.1
    allowed[:, 63] = True  # the sign bit of a word
    allowed[0] = torch.arange(64) == 63
    bits = torch.from_numpy(np.packbits(allowed.numpy(), axis=-1, bitorder="little").view(np.int32))
    by_bool = sample(logits, SamplingRows(states), mask=allowed).token_ids
    by_bits = sample(logits, SamplingRows(states), mask=bits).token_ids
    assert by_bool.equal(by_bits)
    wide = torch.nn.functional.pad(allowed, (0, vocab - 64))
    assert bool(wide.gather(1, by_bool.unsqueeze(1)).all())
    free = sample(logits, SamplingRows(states)).token_ids
    assert not by_bool.equal(free)
    some = sample(logits, SamplingRows(states), mask=bits[[4, 1]], mask_rows=[4, 1]).token_ids
    assert some.tolist() == [by_bits[i] if i in (1, 4) else free[i] for i in range(6)]


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(4, 100).bfloat16()
    states = [
        make_state(0, temperature=0.3, top_k=2, logprobs=0),
        make_state(1, temperature=0.0, logit_bias={5: 100.0}, logprobs=3),
        make_state(2),
        make_state(3, logprobs=20),
    ]
    tokens, logprobs = sample(logits, SamplingRows(states)).token_ids, sample(logits, SamplingRows(states)).logprobs
    raw = logits.float().log_softmax(-1)
    assert logprobs is not None
    assert [entry is None for entry in logprobs] == [False, False, True, False]
    for row, count in ((0, 0), (1, 3), (3, 20)):
        assert logprobs[row].logprob == float(raw[row, tokens[row]])
        assert len(logprobs[row].top) == count
        assert [value for _, value in logprobs[row].top] == raw[row].topk(count).values.tolist()
        assert all(value == float(raw[row, token]) for token, value in logprobs[row].top)
    assert int(tokens[1]) == 5
    assert sample(logits[2:3], SamplingRows(states[2:3])).logprobs is None


def test_logprobs_of_chosen_tokens_alone_sort_no_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same in whatever blocks of rows they are worked out; a draft model's are left out."""
    logits = torch.randn(40, 30_000)
    rows = SamplingRows([make_state(seed, logprobs=0) for seed in range(40)])
    monkeypatch.setattr(torch.Tensor, "topk", None)
    sampled = sample(logits, rows)
    assert sampled.logprobs is not None
    expected = logits.log_softmax(-1).gather(1, sampled.token_ids.unsqueeze(1)).squeeze(1).tolist()
    assert sampled.logprobs == [TokenLogprobs(one, ()) for one in expected]
    assert sample(logits, rows, logprobs=False).logprobs is None


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"temperature": 0.0}])
def test_a_row_from_which_nothing_can_be_taken_leaves_the_others_alone(params: dict[str, float]) -> None:
    logits = torch.randn(4, 8)
    mask = torch.ones(4, 8, dtype=torch.bool)
    rows = SamplingRows([make_state(seed, logprobs=2, **params) for seed in range(4)])
    expected = sample(logits, rows).token_ids
    logits[1, 3], logits[3, 2] = torch.nan, torch.inf
    mask[2] = False
    tokens = sample(logits, rows, mask=mask).token_ids
    assert tokens.tolist() == [expected[0], NO_TOKEN, NO_TOKEN, NO_TOKEN]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-4, 1e30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1000.0, 999.0, -torch.inf, -1000.0]])
    tokens = {int(sample(logits, SamplingRows([make_state(seed, temperature=temperature)])).token_ids) for seed in range(60)}
    assert tokens == ({0} if temperature < 1 else {0, 1, 3})


def test_small_temperatures_keep_the_difference_of_large_logits() -> None:
    """1000 / 1e-4 has no digits left for the 0.6 that separate these two tokens in float32."""
    logits = torch.tensor([1000.0, 1000.0 + 2**-14]).expand(4000, 2)
    tokens = sample(logits, SamplingRows([make_state(seed, temperature=1e-4) for seed in range(4000)])).token_ids
    expected = 1 / (1 + math.exp(-(2**-14) / 1e-4))
    assert abs(float(tokens.double().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_accept_counts_the_drafts_before_the_first_difference() -> None:
    assert accept([], [4]) == 0
    assert accept([4, 5], [4, 5, 6]) == 2
    assert accept([4, 5], [3, 5, 6]) == 0
    assert accept([4, 5, 6], [4, 6, 6, 7]) == 1


VOCAB = 30


def markov(seed: int) -> Callable[[int], Tensor]:
    """Logits [VOCAB] of a toy model that looks at the last token only."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5
    return lambda last: table[last]


def drafting(seed: int) -> Callable[[int], Tensor]:
    """The toy model, somewhat wrong."""
    target, noise = markov(seed), markov(seed + 1000)
    return lambda last: target(last) + 0.2 * noise(last)


def decode(model: Callable[[int], Tensor], states: Sequence[SamplingState], length: int) -> list[list[int]]:
    answers: list[list[int]] = [[0] for _ in states]
    rows = SamplingRows(states)
    for _ in range(length):
        tokens = sample(torch.stack([model(answer[-1]) for answer in answers]), rows).token_ids.tolist()
        for state, answer, token in zip(states, answers, tokens, strict=True):
            answer.append(token)
            state.append(token)
    return [answer[1:] for answer in answers]


def decode_speculatively(
    model: Callable[[int], Tensor], draft: Callable[[int], Tensor], states: Sequence[SamplingState], length: int, depth: int
) -> tuple[list[list[int]], float]:
    """The answers and the share of drafts that were accepted."""
    answers: list[list[int]] = [[0] for _ in states]
    accepted = drafted = 0
    one_each = SamplingRows(states)
    while min(map(len, answers)) <= length:
        drafts: list[list[int]] = [[] for _ in states]
        for ahead in range(depth):
            logits = torch.stack([draft((a + d)[-1]) for a, d in zip(answers, drafts, strict=True)])
            for d, token in zip(drafts, sample(logits, one_each, drafts=drafts, ahead=ahead).token_ids.tolist(), strict=True):
                d.append(token)
        drafts = [d[: i % (depth + 1)] if i < depth else d for i, d in enumerate(drafts)]  # some requests with fewer
        rows = SamplingRows(states, [len(d) for d in drafts])
        logits = torch.stack([model(token) for a, d in zip(answers, drafts, strict=True) for token in [a[-1], *d]])
        tokens = sample(logits, rows, drafts=drafts).token_ids.tolist()
        for state, answer, d in zip(states, answers, drafts, strict=True):
            own, tokens = tokens[: len(d) + 1], tokens[len(d) + 1 :]
            count = accept(d, own)
            accepted, drafted = accepted + count, drafted + len(d)
            for token in own[: count + 1]:
                answer.append(token)
                state.append(token)
    return [answer[1 : length + 1] for answer in answers], accepted / drafted


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 12},
        {"temperature": 1.0, "frequency_penalty": 0.6, "repetition_penalty": 1.2},
        {"temperature": 0.0, "presence_penalty": 1.5},
    ],
)
@pytest.mark.parametrize("depth", [1, 3])
def test_speculation_changes_no_token(params: dict[str, object], depth: int) -> None:
    def states() -> list[SamplingState]:
        return [make_state(seed, (0,), **params) for seed in range(8)]

    expected = decode(markov(1), states(), 60)
    speculated, acceptance = decode_speculatively(markov(1), drafting(1), states(), 60, depth)
    assert speculated == expected
    assert 0.2 < acceptance < 1  # drafts were accepted and refused
    assert decode_speculatively(markov(1), markov(1), states(), 60, depth)[1] == 1.0  # a perfect draft is always accepted


def test_speculation_keeps_the_distribution() -> None:
    """Third tokens of 3,000 answers against their distribution, summed over all paths."""
    model = markov(2)
    transitions = torch.stack([model(token).softmax(-1) for token in range(VOCAB)]).double()
    expected = (transitions[0] @ transitions @ transitions).numpy() * 3000
    states = [make_state(seed, (0,)) for seed in range(3000)]
    answers, _ = decode_speculatively(model, drafting(2), states, 3, depth=2)
    counts = np.bincount([answer[2] for answer in answers], minlength=VOCAB)
    assert expected.min() > 5
    assert chi_square(counts, expected) < 69  # p = 1e-4 for 29 degrees of freedom


def test_drafts_with_the_targets_own_random_numbers_are_accepted_more_often() -> None:
    states = [make_state(seed, (0,)) for seed in range(200)]
    _, coupled = decode_speculatively(markov(3), drafting(3), states, 20, depth=1)
    target, draft = (torch.stack([model(token).softmax(-1) for token in range(VOCAB)]) for model in (markov(3), drafting(3)))
    independent = float((target * draft).sum(-1).max())
    overlap = float(torch.minimum(target, draft).sum(-1).max())
    assert independent < coupled <= overlap

"""Plain cached generation: greedy as transformers, seeded sampling, ends and errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.config import InputError, ModelConfig
from finback.model.generate import Cache, cached_forward, generate, sample
from finback.model.transformer import Transformer
from tests.model.oracle import BASE, V2, V2_LITE, build, twin, yarn

CONFIGS: dict[str, ModelConfig] = {
    "v3": replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0), num_nextn_predict_layers=1),
    "dense, no query compression": replace(BASE, q_lora_rank=None, first_k_dense_replace=3),
    "values wider than keys": replace(BASE, v_head_dim=32),
    "v2": V2,
    "v2-lite": V2_LITE,
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(BASE)


def prompt(batch: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(0, BASE.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 70])
def test_greedy_generation_equals_that_of_transformers_token_for_token(name: str, tokens: int) -> None:
    ours = build(CONFIGS[name])
    other = twin(ours)
    other.generation_config.eos_token_id = None
    input_ids = prompt(3, tokens)
    expected = other.generate(
        input_ids, max_new_tokens=25, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(input_ids)
    )
    assert torch.equal(generate(ours, input_ids, 25), expected)


def test_greedy_generation_equals_argmax_over_whole_forward_passes(model: Transformer) -> None:
    expected = prompt()
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(generate(model, prompt(), 12), expected)


def test_batch_rows_do_not_touch_each_other(model: Transformer) -> None:
    """Also across paths: a batch of 30 and a single row take different expert products."""
    together = generate(model, prompt(30), 10)
    for row in (0, 13, 29):
        assert torch.equal(generate(model, prompt(30)[row : row + 1], 10)[0], together[row])


def test_generation_keeps_no_graph_and_leaves_the_model_alone(model: Transformer) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = generate(model, prompt(), 5, temperature=1.0)
    assert not out.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_is_reproducible_by_seed_and_by_nothing_else(model: Transformer) -> None:
    outs = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        outs.append(generate(model, prompt(), 30, temperature=1.0, seed=seed))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    state = torch.get_rng_state()
    generate(model, prompt(), 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)  # and it does not spend the global randomness


def test_on_token_gets_every_new_column_as_it_comes(model: Transformer) -> None:
    columns: list[Tensor] = []
    out = generate(model, prompt(), 9, temperature=0.7, on_token=columns.append)
    assert torch.equal(torch.stack(columns, 1), out[:, 7:])
    assert {column.dtype for column in columns} == {torch.int64}


# The end of a sequence.


def test_sequences_end_at_eos_and_are_filled_up_with_it(model: Transformer) -> None:
    free = generate(model, prompt(4), 30)[:, 7:]
    eos = int(free[1, 4])  # what row 1 says first at some step up to 4
    out = generate(model, prompt(4), 30, eos_token_id=eos)[:, 7:]
    ends = [row.index(eos) if eos in row else 30 for row in free.tolist()]
    length = min(30, max(ends) + 1)
    assert out.shape == (4, length)
    for row, end in enumerate(ends):
        assert torch.equal(out[row, : end + 1], free[row, : min(end + 1, length)])
        assert (out[row, end + 1 :] == eos).all()
    assert any(end < length - 1 for end in ends)


def test_generation_stops_when_all_have_ended(model: Transformer) -> None:
    first = generate(model, prompt(1), 1)[0, -1]
    columns: list[Tensor] = []
    out = generate(model, prompt(1), 20, eos_token_id=int(first), on_token=columns.append)
    assert out.shape == (1, 8)
    assert len(columns) == 1


def test_eos_in_the_prompt_does_not_end_anything(model: Transformer) -> None:
    input_ids = prompt(1)
    free = generate(model, input_ids, 6)
    absent = next(token for token in range(96) if token not in free[0, 7:].tolist())
    input_ids[0, 3] = absent
    out = generate(model, input_ids, 6, eos_token_id=absent)
    assert out.shape[1] > 8 or out[0, -1] == absent


def test_generation_reaches_the_last_position_of_the_context() -> None:
    small = build(replace(BASE, max_position_embeddings=16))
    assert generate(small, prompt(1), 9).shape == (1, 16)
    with pytest.raises(InputError, match="16"):
        generate(small, prompt(1), 10)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"max_new_tokens": 0}, "max_tokens"),
        ({"max_new_tokens": -3}, "max_tokens"),
        ({"max_new_tokens": 10**6}, "context"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
        ({"input_ids": torch.tensor([[5, 96, 3]])}, "96"),
        ({"input_ids": torch.tensor([[5, -1, 3]])}, "-1"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else None,
)
def test_bad_input_is_named(model: Transformer, arguments: dict[str, object], word: str) -> None:
    given_arguments: dict[str, object] = {"input_ids": prompt(1), "max_new_tokens": 3, **arguments}
    with pytest.raises(InputError, match=word):
        generate(model, **given_arguments)  # type: ignore[arg-type]


def test_a_full_cache_is_an_error_and_stays_as_it_was(model: Transformer) -> None:
    cache = Cache(model, 1, 5)
    cached_forward(model, prompt(1, 4), cache)
    rows = cache.rows.clone()
    with pytest.raises(InputError, match="5 tokens"):
        cached_forward(model, prompt(1, 2), cache)
    assert cache.length == 4
    assert torch.equal(cache.rows[:, :, :4], rows[:, :, :4])


# Choosing a token.


def draw(probabilities: list[float], times: int, **arguments: float) -> list[float]:
    """Observed frequencies."""
    logits = torch.tensor(probabilities).log().expand(times, -1)
    settings_ = {"temperature": 1.0, "top_p": 1.0} | arguments
    tokens = sample(logits, settings_["temperature"], settings_["top_p"], torch.Generator().manual_seed(0))
    return (tokens.bincount(minlength=len(probabilities)) / times).tolist()


def test_temperature_zero_is_argmax_whatever_top_p() -> None:
    logits = torch.randn(50, 20)
    for top_p in (1e-9, 0.5, 1.0):
        assert torch.equal(sample(logits, 0.0, top_p, torch.Generator()), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [1e-30, 1e-6, 0.05])
def test_a_tiny_top_p_is_argmax(top_p: float) -> None:
    logits = torch.randn(200, 20)
    assert torch.equal(sample(logits, 1.0, top_p, torch.Generator()), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-40])
def test_a_tiny_temperature_is_argmax(temperature: float) -> None:
    logits = 30 * torch.randn(50, 20)
    assert torch.equal(sample(logits, temperature, 1.0, torch.Generator()), logits.argmax(-1))


def test_sampling_follows_the_probabilities() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    assert draw(probabilities, 40000) == pytest.approx(probabilities, abs=0.012)
    root = [p**0.5 for p in probabilities]
    assert draw(probabilities, 40000, temperature=2.0) == pytest.approx([r / sum(root) for r in root], abs=0.012)
    assert draw(probabilities[::-1], 40000) == pytest.approx(probabilities[::-1], abs=0.012)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.49, 1), (0.51, 2), (0.79, 2), (0.81, 3), (0.94, 3), (0.96, 4), (1.0, 4), (1 - 1e-9, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    """In whatever order the tokens stand; what is kept is renormalised."""
    probabilities = [0.15, 0.5, 0.05, 0.3]
    order = [1, 3, 0, 2]
    frequencies = draw(probabilities, 40000, top_p=top_p)
    total = sum(probabilities[i] for i in order[:kept])
    expected = [probabilities[i] / total if i in order[:kept] else 0.0 for i in range(4)]
    assert frequencies == pytest.approx(expected, abs=0.012)
    assert all(frequencies[i] == 0.0 for i in order[kept:])


@settings(max_examples=100)
@given(seed=st.integers(0, 1000), vocab=st.integers(1, 300), top_p=st.floats(1e-6, 1.0), temperature=st.floats(0.01, 50))
def test_a_sampled_token_is_always_in_the_nucleus(seed: int, vocab: int, top_p: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(5, vocab, generator=generator)
    tokens = sample(logits, temperature, top_p, generator)
    probabilities = (logits.double() / temperature).softmax(-1)
    for row, token in zip(probabilities, tokens.tolist(), strict=True):
        better = row[row > row[token] * (1 + 1e-5)].sum()
        assert 0 <= token < vocab
        assert better <= top_p + 1e-4

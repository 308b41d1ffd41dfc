"""Dense students against transformers in float32: logits, every gradient, cached generation, tied embeddings, the rotary tables.

Tolerances are relative Frobenius norms: 1e-5 for logits, 1e-4 for each gradient, 1e-5 for all gradients together.
"""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finback.config import Llama3RopeScaling, ModelConfig, RopeScaling, checkpoint_tensors, count_params
from finback.model.checkpoint import hf_tensors
from finback.model.generate import Cache, cached_forward, generate
from finback.model.gqa import GQA
from finback.model.mla import Rotary
from finback.model.transformer import Transformer, init_weights
from finback.ops.cross_entropy import linear_cross_entropy
from finback.ops.rotary import apply_rotary_halves, inverse_frequencies, rotary_table, softmax_scale
from tests.model.oracle import LLAMA, LLAMA3, QWEN2, QWEN3, build, check_gradients, relative_error, twin, worst_row

QWEN_YARN = {"rope_scaling": RopeScaling(4.0, 128), "max_position_embeddings": 512}

# name: (config, sequences, tokens). Each is one branch of the computation.
CASES: dict[str, tuple[ModelConfig, int, int]] = {
    "llama": (LLAMA, 2, 37),
    "llama, one token": (LLAMA, 3, 1),
    "llama, two tokens": (LLAMA, 2, 2),
    "llama, a whole block of queries": (LLAMA, 1, 128),
    "llama, one query over a block": (LLAMA, 2, 129),
    "llama, three blocks, the last one ragged": (LLAMA, 1, 300),
    "llama, a head each": (replace(LLAMA, num_key_value_heads=6), 2, 140),
    "llama, one head for all": (replace(LLAMA, num_key_value_heads=1), 2, 140),
    "llama, one head": (replace(LLAMA, num_attention_heads=1, num_key_value_heads=1, head_dim=48), 2, 37),
    "llama, a head size of its own": (replace(LLAMA, head_dim=14), 2, 37),
    "llama, tied": (replace(LLAMA, tie_word_embeddings=True), 2, 37),
    "llama, biases, output projection included": (replace(LLAMA, attention_bias=True), 2, 37),
    "llama, large norm eps": (replace(LLAMA, rms_norm_eps=0.05), 2, 37),
    "llama, rope theta": (replace(LLAMA, rope_theta=500.0), 2, 140),
    "llama 3 scaling": (LLAMA3, 2, 140),
    "llama 3 scaling, tied": (replace(LLAMA3, tie_word_embeddings=True, num_key_value_heads=3), 1, 300),
    "llama 3 scaling, factor 1": (replace(LLAMA3, rope_scaling=Llama3RopeScaling(1.0, 1.0, 4.0, 64)), 1, 140),
    "llama 3 scaling, narrow band": (replace(LLAMA3, rope_scaling=Llama3RopeScaling(4.0, 2.0, 2.5, 128)), 1, 140),
    "llama, yarn": (replace(LLAMA, **QWEN_YARN), 1, 140),
    "qwen2": (QWEN2, 2, 37),
    "qwen2, tied": (replace(QWEN2, tie_word_embeddings=True), 2, 140),
    "qwen2, yarn": (replace(QWEN2, **QWEN_YARN), 2, 140),
    "qwen2, yarn with mscales": (
        replace(QWEN2, max_position_embeddings=512, rope_scaling=RopeScaling(4.0, 128, mscale=1.3, mscale_all_dim=0.6)), 1, 140,
    ),
    "qwen2, a head size of its own": (replace(QWEN2, head_dim=10), 2, 37),
    "qwen3": (QWEN3, 2, 37),
    "qwen3, tied": (replace(QWEN3, tie_word_embeddings=True), 2, 140),
    "qwen3, biases": (replace(QWEN3, attention_bias=True), 2, 37),
    "qwen3, large norm eps": (replace(QWEN3, rms_norm_eps=0.05), 2, 37),
    "qwen3, a head each": (replace(QWEN3, num_key_value_heads=6), 2, 37),
    "qwen3, llama 3 scaling": (replace(QWEN3, rope_scaling=LLAMA3.rope_scaling), 1, 140),
}  # fmt: skip


def draw_config(seed: int) -> tuple[ModelConfig, int, int]:
    """A random member of the three families."""
    draw = random.Random(seed)
    shared = draw.choice([1, 2, 3])
    heads = shared * draw.choice([1, 2, 4])
    scaling = draw.choice([None, Llama3RopeScaling(8.0, 1.0, draw.choice([2.0, 4.0]), 64), RopeScaling(4.0, 128)])
    config = replace(
        draw.choice([LLAMA, QWEN2, QWEN3]),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        hidden_size=heads * draw.choice([6, 12]),
        head_dim=2 * draw.choice([2, 5, 8]),
        num_hidden_layers=draw.choice([1, 2, 3]),
        intermediate_size=draw.choice([17, 64]),
        tie_word_embeddings=draw.choice([True, False]),
        rope_scaling=scaling,
        rope_theta=draw.choice([100.0, 1e4, 1e6]),
        rms_norm_eps=draw.choice([1e-6, 1e-5, 1e-2]),
    )
    return config, draw.choice([1, 2]), draw.choice([3, 50, 131])


CASES |= {f"random {seed}": draw_config(seed) for seed in range(16)}


def tokens_of(config: ModelConfig, sequences: int, tokens: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    config, sequences, tokens = CASES[name]
    model = build(config)
    input_ids = tokens_of(config, sequences, tokens)
    with torch.no_grad():
        logits, expected = model(input_ids), twin(model)(input_ids).logits
    assert relative_error(logits, expected) < 1e-5
    assert worst_row(logits, expected) < 2e-5


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_transformers(name: str, recompute: str) -> None:
    """Through the path that training takes: `train_forward` and the fused head and loss."""
    config, sequences, tokens = CASES[name]
    model = build(config)
    input_ids, targets = tokens_of(config, sequences, tokens), torch.randint(0, config.vocab_size, (sequences, tokens))
    hidden = model.train_forward(input_ids, recompute=recompute).hidden  # type: ignore[arg-type]
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten()) / targets.numel()
    loss.backward()
    other = twin(model)
    expected_loss = F.cross_entropy(other(input_ids).logits.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    check_gradients(model, other)


@pytest.mark.parametrize("config", [LLAMA3, QWEN2, QWEN3], ids=["llama3", "qwen2", "qwen3"])
def test_gradients_of_the_logits_equal_those_of_transformers_with_its_fused_attention(config: ModelConfig) -> None:
    """The other way out of the model (`forward`), another loss, and transformers' other attention."""
    model = build(replace(config, tie_word_embeddings=True))
    input_ids = tokens_of(config, 2, 140)
    weights = torch.randn(2, 140, config.vocab_size)
    other = twin(model, attention="sdpa")
    (model(input_ids) * weights).sum().backward()
    (other(input_ids).logits * weights).sum().backward()
    check_gradients(model, other)


def test_far_positions_of_a_long_context_agree() -> None:
    model = build(replace(LLAMA3, num_hidden_layers=1, rope_theta=1e4))
    input_ids = tokens_of(LLAMA3, 1, 512)
    with torch.no_grad():
        logits, expected = model(input_ids), twin(model)(input_ids).logits
    assert relative_error(logits[:, -8:], expected[:, -8:]) < 1e-5


def test_parity_would_see_each_forgotten_term() -> None:
    """The comparison has teeth: wrong pairs, a wrong group, a dropped bias, norm or scaling moves logits far beyond the tolerance."""
    config = replace(QWEN3, attention_bias=True, rope_scaling=LLAMA3.rope_scaling, rope_theta=500.0)
    input_ids = tokens_of(config, 1, 140)
    expected = twin(build(config))(input_ids).logits.detach()

    def broken(change: str) -> float:
        other = build(replace(config, rope_scaling=None) if change == "rope scaling" else config)
        attention = other.blocks[1].self_attn
        assert isinstance(attention, GQA)
        assert attention.q_norm is not None
        assert attention.o_proj.bias is not None
        assert attention.k_proj.bias is not None
        with torch.no_grad():
            if change == "pairs":
                order = torch.arange(config.head_dim).view(2, -1).T.flatten()
                attention.q_proj.weight.copy_(attention.q_proj.weight.unflatten(0, (6, -1))[:, order].flatten(0, 1))
            elif change == "groups":
                attention.k_proj.weight.copy_(attention.k_proj.weight.roll(config.head_dim, 0))
            elif change == "norm":
                attention.q_norm.weight.fill_(1)
            elif change == "output bias":
                attention.o_proj.bias.zero_()
            elif change == "key bias":
                attention.k_proj.bias.zero_()
            return relative_error(other(input_ids), expected)

    assert broken("nothing") < 1e-5
    for change in ("pairs", "groups", "norm", "output bias", "key bias", "rope scaling"):
        assert broken(change) > 3e-4, change


# Rotary embedding


@settings(max_examples=200)
@given(
    factor=st.floats(1, 64),
    low=st.floats(0.25, 4),
    width=st.floats(0.1, 8),
    original=st.integers(16, 8192),
    half=st.integers(1, 64),
    theta=st.sampled_from([10.0, 500.0, 10000.0, 5e5]),
)
def test_llama3_frequencies_equal_those_of_transformers(
    factor: float, low: float, width: float, original: int, half: int, theta: float
) -> None:
    scaling = Llama3RopeScaling(factor, low, low + width, original)
    config = replace(LLAMA, rope_scaling=scaling, head_dim=2 * half, rope_theta=theta, max_position_embeddings=8193)
    frequencies, table_scale = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_dict(config.to_dict()))
    torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=2e-6, atol=0)
    assert table_scale == 1.0


def test_llama_3_1_has_its_published_frequencies() -> None:
    """8 times slower where a pair turns less than once in 8192 tokens, as before where it turns more than four times."""
    config = replace(
        LLAMA, head_dim=128, hidden_size=768, rope_theta=5e5, max_position_embeddings=131072,
        rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192),
    )  # fmt: skip
    ratio = inverse_frequencies(config) / inverse_frequencies(replace(config, rope_scaling=None))
    assert ratio[:29] == pytest.approx(torch.ones(29))
    assert ratio[35:] == pytest.approx(torch.full((29,), 1 / 8))
    assert (ratio[28:36].diff() < 0).all()
    assert softmax_scale(config) == 128**-0.5


def test_pairs_are_the_halves_of_a_head() -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    table = rotary_table(replace(LLAMA, head_dim=8), torch.arange(5))
    rotated = apply_rotary_halves(x, *table)
    turn = torch.complex(*(part.double() for part in table))
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1))


# The cache

CACHED = {"llama": LLAMA3, "llama, a head each": replace(LLAMA, num_key_value_heads=6), "qwen2": QWEN2, "qwen3": QWEN3}


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("sizes", [[150], [1] * 40, [17, 1, 1, 130, 1], [139, 1]], ids=["prefill", "decode", "chunks", "both"])
def test_cached_equals_whole_equals_transformers(name: str, sizes: list[int]) -> None:
    model = build(CACHED[name])
    input_ids = tokens_of(model.config, 2, sum(sizes))
    cache = Cache(model, 2, sum(sizes))
    with torch.no_grad():
        expected = twin(model).model(input_ids).last_hidden_state
        hidden = torch.cat([cached_forward(model, part, cache) for part in input_ids.split(sizes, dim=1)], dim=1)
        assert worst_row(hidden, model.train_forward(input_ids).hidden) < 2e-5
        assert worst_row(hidden, expected) < 2e-5


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("tokens", [1, 70])
def test_greedy_generation_equals_that_of_transformers_token_for_token(name: str, tokens: int) -> None:
    model = build(replace(CACHED[name], tie_word_embeddings=tokens == 1))
    other = twin(model)
    other.generation_config.eos_token_id = None
    input_ids = tokens_of(model.config, 3, tokens)
    expected = other.generate(
        input_ids, max_new_tokens=25, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(input_ids)
    )
    assert torch.equal(generate(model, input_ids, 25), expected)


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_a_cached_row_is_the_rotated_keys_of_all_heads_then_their_values(config: ModelConfig) -> None:
    attention = build(config).blocks[0].self_attn
    assert isinstance(attention, GQA)
    x, table = torch.randn(2, 5, config.hidden_size), rotary_table(config, torch.arange(5))
    rows = attention.cache_rows(x, Rotary(*table))
    assert rows.shape == (2, 5, config.cache_row_width)
    assert config.cache_row_width == 2 * config.num_key_value_heads * config.head_dim
    keys = F.linear(x, attention.k_proj.weight).unflatten(-1, (config.num_key_value_heads, config.head_dim))
    if attention.k_norm is not None:
        scale = torch.rsqrt(keys.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        keys = keys * scale * attention.k_norm.weight
    rotated = apply_rotary_halves(keys, *(part.unsqueeze(1) for part in table))
    torch.testing.assert_close(rows, torch.cat((rotated.flatten(2), F.linear(x, attention.v_proj.weight)), -1))


def test_several_tokens_over_more_rows_than_themselves_need_a_mask() -> None:
    attention = build(LLAMA).blocks[0].self_attn
    assert isinstance(attention, GQA)
    rotary = Rotary(*rotary_table(LLAMA, torch.arange(2)))
    with pytest.raises(AssertionError, match="need a mask"):
        attention.attend(torch.randn(1, 2, 48), torch.randn(1, 5, LLAMA.cache_row_width), rotary, None)


def test_packed_samples_equal_each_sample_alone() -> None:
    model = build(LLAMA3)
    input_ids = tokens_of(LLAMA3, 1, 30)
    document_ids = torch.arange(30).view(1, -1) // 11
    packed = model.train_forward(input_ids, document_ids=document_ids).hidden
    for start, end in ((0, 11), (11, 22), (22, 30)):
        assert worst_row(packed[:, start:end], model.train_forward(input_ids[:, start:end]).hidden) < 1e-4


# Low precision: against the float32 model, at most twice the error of plain PyTorch code at the same precision.


@pytest.mark.parametrize("way", ["autocast", "weights"])
@pytest.mark.parametrize("config", [LLAMA3, QWEN2, QWEN3], ids=["llama3", "qwen2", "qwen3"])
def test_bf16_is_at_most_twice_as_wrong_as_transformers(config: ModelConfig, way: str) -> None:
    ours, theirs, cached = 0.0, 0.0, 0.0
    for seed in range(3):
        exact = build(config, seed).bfloat16().float()
        model = build(config, seed).bfloat16() if way == "weights" else exact
        input_ids = tokens_of(config, 2, 140)
        cache = Cache(model, 2, 140)
        with torch.no_grad():
            reference = twin(exact)(input_ids).logits
            other = twin(model)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
                ours += relative_error(model(input_ids), reference)
                theirs += relative_error(other(input_ids).logits, reference)
                hidden = [cached_forward(model, part, cache) for part in input_ids.split([120] + [1] * 20, dim=1)]
                cached += relative_error(model.lm_head(torch.cat(hidden, 1)), reference)
    assert ours < 2 * theirs
    assert cached < 2 * theirs
    assert ours / 3 < 0.1


# Tied embeddings


def test_a_tied_head_is_the_embedding_wherever_the_model_goes() -> None:
    model = build(replace(LLAMA, tie_word_embeddings=True))
    embedding = "model.embed_tokens.weight"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [name for name, _ in model.named_parameters()]
    assert embedding in names
    assert "lm_head.weight" not in names
    for moved in (model.bfloat16(), Transformer(model.config, device="meta").to_empty(device="cpu")):
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
    pairs = [name for name, _ in hf_tensors(model)]
    assert pairs.count(embedding) == 1
    assert "lm_head.weight" not in pairs


def test_the_gradient_of_a_tied_embedding_has_both_its_uses_and_comes_once() -> None:
    tied = build(replace(LLAMA, tie_word_embeddings=True))
    untied = build(LLAMA)
    untied.load_state_dict(tied.state_dict())
    input_ids = tokens_of(LLAMA, 2, 20)
    for model in (tied, untied):
        hidden = model.train_forward(input_ids).hidden
        linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, input_ids.flatten()).backward()
    ours, apart = dict(hf_tensors(tied, grads=True)), dict(hf_tensors(untied, grads=True))
    assert ours.keys() == apart.keys() - {"lm_head.weight"}
    both = apart["model.embed_tokens.weight"] + apart["lm_head.weight"]
    assert relative_error(ours["model.embed_tokens.weight"], both) < 1e-6


# What a model is made of


@pytest.mark.parametrize("name", CASES)
def test_parameters_on_the_meta_device_are_those_of_the_formula(name: str) -> None:
    config = CASES[name][0]
    model = Transformer(config, device="meta")
    assert all(tensor.device.type == "meta" for tensor in model.parameters())
    counts = count_params(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total == counts.active
    assert counts.mtp == 0
    table = [(spec.name, spec.shape) for spec in checkpoint_tensors(config)]
    assert table == [(name, tuple(tensor.shape)) for name, tensor in hf_tensors(model)]
    assert {name for name, _ in table} == {name for name, _ in model.named_parameters()}


def test_init_weights_gives_matrices_their_deviation_norms_one_and_biases_zero() -> None:
    model = Transformer(replace(QWEN3, attention_bias=True, initializer_range=0.02))
    init_weights(model, 3)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert (parameter == 0).all(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=4 / (2 * parameter.numel()) ** 0.5), name

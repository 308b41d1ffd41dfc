"""MLA's two paths over one set of weights, what is cached, and samples that are packed into one row."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.config import ModelConfig
from finback.model.generate import Cache, Path, cached_forward
from finback.model.mla import MLA, Rotary
from finback.model.transformer import Transformer
from finback.ops.cross_entropy import linear_cross_entropy
from finback.ops.rotary import apply_rotary, rotary_table
from tests.model.oracle import BASE, V2, V2_LITE, build, relative_error, twin, untied, worst_row, yarn

CONFIGS: dict[str, ModelConfig] = {
    "v3": replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0)),
    "unequal mscales": replace(BASE, **yarn(mscale=1.3, mscale_all_dim=0.6)),
    "no query compression": replace(BASE, q_lora_rank=None),
    "values wider than keys": replace(BASE, v_head_dim=32),
    "values narrower than keys": replace(BASE, v_head_dim=4),
    "one head": replace(BASE, num_attention_heads=1),
    "v2": V2,
    "v2-lite": replace(V2_LITE, **yarn(mscale=0.707, mscale_all_dim=0.707)),
}


def in_chunks(model: Transformer, input_ids: Tensor, sizes: list[int], path: Path | None) -> tuple[Tensor, Cache]:
    """Hidden states of cached forward passes over pieces of the sequence."""
    cache = Cache(model, input_ids.shape[0], input_ids.shape[1])
    return torch.cat([cached_forward(model, part, cache, path) for part in input_ids.split(sizes, dim=1)], dim=1), cache


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [17, 1, 1, 20, 1], [39, 1]], ids=["prefill", "decode", "chunks", "both"])
def test_absorbed_equals_expanded_equals_cached_equals_whole_equals_transformers(name: str, sizes: list[int]) -> None:
    """Peers 7.1: one model, whichever way its tokens go through it; batch of two."""
    model = build(CONFIGS[name])
    input_ids = untied(model, 2, 40)
    with torch.no_grad():
        whole = model.train_forward(input_ids, mtp=False).hidden
        expected = twin(model).model(input_ids).last_hidden_state
        assert worst_row(whole, expected) < 2e-5
        rows = []
        for path in ("expanded", "absorbed", None):
            hidden, cache = in_chunks(model, input_ids, sizes, path)  # type: ignore[arg-type]
            assert relative_error(hidden, whole) < 1e-5, path
            assert worst_row(hidden, expected) < 2e-5, path
            assert cache.length == 40
            rows.append(cache.rows)
    assert relative_error(rows[1], rows[0]) < 1e-5
    assert relative_error(rows[2], rows[0]) < 1e-5


def test_paths_agree_beyond_a_block_of_queries() -> None:
    """Prefill in pieces that are no multiple of 128, behind more than 128 cached tokens."""
    model = build(CONFIGS["v3"])
    input_ids = untied(model, 1, 300)
    with torch.no_grad():
        whole = model.train_forward(input_ids, mtp=False).hidden
        for path in ("expanded", "absorbed"):
            hidden, _ = in_chunks(model, input_ids, [131, 130, 39], path)  # type: ignore[arg-type]
            assert worst_row(hidden, whole) < 2e-5


@pytest.mark.parametrize("config", [BASE, V2_LITE], ids=["v3", "v2-lite"])
def test_the_cache_holds_576_values_a_token_and_layer_in_v3_and_as_many_as_that_here(config: ModelConfig) -> None:
    """kv_lora_rank + qk_rope_head_dim and nothing else, MTP layers not counted (V3 section 2.1.1; facts 8: 70,272 bytes a token)."""
    model = build(config)
    cache = Cache(model, 3, 50)
    per_token = config.kv_lora_rank + config.qk_rope_head_dim
    assert cache.rows.shape == (config.num_hidden_layers, 3, 50, per_token)
    assert cache.rows.untyped_storage().nbytes() == config.num_hidden_layers * 3 * 50 * per_token * 4
    held = [value for value in vars(cache).values() if isinstance(value, Tensor) and value is not cache.rows]
    assert not held
    before = cache.rows.data_ptr()
    cached_forward(model, torch.zeros(3, 7, dtype=torch.int64), cache)
    assert cache.rows.data_ptr() == before  # in place: nothing grew beside it


def test_a_cached_row_is_the_normalised_latent_then_the_rotated_key_without_norm() -> None:
    """Facts 1.5: split latent first, RMSNorm (eps 1e-6) on the latent only, rotation on the key only; one key for all heads."""
    config = replace(BASE, rms_norm_eps=0.05)
    attention = build(config).blocks[0].self_attn
    x, rank = torch.randn(2, 5, config.hidden_size), config.kv_lora_rank
    table = rotary_table(config, torch.arange(5))
    rows = attention.cache_rows(x, Rotary(*table))
    compressed = F.linear(x, attention.kv_a_proj_with_mqa.weight)
    latent, key = compressed[..., :rank], compressed[..., rank:]
    normalised = latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + 1e-6) * attention.kv_a_layernorm.weight
    torch.testing.assert_close(rows, torch.cat((normalised, apply_rotary(key, *table)), -1), rtol=1e-5, atol=1e-5)


def test_absorbed_weights_are_views_of_the_one_matrix() -> None:
    attention = build(BASE).blocks[0].self_attn
    key_up, value_up = attention.absorbed_weights()
    c = BASE
    assert key_up.shape == (c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank)
    assert value_up.shape == (c.num_attention_heads, c.v_head_dim, c.kv_lora_rank)
    storage = attention.kv_b_proj.weight.untyped_storage().data_ptr()
    assert key_up.untyped_storage().data_ptr() == value_up.untyped_storage().data_ptr() == storage
    expanded = attention.kv_b_proj(torch.eye(c.kv_lora_rank)).T.view(c.num_attention_heads, -1, c.kv_lora_rank)
    torch.testing.assert_close(expanded, torch.cat((key_up, value_up), 1))


def test_cache_and_paths_in_a_bf16_model_and_under_autocast() -> None:
    """Low precision in any of the two ways; both paths stay near the float32 model (the error of bfloat16 itself is about 1%)."""
    config = replace(BASE, first_k_dense_replace=3, **yarn(mscale=1.0, mscale_all_dim=1.0))
    model = build(config)
    low = build(config, dtype=torch.bfloat16)
    input_ids = torch.randint(0, 96, (2, 30))
    with torch.no_grad():
        whole = model.train_forward(input_ids).hidden
        bound = 2 * relative_error(low.train_forward(input_ids).hidden, whole)
        assert bound < 0.1
        for path in ("expanded", "absorbed", None):
            hidden, cache = in_chunks(low, input_ids, [20] + [1] * 10, path)  # type: ignore[arg-type]
            assert cache.rows.dtype == torch.bfloat16
            assert relative_error(hidden, whole) < bound
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden, _ = in_chunks(model, input_ids, [20] + [1] * 10, path)  # type: ignore[arg-type]
            assert relative_error(hidden, whole) < bound


# Samples packed into one row and hidden from each other (V3 section 5.1).

PACKED = replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0), num_nextn_predict_layers=2)
LENGTHS = [[5, 1, 9, 15], [3, 20, 7]]  # two rows of 30


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_samples_equal_each_sample_alone(recompute: str) -> None:
    """Hidden states of every sample, wherever it starts in its row: rotary embedding is relative."""
    model = build(PACKED)
    input_ids = untied(model, 2, 30)
    document_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    packed = model.train_forward(input_ids, document_ids=document_ids, recompute=recompute)  # type: ignore[arg-type]
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = model.train_forward(input_ids[row : row + 1, start : start + length])
            assert worst_row(packed.hidden[row : row + 1, start : start + length], alone.hidden) < 1e-4
            assert relative_error(packed.hidden[row : row + 1, start : start + length], alone.hidden) < 1e-5
            start += length


def test_packed_samples_have_the_gradients_of_the_samples_alone() -> None:
    model = build(replace(PACKED, num_nextn_predict_layers=0))
    input_ids = untied(model, 2, 30)
    targets = torch.randint(0, 96, (2, 30))
    document_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    loss = model.train_forward(input_ids, document_ids=document_ids).hidden
    linear_cross_entropy(loss.flatten(0, 1), model.lm_head.weight, targets.flatten()).backward()
    packed = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    for row, lengths in enumerate(LENGTHS):
        for ids, wanted in zip(input_ids[row].split(lengths), targets[row].split(lengths), strict=True):
            hidden = model.train_forward(ids[None]).hidden
            linear_cross_entropy(hidden[0], model.lm_head.weight, wanted).backward()
    for (name, parameter), gradient in zip(model.named_parameters(), packed, strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert relative_error(gradient, parameter.grad) < 1e-4, name


def test_mtp_of_packed_samples_is_that_of_the_sample_alone_up_to_its_last_tokens() -> None:
    """Depth k of position i reads token i + 1 + k. Where that token is in the sample, the state is the sample's own; the last 1 + k
    positions read the next sample's first tokens, and what they predict lies in the next sample: a loss has to leave them out."""
    model = build(PACKED)
    input_ids = untied(model, 2, 30)
    document_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    packed = model.train_forward(input_ids, document_ids=document_ids)
    crossed = 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = model.train_forward(input_ids[row : row + 1, start : start + length])
            for depth, hidden in enumerate(alone.mtp_hidden):
                own = hidden.shape[1]
                if own:  # a sample of one or two tokens has no prediction at this depth
                    assert own == length - 1 - depth
                    assert worst_row(packed.mtp_hidden[depth][row : row + 1, start : start + own], hidden) < 1e-4
                crossed += packed.mtp_hidden[depth].shape[1] > start + max(own, 0)
            start += length
    assert crossed > 0  # the others are there: every row keeps T - 1 - k states


def test_without_document_ids_samples_see_each_other() -> None:
    """Pre-training packs without a mask (V3 section 4.1)."""
    model = build(PACKED)
    input_ids = untied(model, 1, 30)
    whole, alone = model.train_forward(input_ids).hidden, model.train_forward(input_ids[:, 20:]).hidden
    assert relative_error(whole[:, 20:], alone) > 0.1


def test_future_tokens_change_nothing() -> None:
    """Causality of the whole model, MTP included: depth k of position i may know tokens up to i + 1 + k."""
    model = build(PACKED)
    input_ids = untied(model, 1, 30)
    changed = input_ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 96
    before, after = model.train_forward(input_ids), model.train_forward(changed)
    assert worst_row(after.hidden[:, :20], before.hidden[:, :20]) < 1e-5
    assert worst_row(after.hidden[:, 20:21], before.hidden[:, 20:21]) > 0.01
    for depth in range(2):
        last = 20 - 1 - depth
        assert worst_row(after.mtp_hidden[depth][:, :last], before.mtp_hidden[depth][:, :last]) < 1e-5
        assert worst_row(after.mtp_hidden[depth][:, last : last + 1], before.mtp_hidden[depth][:, last : last + 1]) > 0.01


def test_query_parts_are_nope_first_then_rope() -> None:
    """Facts 1.5: a model whose rope rows are zero in every head is blind to position, so order does not matter to the last token."""
    config = replace(BASE, num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=None)
    model = build(config)
    attention = model.blocks[0].self_attn
    assert isinstance(attention, MLA)
    input_ids = torch.randint(0, 96, (1, 12))
    shuffled = torch.cat((input_ids[:, torch.randperm(11)], input_ids[:, 11:]), 1)
    with torch.no_grad():
        assert worst_row(model(shuffled)[:, -1:], model(input_ids)[:, -1:]) > 0.01
        heads = attention.q_proj.weight.view(config.num_attention_heads, config.qk_head_dim, -1)
        heads[:, config.qk_nope_head_dim :] = 0
        assert worst_row(model(shuffled)[:, -1:], model(input_ids)[:, -1:]) < 1e-5

"""The whole model against transformers in float32: logits, every gradient, the rotary tables; and the error rule in bfloat16.

Tolerances are relative Frobenius norms: 1e-5 for logits, 1e-4 for each gradient, 1e-5 for all gradients together.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from finback.config import ModelConfig, checkpoint_tensors, count_params
from finback.model.transformer import Transformer, init_weights
from finback.ops.cross_entropy import linear_cross_entropy
from finback.ops.rotary import inverse_frequencies, rotary_table, softmax_scale, yarn_table_scale
from tests.model.oracle import BASE, V2, V2_LITE, build, check_gradients, gradients, relative_error, twin, untied, worst_row, yarn

V3_YARN = replace(BASE, **yarn(mscale=1.0, mscale_all_dim=1.0))

# name: (config, sequences, tokens). Each is one branch of the computation; the traps of the facts sheet are among them.
CASES: dict[str, tuple[ModelConfig, int, int]] = {
    "v3": (BASE, 2, 37),
    "v3 with its yarn": (V3_YARN, 2, 140),
    "one token": (BASE, 3, 1),
    "two tokens": (BASE, 2, 2),
    "a whole block of queries": (BASE, 1, 128),
    "one query over a block": (BASE, 2, 129),
    "two blocks and one": (BASE, 1, 257),
    "three blocks, the last one ragged": (V3_YARN, 1, 300),
    "no query compression": (replace(BASE, q_lora_rank=None), 2, 37),
    "no query compression, yarn": (replace(V3_YARN, q_lora_rank=None), 1, 140),
    "values narrower than keys": (replace(BASE, v_head_dim=4), 2, 37),
    "values as wide as the nope part": (replace(BASE, v_head_dim=12), 2, 37),
    "values as wide as keys": (replace(BASE, v_head_dim=20), 2, 37),
    "values wider than keys": (replace(BASE, v_head_dim=32), 2, 130),
    "one head": (replace(BASE, num_attention_heads=1), 2, 37),
    "seven heads": (replace(BASE, num_attention_heads=7), 2, 37),
    "latent narrower than the rope part": (replace(BASE, kv_lora_rank=4, qk_rope_head_dim=16), 2, 37),
    "rope theta": (replace(BASE, rope_theta=500.0), 2, 140),
    # Facts 1.5: the latent norms keep eps 1e-6 whatever rms_norm_eps says.
    "large norm eps": (replace(BASE, rms_norm_eps=0.05), 2, 37),
    "large norm eps, no query compression": (replace(BASE, rms_norm_eps=0.05, q_lora_rank=None), 2, 37),
    # Facts 1.5: where mscale goes. V3 1.0, V2 0.707; without mscale_all_dim the softmax scale stays and cos and sin grow.
    "yarn 0.707": (replace(BASE, **yarn(mscale=0.707, mscale_all_dim=0.707)), 2, 140),
    "yarn without mscale_all_dim": (replace(BASE, **yarn(mscale=0.8)), 2, 140),
    "yarn without mscale": (replace(BASE, **yarn(mscale_all_dim=0.8)), 2, 140),
    "yarn with neither": (replace(BASE, **yarn()), 2, 140),
    "yarn with unequal mscales": (replace(BASE, **yarn(mscale=1.3, mscale_all_dim=0.6)), 2, 140),
    "yarn factor 40": (replace(BASE, **yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0), qk_rope_head_dim=64), 1, 140),
    "yarn factor 1": (replace(BASE, **yarn(1.0, 256, mscale=1.0, mscale_all_dim=1.0)), 1, 140),
    "yarn other betas": (replace(BASE, **yarn(4.0, 128, beta_fast=8, beta_slow=2), qk_rope_head_dim=32), 1, 140),
    "no dense layer": (replace(BASE, first_k_dense_replace=0), 2, 37),
    "two dense layers": (replace(BASE, first_k_dense_replace=2), 2, 37),
    "all layers dense": (replace(BASE, first_k_dense_replace=3), 2, 37),
    "two shared experts": (replace(BASE, n_shared_experts=2), 2, 37),
    "gate values as they are": (replace(BASE, norm_topk_prob=False), 2, 37),
    "no scaling": (replace(BASE, routed_scaling_factor=1.0), 2, 37),
    "one group": (replace(BASE, n_group=1, topk_group=1), 2, 37),
    "all groups kept": (replace(BASE, n_group=4, topk_group=4), 2, 37),
    "one group kept": (replace(BASE, n_group=2, topk_group=1), 2, 37),
    "groups of two": (replace(BASE, n_routed_experts=16, n_group=8, topk_group=3, num_experts_per_tok=5), 2, 37),
    "groups chosen whole": (replace(BASE, n_group=4, topk_group=2, num_experts_per_tok=4), 2, 37),
    "one expert per token": (replace(BASE, num_experts_per_tok=1, norm_topk_prob=False), 2, 37),
    "every expert": (replace(BASE, n_group=1, topk_group=1, num_experts_per_tok=8), 2, 37),
    "more experts than pairs": (replace(BASE, n_routed_experts=64, num_experts_per_tok=2), 1, 9),
    "odd sizes everywhere": (
        replace(BASE, hidden_size=45, moe_intermediate_size=23, intermediate_size=67, kv_lora_rank=19, q_lora_rank=27,
                qk_nope_head_dim=11, qk_rope_head_dim=6, v_head_dim=13, vocab_size=97, num_attention_heads=3),
        2,
        37,
    ),
    "v2": (V2, 2, 37),
    "v2 with its yarn": (replace(V2, **yarn(mscale=0.707, mscale_all_dim=0.707)), 2, 140),
    "v2, one group kept": (replace(V2, n_group=2, topk_group=1), 2, 37),
    "v2, one shared expert": (replace(V2, n_shared_experts=1), 2, 37),
    "v2 greedy": (replace(V2, topk_method="greedy"), 2, 37),
    "v2, unequal mscales": (replace(V2, **yarn(mscale=1.3, mscale_all_dim=0.6)), 2, 140),
    "v2-lite": (V2_LITE, 2, 37),
    "v2-lite with its yarn": (replace(V2_LITE, **yarn(mscale=0.707, mscale_all_dim=0.707)), 2, 140),
    "v2-lite, large norm eps": (replace(V2_LITE, rms_norm_eps=0.05), 2, 37),
}  # fmt: skip


def draw_config(seed: int) -> tuple[ModelConfig, int, int]:
    """A random member of the family: every field from its own short list."""
    draw = random.Random(seed)
    n_group = draw.choice([1, 2, 4])
    group_size = draw.choice([2, 3, 4])
    topk_group = draw.randint(1, n_group)
    mscale = draw.choice([None, 0.707, 1.0])
    scaling = [{}, yarn(draw.choice([2.0, 5.0]), 64, mscale=mscale, mscale_all_dim=draw.choice([None, 0.707, 1.0]))]
    heads = draw.choice([1, 2, 3])
    changes = {
        "num_attention_heads": heads,
        "hidden_size": 12 * draw.choice([2, 3, 4]),
        "num_hidden_layers": (layers := draw.choice([1, 2, 3])),
        "first_k_dense_replace": draw.randint(0, layers),
        "q_lora_rank": draw.choice([None, 7, 16]),
        "kv_lora_rank": draw.choice([8, 15, 24]),
        "qk_nope_head_dim": draw.choice([4, 8, 13]),
        "qk_rope_head_dim": draw.choice([2, 8, 10]),
        "v_head_dim": draw.choice([3, 8, 24]),
        "n_routed_experts": n_group * group_size,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_experts_per_tok": draw.randint(2, topk_group * group_size),
        "n_shared_experts": draw.choice([1, 2, 3]),
        "moe_intermediate_size": draw.choice([8, 17]),
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        "rope_theta": draw.choice([100.0, 10000.0]),
    }
    family = draw.choice([BASE, BASE, V2, V2_LITE])
    if family.model_type == "deepseek_v3":
        changes["norm_topk_prob"] = draw.choice([True, False])
    else:  # transformers' V2 code cannot view rows of odd length as complex numbers
        changes |= {"kv_lora_rank": draw.choice([8, 24]), "qk_nope_head_dim": draw.choice([4, 8])}
    return replace(family, **changes, **draw.choice(scaling)), draw.choice([1, 2]), draw.choice([3, 50, 131])


CASES |= {f"random {seed}": draw_config(seed) for seed in range(16)}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    config, sequences, tokens = CASES[name]
    model = build(config)
    input_ids = untied(model, sequences, tokens)
    with torch.no_grad():
        logits, expected = model(input_ids), twin(model)(input_ids).logits
    assert relative_error(logits, expected) < 1e-5
    assert worst_row(logits, expected) < 2e-5  # one token that went to another expert would show here


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_transformers(name: str) -> None:
    """Through the path that training takes: `train_forward` and the fused head and loss."""
    config, sequences, tokens = CASES[name]
    model = build(config)
    input_ids, targets = untied(model, sequences, tokens), torch.randint(0, config.vocab_size, (sequences, tokens))
    hidden = model.train_forward(input_ids).hidden
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten()) / targets.numel()
    loss.backward()
    other = twin(model)
    expected_loss = F.cross_entropy(other(input_ids).logits.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    check_gradients(model, other)


def test_gradients_of_the_logits_equal_those_of_transformers_with_its_fused_attention() -> None:
    """The other way out of the model (`forward`), another loss, and transformers' other attention."""
    model = build(V3_YARN)
    input_ids = untied(model, 2, 140)
    weights = torch.randn(2, 140, V3_YARN.vocab_size)
    other = twin(model, attention="sdpa")
    (model(input_ids) * weights).sum().backward()
    (other(input_ids).logits * weights).sum().backward()
    check_gradients(model, other)


@pytest.mark.parametrize("config", [V3_YARN, replace(V2, **yarn(mscale=0.707, mscale_all_dim=0.707))], ids=["v3", "v2"])
def test_far_positions_of_a_long_context_agree(config: ModelConfig) -> None:
    """The rotary tables at the end of the YaRN range, where an angle has thousands of turns: the last 8 tokens see 504 others."""
    model = build(replace(config, num_hidden_layers=1))
    input_ids = untied(model, 1, 512)
    with torch.no_grad():
        logits, expected = model(input_ids), twin(model)(input_ids).logits
    assert relative_error(logits[:, -8:], expected[:, -8:]) < 1e-5


@settings(max_examples=200)
@given(
    factor=st.floats(1, 64),
    original=st.integers(16, 8192),
    dim=st.integers(1, 40).map(lambda half: 2 * half),
    theta=st.sampled_from([10.0, 500.0, 10000.0, 1e6]),
    betas=st.sampled_from([(32, 1), (4, 1), (100, 0.5), (2, 1.5)]),
    mscales=st.tuples(*[st.sampled_from([None, 0.0, 0.707, 1.0, 1.4])] * 2),
)
def test_yarn_tables_equal_those_of_transformers(
    factor: float, original: int, dim: int, theta: float, betas: tuple[float, float], mscales: tuple[float | None, float | None]
) -> None:
    scaling = yarn(factor, original, beta_fast=betas[0], beta_slow=betas[1], mscale=mscales[0], mscale_all_dim=mscales[1])
    config = replace(BASE, **scaling, qk_rope_head_dim=dim, rope_theta=theta)
    other = twin_config(config)
    frequencies, table_scale = ROPE_INIT_FUNCTIONS["yarn"](other)
    torch.testing.assert_close(inverse_frequencies(config), frequencies, rtol=1e-6, atol=0)
    assert yarn_table_scale(config.rope_scaling) == pytest.approx(table_scale, rel=1e-12)


def twin_config(config: ModelConfig) -> DeepseekV3Config:
    published = config.to_dict()
    # Not every factor times original is a whole number; transformers warns where the context is another one.
    published["max_position_embeddings"] = published["rope_scaling"]["original_max_position_embeddings"]
    return DeepseekV3Config.from_dict(published)


def test_v3_softmax_scale_and_frequencies_have_the_published_values() -> None:
    """Facts 1.5: m = 1.3688879, scale 0.1352338; dimensions up to 10 keep their frequency, from 23 on it is divided by 40."""
    config = replace(
        BASE, **yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0), qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert softmax_scale(config) == pytest.approx(0.1352338, abs=1e-7)
    assert softmax_scale(replace(config, rope_scaling=None)) == pytest.approx(0.0721688, abs=1e-7)
    assert yarn_table_scale(config.rope_scaling) == 1.0
    plain = inverse_frequencies(replace(config, rope_scaling=None))
    ratio = inverse_frequencies(config) / plain
    assert ratio[:11] == pytest.approx(torch.ones(11))
    assert ratio[23:] == pytest.approx(torch.full((9,), 1 / 40))
    assert (ratio[10:24].diff() < 0).all()
    cos, sin = rotary_table(config, torch.tensor([0, 163839]))
    assert cos.shape == sin.shape == (2, 32)
    assert cos.dtype == torch.float32
    v2 = replace(config, **yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707))
    assert softmax_scale(v2) == pytest.approx(192**-0.5 * 1.2608038**2, rel=1e-6)


def test_parity_would_see_each_forgotten_term() -> None:
    """The comparison has teeth: a wrong latent eps, bias sign, mscale, expert or gate value moves logits far beyond the tolerance."""
    config = replace(BASE, rms_norm_eps=0.05, **yarn(mscale=1.3, mscale_all_dim=0.6))
    model = build(config)
    input_ids = untied(model, 1, 40)
    expected = twin(model)(input_ids).logits.detach()

    def broken(change: str) -> float:
        other = build(config)
        attention = other.blocks[1].self_attn
        router = other.routers()[0]
        with torch.no_grad():
            if change == "eps":
                attention.kv_a_layernorm.eps = config.rms_norm_eps
            elif change == "query eps":
                attention.q_a_layernorm.eps = config.rms_norm_eps
            elif change == "scale":
                attention.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
            elif change == "bias":
                router.e_score_correction_bias.neg_()
            elif change == "expert":
                other.blocks[1].mlp.experts.up_proj[0] = 0
            return relative_error(other(input_ids), expected)

    assert broken("nothing") < 1e-5
    for change in ("eps", "query eps", "scale", "bias", "expert"):
        assert broken(change) > 3e-4, change


# The error rule in bfloat16: against the float32 model, at most twice the error of plain PyTorch code at the same precision.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [BASE, replace(BASE, q_lora_rank=None), V2], ids=["v3", "no query compression", "v2"])
def test_bf16_autocast_is_at_most_twice_as_wrong_as_transformers(config: ModelConfig, attention: str) -> None:
    """Logits and all gradients together; errors of three models summed, so that one lucky expert choice decides nothing."""
    ours, theirs, gradient_ours, gradient_theirs = 0.0, 0.0, 0.0, 0.0
    for seed in range(3):
        model = build(replace(config, n_routed_experts=4, num_experts_per_tok=3, n_group=1, topk_group=1), seed)
        input_ids = untied(model, 2, 140, seed)
        weights = torch.randn(2, 140, config.vocab_size) / 280
        other = twin(model, attention)
        reference = other(input_ids).logits
        (reference * weights).sum().backward()
        names = [name for name, _ in gradients(other)]
        expected = torch.cat([gradient.flatten() for _, gradient in gradients(other)])
        other.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, logits_theirs = model(input_ids), other(input_ids).logits
        (logits.float() * weights).sum().backward()
        (logits_theirs.float() * weights).sum().backward()
        parameters = dict(model.named_parameters())
        ours += relative_error(logits, reference)
        theirs += relative_error(logits_theirs, reference)
        gradient_ours += relative_error(torch.cat([parameters[name].grad.flatten() for name in names]), expected)  # type: ignore[union-attr]
        gradient_theirs += relative_error(torch.cat([gradient.flatten() for _, gradient in gradients(other)]), expected)
    assert ours < 2 * theirs
    assert gradient_ours < 2 * gradient_theirs
    assert ours / 3 < 0.1


@pytest.mark.parametrize("config", [V3_YARN, V2], ids=["v3", "v2"])
def test_a_bf16_model_is_at_most_twice_as_wrong_as_the_one_of_transformers(config: ModelConfig) -> None:
    """All weights in bfloat16, as the published files hold them; the truth is the same rounded weights in float32."""
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        low = build(replace(config, n_routed_experts=4, num_experts_per_tok=3, n_group=1, topk_group=1), seed).bfloat16()
        exact = build(low.config, seed).bfloat16().float()
        input_ids = untied(exact, 2, 140, seed)
        with torch.no_grad():
            reference = twin(exact)(input_ids).logits
            ours += relative_error(low(input_ids), reference)
            theirs += relative_error(twin(low)(input_ids).logits, reference)
    assert ours < 2 * theirs
    assert ours / 3 < 0.1


# Gradients once more, without an oracle.

EVERYTHING = replace(BASE, num_nextn_predict_layers=2, **yarn(mscale=1.0, mscale_all_dim=0.7))


def whole_loss(
    model: Transformer, input_ids: torch.Tensor, recompute: Any = "none", documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Language model, both MTP depths and the balance term."""
    output = model.train_forward(input_ids, recompute=recompute, document_ids=documents)
    loss = output.balance_loss
    for shift, hidden in enumerate([output.hidden, *output.mtp_hidden]):
        targets = input_ids[:, shift:].flatten()
        loss = loss + linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets) / targets.numel()
    return loss


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_in_float64_is_the_slope_of_the_whole_loss(packed: bool) -> None:
    """Every hand-written backward at once, with the terms that transformers does not have: MTP chained, balance, hidden documents."""
    model = build(EVERYTHING).double()
    input_ids = untied(model, 2, 21)
    documents = torch.arange(21).expand(2, -1) // 8 if packed else None
    whole_loss(model, input_ids, documents=documents).backward()
    parameters = list(model.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    direction = [torch.randn_like(parameter) * parameter.norm() / parameter.numel() ** 0.5 for parameter in start]
    slope = sum((parameter.grad * way).sum().item() for parameter, way in zip(parameters, direction, strict=True))  # type: ignore[operator]
    losses = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            for parameter, origin, way in zip(parameters, start, direction, strict=True):
                parameter.copy_(origin + step * way)
            losses.append(whole_loss(model, input_ids, documents=documents).item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_frozen_parameters_change_no_other_gradient(recompute: str) -> None:
    model = build(EVERYTHING)
    input_ids = untied(model, 2, 21)
    whole_loss(model, input_ids).backward()
    kept = [
        name for name, _ in model.named_parameters() if name.endswith(("1.self_attn.kv_b_proj.weight", "2.mlp.experts.up_proj"))
    ]
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if name in kept}
    model.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    whole_loss(model, input_ids, recompute).backward()
    assert len(kept) == 2
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in kept)
        assert name not in kept or torch.equal(parameter.grad, expected[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_training_step_is_bitwise_repeatable(autocast: bool) -> None:
    """What resuming bitwise rests on: the gradients of two models with the same weights, on memory that others have used."""
    input_ids = torch.randint(0, 96, (2, 140))
    runs = []
    for _ in range(2):
        model = build(EVERYTHING)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = whole_loss(model, input_ids)
        loss.backward()
        runs.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)  # type: ignore[arg-type]


# What a model is made of.


@pytest.mark.parametrize("config", [replace(BASE, num_nextn_predict_layers=2), V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_parameters_on_the_meta_device_are_those_of_the_formula(config: ModelConfig) -> None:
    model = Transformer(config, device="meta")
    tensors = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    counts = count_params(config)
    copies = config.num_nextn_predict_layers * 2 * config.vocab_size * config.hidden_size  # shared in memory, stored again
    assert sum(tensor.numel() for tensor in tensors) == counts.total + counts.mtp - copies


def test_the_real_v3_on_the_meta_device_has_671_billion_parameters() -> None:
    published = Path(__file__).parents[1] / "data_files" / "configs" / "deepseek-v3.json"
    config = ModelConfig.from_dict(json.loads(published.read_text()))
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    total = sum(tensor.numel() for name, tensor in model.state_dict().items() if not name.startswith("model.layers.61."))
    assert total == count_params(config).total == 671_026_419_200
    assert {b.dtype for b in model.buffers()} == {torch.float32}  # router biases, whatever the dtype of the rest
    names = {spec.name for spec in checkpoint_tensors(config, fp8=False)}
    plain = {name for name in model.state_dict() if ".experts." not in name}
    assert plain <= names
    copies = {"model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight"}
    assert {name for name in names if ".experts." not in name} - plain == copies


def test_init_weights_is_deterministic_and_has_the_configured_deviation() -> None:
    config = replace(BASE, initializer_range=0.006, hidden_size=64, num_nextn_predict_layers=1)
    first, second, other = Transformer(config), Transformer(config, dtype=torch.float64), Transformer(config)
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        torch.manual_seed(seed + 100 * len(list(model.parameters())))  # the global state must not matter
        init_weights(model, seed)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.double(), two), name
        if one.dim() == 1:
            assert (one == 1).all(), name
        else:
            assert not torch.equal(one, three), name
            assert one.std().item() == pytest.approx(0.006, rel=4 / (2 * one.numel()) ** 0.5), name  # 4 deviations
            assert abs(one.mean().item()) < 4 * 0.006 / one.numel() ** 0.5, name
    for router in first.routers():
        assert torch.equal(router.e_score_correction_bias, torch.zeros(8))

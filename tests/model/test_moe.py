"""DeepSeekMoE as modules: precision of the router, experts against the loop over tokens, counts and balance loss of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from finback.model.moe import Experts, MoE, Router
from finback.model.transformer import Transformer
from finback.ops import grouped
from finback.ops.grouped import row_alignment
from finback.ops.router import router_scores, select_experts
from tests.model.oracle import BASE, V2, V2_LITE, build, relative_error, untied, worst_row
from tests.ops.rule import assert_low_precision_rule, assert_repeatable, outputs_and_gradients

WITH_MTP = replace(BASE, num_nextn_predict_layers=2)


# The router.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_router_bias_in_float32(dtype: torch.dtype) -> None:
    """Facts 1.6 and 1.8: in bfloat16 a bias of 1 would no longer feel updates of 0.001."""
    model = build(BASE)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    for cast in (model.to(dtype), model.to("cpu", dtype), model.type(dtype)):
        for router, bias in zip(cast.routers(), before, strict=True):
            assert router.e_score_correction_bias.dtype == torch.float32
            assert torch.equal(router.e_score_correction_bias, bias)
            assert router.weight.dtype == dtype
    assert Transformer(BASE, dtype=dtype).routers()[0].e_score_correction_bias.dtype == torch.float32
    assert (
        Transformer(BASE, device="meta").to_empty(device="cpu").to(dtype).routers()[0].e_score_correction_bias.dtype
        == torch.float32
    )


def test_the_bias_is_a_stored_buffer_without_gradient_and_v2_has_none() -> None:
    router = build(BASE).routers()[0]
    assert set(dict(router.named_parameters())) == {"weight"}
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}
    for config in (V2, V2_LITE):
        assert set(build(config).routers()[0].state_dict()) == {"weight"}


def test_no_forward_or_backward_pass_moves_the_bias() -> None:
    """Peers 7.3: it moves once per optimizer step, by what the counts say, and nowhere else."""
    model = build(WITH_MTP)
    before = [router.e_score_correction_bias.clone() for router in model.routers()]
    output = model.train_forward(untied(model, 2, 20))
    (output.hidden.square().sum() + output.balance_loss).backward()
    for router, bias in zip(model.routers(), before, strict=True):
        assert torch.equal(router.e_score_correction_bias, bias)
        assert router.e_score_correction_bias.grad is None


@pytest.mark.parametrize("config", [BASE, V2_LITE], ids=["v3", "v2-lite"])
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_and_gate_values_are_float32_in_bf16_models(config: Any, autocast: bool) -> None:
    """Router logits that differ by less than bfloat16 can tell: the choice is still the exact one."""
    router = Router(config)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = 1.0
        router.weight[:, 1] = torch.arange(8) * 2.0**-9  # exact in bfloat16; 1 + that is not
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()
    x = torch.zeros(5, config.hidden_size)
    x[:, :2] = 1.0
    router = router if autocast else router.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values, routing = router(x.to(torch.bfloat16))
    assert values.dtype == routing.scores.dtype == torch.float32
    k = config.num_experts_per_tok
    expected = set(range(8 - k, 8)) if config is V2_LITE else {7, 6, 5}  # the last experts; two of four groups of two hold them
    assert all(set(row) == expected for row in routing.indices.tolist())


# The experts.


def experts_by_token(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """sum_k value_k * down(silu(gate x) * up x), one expert after another, as transformers does."""
    output = torch.zeros_like(x)
    for expert in range(len(gate)):
        token, choice = torch.where(indices == expert)
        rows = F.linear(F.silu(F.linear(x[token], gate[expert])) * F.linear(x[token], up[expert]), down[expert])
        output = output.index_add(0, token, (rows * values[token, choice].unsqueeze(-1)).to(output.dtype))
    return output


def grouped_experts(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    count, width, size = gate.shape
    config = replace(BASE, n_routed_experts=count, moe_intermediate_size=width, hidden_size=size, n_group=1, topk_group=1,
                     num_experts_per_tok=indices.shape[1])  # fmt: skip
    experts = Experts(config, device=torch.device("meta"))
    output: Tensor = functional_call(experts, {"gate_proj": gate, "up_proj": up, "down_proj": down}, (x, indices, values))
    return output


def draw_experts(tokens: int, n_experts: int, top_k: int, skew: float, width: int = 16, size: int = 24) -> tuple[Tensor, ...]:
    wish = torch.rand(tokens, n_experts) + skew * torch.arange(n_experts)
    x, values = torch.randn(tokens, size), torch.rand(tokens, top_k) + 0.5
    matrices = [torch.randn(n_experts, *shape) * shape[1] ** -0.5 for shape in ((width, size), (width, size), (size, width))]
    return x, *matrices, values, wish.topk(top_k).indices


IMBALANCE = {
    "spread": (70, 8, 3, 0.0),
    "all tokens want the same experts": (70, 8, 3, 10.0),
    "one expert for all": (300, 6, 1, 10.0),
    "most experts empty": (3, 32, 2, 0.0),
    "one token": (1, 8, 2, 0.0),
    "every expert": (40, 4, 4, 0.0),
}
FILLED = ("spread", "all tokens want the same experts", "one expert for all", "every expert")
"""Those with rows enough."""


@pytest.mark.parametrize("name", IMBALANCE)
@pytest.mark.parametrize(("width", "size"), [(16, 24), (7, 5)])
def test_experts_equal_the_loop_whatever_the_imbalance(name: str, width: int, size: int) -> None:
    """Facts 1.6: no token is dropped. Output, and gradients of input, weights and gate values."""
    inputs = draw_experts(*IMBALANCE[name], width=width, size=size)
    ours = outputs_and_gradients(grouped_experts, inputs)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    for one, other in zip(ours, outputs_and_gradients(experts_by_token, exact), strict=True):
        assert relative_error(one, other) < 2e-6
    counts = inputs[-1].flatten().bincount(minlength=len(inputs[1]))
    assert not ours[2][counts == 0].any()  # experts without tokens: a gradient of zeros, not of whatever memory held


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("name", IMBALANCE)
def test_experts_in_bf16_keep_the_error_rule(name: str, filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies bfloat16 on a CPU each expert's rows are filled up: filling must not reach output or gradients."""
    if filled:
        monkeypatch.setattr(grouped, "_native", lambda *_: None)
        tokens, n_experts, top_k, _ = IMBALANCE[name]
        assert row_alignment(tokens * top_k, n_experts, torch.bfloat16, torch.device("cpu")) > 1 or name not in FILLED
    x, gate, up, down, values, indices = draw_experts(*IMBALANCE[name], width=32, size=48)
    matrices = [matrix.bfloat16() for matrix in (gate, up, down)]
    assert_low_precision_rule(grouped_experts, experts_by_token, x.bfloat16(), *matrices, values, indices)


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 24, 25, 63, 64, 65])
@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 3), (64, 2), (4, 4), (40, 17)])
@pytest.mark.parametrize("width", [16, 7])
def test_experts_without_gradients_equal_the_loop(tokens: int, n_experts: int, top_k: int, width: int) -> None:
    """Decoding takes other paths than training: few rows go through all experts, or visit theirs one by one."""
    inputs = draw_experts(tokens, n_experts, top_k, 0.0, width=width)
    with torch.no_grad():
        output = grouped_experts(*inputs)
    exact = experts_by_token(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    assert worst_row(output, exact) < 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 7, 24, 64, 65])
@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 3), (64, 2), (40, 17)])
def test_experts_without_gradients_keep_the_error_rule_in_bf16(tokens: int, n_experts: int, top_k: int) -> None:
    x, gate, up, down, values, indices = draw_experts(tokens, n_experts, top_k, 0.0, width=32, size=48)
    inputs = [*(tensor.bfloat16() for tensor in (x, gate, up, down)), values, indices]
    exact = experts_by_token(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    with torch.no_grad():
        assert relative_error(grouped_experts(*inputs), exact) <= 2 * relative_error(experts_by_token(*inputs), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_repeatable(dtype: torch.dtype) -> None:
    x, gate, up, down, values, indices = draw_experts(*IMBALANCE["spread"])
    assert_repeatable(grouped_experts, *(tensor.to(dtype) for tensor in (x, gate, up, down)), values, indices)


def test_shared_experts_are_one_feed_forward_of_their_widths_together() -> None:
    """Facts 1.6: n_shared_experts experts that every token visits, fused; added to what the routed ones give."""
    config = replace(BASE, n_shared_experts=2)
    moe = build(config).blocks[1].mlp
    assert isinstance(moe, MoE)
    x, width = torch.randn(2, 5, config.hidden_size), config.moe_intermediate_size
    output, routing = moe(x)
    values, _ = moe.gate(x.flatten(0, 1))
    expected = moe.experts(x.flatten(0, 1), routing.indices, values).view_as(x)
    gate, up, down = (getattr(moe.shared_experts, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    for rows in (slice(0, width), slice(width, None)):
        expected = expected + F.linear(F.silu(F.linear(x, gate[rows])) * F.linear(x, up[rows]), down[:, rows])
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# Counts and balance loss of a forward pass.


@contextmanager
def router_inputs(model: Transformer) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handles = [router.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for router in model.routers()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("config", [WITH_MTP, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_expert_counts_and_balance_loss_equal_a_recount(config: Any) -> None:
    """One row of counts per router, main layers first; each adds up to tokens x K. The loss in plain loops: V3 equations 17-20."""
    model = build(config)
    input_ids = untied(model, 3, 17)
    with router_inputs(model) as seen:
        output = model.train_forward(input_ids)
    expected_balance = 0.0
    assert len(seen) == len(model.routers()) == len(output.expert_counts)
    for row, (router, x) in enumerate(zip(model.routers(), seen, strict=True)):
        depth = max(0, row - config.num_moe_layers + 1)
        tokens = 17 - depth  # MTP module k sees T - 1 - k
        assert len(x) == 3 * tokens
        scores = router_scores(x, router.weight, config.scoring_func)
        k, n = config.num_experts_per_tok, config.n_routed_experts
        chosen = select_experts(scores, router.e_score_correction_bias, k, config.n_group, config.topk_group, config.topk_method)
        assert torch.equal(output.expert_counts[row], chosen.flatten().bincount(minlength=n))
        assert output.expert_counts[row].sum() == 3 * tokens * k
        for sequence in scores.view(3, tokens, n).tolist():
            hits, share = [0.0] * n, [0.0] * n
            for token in sequence:
                for expert in sorted(range(n), key=lambda e: -token[e])[:k]:  # unbiased, and no groups
                    hits[expert] += n / (k * tokens)
                for expert in range(n):
                    share[expert] += token[expert] / sum(token) / tokens
            expected_balance += sum(f * p for f, p in zip(hits, share, strict=True)) / 3
    assert output.expert_counts.dtype == torch.int64
    assert output.balance_loss.item() == pytest.approx(expected_balance, rel=1e-5)


@pytest.mark.parametrize("shift", [-2.0, 0.25, 64.0])
def test_a_shift_common_to_the_biases_of_a_router_changes_nothing(shift: float) -> None:
    """Peers 7.3 asks for a mean of zero, against drift. The paper's update keeps none and needs none: choices, groups included, depend
    on differences alone."""
    model = build(BASE)
    input_ids = untied(model, 2, 20)
    for router in model.routers():
        router.e_score_correction_bias.copy_(
            torch.arange(8).roll(3) / 16
        )  # whole parts of 2^-4, so that sums with the shift are exact
    before = model.train_forward(input_ids)
    for router in model.routers():
        router.e_score_correction_bias.add_(shift)
    after = model.train_forward(input_ids)
    assert torch.equal(before.expert_counts, after.expert_counts)
    assert torch.equal(before.hidden, after.hidden)


def test_balance_loss_does_not_look_at_the_bias() -> None:
    """Facts 1.6: f counts the top K of the unbiased scores, so biases change the choice and not the loss of the first router."""
    model = build(replace(BASE, num_hidden_layers=2))
    input_ids = untied(model, 2, 20)
    before = model.train_forward(input_ids)
    model.routers()[0].e_score_correction_bias.copy_(torch.linspace(-3, 3, 8))
    after = model.train_forward(input_ids)
    assert not torch.equal(before.expert_counts, after.expert_counts)
    assert torch.equal(before.balance_loss, after.balance_loss)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("sizes", [[4], [1, 3], [2, 2], [1, 1, 1, 1]])
def test_counts_and_balance_loss_are_those_of_the_whole_batch_however_it_is_cut(sizes: list[int], recompute: Any) -> None:
    """Peers 7.3: any micro-batch split, with or without recomputation, and nothing is counted twice in backward."""
    model = build(WITH_MTP)
    input_ids = untied(model, 4, 15)
    whole = model.train_forward(input_ids)
    counts, balance = torch.zeros_like(whole.expert_counts), 0.0
    for part in input_ids.split(sizes):
        output = model.train_forward(part, recompute=recompute)
        kept = output.expert_counts
        before = kept.clone()
        (output.hidden.square().sum() + output.balance_loss).backward()
        assert torch.equal(kept, before)
        counts += kept
        balance += output.balance_loss.item() * len(part) / 4
    assert torch.equal(counts, whole.expert_counts)
    assert balance == pytest.approx(whole.balance_loss.item(), rel=1e-5)


def test_balance_loss_reaches_the_router_weights() -> None:
    model = build(WITH_MTP)
    model.train_forward(untied(model, 2, 15)).balance_loss.backward()
    for router in model.routers():
        assert router.weight.grad is not None
        assert router.weight.grad.norm() > 0
    assert model.lm_head.weight.grad is None


def test_a_dense_model_has_no_counts_and_no_balance_loss() -> None:
    model = build(replace(BASE, first_k_dense_replace=3))
    output = model.train_forward(torch.zeros(1, 4, dtype=torch.int64))
    assert output.expert_counts.shape == (0, 8)
    assert output.balance_loss.item() == 0.0

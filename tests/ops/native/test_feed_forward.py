"""Router, routed and shared experts in C against `ops.router` and the loop over experts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.calls import Choice, Norm, Routing, Weights
from finback.ops.norm import rms_norm
from finback.ops.router import gate_values, router_scores, select_experts
from finback.ops.swiglu import swiglu
from tests.ops.native.rule import DTYPES, assert_same_bits, assert_within_the_rule, compiled, draw, nans, threads, wide

EPS = 1e-6
TOKENS = [1, 2, 5, 8, 9, 16, 17, 33, 40]
# width D, width of an expert F, width of shared experts
SIZES = [(8, 3, 5), (40, 17, 33), (64, 32, 64), (96, 50, 16)]
# scoring_func, topk_method, n_group, topk_group, normalise, with bias
KINDS = [
    ("sigmoid", "noaux_tc", 1, 1, True, True),
    ("sigmoid", "noaux_tc", 4, 2, True, True),
    ("sigmoid", "noaux_tc", 4, 1, False, True),
    ("softmax", "greedy", 1, 1, False, False),
    ("softmax", "greedy", 4, 2, False, False),
    ("softmax", "group_limited_greedy", 4, 2, False, False),
    ("softmax", "group_limited_greedy", 2, 1, True, False),
]
EXPERTS, CHOICES, SCALING = 16, 3, 2.5


def draw_experts(dtype: torch.dtype, size: int, width: int, count: int | None = EXPERTS) -> Weights:
    lead = () if count is None else (count,)
    gate, up = (draw(dtype, *lead, width, size, scale=size**-0.5) for _ in range(2))
    return Weights(gate, up, draw(dtype, *lead, size, width, scale=width**-0.5))


def feed_forward(
    x: Tensor,
    norm: Tensor | None,
    residual: Tensor | None,
    choice: Choice | None,
    experts: Weights | None,
    shared: Weights | None,
) -> Tensor:
    """The loop over experts, in the dtype of x."""
    if norm is not None:
        x = rms_norm(x, norm, EPS)
    output = torch.zeros_like(x)
    if experts is not None:
        assert choice is not None
        for expert, (gate, up, down) in enumerate(zip(*experts, strict=True)):
            tokens, choices = (choice.indices == expert).nonzero(as_tuple=True)
            values = choice.values[tokens, choices]
            rows = F.linear(swiglu(F.linear(x[tokens], gate), F.linear(x[tokens], up), values), down)
            output = output.index_add(0, tokens, rows)
    if shared is not None:
        output = output + F.linear(swiglu(F.linear(x, shared.gate), F.linear(x, shared.up)), shared.down)
    return output if residual is None else output + residual


def truth_of(x: Tensor, norm: Tensor | None, residual: Tensor | None, choice: Choice | None, *weights: Weights | None) -> Tensor:
    def widened(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    if choice is not None:
        choice = Choice(choice.indices, choice.values.double())
    experts, shared = (None if some is None else Weights(*wide(*some)) for some in weights)
    return feed_forward(x.double(), widened(norm), widened(residual), choice, experts, shared)


def routing_of(
    dtype: torch.dtype, tokens: int, size: int, kind: tuple[str, str, int, int, bool, bool], experts: int = EXPERTS
) -> Routing:
    scoring_func, method, n_group, topk_group, normalise, biased = kind
    bias = 0.3 * torch.randn(experts) if biased else None
    weight = draw(dtype, experts, size, scale=size**-0.5)
    return Routing(
        weight, bias, scoring_func, method, n_group, topk_group, normalise, SCALING, nans(torch.float32, tokens, experts)
    )


def empty_choice(tokens: int, choices: int = CHOICES) -> Choice:
    return Choice(torch.full((tokens, choices), -1), nans(torch.float32, tokens, choices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", KINDS)
def test_choice_equals_the_router_of_ops(kind: tuple[str, str, int, int, bool, bool], tokens: int, dtype: torch.dtype) -> None:
    size = 40
    x, norm, routing, choice = (
        draw(dtype, tokens, size),
        draw(dtype, size),
        routing_of(dtype, tokens, size, kind),
        empty_choice(tokens),
    )
    assert compiled().feed_forward(x, None, norm=Norm(norm, EPS), routing=routing, choice=choice)() == 0
    normalised = rms_norm(x, norm, EPS)
    scores = router_scores(normalised, routing.weight, routing.scoring_func)
    torch.testing.assert_close(routing.scores, scores, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    # From the kernel's own scores, so that a tie that rounding broke is no difference.
    indices = select_experts(routing.scores, routing.bias, CHOICES, routing.n_group, routing.topk_group, routing.topk_method)
    assert [set(row) for row in choice.indices.tolist()] == [set(row) for row in indices.tolist()]
    values = gate_values(routing.scores, choice.indices, routing.normalise, SCALING)
    torch.testing.assert_close(choice.values, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 20])
@pytest.mark.parametrize("experts", [2, 15, 33, 64])
def test_scores_of_the_router_are_float32(experts: int, tokens: int, dtype: torch.dtype) -> None:
    """bfloat16 logits would tie experts."""
    for kind in (KINDS[0], KINDS[3]):
        x, routing, choice = draw(dtype, tokens, 50), routing_of(dtype, tokens, 50, kind, experts), empty_choice(tokens, 2)
        compiled().feed_forward(x, None, routing=routing, choice=choice)()
        scores = router_scores(x, routing.weight, routing.scoring_func)
        torch.testing.assert_close(routing.scores, scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("sizes", SIZES)
def test_routed_and_shared_experts_keep_the_error_rule(sizes: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> None:
    size, width, shared_width = sizes
    x, norm, residual = draw(dtype, tokens, size), draw(dtype, size), draw(dtype, tokens, size)
    experts, shared = draw_experts(dtype, size, width), draw_experts(dtype, size, shared_width, None)
    for with_experts, with_shared, routed in (
        (True, True, True),
        (True, False, False),
        (False, True, False),
        (True, True, False),
    ):
        routing = routing_of(dtype, tokens, size, KINDS[1]) if routed else None
        choice = empty_choice(tokens) if with_experts else None
        if choice is not None and not routed:
            choice.indices.copy_(torch.rand(tokens, EXPERTS).topk(CHOICES).indices)
            choice.values.copy_(torch.rand(tokens, CHOICES))
        output, own = nans(dtype, tokens, size), (experts if with_experts else None, shared if with_shared else None)
        call = compiled().feed_forward(
            x,
            output,
            norm=Norm(norm, EPS),
            residual=residual,
            routing=routing,
            choice=choice,
            experts=own[0],
            shared=own[1],
        )
        assert call() == 0
        arguments = (x, norm, residual, choice, *own)
        with torch.no_grad():
            assert_within_the_rule(output, feed_forward(*arguments), truth_of(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_norm_nor_residual_nor_choice_is_needed(dtype: torch.dtype) -> None:
    x, shared, output = draw(dtype, 3, 40), draw_experts(dtype, 40, 56, None), nans(dtype, 3, 40)
    compiled().feed_forward(x, output, shared=shared)()
    arguments = (x, None, None, None, None, shared)
    with torch.no_grad():
        assert_within_the_rule(output, feed_forward(*arguments), truth_of(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_output_may_be_the_residual_stream(tokens: int, dtype: torch.dtype) -> None:
    stream, norm, experts = draw(dtype, tokens, 40), Norm(draw(dtype, 40), EPS), draw_experts(dtype, 40, 20)
    apart, choice = nans(dtype, tokens, 40), Choice(torch.rand(tokens, EXPERTS).topk(3).indices, torch.rand(tokens, 3))
    compiled().feed_forward(stream, apart, norm=norm, residual=stream, choice=choice, experts=experts)()
    compiled().feed_forward(stream, stream, norm=norm, residual=stream, choice=choice, experts=experts)()
    assert torch.equal(stream, apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [9, 40])
def test_all_tokens_may_go_to_one_expert(tokens: int, dtype: torch.dtype) -> None:
    """More pairs than a panel holds in one expert; the same expert twice for one token."""
    x, experts, output = draw(dtype, tokens, 40), draw_experts(dtype, 40, 20), nans(dtype, tokens, 40)
    choice = Choice(torch.full((tokens, 2), 7), torch.rand(tokens, 2))
    compiled().feed_forward(x, output, choice=choice, experts=experts)()
    arguments = (x, None, None, choice, experts, None)
    with torch.no_grad():
        assert_within_the_rule(output, feed_forward(*arguments), truth_of(*arguments))


@pytest.mark.parametrize("index", [-1, EXPERTS])
def test_an_index_that_is_no_expert_is_reported_and_writes_nothing(index: int) -> None:
    choice = Choice(torch.tensor([[0, 1], [2, index]]), torch.ones(2, 2))
    output = nans(torch.float32, 2, 8)
    assert compiled().feed_forward(torch.ones(2, 8), output, choice=choice, experts=draw_experts(torch.float32, 8, 3))() == 1
    assert output.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 6, 20, 40])
def test_results_do_not_depend_on_threads(tokens: int, dtype: torch.dtype) -> None:
    x, experts, shared = draw(dtype, tokens, 72), draw_experts(dtype, 72, 40), draw_experts(dtype, 72, 40, None)
    routing = routing_of(dtype, tokens, 72, KINDS[1])
    results = []
    for count in (1, 2, 3):
        with threads(count):
            output, choice = nans(dtype, tokens, 72), empty_choice(tokens)
            compiled().feed_forward(x, output, routing=routing, choice=choice, experts=experts, shared=shared)()
            results.append(torch.cat((output.float(), choice.values, choice.indices.float()), 1))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_stays_in_its_token(bad: float, dtype: torch.dtype) -> None:
    """Experts are chosen for it nonetheless, distinct ones and within range."""
    for tokens in (3, 12):
        x, experts, shared = draw(dtype, tokens, 40), draw_experts(dtype, 40, 20), draw_experts(dtype, 40, 20, None)
        x[1, 4] = bad
        for kind in KINDS:
            output, choice = nans(dtype, tokens, 40), empty_choice(tokens)
            routing = routing_of(dtype, tokens, 40, kind)
            assert compiled().feed_forward(x, output, routing=routing, choice=choice, experts=experts, shared=shared)() == 0
            assert output.isfinite().all(1).tolist() == [token != 1 for token in range(tokens)]
            assert all(len(set(row)) == CHOICES and set(row) <= set(range(EXPERTS)) for row in choice.indices.tolist())

"""The gate in Triton beside the reference."""

from collections.abc import Callable

import pytest
import torch

from finback.ops import router as reference
from finback.ops.triton import router as kernels
from tests.ops.triton.ahead import has_wide_accesses, request

CASES = [
    (256, 8, 8, 4, "noaux_tc", "sigmoid"),
    (16, 4, 4, 2, "noaux_tc", "sigmoid"),
    (160, 6, 1, 1, "greedy", "softmax"),
    (64, 6, 8, 3, "group_limited_greedy", "softmax"),
    (5, 2, 1, 1, "noaux_tc", "sigmoid"),
]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 19])
def test_experts_and_values_are_those_of_the_reference(
    case: tuple[int, int, int, int, str, str], tokens: int, has_bias: bool
) -> None:
    experts, top_k, groups, kept, method, scoring = case
    torch.manual_seed(experts + tokens)
    logits = torch.randn(tokens, experts) * 2
    bias = torch.randn(experts) * 0.7 - 1.0 if has_bias else None  # biased scores below zero, too
    arguments = (bias, top_k, groups, kept, method, scoring, True, 2.5)
    values, indices = kernels.route(logits, *arguments)
    wanted_values, wanted = reference.route(logits, *arguments)
    order, wanted_order = indices.argsort(1), wanted.argsort(1)
    assert torch.equal(indices.gather(1, order), wanted.gather(1, wanted_order))
    torch.testing.assert_close(values.gather(1, order), wanted_values.gather(1, wanted_order), rtol=2e-6, atol=1e-7)


def test_without_normalisation_and_without_tokens() -> None:
    logits = torch.randn(3, 8)
    values, indices = kernels.route(logits, None, 2, scaling=3.0, normalise=False)
    torch.testing.assert_close(values, logits.sigmoid().gather(1, indices) * 3)
    assert kernels.route(logits[:0], None, 2)[0].shape == (0, 2)


def test_sizes_that_are_no_powers_of_two_are_refused_where_groups_matter() -> None:
    with pytest.raises(ValueError, match="powers of two, not 24 experts in 3 groups"):
        kernels.route(torch.randn(2, 24), None, 2, 3, 1)


def test_it_compiles_for_hopper(compile_for_hopper: Callable[..., list[str]]) -> None:
    types = {"logits": "*fp32", "bias": "*fp32", "values_out": "*fp32", "indices_out": "*i64", "tokens": "i32", "scaling": "fp32"}
    constants = {
        "experts": 256,
        "width": 256,
        "top_k": 8,
        "width_k": 8,
        "groups": 8,
        "kept_groups": 4,
        "scoring": 0,
        "group_score": 2,
        "has_bias": True,
        "normalise": True,
        "block": 8,
    }
    (ptx,) = compile_for_hopper([request("router", "route_kernel", types, constants)])
    assert has_wide_accesses(ptx)
    assert "st.local" not in ptx

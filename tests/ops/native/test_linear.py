"""Products, norm, activation and rotation in C against their bodies in torch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops.native.arguments import Norm, RotaryTable
from finback.ops.norm import rms_norm
from finback.ops.rotary import apply_rotary
from finback.ops.swiglu import swiglu
from tests.ops.native.rule import DTYPES, angles, assert_same_bits, assert_within_the_rule, compiled, draw, nans, threads, wide

EPS = 1e-6
# outputs, inputs: multiples of nothing, single ones, several blocks, longer than a vector by one
SIZES = [((1,), 1), ((5,), 3), ((17, 3), 31), ((33, 1, 18), 33), ((40, 16), 64), ((7, 50, 129), 97), ((64,), 200)]


def products(x: Tensor, weights: list[Tensor], norm: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    """What `linear` promises, in torch at the dtype of x."""
    if norm is not None:
        x = rms_norm(x, norm, EPS)
    outputs = [F.linear(x, weight) for weight in weights]
    if residual is not None:
        outputs[0] = outputs[0] + residual
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 7, 8, 9, 12, 16, 17, 31, 32, 33, 40])
@pytest.mark.parametrize(("rows", "inputs"), SIZES)
def test_linear_keeps_the_error_rule(rows: tuple[int, ...], inputs: int, tokens: int, dtype: torch.dtype) -> None:
    x, norm, residual = draw(dtype, tokens, inputs), draw(dtype, inputs), draw(dtype, tokens, rows[0])
    weights = [draw(dtype, count, inputs, scale=inputs**-0.5) for count in rows]
    for with_norm, with_residual in ((False, False), (True, True), (True, False), (False, True)):
        n, r = norm if with_norm else None, residual if with_residual else None
        outputs = [nans(dtype, tokens, count) for count in rows]
        compiled().linear(x, weights, outputs, None if n is None else Norm(n, EPS), r)()
        plain = products(x, weights, n, r)
        x64, n64, r64, *w64 = wide(x, norm, residual, *weights)
        truth = products(x64, w64, n64 if with_norm else None, r64 if with_residual else None)
        # One norm over all outputs: single ones of a few values have errors that are luck.
        assert_within_the_rule(*(torch.cat([t.flatten() for t in tensors]) for tensors in (outputs, plain, truth)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 9, 40])
def test_biases_are_added_to_the_outputs_that_have_one(tokens: int, dtype: torch.dtype) -> None:
    """Any of the three may be without; the residual comes on top."""
    rows = (21, 16, 5)
    x, residual, weights = draw(dtype, tokens, 40), draw(dtype, tokens, rows[0]), [draw(dtype, count, 40) for count in rows]
    for which in ((True, True, True), (True, False, False), (False, True, True)):
        biases = [draw(dtype, count) if given else None for count, given in zip(rows, which, strict=True)]
        outputs = [nans(dtype, tokens, count) for count in rows]
        compiled().linear(x, weights, outputs, residual=residual, biases=biases)()

        def expected(*tensors: Tensor, biases: list[Tensor | None]) -> Tensor:
            x, residual, *weights = tensors
            parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
            return torch.cat((parts[0] + residual, *parts[1:]), 1)

        exact = [None if bias is None else bias.double() for bias in biases]
        plain = expected(x, residual, *weights, biases=biases)
        assert_within_the_rule(torch.cat(outputs, 1), plain, expected(*wide(x, residual, *weights), biases=exact))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_linear_adds_to_its_own_output(tokens: int, dtype: torch.dtype) -> None:
    x, weight, stream = draw(dtype, tokens, 40), draw(dtype, 24, 40), draw(dtype, tokens, 24)
    apart = nans(dtype, tokens, 24)
    compiled().linear(x, [weight], [apart], residual=stream)()
    compiled().linear(x, [weight], [stream], residual=stream)()
    assert torch.equal(apart, stream)


@pytest.mark.parametrize("tokens", [1, 9, 33])
def test_linear_may_leave_its_first_output_unrounded(tokens: int) -> None:
    x, weights = draw(torch.bfloat16, tokens, 40), [draw(torch.bfloat16, 21, 40), draw(torch.bfloat16, 8, 40)]
    wide_output, narrow = nans(torch.float32, tokens, 21), nans(torch.bfloat16, tokens, 8)
    compiled().linear(x, weights, [wide_output, narrow])()
    exact = x.double() @ weights[0].double().T
    assert float((wide_output - exact).norm() / exact.norm()) < 1e-6
    rounded = nans(torch.bfloat16, tokens, 21)
    compiled().linear(x, weights, [rounded, narrow])()
    assert torch.equal(wide_output.bfloat16(), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 9, 20, 40])
def test_linear_does_not_depend_on_threads(tokens: int, dtype: torch.dtype) -> None:
    x, norm, weights = draw(dtype, tokens, 70), Norm(draw(dtype, 70), EPS), [draw(dtype, 45, 70), draw(dtype, 19, 70)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            outputs = [nans(dtype, tokens, len(weight)) for weight in weights]
            compiled().linear(x, weights, outputs, norm)()
            results.append(torch.cat(outputs, 1))
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 8, 9, 33])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_linear_spreads_nan_and_infinity_as_torch_does(bad: float, tokens: int, dtype: torch.dtype) -> None:
    """In one token: its outputs only. In one weight: the output of its row only."""
    x, weight = draw(dtype, tokens, 37), draw(dtype, 21, 37)
    x[tokens - 1, 5] = bad
    weight[20, 36] = bad
    output = nans(dtype, tokens, 21)
    compiled().linear(x, [weight], [output])()
    expected = F.linear(x.float(), weight.float())
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.isposinf(), expected.isposinf())
    assert torch.equal(output.isneginf(), expected.isneginf())


def test_a_call_reads_what_its_tensors_hold_by_then() -> None:
    x, weight, output = torch.zeros(1, 4), torch.eye(4), torch.empty(1, 4)
    call = compiled().linear(x, [weight], [output])
    call()
    assert output.tolist() == [[0, 0, 0, 0]]
    x.copy_(torch.arange(4.0))
    call()
    assert output.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("x", torch.zeros(2, 5)),
        ("x", torch.zeros(4, 2).T),
        ("weight", torch.zeros(3, 4, dtype=torch.bfloat16)),
        ("output", torch.zeros(1, 3)),
        ("residual", torch.zeros(2, 4)),
        ("norm", torch.zeros(3)),
    ],
)
def test_linear_refuses_tensors_that_do_not_fit(change: str, value: Tensor) -> None:
    given = {
        "x": torch.zeros(2, 4),
        "weight": torch.zeros(3, 4),
        "output": torch.zeros(2, 3),
        "residual": torch.zeros(2, 3),
        "norm": torch.zeros(4),
    }
    compiled().linear(given["x"], [given["weight"]], [given["output"]], Norm(given["norm"], EPS), given["residual"])
    given[change] = value
    with pytest.raises(AssertionError):
        compiled().linear(given["x"], [given["weight"]], [given["output"]], Norm(given["norm"], EPS), given["residual"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 16), (5, 33), (2, 576)])
def test_rms_norm_keeps_the_error_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, output = draw(dtype, *shape), draw(dtype, shape[1]), nans(dtype, *shape)
    compiled().rms_norm(x, Norm(weight, EPS), output)()
    assert_within_the_rule(output, rms_norm(x, weight, EPS), rms_norm(*wide(x, weight), EPS))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 16), (4, 33)])
def test_swiglu_keeps_the_error_rule(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up, output = draw(dtype, *shape, scale=3), draw(dtype, *shape), nans(dtype, *shape)
    with torch.no_grad():
        compiled().swiglu(gate, up, output)()
        assert_within_the_rule(output, swiglu(gate, up), swiglu(*wide(gate, up)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extremes_is_what_torch_says(dtype: torch.dtype) -> None:
    infinity = float("inf")
    gate = torch.tensor([-infinity, -1e30, -200, -89, -50, 0, 50, 89, 200, 1e30, infinity, float("nan")], dtype=dtype)
    output = torch.zeros_like(gate)
    compiled().swiglu(gate, torch.ones_like(gate), output)()
    expected = F.silu(gate.double()).to(dtype)
    torch.testing.assert_close(output, expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 6, 32, 64])
def test_rotary_keeps_the_error_rule(size: int, dtype: torch.dtype) -> None:
    cosine, sine = angles(torch.tensor([0, 1, 77, 4095]), size)
    x, output = draw(dtype, 4, 3, size), nans(dtype, 4, 3, size)
    compiled().rotary(x, RotaryTable(cosine, sine), output)()
    by_head = cosine.unsqueeze(1), sine.unsqueeze(1)
    assert_within_the_rule(output, apply_rotary(x, *by_head), apply_rotary(x.double(), *wide(*by_head)))

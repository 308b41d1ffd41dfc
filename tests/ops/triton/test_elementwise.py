"""RMSNorm, rotation, SwiGLU and the head's softmax in Triton, beside their references by the rule for low precision."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finback.ops import cross_entropy, fp8, norm, rotary, swiglu
from finback.ops.triton import cross_entropy as triton_cross_entropy
from finback.ops.triton import norm as triton_norm
from finback.ops.triton import rotary as triton_rotary
from finback.ops.triton import swiglu as triton_swiglu
from tests.ops.triton.ahead import has_wide_accesses, request

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 5), (7, 48), (33, 200), (40, 1030)]


def obeys(got: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Error against float64 at most twice that of PyTorch at this precision, and no more than float32's own rounding beside."""
    error, allowed = (got.double() - exact).norm(), (plain.double() - exact).norm()
    return bool(error <= 2 * allowed + 1e-6 * exact.norm())


def operands(shape: tuple[int, ...], dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, grad = operands(shape, dtype, 2)
    weight = torch.randn(shape[1])
    exact, exact_scale = norm.normalise(x.double(), weight.double(), 1e-6)
    plain, scale = norm.normalise(x, weight, 1e-6)
    got, got_scale = triton_norm.normalise(x, weight, 1e-6)
    assert got.dtype == dtype
    assert got_scale.shape == scale.shape
    assert obeys(got, plain, exact)
    exact_grads = norm.normalise_backward(grad.double(), x.double(), weight.double(), exact_scale)
    plain_grads = norm.normalise_backward(grad, x, weight, scale)
    got_grads = triton_norm.normalise_backward(grad, x, weight, got_scale)
    assert all(obeys(a, b, c) for a, b, c in zip(got_grads, plain_grads, exact_grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("half", [4, 24, 32])
def test_rotation_with_and_without_heads(half: int, dtype: torch.dtype) -> None:
    x, shared, grad = (torch.randn(shape).to(dtype) for shape in ((2, 5, 3, 2 * half), (2, 5, 2 * half), (2, 5, 3, 2 * half)))
    angles = torch.randn(5, half)
    cos, sin = angles.cos(), angles.sin()
    for values, c, s in ((x, cos.unsqueeze(-2), sin.unsqueeze(-2)), (shared, cos, sin)):
        exact = rotary.apply_rotary(values.double(), c.double(), s.double())
        assert obeys(triton_rotary.apply_rotary(values, c, s), rotary.apply_rotary(values, c, s), exact)
    grads = []
    for function in (triton_rotary.apply_rotary, rotary.apply_rotary):
        leaf = x.clone().requires_grad_()
        function(leaf, cos.unsqueeze(-2), sin.unsqueeze(-2)).backward(grad)
        grads.append(leaf.grad)
    torch.testing.assert_close(
        *grads, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype, weighted: bool) -> None:
    gate, up, grad = operands(shape, dtype, 3)
    weight = torch.rand(shape[0]) if weighted else None
    wide = weight.double() if weight is not None else None
    exact = swiglu.activate(gate.double(), up.double(), wide)
    assert obeys(triton_swiglu.activate(gate, up, weight), swiglu.activate(gate, up, weight), exact)
    exact_grads = swiglu.activate_backward(grad.double(), gate.double(), up.double(), wide)
    plain_grads = swiglu.activate_backward(grad, gate, up, weight)
    got_grads = triton_swiglu.activate_backward(grad, gate, up, weight)
    for got, plain, wanted in zip(got_grads, plain_grads, exact_grads, strict=True):
        assert (got is None) == (wanted is None)
        assert got is None or plain is None or wanted is None or obeys(got, plain, wanted)


@pytest.mark.parametrize("turned", [(0,), (1,), (0, 1, 2, 3)])
def test_swiglu_of_views_that_are_not_contiguous(turned: tuple[int, ...]) -> None:
    """Transposed gate, up, output gradient and row weights with a stride, by themselves and together."""
    values = operands((7, 48), torch.float32, 3)
    gate, up, grad = (value.t().contiguous().t() if place in turned else value for place, value in enumerate(values))
    weight = torch.rand(14)[::2] if 3 in turned else torch.rand(7)
    torch.testing.assert_close(triton_swiglu.activate(gate, up, weight), swiglu.activate(gate, up, weight))
    got, wanted = (one.activate_backward(grad, gate, up, weight) for one in (triton_swiglu, swiglu))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    payload, scale = triton_swiglu.activate_quantize(gate, up, weight)
    expected = fp8.quantize_1x128(triton_swiglu.activate(gate, up, weight))
    assert torch.equal(payload.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_with_the_cast_is_the_cast_of_swiglu(dtype: torch.dtype, ue8m0: bool) -> None:
    gate, up = operands((37, 300), dtype, 2)
    weight = torch.rand(37)
    got = triton_swiglu.activate_quantize(gate, up, weight, ue8m0=ue8m0)
    wanted = fp8.quantize_1x128(triton_swiglu.activate(gate, up, weight), ue8m0=ue8m0)
    assert torch.equal(got[0].view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 100, 5000])
def test_softmax_and_its_gradient(vocab: int, dtype: torch.dtype, gradient: bool) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(6, vocab) * 8).to(dtype)
    targets = torch.randint(0, vocab, (6,))
    targets[2] = -100
    exact, plain, got = logits.double(), logits.clone(), logits.clone()
    wanted = cross_entropy.softmax_gradient(exact, targets, -100, gradient)
    plain_losses = cross_entropy.softmax_gradient(plain, targets, -100, gradient)
    losses = triton_cross_entropy.softmax_gradient(got, targets, -100, gradient)
    assert losses[2] == 0
    assert obeys(losses, plain_losses, wanted)
    assert obeys(got, plain, exact)
    if not gradient:
        assert torch.equal(got, logits)
    with pytest.raises(ValueError, match="must be contiguous"):
        triton_cross_entropy.softmax_gradient(torch.randn(6, 4).T, targets[:4], -100, False)


@pytest.mark.filterwarnings(
    "ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"
)  # of the row without any
@pytest.mark.parametrize("gradient", [False, True])
def test_the_softmax_of_tokens_that_are_ruled_out(gradient: bool) -> None:
    """A whole first block of -inf, single ones, and a row of nothing else, whose loss is nan as PyTorch's."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5000)
    logits[0, :4500] = logits[1, ::2] = logits[2] = float("-inf")
    targets, plain = torch.tensor([4800, 1, 0]), logits.clone()
    losses = triton_cross_entropy.softmax_gradient(logits, targets, -100, gradient)
    wanted = cross_entropy.softmax_gradient(plain, targets, -100, gradient)
    torch.testing.assert_close(losses, wanted, equal_nan=True)
    torch.testing.assert_close(logits, plain, equal_nan=True)
    assert losses.isnan().tolist() == [False, False, True]


def test_they_compile_for_hopper_and_read_sixteen_bytes_at_once(compile_for_hopper: Callable[..., list[str]]) -> None:
    swiglu_types = dict.fromkeys(("gate", "up", "out", "grad", "grad_gate", "grad_up"), "*bf16")
    swiglu_types |= {"row_weight": "*fp32", "grad_weight": "*fp32", "width": "i32", "payload": "*fp8e4nv", "scale": "*fp32"}
    swiglu_types |= {"rows": "i32", "tiles": "i32", "smallest_amax": "fp32"}

    def swiglu_request(kernel: str, names: str, constants: dict[str, object]) -> dict[str, object]:
        return request("swiglu", kernel, {name: swiglu_types[name] for name in names.split()}, {"weighted": True, **constants})

    norm_types = {"x": "*bf16", "weight": "*fp32", "out": "*bf16", "inverse": "*fp32", "size": "i32", "eps": "fp32"}
    backward_types = {"grad": "*bf16", "x": "*bf16", "weight": "*fp32", "inverse": "*fp32", "grad_x": "*bf16", "partial": "*fp32"}
    rotary_types = dict.fromkeys(("x", "out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
    rotary_types |= {"vectors": "i32", "heads": "i32", "half": "i32", "direction": "fp32"}
    loss_types = {"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "vocab": "i32", "ignore_index": "i32"}
    asked = [
        request("norm", "normalise_kernel", norm_types, {"block": 8192}),
        request("norm", "normalise_backward_kernel", backward_types | {"rows": "i32", "size": "i32"},
                {"block": 8192, "per_program": 32}, warps=8),
        request("rotary", "rotate_kernel", rotary_types, {"block": 16, "width": 32}),
        swiglu_request("activate_kernel", "gate up row_weight out width", {"block": 1024}),
        swiglu_request("activate_backward_kernel", "grad gate up row_weight grad_gate grad_up grad_weight width", {"block": 1024}),
        swiglu_request("activate_quantize_kernel", "gate up row_weight payload scale rows width tiles smallest_amax",
                       {"ue8m0": False, "block_rows": 32, "tile": 128}),
        request("cross_entropy", "softmax_gradient_kernel", loss_types, {"gradient": True, "block": 4096}, warps=8),
    ]  # fmt: skip
    for asked_for, ptx in zip(asked, compile_for_hopper(asked), strict=True):
        assert has_wide_accesses(ptx), asked_for["kernel"]

"""FP8 layers: the three products of each against a recipe written out by hand, how often operands are quantised, and what is kept."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from finback.ops import fp8_linear as module
from finback.ops.e5m6 import dequantize_e5m6, quantize_e5m6
from finback.ops.fp8 import dequantize_1x128, dequantize_128x128, quantize_1x128, quantize_128x128
from finback.ops.fp8_linear import Recipe, fp8_linear, fp8_linear_after_attention, fp8_swiglu_feed_forward
from finback.ops.swiglu import activate, activate_backward

TINY = 1e-30


def tiles(x: Tensor, ue8m0: bool = False) -> Tensor:
    """x as its 1 x 128 tiles have it."""
    return dequantize_1x128(*quantize_1x128(x, ue8m0=ue8m0))


def gradient_tiles(x: Tensor, ue8m0: bool = False) -> Tensor:
    return dequantize_1x128(*quantize_1x128(x, ue8m0=ue8m0, smallest_amax=0.0))


def token_tiles(x: Tensor) -> Tensor:
    """x as its tiles of 128 tokens x 1 channel have it."""
    return gradient_tiles(x.T.contiguous()).T


def blocks(weight: Tensor) -> Tensor:
    return dequantize_128x128(*quantize_128x128(weight))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(TINY)) < bound


def operands(*shape: int) -> tuple[Tensor, ...]:
    torch.manual_seed(sum(shape))
    tokens, inputs, outputs = shape
    x = (torch.randn(tokens, inputs) * 3).requires_grad_()
    weight = (torch.randn(outputs, inputs) * 0.05).requires_grad_()
    return x, weight, torch.randn(tokens, outputs) * 1e-6


@pytest.mark.parametrize("shape", [(300, 200, 150), (128, 256, 128), (5, 40, 300), (1, 128, 128)])
def test_a_layer_multiplies_what_the_recipe_says(shape: tuple[int, int, int]) -> None:
    x, weight, grad = operands(*shape)
    y = fp8_linear(x, weight)
    y.backward(grad)
    with torch.no_grad():
        assert close(y, tiles(x) @ blocks(weight).T)
        assert close(x.grad, gradient_tiles(grad) @ blocks(weight))
        # Wgrad reads what forward multiplied, in tiles that lie the other way.
        assert close(weight.grad, token_tiles(grad).T @ token_tiles(tiles(x)))
        assert not close(weight.grad, grad.T @ x, 1e-3), "the products are FP8's, not float32's"
        assert close(weight.grad, grad.T @ x, 0.08)


def test_behind_attention_backward_reads_e5m6() -> None:
    x, weight, grad = operands(200, 256, 64)
    y = fp8_linear_after_attention(x, weight)
    y.backward(grad)
    with torch.no_grad():
        assert close(y, tiles(x) @ blocks(weight).T)
        assert close(weight.grad, token_tiles(grad).T @ token_tiles(dequantize_e5m6(*quantize_e5m6(x))))


def test_gradients_far_below_the_bound_of_activations_are_kept() -> None:
    x, weight, grad = operands(64, 128, 128)
    fp8_linear(x, weight).backward(grad * 1e-6)
    with torch.no_grad():
        assert close(x.grad, grad * 1e-6 @ weight, 0.08)


def test_gradients_in_blocks_are_another_recipe() -> None:
    x, weight, grad = operands(256, 128, 128)
    grad = grad * torch.logspace(0, -4, 256).unsqueeze(1)
    fp8_linear(x, weight, Recipe(gradient_tiles="128x128")).backward(grad)
    assert close(x.grad, blocks(grad) @ blocks(weight.detach()))


def test_every_scale_of_ue8m0_is_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []

    def watch(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def watched(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
            payload, scale = function(*args, **named)
            scales.append(scale)
            return payload, scale

        return watched

    for name in ("quantize_1x128", "quantize_128x128"):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    x, weight, grad = operands(130, 256, 200)
    fp8_linear(x, weight, Recipe(ue8m0=True)).backward(grad)
    assert len(scales) == 5
    assert all(bool((torch.frexp(scale)[0] == 0.5).all()) for scale in scales)


def feed_forward_operands() -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    counts = torch.tensor([130, 0, 5, 200])
    rows = (torch.randn(335, 160) * 2).requires_grad_()
    shapes = ((4, 96, 160), (4, 96, 160), (4, 160, 96))
    weights = [(torch.randn(*shape) * 0.1).requires_grad_() for shape in shapes]
    row_weight = torch.rand(335).requires_grad_()
    return rows, weights, counts, row_weight, torch.randn(335, 160) * 1e-5


def test_experts_multiply_what_the_recipe_says() -> None:
    rows, weights, counts, row_weight, grad = feed_forward_operands()
    output = fp8_swiglu_feed_forward(rows, *weights, counts, row_weight)
    output.backward(grad)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        part = slice(start, start + count)
        start += count
        with torch.no_grad():
            gate_w, up_w, down_w = (blocks(weight[expert]) for weight in weights)
            x, scale = tiles(rows[part], ue8m0=True), row_weight[part]  # what is sent has scales that are powers of two
            gate, up = x @ gate_w.T, x @ up_w.T
            assert close(output[part], tiles(activate(gate, up, scale)) @ down_w.T)
            kept_gate, kept_up = tiles(gate), tiles(up)
            arrived = gradient_tiles(grad[part], ue8m0=True)
            grad_hidden = arrived @ down_w
            hidden = activate(kept_gate, kept_up, scale)
            grad_gate, grad_up, grad_scale = activate_backward(grad_hidden, kept_gate, kept_up, scale)
            wanted = [
                (weights[0].grad, token_tiles(grad_gate).T @ token_tiles(x)),
                (weights[1].grad, token_tiles(grad_up).T @ token_tiles(x)),
                (weights[2].grad, token_tiles(arrived).T @ token_tiles(hidden)),
            ]
            assert grad_scale is not None
            assert all(close(got[expert], want) for got, want in wanted)
            # The two sums are quantised from values that differ in float32's last bits: a few codes may fall to the other side.
            assert close(rows.grad[part], gradient_tiles(grad_gate) @ gate_w + gradient_tiles(grad_up) @ up_w, 1e-3)
            assert close(row_weight.grad[part], grad_scale, 1e-3)


def test_one_feed_forward_is_the_case_of_one_group_without_travel() -> None:
    torch.manual_seed(4)
    rows = torch.randn(40, 64, requires_grad=True)
    gate, up, down = ((torch.randn(*shape) * 0.1).requires_grad_() for shape in ((96, 64), (96, 64), (64, 96)))
    output = fp8_swiglu_feed_forward(rows, gate, up, down)
    output.sum().backward()
    with torch.no_grad():
        x = tiles(rows)
        assert close(output, tiles(activate(x @ blocks(gate).T, x @ blocks(up).T, None)) @ blocks(down).T)
    assert gate.grad.shape == gate.shape
    assert down.grad.shape == down.shape


def test_each_operand_is_quantised_as_often_as_the_paper_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights once, for forward and Dgrad; the input once per direction; each gradient once per direction; the SwiGLU inputs once
    for the cache; the activation once forward and once, from what was recomputed, backward."""
    calls: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def watch(name: str) -> None:
        function = getattr(module, name)

        def watched(x: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
            calls[name, tuple(x.shape)] += 1
            return function(x, **named)

        monkeypatch.setattr(module, name, watched)

    for name in ("quantize_1x128", "quantize_128x128", "quantize_e5m6"):
        watch(name)
    tokens, inputs, outputs = 60, 48, 32
    x, weight, grad = operands(tokens, inputs, outputs)
    fp8_linear(x, weight).backward(grad)
    assert calls == {
        ("quantize_128x128", (outputs, inputs)): 1,
        ("quantize_1x128", (tokens, inputs)): 1,
        ("quantize_1x128", (inputs, tokens)): 1,
        ("quantize_1x128", (tokens, outputs)): 1,
        ("quantize_1x128", (outputs, tokens)): 1,
    }
    calls.clear()
    fp8_linear_after_attention(x, weight).backward(grad)
    assert calls["quantize_e5m6", (tokens, inputs)] == 1
    assert calls.total() == 6
    calls.clear()
    width = 20
    rows = torch.randn(tokens, inputs, requires_grad=True)
    weights = [torch.randn(1, *shape, requires_grad=True) for shape in ((width, inputs), (width, inputs), (inputs, width))]
    fp8_swiglu_feed_forward(rows, *weights, torch.tensor([tokens])).sum().backward()
    assert calls == {
        ("quantize_128x128", (width, inputs)): 2,
        ("quantize_128x128", (inputs, width)): 1,
        ("quantize_1x128", (tokens, inputs)): 2,  # x forward, and the gradient that arrives
        ("quantize_1x128", (inputs, tokens)): 2,  # both again, lying
        ("quantize_1x128", (tokens, width)): 3 + 2,  # gate, up and activation; the gradients of gate and up
        ("quantize_1x128", (width, tokens)): 1 + 2,  # the recomputed activation; both gradients, lying
    }


def test_backward_keeps_bytes_and_not_floats() -> None:
    kept: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x, weight, _ = operands(256, 256, 128)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        fp8_linear(x, weight)
    assert sum(t.numel() * t.element_size() for t in kept) == 256 * 256 + 256 * 2 * 4 + 128 * 256 + 2 * 4
    kept.clear()
    rows, weights, counts, row_weight, _ = feed_forward_operands()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        fp8_swiglu_feed_forward(rows, *weights, counts, row_weight)
    activations = [t for t in kept if t.shape[0] == len(rows) and t.dim() == 2]
    assert sum(t.numel() * t.element_size() for t in activations) == 335 * (160 + 2 * 96) + 335 * 4 * (2 + 1 + 1)
    assert all(t.dtype in (torch.float8_e4m3fn, torch.float32) for t in kept)


def test_outputs_and_input_gradients_have_the_low_precision_of_autocast() -> None:
    x, weight, _ = operands(16, 128, 128)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(low, weight)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert low.grad is not None
    assert weight.grad is not None
    assert (low.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)

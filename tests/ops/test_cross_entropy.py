"""The fused head and loss against `cross_entropy(linear(...))`."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops import cross_entropy
from finback.ops.cross_entropy import linear_cross_entropy, linear_log_probs
from tests.ops.rule import assert_low_precision_rule, assert_repeatable, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("implementation")


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=ignore_index, reduction="sum")


def draw(rows: int, ignored: int = 0, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, 37, (rows,))
    targets[torch.randperm(rows)[:ignored]] = ignore_index
    return torch.randn(rows, 16), torch.randn(37, 16), targets


@pytest.mark.parametrize(
    ("rows", "ignored", "ignore_index"), [(1, 0, -100), (50, 0, -100), (50, 20, -100), (50, 7, 3), (9, 9, -100)]
)
@pytest.mark.parametrize("chunk", [37, 37 * 8, 37 * 50, 1 << 22])
def test_loss_and_gradients_equal_the_two_steps(
    rows: int, ignored: int, ignore_index: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the rows are cut: one at a time, eight at a time with a rest, all at once; rows without a target count nothing."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", 1)
    inputs = draw(rows, ignored, ignore_index)
    ours = outputs_and_gradients(lambda *tensors: linear_cross_entropy(*tensors, ignore_index), inputs)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = outputs_and_gradients(lambda *tensors: naive(*tensors, ignore_index), exact)
    assert ours[0].dtype == torch.float32
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("rows", [255, 256, 257, 600])
def test_a_large_vocabulary_has_few_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 256 rows at a time, whatever the vocabulary, so that the head's gradient is summed over few chunks."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 37)
    inputs, sums = draw(rows), []
    add = cross_entropy.add_sum_of_outer
    monkeypatch.setattr(cross_entropy, "add_sum_of_outer", lambda *tensors: sums.append(len(tensors[1])) or add(*tensors))
    outputs_and_gradients(linear_log_probs, inputs)
    assert sums == [256] * (rows // 256) + [rows % 256] * (rows % 256 > 0)


def test_gradients_pass_gradcheck() -> None:
    hidden, weight, targets = draw(6, 2)
    inputs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: linear_cross_entropy(*tensors, targets), inputs)


def test_it_is_a_sum_and_not_a_mean() -> None:
    hidden, weight = torch.zeros(5, 4), torch.ones(8, 4)
    assert linear_cross_entropy(hidden, weight, torch.arange(5)).item() == pytest.approx(5 * torch.tensor(8.0).log().item())


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = draw(20)
    for tensor in outputs_and_gradients(linear_cross_entropy, (1e4 * hidden, weight, targets)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("leaf", [0, 1])
def test_one_of_the_two_gradients_alone(leaf: int) -> None:
    inputs = draw(12)
    both = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    linear_cross_entropy(*both).backward()
    inputs[leaf].requires_grad_()
    linear_cross_entropy(*inputs).backward()
    assert torch.equal(inputs[leaf].grad, both[leaf].grad)  # type: ignore[arg-type]


def test_loss_is_the_same_without_gradients() -> None:
    hidden, weight, targets = draw(30, 4)
    expected = linear_cross_entropy(hidden.clone().requires_grad_(), weight, targets)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bf16_keeps_the_error_rule(weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bfloat16 weights, and with float32 master weights under mixed precision; several chunks."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", 37 * 64)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", 1)
    hidden, weight, targets = draw(200, 10)
    assert_low_precision_rule(linear_cross_entropy, naive, hidden.bfloat16(), weight.to(weight_dtype), targets)


def test_autocast_does_not_reach_inside() -> None:
    hidden, weight, targets = draw(30)
    expected = linear_cross_entropy(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_repeatable(dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(40, 3)
    assert_repeatable(linear_cross_entropy, hidden.to(dtype), weight.to(dtype), targets)


def naive_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("chunk", [37, 37 * 8, 37 * 50, 1 << 22])
@pytest.mark.parametrize("rows", [1, 50])
def test_log_probs_and_their_gradients_equal_the_two_steps(rows: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row with a gradient of its own, as a policy's loss gives it."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", 1)
    inputs = draw(rows)
    ours = outputs_and_gradients(linear_log_probs, inputs)
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs]
    expected = outputs_and_gradients(naive_log_probs, exact)
    assert ours[0].dtype == torch.float32
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-6)


def test_log_probs_obey_the_low_precision_rule() -> None:
    hidden, weight, targets = draw(64)
    assert_low_precision_rule(linear_log_probs, naive_log_probs, hidden.bfloat16(), weight, targets)


def test_log_probs_pass_gradcheck() -> None:
    hidden, weight, targets = draw(6)
    inputs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: linear_log_probs(*tensors, targets), inputs)


def test_log_probs_of_no_rows() -> None:
    hidden, weight, targets = draw(0)
    assert linear_log_probs(hidden, weight, targets).shape == (0,)

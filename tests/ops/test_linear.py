"""The products of a linear layer: through oneDNN, where it is asked, and through whatever torch takes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finback.ops import linear as module
from finback.ops.grouped import grouped_linear, grouped_linear_loop
from finback.ops.linear import add_sum_of_outer, linear, rows_times, sum_of_outer
from tests.ops.rule import assert_repeatable, outputs_and_gradients

# rows, inputs, outputs: below and above the thresholds, and sizes that divide by nothing
SHAPES = [
    (1, 3, 2),
    (63, 16, 8),
    (64, 16, 8),
    (65, 7, 5),
    (256, 32, 48),
    (300, 33, 17),
    (257, 1, 1),
    (256, 520, 6),
    (520, 6, 520),
]


@pytest.fixture(params=[False, True], autouse=True)
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways on every processor: either is right everywhere, only one of them is fast."""
    chosen: bool = request.param
    if chosen and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: chosen)
    return chosen


def assert_equal(ours: Tensor, truth: Tensor) -> None:
    """In float32, against float64: sums of a few hundred products of numbers about 1."""
    assert ours.dtype == torch.float32
    assert ours.shape == truth.shape
    assert float((ours.double() - truth).norm()) <= 1e-6 * float(truth.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_those_in_float64(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    assert_equal(rows_times(x, weight.t()), x.double() @ weight.double().t())
    assert_equal(rows_times(grad, weight), grad.double() @ weight.double())
    assert_equal(sum_of_outer(grad, x), grad.double().t() @ x.double())
    out = torch.full((rows, outputs), float("nan"))
    rows_times(x, weight.t(), out=out)
    assert_equal(out, x.double() @ weight.double().t())


@pytest.mark.parametrize("outputs", [5, 4096, 4097, 9000])
def test_wide_products_by_parts_equal_those_in_float64(outputs: int) -> None:
    x, weight, grad = torch.randn(70, 12), torch.randn(outputs, 12), torch.randn(70, outputs)
    out = torch.full((70, outputs), float("nan"))
    assert rows_times(x, weight.t(), out=out) is out
    assert_equal(out, x.double() @ weight.double().t())
    total = torch.randn(outputs, 12)
    before = total.double()
    add_sum_of_outer(total, grad, x)
    assert_equal(total, before + grad.double().t() @ x.double())
    low = torch.zeros(outputs, 12)  # of bfloat16, what is added is rounded, and the sum is not
    add_sum_of_outer(low, grad.bfloat16(), x.bfloat16())
    assert torch.equal(low, torch.mm(grad.bfloat16().t(), x.bfloat16()).float())


def test_products_take_views() -> None:
    wide, weight = torch.randn(300, 80), torch.randn(24, 32)
    for x in (wide[:, :32], wide[:, 5:37], torch.randn(32, 300).t()):
        assert_equal(rows_times(x, weight.t()), x.double() @ weight.double().t())
        assert_equal(sum_of_outer(x, wide[:, 40:]), x.double().t() @ wide[:, 40:].double())


@pytest.mark.parametrize("leading", [(300,), (3, 100), (2, 3, 50), (1, 1)])
def test_linear_and_its_gradients_equal_the_formula(leading: tuple[int, ...]) -> None:
    inputs = torch.randn(*leading, 24), torch.randn(40, 24)
    exact = outputs_and_gradients(F.linear, [tensor.double() for tensor in inputs])
    for ours, truth in zip(outputs_and_gradients(linear, inputs), exact, strict=True):
        assert_equal(ours, truth)


def test_linear_takes_no_rows_and_stopped_gradients() -> None:
    assert linear(torch.randn(0, 8), torch.randn(4, 8)).shape == (0, 4)
    x, weight = torch.randn(300, 8), torch.randn(4, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert_equal(weight.grad, x.double().sum(0).expand(4, 8))


def test_linear_is_repeatable() -> None:
    assert_repeatable(linear, torch.randn(300, 24), torch.randn(40, 24))


def test_autocast_still_means_bfloat16() -> None:
    x, weight = torch.randn(300, 24), torch.randn(40, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("counts", [[70, 0, 300, 1], [0, 0, 0], [256]])
def test_grouped_products_equal_the_loop(counts: list[int]) -> None:
    x, weight = torch.randn(sum(counts), 16), torch.randn(len(counts), 8, 16)
    ours = outputs_and_gradients(grouped_linear, (x, weight, torch.tensor(counts)))
    loop = outputs_and_gradients(grouped_linear_loop, (x.double(), weight.double(), torch.tensor(counts)))
    for one, other in zip(ours, loop, strict=True):
        assert_equal(one, other)


def test_other_dtypes_are_left_to_torch() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        x, weight = torch.randn(300, 16).to(dtype), torch.randn(8, 16).to(dtype)
        assert not module.prefers_onednn(x, weight)
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_the_processor_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a measurement, which could change from process to process and with it the bits of a resumed run."""
    monkeypatch.undo()
    assert module.onednn_is_faster() == module.onednn_is_faster.__wrapped__()

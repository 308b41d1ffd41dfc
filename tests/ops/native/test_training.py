"""The C kernels of a training step: each against its twin in torch, whatever the threads, and on what is not finite."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from finback.ops import attention, cross_entropy, norm, router, swiglu
from finback.ops.native import build
from finback.ops.native.build import training_kernels
from finback.ops.native.training import TrainingKernels
from tests.ops.native.rule import DTYPES, assert_within_the_rule, draw, skip_without_compiler, threads, wide

WIDTHS = [1, 7, 16, 33, 64, 250]  # single elements, less than a vector, whole vectors, both
IGNORED = -100


@pytest.fixture
def kernels() -> TrainingKernels:
    found = training_kernels()
    if found is None:
        skip_without_compiler()
    assert found is not None
    return found


def assert_rule(ours: Sequence[Tensor | None], plain: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> None:
    for one, other, exact in zip(ours, plain, truth, strict=True):
        if one is None or other is None or exact is None:
            assert one is other is exact is None
        else:
            assert_within_the_rule(one, other, exact.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", WIDTHS)
def test_rms_norm_equals_its_twin(kernels: TrainingKernels, size: int, dtype: torch.dtype) -> None:
    x, grad, weight = draw(dtype, 5, 40, size), draw(dtype, 5, 40, size), 1 + draw(torch.float32, size) / 4
    exact = norm.normalise(*wide(x, weight), 1e-6)
    ours, plain = kernels.rms_norm(x, weight, 1e-6), norm.normalise(x, weight, 1e-6)
    assert_rule(ours, plain, exact)
    backward = norm.normalise_backward(*wide(grad, x, weight), exact[1])
    ours, plain = kernels.rms_norm_backward(grad, x, weight, ours[1]), norm.normalise_backward(grad, x, weight, plain[1])
    assert_rule(ours, plain, backward)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_takes_rows_cut_out_of_wider_ones(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    """As MLA's latent is cut out of latent and rope key; and tensors whose rows are no rows."""
    whole, weight, grad = draw(dtype, 3, 20, 48), draw(torch.float32, 32), draw(dtype, 3, 20, 32)
    for x in (whole[..., :32], whole[:, 3:, 5:37], whole[..., ::2][..., :20], whole.transpose(0, 1)[..., :32]):
        size = x.shape[-1]
        expected = kernels.rms_norm(x.contiguous(), weight[:size], 1e-6)
        found = kernels.rms_norm(x, weight[:size], 1e-6)
        assert all(map(torch.equal, found, expected))
        some = grad.flatten()[: x.numel()].view(x.shape)
        found = kernels.rms_norm_backward(some, x, weight[:size], found[1])
        assert all(map(torch.equal, found, kernels.rms_norm_backward(some, x.contiguous(), weight[:size], expected[1])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_equals_its_twin(kernels: TrainingKernels, weighted: bool, size: int, dtype: torch.dtype) -> None:
    gate, up, grad = (draw(dtype, 60, size, scale=scale) for scale in (3, 1, 1))
    row_weight = torch.rand(60) if weighted else None
    inputs, exact = (gate, up, row_weight), (*wide(gate, up), row_weight)
    assert_rule([kernels.swiglu(*inputs)], [swiglu.activate(*inputs)], [swiglu.activate(*exact)])
    truth = swiglu.activate_backward(grad.double(), *exact)
    assert_rule(kernels.swiglu_backward(grad, *inputs), swiglu.activate_backward(grad, *inputs), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", WIDTHS)
def test_cross_entropy_equals_its_twin(kernels: TrainingKernels, size: int, dtype: torch.dtype) -> None:
    logits, targets = draw(dtype, 70, size, scale=4), torch.randint(size, (70,))
    targets[::9] = IGNORED
    made = [(tensor.clone(), function) for tensor, function in (
        (logits, kernels.cross_entropy), (logits, cross_entropy.softmax_gradient), (logits.double(), cross_entropy.softmax_gradient)
    )]  # fmt: skip
    losses = [function(tensor, targets, IGNORED, True) for tensor, function in made]
    assert_within_the_rule(*losses)
    assert_within_the_rule(*(tensor for tensor, _ in made))
    assert not losses[0][::9].any()
    assert not made[0][0][::9].any()
    before = logits.clone()
    assert torch.equal(kernels.cross_entropy(logits, targets, IGNORED, False), losses[0])
    assert torch.equal(logits, before)  # without the gradient they stay as they are


@pytest.mark.parametrize("target", [-1, 8, 2**40])
def test_a_target_outside_of_the_vocabulary_is_an_error(kernels: TrainingKernels, target: int) -> None:
    with pytest.raises(IndexError, match="outside of the vocabulary of 8"):
        kernels.cross_entropy(torch.zeros(2, 8), torch.tensor([0, target]), IGNORED, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "start"), [(1, 0), (5, 0), (16, 3), (128, 128), (3, 254)])
def test_causal_softmax_equals_its_twin(kernels: TrainingKernels, rows: int, start: int, dtype: torch.dtype) -> None:
    query, key = draw(dtype, 3, rows, 24), draw(dtype, 3, start + rows, 24)
    grad, scale = draw(dtype, 3, rows, start + rows), 0.3
    exact, plain = (
        attention.causal_weights(*tensors, start, start + rows, scale) for tensors in (wide(query, key), (query, key))
    )
    weights = torch.bmm(query, key.transpose(1, 2))
    kernels.causal_softmax(weights, start, scale)
    assert_within_the_rule(weights, plain, exact)
    assert not weights.triu(start + 1).any()
    of_scores, plain_of_scores, exact_of_scores = (
        torch._softmax_backward_data(g, w, -1, w.dtype) * scale for g, w in ((grad, weights), (grad, plain), wide(grad, exact))
    )
    kernels.causal_softmax_backward(grad, weights, start, scale)
    assert_within_the_rule(grad, plain_of_scores, exact_of_scores)
    assert of_scores.shape == grad.shape


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy"])
def test_select_experts_equals_its_twin(kernels: TrainingKernels, method: str, groups: int, kept: int) -> None:
    scores = torch.randn(3000, 32)
    found = kernels.select_experts(scores, 4, groups, kept, method == "noaux_tc")
    plain = router._select_in_torch(scores, 4, groups, kept, method)
    assert torch.equal(found.sort(-1).values, plain.sort(-1).values)
    scores[7] = float("nan")  # a run that has diverged: anything, but experts that exist, each once
    row = kernels.select_experts(scores, 4, groups, kept, method == "noaux_tc")[7].tolist()
    assert len(set(row)) == 4
    assert set(row) <= set(range(32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 1 << 14, (1 << 15) + 21])
def test_adamw_equals_the_formula(kernels: TrainingKernels, size: int, dtype: torch.dtype) -> None:
    p, g, m, v = draw(torch.float32, size), draw(torch.float32, size), draw(dtype, size), draw(dtype, size).square()
    new_m = 0.9 * m.double() + 0.1 * 0.5 * g.double()
    new_v = 0.95 * v.double() + 0.05 * (0.5 * g.double()).square()
    new_p = 0.99 * p.double() - 0.02 * new_m / (new_v.sqrt() + 1e-8)
    kernels.adamw(p, g, m, v, scale=0.5, beta1=0.9, beta2=0.95, decay=0.99, step_size=0.02, epsilon=1e-8)
    torch.testing.assert_close(p.double(), new_p, rtol=1e-5, atol=1e-5)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(m.double(), new_m, rtol=rtol, atol=1e-6)
    torch.testing.assert_close(v.double(), new_v, rtol=rtol, atol=1e-6)


def everything(kernels: TrainingKernels, dtype: torch.dtype) -> list[Tensor]:
    """The outputs of all kernels on arrays that are large enough for several threads."""
    generator = torch.Generator().manual_seed(3)
    x, y, z = (torch.randn(1000, 70, generator=generator).to(dtype) for _ in range(3))
    weight, row_weight, targets = (
        torch.rand(70, generator=generator),
        torch.rand(1000, generator=generator),
        torch.arange(1000) % 70,
    )
    scores = torch.randn(4, 60, 100, generator=generator).to(dtype)
    grad = torch.randn(4, 60, 100, generator=generator).to(dtype)
    p, g = (torch.randn(70_000, generator=generator) for _ in range(2))
    normalised, scales = kernels.rms_norm(x, weight, 1e-6)
    outputs = [normalised, scales, *kernels.rms_norm_backward(y, x, weight, scales), kernels.swiglu(x, y, row_weight)]
    outputs += [tensor for tensor in kernels.swiglu_backward(z, x, y, row_weight) if tensor is not None]
    moments = x.flatten().clone(), y.flatten().square()
    kernels.adamw(p, g, *moments, scale=0.5, beta1=0.9, beta2=0.95, decay=0.99, step_size=0.02, epsilon=1e-8)
    outputs += [p, *moments, kernels.cross_entropy(x, targets, IGNORED, True), x]
    kernels.causal_softmax(scores, 40, 0.3)
    kernels.causal_softmax_backward(grad, scores, 40, 0.3)
    chosen = kernels.select_experts(torch.randn(2000, 32, generator=generator), 4, 4, 2, True)
    return [*outputs, scores, grad, chosen]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_result_depends_on_the_number_of_threads(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    with threads(1):
        alone = everything(kernels, dtype)
    for count in (2, 3):
        with threads(count):
            assert all(map(torch.equal, everything(kernels, dtype), alone))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(kernels: TrainingKernels, bad: float, dtype: torch.dtype) -> None:
    """A step that has diverged must show: its gradient norm is looked at."""
    x, y = torch.ones(2, 40, dtype=dtype), torch.ones(2, 40, dtype=dtype)
    x[1, 37] = bad
    calls: list[Callable[[], Tensor]] = [
        lambda: kernels.rms_norm_backward(y, x, torch.ones(40), kernels.rms_norm(x, torch.ones(40), 1e-6)[1])[0],
        lambda: kernels.swiglu(x, y, None),
        lambda: kernels.cross_entropy(x.clone(), torch.tensor([0, 1]), IGNORED, True),
    ]
    for call in calls:
        found = call()
        assert found[0].isfinite().all()
        assert not found[1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_are_no_work(kernels: TrainingKernels, dtype: torch.dtype) -> None:
    x = torch.empty(0, 8, dtype=dtype)
    output, scales = kernels.rms_norm(x, torch.ones(8), 1e-6)
    assert output.shape == (0, 8)
    grad_x, grad_weight = kernels.rms_norm_backward(x, x, torch.ones(8), scales)
    assert grad_x.shape == (0, 8)
    assert not grad_weight.any()
    assert kernels.swiglu(x, x, None).shape == (0, 8)
    assert kernels.cross_entropy(x, torch.empty(0, dtype=torch.int64), IGNORED, True).shape == (0,)


def test_without_a_compiler_torch_computes_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ())
    build.training_kernels.cache_clear()
    try:
        x, weight = torch.randn(4, 24), torch.rand(24)
        assert torch.equal(norm.rms_norm(x, weight, 1e-6), norm.normalise(x, weight, 1e-6)[0])
        assert torch.equal(swiglu.swiglu(x, x), swiglu.activate(x, x, None))
    finally:
        build.training_kernels.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().startswith("training on the CPU runs on torch alone")
    assert "install gcc" in record.getMessage()


def test_functions_without_gradients_use_them_too(kernels: TrainingKernels) -> None:
    x, weight = torch.randn(4, 24), torch.rand(24)
    with torch.no_grad():
        assert torch.equal(norm.rms_norm(x, weight, 1e-6), kernels.rms_norm(x, weight, 1e-6)[0])
        assert torch.equal(swiglu.swiglu(x, x), kernels.swiglu(x, x, None))

"""Causal attention in C beside the formula in float64."""

import pytest
import torch
from torch import Tensor

from finback.ops import attention
from finback.ops.native.build import causal_kernels, causal_kernels_for
from finback.ops.native.causal import CausalKernels
from tests.ops.native.rule import skip_without_compiler, threads

# Batch, query heads, heads of keys, tokens, width of queries and keys, of values: a token, less than a tile and more than a block of
# queries, ends in the middle of everything, widths that fill no panel and more than two.
SHAPES = [
    (1, 1, 1, 1, 8, 4),
    (2, 4, 4, 5, 6, 10),
    (1, 2, 2, 96, 64, 64),
    (2, 6, 2, 131, 24, 40),
    (1, 3, 3, 193, 34, 2),
    (1, 2, 1, 257, 96, 64),
    (1, 2, 2, 389, 192, 128),
]
SCALE = 0.3


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> CausalKernels:
    found = causal_kernels()
    if found is None:
        skip_without_compiler()
        raise AssertionError("the kernels do not compile")
    return found


def draw(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output."""
    batch, heads, groups, tokens, size, width = shape
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((heads, size), (groups, size), (groups, width), (heads, width))
    query, key, value, grad = (torch.randn(batch, h, tokens, s, generator=generator).to(dtype) for h, s in sizes)
    return query, key, value, grad


def exact(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all three, in float64."""
    inputs = [t.double().requires_grad_() for t in (query, key, value)]
    share = query.shape[1] // key.shape[1]
    scores = SCALE * inputs[0] @ inputs[1].repeat_interleave(share, 1).transpose(2, 3)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(later, -torch.inf).softmax(-1) @ inputs[2].repeat_interleave(share, 1)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad.double())]


def computed(kernels: CausalKernels, query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> list[Tensor]:
    return [kernels.attention(query, key, value, SCALE), *kernels.backward(grad, query, key, value, SCALE)]


def assert_close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    """In bfloat16 weights and gradients of scores are rounded once, and each result once: half a unit of the last place each."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        limit = 2 * 2.0**-9 if dtype == torch.bfloat16 else 2e-6
        assert float((one.double() - other).norm()) <= limit * float(other.norm()) + 1e-12


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_attention_and_its_gradients(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, kernels: CausalKernels
) -> None:
    operands = draw(shape, dtype)
    assert_close(computed(kernels, *operands), exact(*operands), dtype)


def test_queries_come_behind_keys_that_were_there_before(dtype: torch.dtype, kernels: CausalKernels) -> None:
    """Sequences of unlike lengths: behind the end of each stands what must not be read, and nothing is written."""
    spans = [(0, 5), (7, 3), (50, 97), (3, 0), (101, 1), (5, 60)]
    keys = max(past + own for past, own in spans)
    query, key, value, grad = (t[:, :, :97] if i in (0, 3) else t for i, t in enumerate(draw((6, 6, 2, keys, 24, 40), dtype)))
    query, grad = query.clone(), grad.clone()
    for n, (past, own) in enumerate(spans):
        for t, end in ((query, own), (grad, own), (key, past + own), (value, past + own)):
            t[n, :, end:] = float("nan")
    where = torch.tensor(spans)
    output, *grads = kernels.attention(query, key, value, SCALE, where), *kernels.backward(grad, query, key, value, SCALE, where)
    for n, (past, own) in enumerate(spans):
        inputs = [
            t[n : n + 1, :, :end].double().requires_grad_() for t, end in ((query, own), (key, past + own), (value, past + own))
        ]
        scores = SCALE * inputs[0] @ inputs[1].repeat_interleave(3, 1).transpose(2, 3)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(past + 1)
        exact = scores.masked_fill(later, -torch.inf).softmax(-1) @ inputs[2].repeat_interleave(3, 1)
        wanted = [exact.detach(), *torch.autograd.grad(exact, inputs, grad[n : n + 1, :, :own].double())]
        ends = (own, own, past + own, past + own)
        found = [t[n : n + 1, :, :end] for t, end in zip((output, *grads), ends, strict=True)]
        assert_close(found, wanted, dtype)


def test_they_read_any_strides(dtype: torch.dtype, kernels: CausalKernels) -> None:
    """Heads behind tokens; parts of wider rows, which start at an even place or at an odd one; one number repeated."""
    operands = draw((2, 3, 3, 50, 16, 12), dtype)
    wanted = computed(kernels, *operands)
    query, key, value, _ = operands
    behind = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in operands]
    assert all(torch.equal(a, b) for a, b in zip(computed(kernels, *behind), wanted, strict=True))
    for offset in (2, 3):
        wider = torch.cat((torch.randn(*value.shape[:3], offset).to(dtype), value), -1)
        parts = (query, key, wider[..., offset:])
        assert torch.equal(kernels.attention(*parts, SCALE), wanted[0])
    ones = torch.ones((), dtype=dtype).expand(2, 3, 50, 12)
    assert_close(computed(kernels, query, key, value, ones), exact(query, key, value, ones), dtype)


def test_no_result_depends_on_threads_or_on_what_else_is_in_the_batch(dtype: torch.dtype, kernels: CausalKernels) -> None:
    """With more heads a task is more queries."""
    operands = draw((8, 4, 4, 200, 16, 16), dtype)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(computed(kernels, *operands))
            one_by_one = [computed(kernels, *(t[i : i + 1] for t in operands)) for i in range(8)]
            found.append([torch.cat(parts) for parts in zip(*one_by_one, strict=True)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_nothing_is_read_behind_the_queries_of_a_tile(dtype: torch.dtype, kernels: CausalKernels) -> None:
    """Neither later tokens nor what fills up panels and words; the six queries that are computed together share their keys."""
    operands = draw((1, 1, 1, 101, 10, 6), dtype)
    wanted = computed(kernels, *operands)
    for t in operands:
        t[0, 0, 60:] = float("nan")
    output, grad_query, *_ = computed(kernels, *operands)
    assert torch.equal(output[:, :, :60], wanted[0][:, :, :60])
    assert torch.equal(grad_query[:, :, :60], wanted[1][:, :, :60])
    assert output[:, :, 60:].isnan().all()


def test_a_negative_scale_is_one_like_others(dtype: torch.dtype, kernels: CausalKernels) -> None:
    query, key, value, grad = draw((1, 2, 2, 50, 16, 8), dtype)
    negative = [kernels.attention(query, key, value, -SCALE), *kernels.backward(grad, query, key, value, -SCALE)]
    wanted = exact(-query, key, value, grad)
    assert_close(negative, [wanted[0], -wanted[1], *wanted[2:]], dtype)


def test_scores_far_apart_overflow_nothing(dtype: torch.dtype, kernels: CausalKernels) -> None:
    operands = tuple(60 * t for t in draw((1, 1, 1, 140, 8, 4), dtype))
    assert all(t.isfinite().all() for t in computed(kernels, *operands))


def test_causal_attention_uses_them_where_they_are_fast(
    dtype: torch.dtype, kernels: CausalKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value, grad = draw((1, 2, 2, 20, 8, 6), dtype)
    fast = dtype in kernels.dtypes
    assert (causal_kernels_for(query, key, value) is not None) == fast
    calls = []
    for name in ("attention", "backward"):
        plain = getattr(CausalKernels, name)
        monkeypatch.setattr(CausalKernels, name, lambda *a, n=name, f=plain: (calls.append(n), f(*a))[1])
    inputs = [t.clone().requires_grad_() for t in (query, key, value)]
    output = attention.causal_attention(*inputs, SCALE)
    found = [output, *torch.autograd.grad(output, inputs, grad)]
    assert calls == (["attention", "backward"] if fast else [])
    if fast:
        assert all(torch.equal(a, b) for a, b in zip(found, computed(kernels, query, key, value, grad), strict=True))


def test_what_they_do_not_take_is_left_to_torch(kernels: CausalKernels) -> None:
    query, key, value, _ = draw((1, 2, 2, 20, 7, 6), torch.bfloat16)
    assert not kernels.take(query, key, value)  # an odd width, read two by two
    assert causal_kernels_for(*(t.double() for t in (query, key, value))) is None
    assert causal_kernels_for(*(t.to("meta") for t in (query, key, value))) is None
    assert not kernels.take(*(t[:, :, :0].float() for t in (query, key, value)))
    assert torch.equal(
        attention.causal_attention(query, key, value, SCALE), attention.blocked_attention(query, key, value, SCALE)
    )

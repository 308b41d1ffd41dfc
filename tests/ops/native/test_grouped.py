"""The products of experts in C beside their definition: one matrix after another."""

import pytest
import torch
from torch import Tensor

from finback.ops import grouped
from finback.ops.native.build import grouped_kernels, grouped_kernels_for
from finback.ops.native.grouped import GroupedKernels
from tests.ops.native.rule import threads
from tests.ops.rule import outputs_and_gradients

CPU = torch.device("cpu")
# Rows of each group, P, Q: less than a tile and a panel, none, more than one visit of a sum to memory, sizes that divide by nothing.
SHAPES = [
    ([1, 0, 2], 2, 1),
    ([0, 0], 4, 3),
    ([5, 6, 7, 12, 13], 16, 64),
    ([40, 0, 17, 1], 34, 70),
    ([100, 3], 96, 130),
    ([1030, 2070, 961], 10, 20),
    ([64, 65], 200, 97),
    ([300, 20], 500, 270),
    ([270], 50, 700),
    ([1100], 500, 270),
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels(dtype: torch.dtype) -> GroupedKernels:
    found = grouped_kernels()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def operands(shape: tuple[list[int], int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts, size, width = shape
    generator = torch.Generator().manual_seed(sum(counts) + size)
    rows, matrices, right = (
        torch.randn(dims, generator=generator).to(dtype)
        for dims in ((sum(counts), size), (len(counts), size, width), (sum(counts), width))
    )
    return rows, matrices, right, torch.tensor(counts)


def products(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts.tolist()), matrices, strict=True)])


def outers(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    pairs = zip(left.split(counts.tolist()), right.split(counts.tolist()), strict=True)
    return torch.stack([a.t() @ b for a, b in pairs])


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """Float32 sums rounded once: half a unit of the stored type's last place, and what a few thousand additions round away."""
    assert ours.shape == exact.shape
    last_place = 2.0**-9 if ours.dtype == torch.bfloat16 else 0.0
    assert float((ours.double() - exact).norm()) <= (last_place + 1e-6) * float(exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_are_the_products_of_each_group(
    shape: tuple[list[int], int, int], dtype: torch.dtype, kernels: GroupedKernels
) -> None:
    rows, matrices, right, counts = operands(shape, dtype)
    exact = products(rows.double(), matrices.double(), counts)
    assert_close(kernels.product(rows, matrices, counts), exact)
    turned = matrices.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kernels.product(rows, turned, counts), kernels.product(rows, matrices, counts))
    spread = torch.randn(*rows.shape, 2).to(dtype)
    spread[..., 0] = rows
    assert torch.equal(kernels.product(spread[..., 0], matrices, counts), kernels.product(rows, matrices, counts))
    sums = kernels.outer(rows, right, counts)
    assert sums.dtype == dtype
    assert_close(sums, outers(rows.double(), right.double(), counts))
    assert not sums[counts == 0].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_named_by_an_order_are_read_where_they_lie(
    shape: tuple[list[int], int, int], dtype: torch.dtype, kernels: GroupedKernels
) -> None:
    rows, matrices, right, counts = operands(shape, dtype)
    few = max(1, len(rows) // 3)  # of which most stand in several places
    order, other = (torch.randint(few, (len(rows),), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(kernels.product(rows[:few], matrices, counts, order), kernels.product(rows[:few][order], matrices, counts))
    sums = kernels.outer(rows[:few][order], right[:few][other], counts)
    assert torch.equal(kernels.outer(rows[:few], right[:few], counts, order, other), sums)
    assert torch.equal(kernels.outer(rows[:few], right[:few][other], counts, left_order=order), sums)
    assert torch.equal(kernels.outer(rows[:few][order], right[:few], counts, right_order=other), sums)


def test_no_result_depends_on_the_number_of_threads(dtype: torch.dtype, kernels: GroupedKernels) -> None:
    rows, matrices, right, counts = operands(([700, 1100, 30], 130, 200), dtype)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append((kernels.product(rows, matrices, counts), kernels.outer(rows, right, counts)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_is_not_finite_stays_where_it_is(dtype: torch.dtype, kernels: GroupedKernels) -> None:
    """An odd number of rows and a width that fills no panel: what fills them up must not be read."""
    rows, matrices, right, counts = operands(([7, 9], 6, 5), dtype)
    rows[3, 2], right[10, 1] = float("nan"), float("inf")
    product, sums = kernels.product(rows, matrices, counts), kernels.outer(rows, right, counts)
    assert product.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert sums[0].isnan().nonzero()[:, 0].unique().tolist() == [2]
    assert (~sums[1].isfinite()).nonzero()[:, 1].unique().tolist() == [1]


def test_sums_of_an_odd_number_of_bfloat16_are_left_to_torch(kernels: GroupedKernels) -> None:
    assert not kernels.take(5, torch.bfloat16)
    assert kernels.take(5, torch.float32) == (torch.float32 in kernels.dtypes)
    rows, matrices, _, counts = operands(([40, 40], 5, 8), torch.bfloat16)
    ours = grouped.grouped_linear(rows, matrices.transpose(1, 2), counts)
    assert_close(ours, products(rows.double(), matrices.double(), counts))


def test_gathering_and_summing_products_equal_those_of_permuted_rows(
    dtype: torch.dtype, kernels: GroupedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 tokens that choose 3 of 5 experts; gradients of all operands."""
    monkeypatch.setattr(grouped, "onednn_is_faster", lambda: True)
    dispatch = grouped.dispatch_order(torch.rand(60, 5, generator=torch.Generator().manual_seed(0)).topk(3).indices, 5)
    x, weight, back = torch.randn(60, 8).to(dtype), torch.randn(5, 12, 8).to(dtype), torch.randn(5, 8, 12).to(dtype)

    def native(x: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        return grouped.summed_linear(grouped.gathered_linear(x, weight, dispatch), back, dispatch, 60)

    def plain(x: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        rows = grouped.grouped_linear(grouped.permute(x, dispatch), weight, dispatch.rows)
        return grouped.unpermute(grouped.grouped_linear(rows, back, dispatch.rows), dispatch, 60)

    permuted = []
    permute = grouped.permute
    monkeypatch.setattr(grouped, "permute", lambda *a: (permuted.append(a), permute(*a))[1])
    ours = outputs_and_gradients(native, (x, weight, back))
    assert len(permuted) == (grouped_kernels_for(dtype, CPU) is None)
    for one, other in zip(ours, outputs_and_gradients(plain, (x, weight, back)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alignment", [1, 4])
def test_what_the_kernels_do_not_take_is_permuted(alignment: int) -> None:
    """Rows of float64, and rows that were filled up."""
    dispatch = grouped.dispatch_order(torch.arange(40).view(20, 2) % 3, 3, alignment)
    x, weight = torch.randn(20, 4, dtype=torch.float64), torch.randn(3, 6, 4, dtype=torch.float64)
    ours = grouped.gathered_linear(x, weight, dispatch)
    assert torch.equal(ours, grouped.grouped_linear(grouped.permute(x, dispatch), weight, dispatch.rows))
    back = weight.transpose(1, 2).contiguous()
    summed = grouped.summed_linear(ours, back, dispatch, 20)
    assert torch.equal(summed, grouped.unpermute(grouped.grouped_linear(ours, back, dispatch.rows), dispatch, 20))


def test_experts_use_them_where_there_are_rows_enough(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "onednn_is_faster", lambda: True)
    if grouped_kernels_for(dtype, CPU) is None:
        pytest.skip("this processor multiplies faster by other means")
    calls = []
    plain = GroupedKernels.product
    monkeypatch.setattr(GroupedKernels, "product", lambda *a: (calls.append("product"), plain(*a))[1])
    for count, used in ((8, 0), (40, 1)):
        rows, matrices, _, counts = operands(([count] * 4, 8, 16), dtype)
        result = grouped.grouped_linear(rows, matrices.transpose(1, 2).contiguous(), counts)
        assert_close(result, products(rows.double(), matrices.double(), counts))
        assert len(calls) == used
        assert (grouped.row_alignment(4 * count, 4, dtype, CPU) == 1) == (count == 40 or count // 8 < 2)
    assert grouped_kernels_for(torch.float64, CPU) is None
    assert grouped_kernels_for(dtype, torch.device("meta")) is None

"""The products of a training step on this processor beside torch's own: experts, causal attention, and a linear layer, each forward
with all gradients. `python -m bench.kernels`.

Which way is taken depends on the processor: C where it has AVX-512 or AVX2, oneDNN or MKL for large single products, and bfloat16
widened to float32 where there are no instructions for it. The peers are the plain twins, which torch alone computes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.ceilings import DTYPES, Ceilings
from bench.contest import alternate, summarize
from bench.results import Row
from bench.small import leaf
from finback.ops.attention import attention_reference, causal_attention
from finback.ops.grouped import grouped_linear, grouped_linear_loop
from finback.ops.linear import linear

# Of a result and its gradients, relative to their norms. In bf16 both sides round the weights of attention, each in its own place.
_TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2}
Work = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Size:
    """How much is measured: shapes of the quickstart's model, and turns of one pass each."""

    experts: tuple[int, int, int, int] = (16, 8192, 128, 64)  # experts, rows, width in and out
    attention: tuple[int, int, int, int, int] = (8, 3, 256, 64, 64)  # sequences, heads, tokens, width of keys and of values
    product: tuple[int, int, int] = (2048, 128, 320)  # rows, width in and out
    warm_up: int = 2
    turns: int = 15


FULL: Size = Size()
QUICK: Size = Size(warm_up=1, turns=3)
TOY: Size = Size(experts=(2, 64, 8, 4), attention=(1, 2, 9, 8, 4), product=(32, 8, 12), warm_up=0, turns=1)


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """A row for each kind of product and precision."""
    rows, rates = [], ceilings.matmul_gflop_per_second
    for precision in DTYPES:
        rate = max(rates["fp32"], rates[precision])  # bfloat16 may be widened
        for name, peer, gflop, ours, theirs in _contests(size, precision):
            _check_equal(name, ours(), theirs(), _TOLERANCE[precision])
            rows.append(_row(f"{name}, {precision}", peer, gflop, ours, theirs, size, rate))
    return rows, _notes()


def _contests(size: Size, precision: str) -> list[tuple[str, str, float, Work, Work]]:
    """Name, peer, GFLOP, and both sides' work."""
    dtype = DTYPES[precision]
    count, rows, inner, outer = size.experts
    sequences, heads, tokens, keys, values = size.attention
    counts = torch.full((count,), rows // count)
    leaves = [leaf(rows // count * count, inner, dtype=dtype), leaf(count, outer, inner, dtype=dtype)]
    heads_of = [leaf(sequences, heads, tokens, width, dtype=dtype) for width in (keys, keys, values)]
    x, weight = leaf(size.product[0], size.product[1], dtype=dtype), leaf(size.product[2], size.product[1], dtype=dtype)
    scale = keys**-0.5
    pairs = sequences * heads * tokens * (tokens + 1) / 2
    return [
        (
            f"{count} experts",
            "one product after another",
            6 * leaves[0].numel() * outer / 1e9,
            _both_ways(lambda: grouped_linear(leaves[0], leaves[1], counts), leaves),
            _both_ways(lambda: grouped_linear_loop(leaves[0], leaves[1], counts), leaves),
        ),
        (
            "causal attention",
            "torch's scaled_dot_product_attention",
            6 * pairs * (keys + values) / 1e9,
            _both_ways(lambda: causal_attention(heads_of[0], heads_of[1], heads_of[2], scale), heads_of),
            _both_ways(lambda: attention_reference(heads_of[0], heads_of[1], heads_of[2], scale), heads_of),
        ),
        (
            "linear layer",
            "torch's linear",
            6 * x.numel() * size.product[2] / 1e9,
            _both_ways(lambda: linear(x, weight), (x, weight)),
            _both_ways(lambda: F.linear(x, weight), (x, weight)),
        ),
    ]


def _row(name: str, peer: str, gflop: float, ours: Work, theirs: Work, size: Size, ceiling: float) -> Row:
    sides = {"ours": lambda: lambda _: ours(), "theirs": lambda: lambda _: theirs()}
    turns = alternate(sides, range(size.warm_up + size.turns), separate=False)
    mine, other = (summarize([1e3 * turn.seconds for turn in turns[side][size.warm_up :]]) for side in sides)
    floor = {"gflop": gflop, "milliseconds": 1e3 * gflop / ceiling}
    return Row(name, "milliseconds", mine.median, mine.spread_percent, peer, other.median, other.spread_percent, floor=floor)


def _check_equal(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> None:
    """The result and each gradient of both sides, or there is nothing to compare."""
    for mine, other in zip(ours, theirs, strict=True):
        error = float((mine.double() - other.double()).norm() / other.double().norm())
        if not error <= tolerance:
            raise RuntimeError(f"{name}: ours and the peer's differ by {error:.1e} of their norm, more than {tolerance:.0e}")


def _both_ways(function: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Work:
    """A forward and a backward: the result and the gradients of `leaves`."""
    gradient = torch.randn(function().shape, generator=torch.Generator().manual_seed(0)).to(leaves[0].dtype)

    def work() -> list[Tensor]:
        result = function()
        return [result.detach(), *torch.autograd.grad(result, leaves, gradient)]

    return work


def _notes() -> list[str]:
    return [
        "Shapes of the quickstart's model. Both sides compute in one process, in turns; results and gradients are compared first. "
        "Attention's floor counts what the causal mask leaves, backward as twice the forward. Floors are at the better of the "
        "ceilings of the row's precision and of fp32.",
        "On processors without bfloat16 instructions torch multiplies it in plain loops, and finback widens it.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("kernels")

"""Many kernels as one call, and the row gather that begins one."""

import pytest
import torch
from torch import Tensor

from finback.ops.native.arguments import CachedRows, Norm, RotaryTable, Weights
from finback.ops.native.calls import Call
from tests.ops.native.rule import DTYPES, angles, assert_same_bits, compiled, draw, nans, threads

EPS, SIZE, LAYERS, VOCABULARY = 1e-6, 48, 3, 70


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_embedding_gathers_rows(tokens: int, dtype: torch.dtype) -> None:
    table, ids, output = draw(dtype, VOCABULARY, 19), torch.randint(0, VOCABULARY, (tokens,)), nans(dtype, tokens, 19)
    assert compiled().embedding(ids, table, output)() == 0
    assert torch.equal(output, table[ids])


@pytest.mark.parametrize("index", [-1, VOCABULARY])
def test_embedding_of_an_id_that_is_no_row_writes_nothing(index: int) -> None:
    ids, output = torch.tensor([3, index]), nans(torch.float32, 2, 4)
    assert compiled().embedding(ids, torch.zeros(VOCABULARY, 4), output)() == 1
    assert output.isnan().all()


class Step:
    """A decode step of a small Llama: its tensors, and the calls from token ids to logits."""

    def __init__(self, dtype: torch.dtype, lengths: list[int]) -> None:
        torch.manual_seed(7)
        tokens, width, self.calls = len(lengths), 16, list[Call]()
        self.ids = torch.randint(0, VOCABULARY, (tokens,))
        x, query, key, value = (nans(dtype, tokens, size) for size in (SIZE, SIZE, width, width))
        heads, self.logits, positions = nans(dtype, tokens, SIZE), nans(dtype, tokens, VOCABULARY), torch.tensor(lengths) - 1
        norm, rotary, table = Norm(torch.ones(SIZE, dtype=dtype), EPS), RotaryTable(*angles(torch.arange(64), 8)), None
        table = draw(dtype, VOCABULARY, SIZE)

        def matrix(rows: int, inputs: int = SIZE) -> Tensor:
            return draw(dtype, rows, inputs, scale=inputs**-0.5)

        kernels = compiled()
        self.calls.append(kernels.embedding(self.ids, table, x))
        for _ in range(LAYERS):
            cached = CachedRows(draw(dtype, tokens, 64, 2 * width), positions)
            weights = [matrix(SIZE), matrix(width), matrix(width)]
            self.calls += [
                kernels.linear(x, weights, [query, key, value], norm, biases=[draw(dtype, SIZE), None, draw(dtype, width)]),
                kernels.grouped_query_attention(query, key, value, cached, rotary, heads, 0.3),
                kernels.linear(heads, [matrix(SIZE)], [x], residual=x),
                kernels.feed_forward(x, x, norm=norm, residual=x, shared=Weights(matrix(80), matrix(80), matrix(SIZE, 80))),
            ]
        self.calls.append(kernels.linear(x, [table], [self.logits], norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[5], [3, 60, 17], [20] * 12])
def test_a_program_equals_its_calls_one_by_one(lengths: list[int], dtype: torch.dtype) -> None:
    one_by_one, whole, results = Step(dtype, lengths), Step(dtype, lengths), []
    for call in one_by_one.calls:
        assert call() == 0
    results.append(one_by_one.logits.clone())
    for count in (1, 2, 3):
        with threads(count):
            kernels = compiled()
            program = kernels.program([kernels.program(whole.calls[:4]), *whole.calls[4:]])  # programs may be parts of programs
            for _ in range(2):
                assert program() == 0
                results.append(whole.logits.clone())
    assert results[0].isfinite().all()
    assert_same_bits(results)


def test_a_program_stops_at_a_wrong_index_and_goes_on_when_it_is_right() -> None:
    step = Step(torch.float32, [3, 4])
    program = compiled().program(step.calls)
    right = step.ids[1].item()
    step.ids[1] = VOCABULARY
    with threads(2):
        assert program() == 1
        assert step.logits.isnan().all()
        step.ids[1] = right
        assert program() == 0
        assert step.logits.isfinite().all()


def test_tensors_live_as_long_as_the_program() -> None:
    """Only the call knows the weights; freed memory would be overwritten."""
    x, output = torch.ones(1, 512), torch.zeros(1, 512)
    program = compiled().program([compiled().linear(x, [torch.ones(512, 512)], [output])])
    filled = [torch.full((512, 512), float("nan")) for _ in range(8)]
    program()
    assert (output == 512).all()
    assert len(filled) == 8

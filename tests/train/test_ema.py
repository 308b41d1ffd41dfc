"""The moving average in a thread against the plain formula, and that it reads the weights of its own step."""

import pytest
import torch
from torch import Tensor

from finback.train.ema import MovingAverage


def make_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(700, 600, generator=generator), "b": torch.randn(5, generator=generator)}


def run(steps: int) -> tuple[MovingAverage, dict[str, Tensor]]:
    """Average `steps` updates of changing parameters; beside it the formula in plain torch."""
    parameters = make_parameters()
    average = MovingAverage(parameters, decay=0.9)
    plain = {name: p.clone() for name, p in parameters.items()}
    for step in range(steps):
        average.wait()
        for p in parameters.values():
            p.mul_(1.01).add_(0.1 * step)
        average.start()
        for name, p in parameters.items():
            plain[name] += (1 - 0.9) * (p - plain[name])
    average.wait()
    return average, plain


def test_equals_plain_average() -> None:
    average, plain = run(10)
    for name, tensor in plain.items():
        torch.testing.assert_close(average.tensors[name], tensor, rtol=1e-6, atol=1e-6)


def test_repeats_bitwise_and_continues_bitwise_from_saved_tensors() -> None:
    whole, _ = run(6)
    again, _ = run(6)
    for name in whole.tensors:
        assert torch.equal(whole.tensors[name], again.tensors[name])
    parameters = make_parameters()
    first = MovingAverage(parameters, decay=0.9)
    for step in range(3):
        first.wait()
        for p in parameters.values():
            p.mul_(1.01).add_(0.1 * step)
        first.start()
    first.wait()
    second = MovingAverage(parameters, decay=0.9)
    for name, tensor in first.tensors.items():
        second.tensors[name].copy_(tensor)
    for step in range(3, 6):
        second.wait()
        for p in parameters.values():
            p.mul_(1.01).add_(0.1 * step)
        second.start()
    second.wait()
    for name in whole.tensors:
        assert torch.equal(second.tensors[name], whole.tensors[name])


def test_bf16_parameters_are_averaged_in_fp32() -> None:
    parameters = {"a": torch.ones(4, dtype=torch.bfloat16)}
    average = MovingAverage(parameters, decay=0.999)
    parameters["a"].fill_(2.0)
    average.start()
    average.wait()
    assert average.tensors["a"].dtype == torch.float32
    torch.testing.assert_close(average.tensors["a"], torch.full((4,), 1.001))


def test_an_error_in_the_thread_reaches_the_loop() -> None:
    parameters = {"a": torch.ones(4)}
    average = MovingAverage(parameters, decay=0.9)
    average._parameters["a"] = torch.ones(3)
    average.start()
    with pytest.raises(ValueError, match="broadcast"):
        average.wait()

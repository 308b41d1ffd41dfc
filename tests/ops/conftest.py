"""Ops that have C kernels for training are tested with them and without."""

import pytest

from finback.ops.native import build
from tests.ops.native.rule import skip_without_compiler


@pytest.fixture(params=["C", "torch"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two computes in this test."""
    name: str = request.param
    if name == "torch":
        for kernels in ("training_kernels", "causal_kernels"):
            monkeypatch.setattr(build, kernels, lambda: None)
    elif build.training_kernels() is None:
        skip_without_compiler()
        raise AssertionError("the kernels do not compile")
    return name

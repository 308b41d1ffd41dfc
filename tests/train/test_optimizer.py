"""AdamW against torch's own, clipping against torch's own, and what bf16 moments and master copies promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finback.ops.native import build
from finback.train import optimizer
from finback.train.optimizer import AdamState, adam_tensors, adamw_update, clip_scale, gradient_norm, init_adam_state

SHAPES = {"embed": (37, 16), "experts": (3, 8, 16), "norm": (16,), "head": (5, 16)}
BETAS = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}


@pytest.fixture(params=["C", "torch"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two computes in this test."""
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(build, "training_kernels", lambda: None)
    elif build.training_kernels() is None:
        pytest.skip("no C compiler on this machine")
    return name


def random_tensors(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def torch_adamw(parameters: dict[str, Tensor], *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters.values() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize("block", [7, 64, 2**18])
@pytest.mark.parametrize("max_norm", [1e9, 1.0])
def test_equals_torch_adamw_and_clip(block: int, max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "_CPU_BLOCK", block)
    ours = random_tensors(0)
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in ours.items()}
    state, reference = init_adam_state(ours), torch_adamw(theirs, lr=0.02, weight_decay=0.1)
    for step in range(20):
        gradients = random_tensors(100 + step, scale=3.0 if step % 2 else 1e-3)
        for name, parameter in theirs.items():
            parameter.grad = gradients[name].clone()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        reference.step()
        norm = gradient_norm(gradients)
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
        adamw_update(ours, gradients, state, lr=0.02, weight_decay=0.1, gradient_scale=clip_scale(norm, max_norm), **BETAS)
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name].detach(), rtol=2e-6, atol=2e-6)


def test_first_update_is_the_sign_of_the_gradient() -> None:
    parameters = random_tensors(0)
    before = {name: p.clone() for name, p in parameters.items()}
    gradients = random_tensors(1)
    adamw_update(parameters, gradients, init_adam_state(parameters), lr=0.1, weight_decay=0.0, **BETAS)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name], before[name] - 0.1 * gradient.sign(), rtol=1e-5, atol=1e-5)


def test_norms_are_not_decayed_and_matrices_are() -> None:
    parameters = random_tensors(0)
    before = {name: p.clone() for name, p in parameters.items()}
    nothing = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    adamw_update(parameters, nothing, init_adam_state(parameters), lr=0.1, weight_decay=0.5, **BETAS)
    for name, shape in SHAPES.items():
        torch.testing.assert_close(parameters[name], before[name] * (0.95 if len(shape) > 1 else 1.0))


@settings(max_examples=8)
@given(block=st.integers(1, 700))
def test_block_size_changes_nothing_but_the_last_bit(block: int) -> None:
    def run(size: int) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "_CPU_BLOCK", size)
            parameters = random_tensors(0)
            state = init_adam_state(parameters)
            for step in range(3):
                adamw_update(parameters, random_tensors(step), state, lr=0.1, weight_decay=0.1, gradient_scale=0.3, **BETAS)
            return parameters | adam_tensors(state)

    for name, tensor in run(2**18).items():
        # a vector unit's last few elements take another code path than the rest, which may round once less
        torch.testing.assert_close(run(block)[name], tensor, rtol=1e-6, atol=1e-7)


def test_bf16_moments_are_the_fp32_moments_rounded_to_nearest_even() -> None:
    parameters, gradients = random_tensors(0), random_tensors(1)
    twin = {name: p.clone() for name, p in parameters.items()}
    narrow, wide = init_adam_state(parameters, moments_dtype=torch.bfloat16), init_adam_state(twin)
    adamw_update(parameters, gradients, narrow, lr=0.1, weight_decay=0.1, **BETAS)
    adamw_update(twin, gradients, wide, lr=0.1, weight_decay=0.1, **BETAS)
    for name in SHAPES:
        assert torch.equal(narrow.exp_avg[name], wide.exp_avg[name].bfloat16())
        assert torch.equal(narrow.exp_avg_sq[name], wide.exp_avg_sq[name].bfloat16())
        assert torch.equal(parameters[name], twin[name])  # the first update starts from exact zeros
    # second step: the starting point is rounded, the step itself is not
    for state in (narrow, wide):
        state.exp_avg, state.exp_avg_sq = (
            {k: v.bfloat16().float() for k, v in d.items()} for d in (narrow.exp_avg, narrow.exp_avg_sq)
        )
    rounded = AdamState(1, *({k: v.bfloat16() for k, v in d.items()} for d in (wide.exp_avg, wide.exp_avg_sq)))
    adamw_update(parameters, gradients, rounded, lr=0.1, weight_decay=0.1, **BETAS)
    adamw_update(twin, gradients, wide, lr=0.1, weight_decay=0.1, **BETAS)
    for name in SHAPES:
        assert torch.equal(parameters[name], twin[name])


def test_bf16_parameters_follow_their_fp32_master_copies() -> None:
    """Updates far below a bf16 step of the weight add up in the master instead of being rounded away."""
    parameters = {"weight": torch.ones(8, 8, dtype=torch.bfloat16)}
    state = init_adam_state(parameters)
    gradients = {"weight": torch.ones(8, 8)}
    for _ in range(100):
        adamw_update(parameters, gradients, state, lr=1e-4, weight_decay=0.0, **BETAS)
    torch.testing.assert_close(state.master["weight"], torch.full((8, 8), 0.99), rtol=1e-4, atol=0)
    assert torch.equal(parameters["weight"], state.master["weight"].bfloat16())
    assert set(adam_tensors(state)) == {"exp_avg.weight", "exp_avg_sq.weight", "master.weight"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_makes_the_norm_not_finite(bad: float) -> None:
    gradients = random_tensors(0)
    gradients["norm"][3] = bad
    assert not torch.isfinite(torch.tensor(gradient_norm(gradients)))

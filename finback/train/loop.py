"""What every training loop does beside its own work: measuring time, taking gradients, and the words and rows about a step."""

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from finback.model.transformer import Transformer
from finback.train.balance import max_violation
from finback.train.checkpoint import Progress
from finback.train.losses import BatchLosses
from finback.train.optimizer import AdamState, adamw_update, clip_scale
from finback.train.session import device_name, kernels_name

_DEEPSEEK_METRICS = ("mtp_loss", "balance_loss", "max_violation")


class Clock:
    """Wall time since the last lap, and the speed of training alone since it was last asked for."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._tokens, self._seconds = 0, 0.0

    def lap(self, *, trained_tokens: int = 0) -> float:
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        if trained_tokens:
            self._tokens += trained_tokens
            self._seconds += passed
        return passed

    def tokens_per_second(self) -> float:
        speed = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return speed


def due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def take_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of all parameters, which then have none."""
    gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


@runtime_checkable
class OptimizerFields(Protocol):
    """The fields of a run's config that AdamW and clipping read."""

    @property
    def adam_beta1(self) -> float: ...

    @property
    def adam_beta2(self) -> float: ...

    @property
    def adam_epsilon(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def max_grad_norm(self) -> float: ...


def clipped_update(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    adam: AdamState,
    config: OptimizerFields,
    *,
    lr: float,
    norm: float,
) -> bool:
    """AdamW with gradients of global norm `norm`, clipped in the same pass. A norm that is not finite changes nothing: False."""
    if not math.isfinite(norm):
        return False
    adamw_update(
        parameters,
        gradients,
        adam,
        lr=lr,
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        gradient_scale=clip_scale(norm, config.max_grad_norm),
    )
    return True


def expert_biases(model: Transformer) -> list[Tensor]:
    """The bias of each router, in the order of the expert counts."""
    biases = [router.e_score_correction_bias for router in model.routers()]
    return [bias for bias in biases if bias is not None]


def step_row(
    progress: Progress, losses: BatchLosses, norm: float, lr: float, speed: float, machine: dict[str, Any]
) -> dict[str, float | int]:
    """What metrics.jsonl says of a step, but for the data's and the evaluation's part. Of a dense model there is less to say."""
    counts = losses.expert_counts
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "loss": losses.loss,
        "mtp_loss": losses.mtp_loss,
        "balance_loss": losses.balance_loss,
        "grad_norm": norm,
        "lr": lr,
        "tokens_per_second": speed,
        "mfu": speed * machine["training_flops_per_token"] / machine["matmul_flops_per_second"],
        "max_violation": max_violation(counts),
    }
    return row if counts.shape[1] else {key: value for key, value in row.items() if key not in _DEEPSEEK_METRICS}


def machine_changes(machine: dict[str, Any], device: torch.device) -> list[str]:
    """What differs from the machine that the run started on and may change bits."""
    now = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "kernels": kernels_name(device),
    }
    return [
        f"{name} is {value} and was {machine.get(name, 'torch')} when the run started: losses may differ in their last bits"
        for name, value in now.items()
        if machine.get(name, "torch") != value
    ]


def not_applied(step: int, norm: float, max_nonfinite_steps: int) -> str:
    """A step whose gradient is not finite, in words."""
    limit = f"the run stops after {max_nonfinite_steps} in a row"
    return f"step {step}: the gradient norm is {norm}, the step is not applied ({limit})"


def diverged(step: int, lr: float, max_nonfinite_steps: int) -> str:
    """The end of a run whose gradients stay that way, in words."""
    times = f"{max_nonfinite_steps} times in a row"
    return f"training has diverged: at step {step} the gradient norm is not finite, {times}; lower lr (now {lr})"

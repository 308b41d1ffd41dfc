"""AdamW (Loshchilov and Hutter, 2019) as plain functions over named tensors, and clipping by the global gradient norm.

Where time goes: AdamW is a dozen elementwise operations on four arrays as long as the model, so it is bound by memory. On a CPU
with a C compiler it is one pass over them. Otherwise the update walks the parameters in blocks that fit the cache and does
all its operations on one block before the next; the arithmetic of each element is the same as without blocks.

Weight decay goes to matrices (embeddings, head, router and stacked experts included) and not to norms; V3 publishes 0.1
and does not say where it applies. Parameters in a lower precision than fp32 have an fp32 master copy in the state, which
is what is updated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finback.ops.native.build import training_kernels_for

_CPU_BLOCK = 2**18  # elements; parameter, gradient, two moments and a temporary: 5 MB in fp32
_GPU_BLOCK = 2**28  # bounds the temporary


@dataclass
class AdamState:
    """`updates` counts the updates applied; the tensors have the parameters' names and shapes."""

    updates: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    master: dict[str, Tensor] = field(default_factory=dict)
    """fp32 copies of the parameters that are not fp32 themselves."""


def init_adam_state(parameters: Mapping[str, Tensor], *, moments_dtype: torch.dtype = torch.float32) -> AdamState:
    """Zero moments beside each parameter, and master copies where the parameter is not fp32."""
    return AdamState(
        updates=0,
        exp_avg={name: torch.zeros_like(p, dtype=moments_dtype) for name, p in parameters.items()},
        exp_avg_sq={name: torch.zeros_like(p, dtype=moments_dtype) for name, p in parameters.items()},
        master={name: p.detach().float() for name, p in parameters.items() if p.dtype != torch.float32},
    )


@torch.no_grad()
def gradient_norm(gradients: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all gradients together. One pass; the clipping itself happens inside `adamw_update`."""
    norms = torch._foreach_norm(list(gradients.values()))
    return float(torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms])))


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings gradients of global norm `norm` down to `max_norm`; 1 if they are below it."""
    return min(1.0, max_norm / (norm + 1e-6))


@torch.no_grad()
def adamw_update(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: AdamState,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    gradient_scale: float = 1.0,
) -> None:
    """Update `parameters` and `state` in place, as if `gradients` were multiplied by `gradient_scale` (which clips them).

    Moments kept in bf16 are widened to fp32, updated, and rounded to nearest even: the parameter's update uses the unrounded values.
    """
    state.updates += 1
    # lr * (m / c1) / (sqrt(v / c2) + epsilon), with the corrections c1 and c2 moved out of the elementwise work
    root_correction = math.sqrt(1 - beta2**state.updates)
    step_size = lr / (1 - beta1**state.updates) * root_correction
    scaled_epsilon = epsilon * root_correction
    left: dict[str, Tensor] = {}  # what the kernels do not take
    for name, parameter in parameters.items():
        weights = state.master.get(name, parameter.detach())
        kernels = training_kernels_for(weights, state.exp_avg[name])
        if kernels is None or not all(t.is_contiguous() for t in (weights, state.exp_avg[name], state.exp_avg_sq[name])):
            left[name] = parameter
            continue
        kernels.adamw(
            weights,
            gradients[name].float().contiguous(),
            state.exp_avg[name],
            state.exp_avg_sq[name],
            scale=gradient_scale,
            beta1=beta1,
            beta2=beta2,
            decay=1 - lr * weight_decay if parameter.ndim >= 2 else 1.0,
            step_size=step_size,
            epsilon=scaled_epsilon,
        )
    for decay, block in _blocks(left, gradients, state):
        p, g, m, v = ([chunk[i] for chunk in block] for i in range(4))
        narrow = m[0].dtype != torch.float32
        wide_m = [chunk.float() for chunk in m] if narrow else m
        wide_v = [chunk.float() for chunk in v] if narrow else v
        torch._foreach_mul_(wide_m, beta1)
        torch._foreach_add_(wide_m, g, alpha=(1 - beta1) * gradient_scale)
        torch._foreach_mul_(wide_v, beta2)
        torch._foreach_addcmul_(wide_v, g, g, (1 - beta2) * gradient_scale**2)
        denominator = torch._foreach_sqrt(wide_v)
        torch._foreach_add_(denominator, scaled_epsilon)
        if decay and weight_decay:
            torch._foreach_mul_(p, 1 - lr * weight_decay)
        torch._foreach_addcdiv_(p, wide_m, denominator, -step_size)
        if narrow:
            torch._foreach_copy_(m, wide_m)
            torch._foreach_copy_(v, wide_v)
    for name, master in state.master.items():
        parameters[name].copy_(master)


Chunk = tuple[Tensor, Tensor, Tensor, Tensor]


def _blocks(
    parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: AdamState
) -> Iterator[tuple[bool, list[Chunk]]]:
    """(whether weight decay applies, flat views of fp32 parameter, gradient and moments) for each block, decayed parameters first."""
    for decay in (True, False):
        block: list[Chunk] = []
        room = 0
        for name, parameter in parameters.items():
            if (parameter.ndim >= 2) != decay:
                continue
            limit = _CPU_BLOCK if parameter.device.type == "cpu" else _GPU_BLOCK
            weights = state.master.get(name, parameter.detach())
            tensors = (weights, gradients[name].float(), state.exp_avg[name], state.exp_avg_sq[name])
            for chunk in zip(*(tensor.view(-1).split(limit) for tensor in tensors), strict=True):
                if block and room < chunk[0].numel():
                    yield decay, block
                    block = []
                room = (room if block else limit) - chunk[0].numel()
                block.append((chunk[0], chunk[1], chunk[2], chunk[3]))
        if block:
            yield decay, block


def adam_tensors(state: AdamState) -> dict[str, Tensor]:
    """The state's tensors under names of their own, for saving."""
    groups = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq, "master": state.master}
    return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

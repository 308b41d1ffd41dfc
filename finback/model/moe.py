"""DeepSeekMoE (V3 section 2.1.2): router, stacked routed experts, shared experts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from finback.config import ModelConfig
from finback.model.layers import MLP
from finback.model.recompute import rebuilt
from finback.ops.grouped import (
    dispatch_order,
    few_tokens,
    gathered_linear,
    permute,
    row_alignment,
    summed_linear,
    unpermute,
)
from finback.ops.packed import PackedWeight, unpacked
from finback.ops.router import gate_values, router_scores, select_experts
from finback.ops.swiglu import swiglu


class Routing(NamedTuple):
    """What one router did with one micro-batch. Returned, not kept: a recomputed forward pass can then not count twice."""

    scores: Tensor  # float32 [B * T, E], unbiased
    indices: Tensor  # int64 [B * T, K]


class Router(nn.Module):
    """Scores, selection and gate values. The expert bias is a float32 buffer: it has no gradient and only ever moves the choice."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, device=device, dtype=dtype))
        self.e_score_correction_bias: Tensor | None
        bias = torch.empty(config.n_routed_experts, device=device, dtype=torch.float32) if config.uses_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Float[Tensor, "N D"], chosen: Int[Tensor, "N K"] | None = None) -> tuple[Float[Tensor, "N K"], Routing]:
        """Gate values of the chosen experts, and what was chosen from which scores. `chosen` replaces the router's choice where it
        is not negative; the gate values are of this router's scores all the same."""
        c = self.config
        scores = router_scores(x, self.weight, c.scoring_func)
        bias = self.e_score_correction_bias
        with torch.no_grad():
            indices = select_experts(scores, bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.topk_method)
            if chosen is not None:
                indices = chosen.where(chosen >= 0, indices)
        return gate_values(scores, indices, c.norm_topk_prob, c.routed_scaling_factor), Routing(scores, indices)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """`.to(bfloat16)` must not round the bias: whole updates of gamma would be lost."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if bias is not None and moved is not None and moved.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(moved.device)
        return self


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_proj, up_proj [E, F, D], down_proj [E, D, F].

    `whole`, set by a pass over a finished model, computes them at once: (rows [M, D] in expert order, three weights, rows of each
    expert [E], gate value of each row [M]) -> [M, D]. `packed`, where it is set, holds the three in their order, for inference; the
    parameters may then have no memory.
    """

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        count, width, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = nn.Parameter(torch.empty(count, width, size, device=device, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(count, width, size, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(count, size, width, device=device, dtype=dtype))
        self.whole: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] | None = None
        self.packed: tuple[PackedWeight, PackedWeight, PackedWeight] | None = None

    def forward(
        self,
        x: Float[Tensor, "N D"],
        indices: Int[Tensor, "N K"],
        values: Float[Tensor, "N K"],
        recompute: bool = False,
    ) -> Float[Tensor, "N D"]:
        """Sum over each token's experts of value * expert(token). Gate values multiply the narrow activation, not the output."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        n_experts = self.gate_proj.shape[0]
        if self.whole is not None:
            dispatch = dispatch_order(indices, n_experts)
            row_values = values.flatten().index_select(0, dispatch.order)
            weights = (self.gate_proj, self.up_proj, self.down_proj)
            return unpermute(self.whole(permute(x, dispatch), *weights, dispatch.rows, row_values), dispatch, x.shape[0])
        gate_weight, up_weight, down_weight = (
            (self.gate_proj, self.up_proj, self.down_proj)
            if self.packed is None
            else (unpacked(weight).to(dtype) for weight in self.packed)
        )
        if not torch.is_grad_enabled() and dtype == gate_weight.dtype:
            few = few_tokens(x, indices, values, gate_weight, up_weight, down_weight)
            if few is not None:
                return few
        dispatch = dispatch_order(indices, n_experts, row_alignment(indices.numel(), n_experts, dtype, x.device))
        narrow = x.to(dtype)
        row_values = values.flatten().index_select(0, dispatch.order)
        if dispatch.real is not None:
            row_values = row_values * dispatch.real
        gate = gathered_linear(narrow, gate_weight.to(dtype), dispatch)
        up = gathered_linear(narrow, up_weight.to(dtype), dispatch)
        hidden = swiglu(gate, up, row_values)
        with rebuilt((hidden,), lambda: (swiglu(gate, up, row_values),), recompute):
            return summed_linear(hidden, down_weight.to(dtype), dispatch, x.shape[0])


class MoE(nn.Module):
    """Routed experts plus shared experts, the latter fused into one feed-forward of n_shared_experts times the width."""

    def __init__(self, config: ModelConfig, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate = Router(config, device, dtype)
        self.experts = Experts(config, device, dtype)
        self.shared_experts = MLP(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size, device, dtype)

    def forward(
        self, x: Float[Tensor, "B T D"], recompute: bool = False, chosen: Int[Tensor, "B T K"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Routing]:
        flat = x.flatten(0, 1)
        values, routing = self.gate(flat, None if chosen is None else chosen.flatten(0, 1))
        routed = self.experts(flat, routing.indices, values, recompute)
        return routed.view_as(x) + self.shared_experts(x, recompute), routing

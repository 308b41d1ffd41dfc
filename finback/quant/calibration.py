"""One layer at a time: its block read from a checkpoint, and what calibration text shows of the inputs of its matrices."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from finback.config import ModelConfig, checkpoint_tensors
from finback.model.checkpoint import EXPERT, Checkpoint, read_weight
from finback.model.layers import Linear, RMSNorm
from finback.model.mla import Rotary
from finback.model.moe import MoE
from finback.model.safetensors_io import TensorReader
from finback.model.transformer import Block, MTPModule
from finback.ops.linear import linear
from finback.ops.rotary import rotary_table
from finback.ops.swiglu import swiglu

BATCH = 4  # sequences that go through a block at once
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@dataclass
class Seen:
    """What one block's matrices were given: the sum of x x^T of each plain projection, by its name in the block, and each expert's
    rows [M, D] with their gate values [M], kept because a Hessian for every expert at once would be larger."""

    hessians: dict[str, Tensor] = field(default_factory=dict)
    expert_rows: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


def read_block(reader: TensorReader, source: Checkpoint, layer: int) -> Block:
    """Block `layer` of the checkpoint, an MTP module where it is one, in float32."""
    config = source.config
    is_mtp = layer >= config.num_hidden_layers
    block = MTPModule(config, dtype=torch.float32) if is_mtp else Block(config, layer, dtype=torch.float32)
    for name, tensor in block_tensors(block, config, layer):
        read_weight(reader, source.stored, name, tensor)
    reader.wait()
    return block.requires_grad_(False)


def block_tensors(block: Block, config: ModelConfig, layer: int) -> Iterator[tuple[str, Tensor]]:
    """The block's own tensors under the names of the checkpoint; experts are views of the stacked weights."""
    prefix = f"model.layers.{layer}."
    own = block.state_dict(keep_vars=True)
    for spec in checkpoint_tensors(config, fp8=False):
        rest = spec.name.removeprefix(prefix)
        if rest == spec.name or rest in _COPIES:
            continue
        expert = EXPERT.fullmatch(rest) or EXPERT.fullmatch(spec.name)
        if expert:
            yield spec.name, own[f"mlp.experts.{expert[3]}"].detach()[int(expert[2])]
        else:
            yield spec.name, own[rest].detach()


@contextmanager
def observed(block: Block, names: set[str]) -> Iterator[Seen]:
    """While the block runs inside, gather what the projections `names` (within the block, without .weight) and the experts see."""
    seen = Seen()
    linears = {name: module for name, module in block.named_modules() if name in names and isinstance(module, Linear)}
    for name, module in linears.items():
        module.product = _gathering(seen, name)
    if isinstance(block.mlp, MoE):

        def whole(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, counts: Tensor, values: Tensor) -> Tensor:
            outputs = []
            sizes = counts.tolist()
            for expert, (part, weights) in enumerate(zip(rows.split(sizes), values.split(sizes), strict=True)):
                if len(part):
                    seen.expert_rows.setdefault(expert, []).append((part, weights))
                hidden = swiglu(linear(part, gate[expert]), linear(part, up[expert]), weights)
                outputs.append(linear(hidden, down[expert]))
            return torch.cat(outputs)

        block.mlp.experts.whole = whole
    try:
        yield seen
    finally:
        for module in linears.values():
            module.product = linear
        if isinstance(block.mlp, MoE):
            block.mlp.experts.whole = None


def _gathering(seen: Seen, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A product of a `Linear` that adds its inputs to the Hessian of `name`."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.flatten(0, -2).float()
        outer = rows.T @ rows
        seen.hessians[name] = seen.hessians[name] + outer if name in seen.hessians else outer
        return linear(x, weight)

    return product


def expert_hessians(block: Block, seen: Seen, expert: int) -> tuple[int, dict[str, Tensor]]:
    """How many rows an expert saw, and the Hessians of its three matrices; none if it saw no row."""
    assert isinstance(block.mlp, MoE)
    parts = seen.expert_rows.get(expert, [])
    if not parts:
        return 0, {}
    rows = torch.cat([part for part, _ in parts])
    values = torch.cat([part for _, part in parts])
    experts = block.mlp.experts
    hidden = swiglu(linear(rows, experts.gate_proj[expert]), linear(rows, experts.up_proj[expert]), values)
    inputs = rows.T @ rows
    return len(rows), {"gate_proj": inputs, "up_proj": inputs, "down_proj": hidden.T @ hidden}


@torch.no_grad()
def through(block: Block, config: ModelConfig, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T D"]:
    """The block's output for every sequence."""
    if not len(x):
        return x
    rotary = Rotary(*rotary_table(config, torch.arange(x.shape[1])))
    return torch.cat([block(part, rotary)[0] for part in x.split(BATCH)])


@torch.no_grad()
def perplexity(norm: RMSNorm, head: Float[Tensor, "vocab D"], x: Float[Tensor, "N T D"], tokens: Int[Tensor, "N T"]) -> float:
    """exp of the mean loss of every token but each sequence's first, given the output of the last block."""
    total = sum(
        float(F.cross_entropy(linear(norm(part), head)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        for part, ids in zip(x.split(1), tokens.split(1), strict=True)
    )
    return math.exp(total / tokens[:, 1:].numel())

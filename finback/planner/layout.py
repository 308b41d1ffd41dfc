"""How a training run is laid out over devices, and the memory that each takes for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Literal

from finback.config import InputError, ModelConfig
from finback.parallel.schedule import nearest_multiple
from finback.planner.hardware import Hardware, Precision
from finback.planner.stages import Stage, scales, stages_of

ScheduleName = Literal["one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipe_v"]
Recompute = Literal["none", "selective", "full"]
INTERLEAVED_CHUNKS = 4


@dataclass(frozen=True)
class Layout:
    """`devices` = dp x pp x tp; experts are spread over `ep` devices inside dp x tp. `schedule` says how a pipeline of pp ranks runs:
    DualPipeV has two stages on each, interleaved 1F1B four. Micro-batches have `micro_batch_size` sequences. Sequences are not cut
    over devices (context parallelism): a long one must fit with recomputation, or with tp, which splits its activations."""

    devices: int
    pp: int = 1
    ep: int = 1
    tp: int = 1
    schedule: ScheduleName = "one_f_one_b"
    recompute: Recompute = "selective"
    micro_batch_size: int = 1
    overlap: bool = False
    """All-to-all is hidden behind the other half of a forward/backward pair; DualPipe's schedules only."""
    expert_imbalance: float = 1.2
    """Load of the busiest device's experts over the mean: 1 where routing is forced to be even, as in most published benchmarks; 1.2
    is assumed for real routing, for which nobody publishes it."""
    stage_layers: tuple[int, ...] | None = None
    """Decoder layers of each stage from the embedding to the head; None: as even in time as whole layers allow, the head counted."""

    @property
    def stages_per_rank(self) -> int:
        """How many parts of the model a rank holds in one direction of the pipeline."""
        if self.pp == 1:
            return 1
        return {"dualpipe_v": 2, "interleaved": INTERLEAVED_CHUNKS}.get(self.schedule, 1)

    @property
    def num_stages(self) -> int:
        """Parts that the model is cut into."""
        return self.pp * self.stages_per_rank

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """The stages that each of the pp ranks holds, DualPipe's with both directions."""
        last, each = self.num_stages - 1, range(self.pp)
        if self.pp > 1 and self.schedule in ("dualpipe", "dualpipe_v"):
            return [(rank, last - rank) for rank in each]
        return [tuple(range(rank, self.num_stages, self.pp)) for rank in each]

    @property
    def dp(self) -> int:
        """Data-parallel replicas of the non-expert part."""
        return self.devices // (self.pp * self.tp)

    @property
    def stages_held(self) -> int:
        """Copies of a stage's parameters on each device: DualPipe keeps both directions (V3 table 2)."""
        return 2 if self.schedule == "dualpipe" and self.pp > 1 else 1

    def text(self) -> str:
        """A short name for tables."""
        words = [f"pp{self.pp}", f"ep{self.ep}"] + ([f"tp{self.tp}"] if self.tp > 1 else []) + [f"dp{self.dp}"]
        return f"{' '.join(words)}, {self.schedule}, recompute {self.recompute}"


def check_layout(c: ModelConfig, layout: Layout, global_batch_size: int) -> None:
    """Refuse what does not divide, with the nearest value that does."""
    check_devices(c, layout)
    unit = layout.dp * layout.micro_batch_size
    if global_batch_size % unit:
        near = nearest_multiple(global_batch_size, unit)
        raise InputError(
            f"--global-batch-size is {global_batch_size}, it must be a multiple of dp x micro_batch_size = {unit}; the "
            f"nearest is {near}"
        )
    _check_microbatches(layout, global_batch_size // unit, unit)


def check_devices(c: ModelConfig, layout: Layout) -> None:
    """The part of `check_layout` that needs no batch."""
    group = layout.pp * layout.tp
    for name in ("devices", "pp", "ep", "tp", "micro_batch_size"):
        if getattr(layout, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(layout, name)}, it must be at least 1")
    if layout.devices % layout.tp:
        near = nearest_multiple(layout.devices, group)
        raise InputError(f"--devices is {layout.devices}, it must be a multiple of pp x tp = {group}; the nearest is {near}")
    if layout.pp > c.num_hidden_layers:
        near = nearest_divisor(layout.devices // layout.tp, layout.pp, c.num_hidden_layers)
        raise InputError(
            f"--pp is {layout.pp}, above the model's {c.num_hidden_layers} layers; the nearest that divides is {near}"
        )
    if layout.devices % group:
        raise does_not_divide(layout, nearest_divisor(layout.devices // layout.tp, layout.pp, c.num_hidden_layers))
    if layout.num_stages > c.num_hidden_layers + 1:
        raise InputError(
            f"--schedule {layout.schedule} with pp {layout.pp} makes {layout.num_stages} stages of {c.num_hidden_layers} layers; "
            f"use at most --pp {(c.num_hidden_layers + 1) // layout.stages_per_rank}"
        )
    stages(c, layout)
    if layout.ep > 1 and not c.n_routed_experts:
        raise InputError(f"--ep is {layout.ep}, but the model is dense; use 1")
    for what, size in (("n_routed_experts", c.n_routed_experts), ("dp x tp", layout.dp * layout.tp)):
        if layout.ep > 1 and size % layout.ep:
            near = nearest_divisor(size, layout.ep)
            raise InputError(f"--ep is {layout.ep}, it must divide {what} ({size}); the nearest is {near}")
    if c.num_attention_heads % layout.tp:
        near = nearest_divisor(c.num_attention_heads, layout.tp)
        raise InputError(
            f"--tp is {layout.tp}, it must divide num_attention_heads ({c.num_attention_heads}); the nearest is {near}"
        )


def check_node(c: ModelConfig, hardware: Hardware, tp: int) -> None:
    """Refuse to cut layers over more devices than a node has, between which only the network is."""
    node = hardware.devices_per_node
    if tp <= node:
        return
    has = f"a node of {hardware.name} has {node} device{'s' if node > 1 else ''} and layers are cut inside a node"
    near = max(one for one in divisors(c.num_attention_heads) if one <= node)
    raise InputError(f"--tp is {tp}, but {has}; {'the nearest is ' if node > 1 else 'use '}{near}")


def does_not_divide(layout: Layout, near: int) -> InputError:
    """Of a pipeline over which the devices cannot be shared out, with the length that is offered instead."""
    groups = layout.devices // layout.tp
    return InputError(
        f"--pp is {layout.pp}, it must divide --devices / --tp ({layout.devices} / {layout.tp} = {groups}); the nearest is {near}"
    )


def _check_microbatches(layout: Layout, microbatches: int, unit: int) -> None:
    pp = layout.pp
    need = {"dualpipe": 2 * pp, "dualpipe_v": 2 * pp}.get(layout.schedule, 1) if pp > 1 else 1
    if microbatches < need:
        raise InputError(
            f"--schedule {layout.schedule} with pp {pp} needs at least {need} micro-batches per replica and has {microbatches}; raise "
            f"--global-batch-size to {need * unit}, or take one_f_one_b"
        )
    if layout.schedule == "dualpipe" and (pp % 2 or microbatches % 2) and pp > 1:
        raise InputError(
            f"--schedule dualpipe needs an even pp and an even number of micro-batches; pp is {pp} and there are {microbatches}: use "
            f"pp {pp + pp % 2} and --global-batch-size {(microbatches + microbatches % 2) * unit}"
        )
    if layout.schedule == "interleaved" and microbatches % pp:
        near = nearest_multiple(microbatches, pp)
        raise InputError(
            f"--schedule interleaved needs a multiple of pp ({pp}) micro-batches per replica and has {microbatches}; the nearest "
            f"--global-batch-size is {near * unit}"
        )


def nearest_divisor(size: int, value: int, most: int | None = None) -> int:
    """The divisor of `size` that is nearest to `value`, the smaller of two; none above `most`."""
    found = (one for one in divisors(size) if most is None or one <= most)
    return min(found, key=lambda one: (abs(one - value), one))


@lru_cache(maxsize=1024)
def divisors(size: int) -> tuple[int, ...]:
    """All divisors in rising order, found up to the root: the others are what these leave."""
    low = [one for one in range(1, isqrt(size) + 1) if size % one == 0]
    return tuple(sorted({*low, *(size // one for one in low)}))


def activation_bytes_per_layer(c: ModelConfig, precision: Precision, recompute: Recompute) -> float:
    """Bytes that one token leaves in one MoE (or dense) layer for the backward (V3 section 3.2.3, 3.3.3).

    With `full` only the layer's input stays. With `selective` norms, expanded latents and SwiGLU's output are computed again: what
    stays are inputs of products, in FP8 where products are, and of the attention output in V3's 12 bits; `none` keeps all.
    """
    wide, low = 2.0, 1.0 if precision == "fp8" else 2.0
    if precision == "fp32":
        wide = low = 4.0
    d, heads = c.hidden_size, c.num_attention_heads
    if recompute == "full":
        return wide * d
    expert_width = (
        c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts) if c.n_routed_experts else c.intermediate_size
    )
    picks = c.num_experts_per_tok if c.n_routed_experts else 0
    value = c.v_head_dim if c.kv_lora_rank else c.head_dim
    latents = (c.q_lora_rank or heads * c.qk_head_dim) + c.cache_row_width
    output = heads * value * (1.5 if precision == "fp8" else wide)
    kept = 2 * wide * d + wide * latents + output + 4.0 * heads + low * d * (picks + 1) + low * 2 * expert_width
    if recompute == "selective":
        return kept
    expanded = heads * (c.qk_nope_head_dim + c.v_head_dim + c.qk_head_dim) if c.kv_lora_rank else 0
    return kept + wide * (2 * d + expanded + expert_width)


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that holds most, by component."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    logits_bytes: float
    buffers_bytes: float

    @property
    def total_bytes(self) -> float:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.buffers_bytes
        )


def stages(c: ModelConfig, layout: Layout) -> tuple[Stage, ...]:
    """The parts of the model, from the embedding to the head."""
    return stages_of(c, layout.num_stages, layout.stage_layers)


def busiest_rank(c: ModelConfig, layout: Layout) -> float:
    """Work of the busiest rank by the mean, 1 where all have the same."""
    by_stage = scales(stages(c, layout))
    return max(sum(by_stage[stage] for stage in held) / len(held) for held in layout.ranks)


def parameters_of_ranks(c: ModelConfig, layout: Layout) -> list[tuple[float, float]]:
    """Non-expert and expert parameters that a device of each rank holds, the MTP layer with the last stage (V3 section 3.2.3)."""
    parts = stages(c, layout)
    return [
        (
            sum(parts[stage].rest_parameters for stage in held) / layout.tp,
            sum(parts[stage].expert_parameters for stage in held) / layout.ep,
        )
        for held in layout.ranks
    ]


def training_memory(
    c: ModelConfig,
    layout: Layout,
    precision: Precision,
    sequence_length: int,
    live_activations: Sequence[float],
    moments_bytes: float | None = None,
) -> Memory:
    """The device that holds most. ZeRO-1: weights in bf16 and gradients in fp32 whole, master copy and both moments shared out over the
    replicas of each part. A moment takes `moments_bytes`; None: bf16's 2 (V3 section 3.3.3), in fp32 4.

    `live_activations` has for each rank how many activations of one micro-batch on one stage it holds at once, from the schedule's
    simulation.
    """
    parts, kept = stages(c, layout), activation_bytes_per_layer(c, precision, layout.recompute)
    tokens = layout.micro_batch_size * sequence_length / layout.tp
    weight, master = (4.0, 0.0) if precision == "fp32" else (2.0, 4.0)
    if moments_bytes is None:
        moments_bytes = 4.0 if precision == "fp32" else 2.0
    replicas = max(1, layout.dp * layout.tp // layout.ep)
    logits = tokens * 2.0 * weight * c.vocab_size
    found = []
    for held, live, (rest, expert) in zip(layout.ranks, live_activations, parameters_of_ranks(c, layout), strict=True):
        layers = sum(parts[stage].layers_in_all for stage in held) / len(held)
        owned = (rest / layout.dp + expert / replicas) / layout.stages_held
        found.append(
            Memory(
                weights_bytes=(rest + expert) * weight,
                gradients_bytes=(rest + expert) * 4.0,
                optimizer_bytes=owned * (2 * moments_bytes + master),
                activations_bytes=live * layers * tokens * kept,
                logits_bytes=logits if layout.num_stages - 1 in held else 0.0,
                buffers_bytes=0.05 * (rest + expert) * weight + 4 * tokens * c.hidden_size * 2.0 * max(1, c.num_experts_per_tok),
            )
        )
    return max(found, key=lambda memory: memory.total_bytes)

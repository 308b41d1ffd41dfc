"""The time of one training step by component: products and elementwise work at stated efficiencies, all-to-all by hop, pipeline by
simulation, data-parallel traffic and optimizer."""

from dataclasses import dataclass
from functools import lru_cache

from finback.config import ModelConfig
from finback.parallel.schedule import SCHEDULES, Costs, Simulation, interleaved, simulate
from finback.planner.communication import all_to_all, dispatch_bytes
from finback.planner.hardware import GIGA, Hardware, Precision
from finback.planner.layout import INTERLEAVED_CHUNKS, Layout, ScheduleName, parameters_of_ranks, stages
from finback.planner.model import (
    absorbed_core_flops,
    attention_core_flops,
    attention_matrices,
    shape,
    training_flops_per_token,
)
from finback.planner.stages import scales

__all__ = ["PerToken", "Step", "absorbed_core_flops", "per_token", "step_time"]


def elementwise_bytes(c: ModelConfig, precision: Precision) -> float:
    """Memory traffic of one token's forward in one layer outside products: two norms, two residual sums, quantisation of every
    product's input, rotary embedding, permutation to and from experts, SwiGLU. Each tensor is read and written once per use."""
    wide = 4.0 if precision == "fp32" else 2.0
    quantise = 3.0 if precision == "fp8" else 0.0  # read bf16, write FP8
    d, heads = c.hidden_size, c.num_attention_heads
    value = c.v_head_dim if c.kv_lora_rank else c.head_dim
    rows = c.num_experts_per_tok if c.n_routed_experts else 0
    width = c.moe_intermediate_size * (rows + c.n_shared_experts) if rows else c.intermediate_size
    low = 1.0 if precision == "fp8" else wide
    block = 2 * (2 * wide + quantise + 3 * wide) * d
    attention = heads * (2 * wide * c.qk_head_dim + 2 * wide * (c.qk_head_dim + value) + (2 * wide + quantise) * value)
    moved = rows * d * (2 * low + 2 * wide)
    swiglu = width * (3 * wide + quantise)
    return block + attention + moved + swiglu


@dataclass(frozen=True)
class PerToken:
    """Seconds of one token over the whole model on one device, kernels only."""

    forward: float
    backward_input: float
    backward_weight: float
    recompute: float
    all_to_all: float
    """One direction (forward or backward): dispatch and combine of all layers."""
    all_to_all_network: float
    all_to_all_links: float
    head_forward: float
    """The output head's part of `forward`, its loss included."""
    tensor_parallel: float
    """Gathers and scatters of a split attention, forward."""


def per_token(c: ModelConfig, hardware: Hardware, layout: Layout, precision: Precision, sequence_length: int) -> PerToken:
    """Times of one token: products by the device's matrix rate, scores by attention kernels', the rest by bandwidth."""
    s, share = shape(c), hardware.efficiencies
    mtp = c.num_nextn_predict_layers
    layers = c.num_hidden_layers + mtp
    uneven = layout.expert_imbalance if layout.ep > 1 else 1.0
    moe_layers = c.num_moe_layers + (mtp if c.n_routed_experts else 0)
    product = product_seconds(c, hardware, precision, layers, moe_layers, uneven)
    head_precision: Precision = "fp32" if precision == "fp32" else "bf16"
    head = 2.0 * (1 + mtp) * s.embedding / hardware.head_flops(head_precision, c.vocab_size)
    core = layers * attention_core_flops(c, (sequence_length + 1) / 2) / hardware.peak_flops(head_precision)
    traffic = layers * elementwise_bytes(c, precision) / hardware.bytes_per_second
    logits = 0.0 if hardware.small_work else 4.0 * (1 + mtp) * c.vocab_size * 2 / hardware.bytes_per_second
    again = {
        "none": 0.0,
        "selective": 2.0 * layers * s.attention_expand / hardware.matmul_flops(precision) + 0.25 * traffic,
        "full": product + core / share.attention_forward + traffic,
    }[layout.recompute]
    hops = all_to_all(c, layout.ep, hardware.devices_per_node, dispatch_bytes(precision))
    network, links = (uneven * seconds for seconds in hops.seconds(hardware))
    split = 0.0
    if layout.tp > 1:
        moved = 4.0 * 2.0 * c.hidden_size * layers * (layout.tp - 1)
        split = moved / (hardware.need("scale_up_gb_per_second") * GIGA * share.network)
    divide = layout.tp
    return PerToken(
        forward=(product + head + core / share.attention_forward + traffic + logits) / divide,
        backward_input=(product + head + 2 * core / share.attention_backward + 1.5 * traffic + logits) / divide,
        backward_weight=(product + head + 0.5 * traffic) / divide,
        recompute=again / divide,
        all_to_all=moe_layers * max(network, links) / divide,
        all_to_all_network=moe_layers * network / divide,
        all_to_all_links=moe_layers * links / divide,
        head_forward=(head + logits) / divide,
        tensor_parallel=split / divide,
    )


def product_seconds(
    c: ModelConfig, hardware: Hardware, precision: Precision, layers: int, moe_layers: int, uneven: float
) -> float:
    """One token's forward products but the head's, each at the rate of its narrower side: `layers` with attention, `moe_layers` with
    experts, whose load is `uneven`; the MTP layers' projections besides."""
    s, width = shape(c), c.hidden_size

    def seconds(parameters: float, narrow: int, *, experts: bool = False) -> float:
        return 2.0 * parameters / hardware.matmul_flops(precision, narrow, experts=experts)

    total = layers * sum(seconds(inner * outer, min(inner, outer)) for inner, outer in attention_matrices(c))
    total += seconds(
        c.first_k_dense_replace * s.dense + c.num_nextn_predict_layers * 2 * width**2, min(width, c.intermediate_size)
    )
    if moe_layers:
        narrow = min(width, c.moe_intermediate_size)
        total += moe_layers * seconds(uneven * c.num_experts_per_tok * s.expert, narrow, experts=True)
        total += moe_layers * (seconds(c.n_shared_experts * s.expert, narrow) + seconds(s.router, min(width, c.n_routed_experts)))
    return total


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step by component; `seconds` is their sum. A part that is hidden behind another is not counted twice.
    Bubbles are all that the pipeline takes beyond a full one's work evenly shared: filling and emptying it, pairs that find no
    partner, and waiting for the busiest stage. `live_activations` counts for each rank activations of one micro-batch on one stage."""

    compute_seconds: float
    recompute_seconds: float
    exposed_all_to_all_seconds: float
    tensor_parallel_seconds: float
    bubble_seconds: float
    idle_seconds: float
    gradient_sync_seconds: float
    optimizer_seconds: float
    hidden_all_to_all_seconds: float
    all_to_all_network_seconds: float
    all_to_all_links_seconds: float
    p2p_seconds: float
    microbatches: int
    live_activations: tuple[int, ...]
    bubble_fraction: float

    @property
    def seconds(self) -> float:
        return (
            self.compute_seconds
            + self.recompute_seconds
            + self.exposed_all_to_all_seconds
            + self.tensor_parallel_seconds
            + self.bubble_seconds
            + self.idle_seconds
            + self.gradient_sync_seconds
            + self.optimizer_seconds
        )


def pipeline(layout: Layout, microbatches: int, costs: Costs) -> tuple[float, tuple[int, ...]]:
    """Seconds from the first action of a layout's schedule to the last, and for each rank the most activations (of one micro-batch on
    one stage) that it holds at once. `costs` are those of 1/pp of the model, with a factor for each stage.

    Once the pipeline is full, a micro-batch more adds the same as the one before, so a long run is simulated at two short lengths, and
    the line through them is followed.
    """
    pp, parts = layout.pp, layout.stages_per_rank
    cut = Costs(
        costs.forward / parts,
        costs.backward_input / parts,
        costs.backward_weight / parts,
        None if costs.overlapped is None else costs.overlapped / parts,
        costs.send,
        costs.stage_scale,
    )
    near, far = 2 * pp + microbatches % pp % 2, 3 * pp + microbatches % pp % 2
    if microbatches <= far:
        result = _simulated(layout.schedule, pp, microbatches, cut)
        return result.makespan, tuple(result.peak_live_activations)
    short, long = (_simulated(layout.schedule, pp, length, cut) for length in (near, far))
    each = (long.makespan - short.makespan) / (far - near)
    return long.makespan + each * (microbatches - far), tuple(long.peak_live_activations)


@lru_cache(maxsize=256)  # many layouts and clusters differ in what does not concern the pipeline
def _simulated(name: ScheduleName, pp: int, microbatches: int, costs: Costs) -> Simulation:
    if name == "interleaved":
        return simulate(interleaved(pp, microbatches, INTERLEAVED_CHUNKS), costs)
    return simulate(SCHEDULES[name](2 * pp if name == "dualpipe_v" else pp, microbatches), costs)


def step_time(
    c: ModelConfig, hardware: Hardware, layout: Layout, precision: Precision, sequence_length: int, global_batch_size: int
) -> Step:
    """One step of `global_batch_size` sequences. `hardware.busy` stretches all kernel time alike."""
    times = per_token(c, hardware, layout, precision, sequence_length)
    tokens = layout.micro_batch_size * sequence_length
    microbatches = global_batch_size // (layout.dp * layout.micro_batch_size)
    scale = tokens / layout.pp
    exchange = times.all_to_all
    forward = times.forward + times.tensor_parallel
    backward_input = times.backward_input + times.recompute + times.tensor_parallel
    weight = times.backward_weight
    compute = forward + backward_input + weight
    hidden = 0.0
    overlaps = layout.overlap and layout.schedule in ("dualpipe", "dualpipe_v") and layout.pp > 1
    pair = None
    if overlaps:
        # While all-to-all runs it takes its share of the cores from the products; whichever side is longer sets the time.
        pair = max(compute + 2 * exchange * hardware.efficiencies.communication_cores, 2 * exchange)
        hidden = compute + 2 * exchange - pair
    busy = hardware.busy(c.n_routed_experts > 0)
    costs = Costs(
        forward=(forward + exchange) * scale / busy,
        backward_input=(backward_input + exchange) * scale / busy,
        backward_weight=weight * scale / busy,
        overlapped=None if pair is None else pair * scale / busy,
        send=_send_seconds(c, hardware, layout, tokens),
        stage_scale=scales(stages(c, layout)),
    )
    work = microbatches * scale
    sync, optimizer = _after_step(c, hardware, layout, precision)
    steady = compute + 2 * exchange - hidden
    full = work * steady / busy
    launches = 0.0
    if hardware.small_work is not None:
        layers = c.num_hidden_layers + c.num_nextn_predict_layers
        launches = microbatches * layers / layout.pp * hardware.small_work.training_layer_seconds
    spent, live = pipeline(layout, microbatches, costs) if layout.pp > 1 else (full, (1,))
    return Step(
        compute_seconds=work * (compute - times.recompute - 2 * times.tensor_parallel),
        recompute_seconds=work * times.recompute,
        exposed_all_to_all_seconds=work * (2 * exchange - hidden),
        tensor_parallel_seconds=work * 2 * times.tensor_parallel,
        bubble_seconds=spent - full,
        idle_seconds=full - work * steady + launches,
        gradient_sync_seconds=sync,
        optimizer_seconds=optimizer,
        hidden_all_to_all_seconds=work * hidden,
        all_to_all_network_seconds=work * 2 * times.all_to_all_network,
        all_to_all_links_seconds=work * 2 * times.all_to_all_links,
        p2p_seconds=2 * microbatches * costs.send,
        microbatches=microbatches,
        live_activations=live,
        bubble_fraction=1 - full / spent,
    )


def _link_bytes_per_second(hardware: Hardware, layout: Layout) -> float:
    """Between the devices of a layout: over the network where they are more than a node's."""
    name = "scale_out_gb_per_second" if layout.devices > hardware.devices_per_node else "scale_up_gb_per_second"
    return hardware.need(name) * GIGA * hardware.efficiencies.network


def _send_seconds(c: ModelConfig, hardware: Hardware, layout: Layout, tokens: int) -> float:
    """One micro-batch's activations to the next stage."""
    if layout.pp == 1:
        return 0.0
    return 2.0 * c.hidden_size * tokens / layout.tp / _link_bytes_per_second(hardware, layout)


def _after_step(c: ModelConfig, hardware: Hardware, layout: Layout, precision: Precision) -> tuple[float, float]:
    """Gradients summed and weights sent out again (ring, ZeRO-1), and AdamW's pass over what a device owns, of the rank that takes
    longest."""
    copies = layout.stages_held
    replicas = max(1, layout.dp * layout.tp // layout.ep)
    state = 4.0 if precision == "fp32" else 2.0
    touched = 2 * (4.0 + 2 * state) + 4.0 + state
    found = []
    for rest, expert in parameters_of_ranks(c, layout):
        sync = 0.0
        for held, ways in ((rest, layout.dp * copies), (expert, replicas * copies)):
            if ways > 1:
                sync += (4.0 + 2.0) * held * (ways - 1) / ways / _link_bytes_per_second(hardware, layout)
        owned = (rest / layout.dp + expert / replicas) / copies
        found.append((sync, owned * touched / hardware.bytes_per_second))
    return max(found, key=sum)


def useful_flops(c: ModelConfig, sequence_length: int, global_batch_size: int) -> float:
    """FLOPs of a step that a model needs, MTP included, recomputation not."""
    return training_flops_per_token(c, sequence_length) * sequence_length * global_batch_size

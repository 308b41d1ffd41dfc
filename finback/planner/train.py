"""`finback plan train`: memory, time, money and energy of a training run, and the best layouts for it."""

from dataclasses import dataclass, replace

from finback.config import InputError, ModelConfig, count_params
from finback.parallel.schedule import nearest_multiple
from finback.planner.dense import DenseComparison, compare_with_dense
from finback.planner.hardware import ROWS, TERA, Hardware, Precision
from finback.planner.layout import (
    Layout,
    Memory,
    Recompute,
    ScheduleName,
    busiest_rank,
    check_layout,
    check_node,
    divisors,
    does_not_divide,
    stages,
    training_memory,
)
from finback.planner.step import Step, per_token, step_time, useful_flops

USABLE_MEMORY = 0.92  # the rest is the driver's, the communication library's and fragmentation
SIMULATED = 6  # layouts of a search
TRIED = 8  # numbers near to one that divides nothing
MODELLED = "data parallelism with ZeRO-1; pipelines of uneven stages; experts over devices; tensor parallelism inside a node"
NOT_MODELLED = "context parallelism (a sequence stays whole); weights cut by ZeRO-2, ZeRO-3 or FSDP; offloading"
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Prices:
    """What turns hours into money, energy and carbon."""

    usd_per_device_hour: float | None
    pue: float = 1.3
    """Energy of the building by energy of the machines."""
    host_watts_per_device: float = 300.0
    """Processors, fans and network, per device."""
    kg_co2_per_kwh: float = 0.55
    """Of the grid; 0.55 is about China's."""


@dataclass(frozen=True)
class Bill:
    """What a run costs; None where the hardware row has no published figure and none was given."""

    device_hours: float
    days: float
    cost_usd: float | None
    energy_mwh: float | None
    co2_tonnes: float | None


def bill(device_hours: float, devices: int, hardware: Hardware, prices: Prices) -> Bill:
    """Money by the rent of a device, energy by its power limit."""
    rate = prices.usd_per_device_hour if prices.usd_per_device_hour is not None else hardware.usd_per_hour
    energy = None
    if hardware.power_watts is not None:
        energy = device_hours * (hardware.power_watts + prices.host_watts_per_device) * prices.pue / 1e6
    return Bill(
        device_hours=device_hours,
        days=device_hours / devices / 24,
        cost_usd=None if rate is None else device_hours * rate,
        energy_mwh=energy,
        co2_tonnes=None if energy is None else energy * prices.kg_co2_per_kwh,
    )


@dataclass(frozen=True)
class Candidate:
    """One layout with what it gives. `stage_layers` are the decoder layers of each pipeline stage; `why_worse` compares it with the
    best one, and is empty for the best."""

    layout: Layout
    description: str
    stage_layers: tuple[int, ...]
    step: Step
    memory: Memory
    memory_gb: float
    fits: bool
    step_seconds: float
    tokens_per_second_per_device: float
    why_worse: str = ""


@dataclass(frozen=True)
class TrainPlan:
    """The whole answer. `mfu` is useful FLOPs, MTP and causal attention counted, by the bf16 peak."""

    hardware: str
    precision: str
    tokens: float
    sequence_length: int
    global_batch_size: int
    steps: float
    best: Candidate
    alternatives: list[Candidate]
    mfu: float
    tokens_per_second: float
    bill: Bill
    dense: DenseComparison | None
    unknown_figures: list[str]
    efficiency_source: str
    modelled: str = MODELLED
    not_modelled: str = NOT_MODELLED


def evaluate(
    c: ModelConfig, hardware: Hardware, layout: Layout, precision: Precision, sequence_length: int, global_batch_size: int
) -> Candidate:
    """Time and memory of one layout."""
    step = step_time(c, hardware, layout, precision, sequence_length, global_batch_size)
    memory = training_memory(c, layout, precision, sequence_length, step.live_activations)
    return Candidate(
        layout=layout,
        description=layout.text(),
        stage_layers=tuple(stage.layers for stage in stages(c, layout)),
        step=step,
        memory=memory,
        memory_gb=memory.total_bytes / 1e9,
        fits=memory.total_bytes <= USABLE_MEMORY * hardware.memory_bytes,
        step_seconds=step.seconds,
        tokens_per_second_per_device=global_batch_size * sequence_length / step.seconds / layout.devices,
    )


def _powers(limit: int) -> list[int]:
    return [1 << power for power in range(limit.bit_length()) if 1 << power <= limit]


def _quick_seconds(
    c: ModelConfig, hardware: Hardware, layout: Layout, precision: Precision, sequence_length: int, batch: int
) -> float:
    """Seconds of a step with the bubble by V3's table instead of a simulation: to sort many layouts."""
    times = per_token(c, hardware, layout, precision, sequence_length)
    forward, weight = times.forward + times.all_to_all, times.backward_weight
    backward = times.backward_input + times.recompute + times.all_to_all + weight + 2 * times.tensor_parallel
    pair = forward + backward
    if layout.overlap:
        exchange = 2 * times.all_to_all
        pair = max(pair - exchange + exchange * hardware.efficiencies.communication_cores, exchange)
    pp = layout.pp
    bubble = {
        "one_f_one_b": (pp - 1) * (forward + backward),
        "interleaved": (pp - 1) * (forward + backward) / 4,
        "zb1p": (pp - 1) * max(0.0, forward + backward - 2 * weight),
        "dualpipe": max(0.0, (pp / 2 - 1) * (pair + backward - 3 * weight)),
        "dualpipe_v": max(0.0, (pp - 1) * (pair + backward - 3 * weight) / 2),
    }[layout.schedule]
    microbatches = batch // (layout.dp * layout.micro_batch_size)
    return (microbatches * pair * busiest_rank(c, layout) + bubble) * layout.micro_batch_size * sequence_length / pp


def candidates(
    c: ModelConfig,
    hardware: Hardware,
    fixed: Layout,
    free: frozenset[str],
    precision: Precision,
    sequence_length: int,
    batch: int,
) -> list[Layout]:
    """Layouts that divide: the fields in `free` vary, the others are those of `fixed`. Tensor parallelism stays inside a node, and
    whole layers are shared out over the stages as evenly as they go."""
    pps = [pp for pp in _pipelines(c, fixed, free) if fixed.devices % pp == 0]
    tps = _tensors(c, hardware, fixed, free)
    eps = _powers(min(c.n_routed_experts or 1, fixed.devices)) if "ep" in free else [fixed.ep]
    schedules: list[ScheduleName] = ["one_f_one_b", "interleaved", "zb1p", "dualpipe", "dualpipe_v"]
    names = schedules if "schedule" in free else [fixed.schedule]
    recomputes = RECOMPUTES if "recompute" in free else (fixed.recompute,)
    found = []
    for pp in pps:
        for tp in tps:
            for ep in eps:
                for name in names if pp > 1 else names[:1]:
                    for recompute in recomputes:
                        layout = replace(
                            fixed,
                            pp=pp,
                            tp=tp,
                            ep=ep,
                            schedule=name,
                            recompute=recompute,
                            overlap=name.startswith("dualpipe") and ep > 1,
                        )
                        try:
                            check_layout(c, layout, batch)
                        except InputError:
                            continue
                        found.append(layout)
    return found


def _pipelines(c: ModelConfig, fixed: Layout, free: frozenset[str]) -> list[int]:
    """Numbers of stages that a search tries."""
    return _powers(min(64, c.num_hidden_layers)) if "pp" in free else [fixed.pp]


def _tensors(c: ModelConfig, hardware: Hardware, fixed: Layout, free: frozenset[str]) -> list[int]:
    """Devices over which a search cuts layers."""
    return _powers(min(8, hardware.devices_per_node, c.num_attention_heads)) if "tp" in free else [fixed.tp]


def live_by_table(layout: Layout) -> list[float]:
    """Activations of a micro-batch on a stage that each rank holds at once: V3's table, interleaved by Megatron's warm-up."""
    pp, parts = layout.pp, layout.stages_per_rank
    if pp == 1:
        return [1.0]
    if layout.schedule == "interleaved":
        return [min(2.0 * (pp - rank - 1) + (parts - 1) * pp + 1, 1.25 * pp * parts) for rank in range(pp)]
    if layout.schedule in ("one_f_one_b", "zb1p"):
        return [float(pp - rank) if layout.schedule == "one_f_one_b" else float(pp) for rank in range(pp)]
    return [float(layout.num_stages + 1)] * pp


def search(
    c: ModelConfig,
    hardware: Hardware,
    fixed: Layout,
    free: frozenset[str],
    precision: Precision,
    sequence_length: int,
    batch: int,
) -> list[Candidate]:
    """The best layouts that fit, fastest first: all are sorted by table, the first few are simulated."""
    layouts = candidates(c, hardware, fixed, free, precision, sequence_length, batch)
    if not layouts:
        raise _nothing_divides(c, hardware, fixed, free, precision, sequence_length, batch)
    limit = USABLE_MEMORY * hardware.memory_bytes
    needs = {
        layout: training_memory(c, layout, precision, sequence_length, live_by_table(layout)).total_bytes for layout in layouts
    }
    fitting = [layout for layout in layouts if needs[layout] <= limit]
    if not fitting:
        least = min(layouts, key=lambda layout: needs[layout])
        told = (
            f"--devices {fixed.devices}: the smallest layout ({least.text()}) needs {needs[least] / 1e9:.0f} GB on each device, of "
            f"which {hardware.name} has {limit / 1e9:.0f} usable"
        )
        enough = _devices_that_fit(c, hardware, precision)
        remedy = f"take about {enough} devices or more"
        if enough > (most := _connected(hardware)):
            other = next(row for row in ROWS if row.scale_out_gb_per_second is not None)
            others = "it to others" if most == 1 else f"more than {most} of it"
            remedy = f"take --hardware {other.name} and about {_devices_that_fit(c, other, precision)} devices or more"
            raise InputError(f"{told}, and nothing connects {others}; {remedy}")
        if enough <= fixed.devices:
            remedy = "what it keeps for the backward is too much; shorten --sequence-length or raise --tp, which splits it"
        raise InputError(f"{told}; {remedy}")
    fitting.sort(key=lambda layout: _quick_seconds(c, hardware, layout, precision, sequence_length, batch))
    done = [evaluate(c, hardware, layout, precision, sequence_length, batch) for layout in fitting[:SIMULATED]]
    done = sorted((one for one in done if one.fits), key=lambda one: one.step_seconds)
    if not done:
        return [evaluate(c, hardware, min(fitting, key=lambda layout: needs[layout]), precision, sequence_length, batch)]
    return [done[0], *(replace(one, why_worse=explain(done[0], one)) for one in done[1:6])]


def _nothing_divides(
    c: ModelConfig,
    hardware: Hardware,
    fixed: Layout,
    free: frozenset[str],
    precision: Precision,
    sequence_length: int,
    batch: int,
) -> InputError:
    """The nearest number with a layout that holds the model: of stages if that was given and does not divide, else of sequences or of
    devices, whichever has to change less; else what does not divide."""
    limit = USABLE_MEMORY * hardware.memory_bytes

    def answers(layout: Layout, sequences: int) -> bool:
        found = candidates(c, hardware, layout, free, precision, sequence_length, sequences)
        return any(training_memory(c, one, precision, sequence_length, live_by_table(one)).total_bytes <= limit for one in found)

    def nearest(sizes: set[int], size: int) -> list[int]:
        return sorted(sizes, key=lambda one: (abs(one - size), one))[:TRIED]

    shared = fixed.devices // fixed.tp
    if "pp" not in free and fixed.devices % fixed.tp == 0 and shared % fixed.pp:
        lengths = nearest({one for one in divisors(shared) if one <= c.num_hidden_layers}, fixed.pp)
        near = next((pp for pp in lengths if answers(replace(fixed, pp=pp), batch)), None)
        if near is not None:
            return does_not_divide(fixed, near)
    pps, tps = _pipelines(c, fixed, free), _tensors(c, hardware, fixed, free)
    groups = {(pp, pp * tp) for pp in pps for tp in tps}
    batches = {_nearest_batch(fixed, free, pp, group, batch) for pp, group in groups if fixed.devices % group == 0}
    offers = []
    for sequences in nearest(batches, batch):
        if answers(fixed, sequences):
            told = f"--global-batch-size is {batch}, which no layout of the search shares out over --devices {fixed.devices}"
            offers.append((abs(sequences / batch - 1), f"{told}; the nearest that does is {sequences}"))
            break
    replicas = divisors(batch // fixed.micro_batch_size) if batch % fixed.micro_batch_size == 0 else ()
    for devices in nearest({dp * group for dp in replicas for _, group in groups}, fixed.devices):
        if answers(replace(fixed, devices=devices), batch):
            told = f"--devices is {fixed.devices}, over which no layout of the search shares out --global-batch-size {batch}"
            offers.append((abs(devices / fixed.devices - 1), f"{told}; the nearest that does is {devices}"))
            break
    if offers:
        return InputError(min(offers)[1])
    try:
        check_layout(c, fixed, batch)
    except InputError as error:
        return error
    return InputError(f"--devices {fixed.devices}: no layout divides both the devices and the batch; change --global-batch-size")


def _nearest_batch(fixed: Layout, free: frozenset[str], pp: int, group: int, batch: int) -> int:
    """The batch nearest to the one asked for that pipelines of `pp` ranks over `group` devices take, by their schedule if it was
    given."""
    unit = fixed.devices // group * fixed.micro_batch_size
    name = "one_f_one_b" if "schedule" in free or pp == 1 else fixed.schedule
    step = {"interleaved": pp, "dualpipe": 2}.get(name, 1) * unit
    least = {"dualpipe": 2 * pp, "dualpipe_v": 2 * pp}.get(name, 1) * unit
    return max(least, nearest_multiple(batch, step))


def _devices_that_fit(c: ModelConfig, hardware: Hardware, precision: Precision) -> int:
    """A power of two of devices whose memory holds weights, gradients and optimizer once."""
    state = 16.0 if precision == "fp32" else 14.0
    total = count_params(c).total + count_params(c).mtp
    needed = total * state / (USABLE_MEMORY * hardware.memory_bytes * 0.7)
    return 1 << max(0, int(needed - 1e-9).bit_length())


def _connected(hardware: Hardware) -> float:
    """The most devices that can train together."""
    if hardware.scale_out_gb_per_second is not None:
        return float("inf")
    return hardware.devices_per_node if hardware.scale_up_gb_per_second is not None else 1


def explain(best: Candidate, other: Candidate) -> str:
    """The component in which `other` loses most against `best`, and by how much."""
    parts = {
        "compute": "compute_seconds",
        "recomputation": "recompute_seconds",
        "all-to-all that is not hidden": "exposed_all_to_all_seconds",
        "tensor-parallel traffic": "tensor_parallel_seconds",
        "bubbles": "bubble_seconds",
        "gradient synchronisation": "gradient_sync_seconds",
    }
    losses = {name: getattr(other.step, part) - getattr(best.step, part) for name, part in parts.items()}
    worst = max(losses, key=lambda name: losses[name])
    slower = other.step_seconds / best.step_seconds - 1
    if slower < 0.001:
        return f"as fast within 0.1%; takes {other.memory_gb:.0f} GB, the best {best.memory_gb:.0f}"
    gain = min(losses, key=lambda name: losses[name])
    saved = f", {gain} -{-losses[gain]:.2f} s" if losses[gain] < -0.01 else ""
    return f"{slower:+.1%}: {worst} +{losses[worst]:.2f} s{saved}"


def plan_train(
    c: ModelConfig,
    hardware: Hardware,
    layout: Layout,
    free: frozenset[str],
    *,
    tokens: float,
    precision: Precision = "fp8",
    sequence_length: int = 4096,
    global_batch_size: int = 15360,
    prices: Prices | None = None,
    compare_dense: bool = True,
) -> TrainPlan:
    """Plan a run of `tokens` tokens. Fields of `layout` that are named in `free` are searched."""
    for name, value in (("tokens", tokens), ("sequence_length", sequence_length), ("global_batch_size", global_batch_size)):
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, it must be at least 1")
    if sequence_length > c.max_position_embeddings:
        raise InputError(
            f"--sequence-length is {sequence_length}, above the model's max_position_embeddings; use at most "
            f"{c.max_position_embeddings}"
        )
    if precision == "fp8" and hardware.fp8_tflops is None:
        raise InputError(f"--precision is fp8, but {hardware.name} has no FP8 units; use bf16")
    check_node(c, hardware, 1 if "tp" in free else layout.tp)
    if free:
        found = search(c, hardware, layout, free, precision, sequence_length, global_batch_size)
    else:
        check_layout(c, layout, global_batch_size)
        found = [evaluate(c, hardware, layout, precision, sequence_length, global_batch_size)]
    best = found[0]
    steps = tokens / (global_batch_size * sequence_length)
    seconds = steps * best.step_seconds
    flops = useful_flops(c, sequence_length, global_batch_size)
    peak = hardware.need("bf16_tflops") * TERA * layout.devices * (0.5 if precision == "fp32" else 1.0)
    dense = None
    if compare_dense and c.n_routed_experts:
        dense = compare_with_dense(c, tokens, sequence_length)
    return TrainPlan(
        hardware=hardware.title,
        precision=precision,
        tokens=tokens,
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        steps=steps,
        best=best,
        alternatives=found[1:],
        mfu=flops / best.step_seconds / peak,
        tokens_per_second=best.tokens_per_second_per_device * layout.devices,
        bill=bill(seconds * layout.devices / 3600, layout.devices, hardware, prices or Prices(None)),
        dense=dense,
        unknown_figures=hardware.unknown,
        efficiency_source=hardware.efficiency_source,
    )


__all__ = ["Bill", "Candidate", "Prices", "TrainPlan", "bill", "evaluate", "plan_train", "search"]

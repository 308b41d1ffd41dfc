"""`finback plan rl`: rollout, reward and training time of GRPO at the scale of R1-Zero and R1 (R1 paper, Methods and appendix B.1)."""

import math
from dataclasses import dataclass, replace

from finback.config import InputError, ModelConfig
from finback.parallel.schedule import nearest_multiple
from finback.planner.hardware import Hardware, Precision
from finback.planner.inference import Unit, check_acceptance, check_unit, decode_step, largest_batch
from finback.planner.layout import Layout, check_devices, check_layout, check_node, nearest_divisor
from finback.planner.step import per_token
from finback.planner.train import RECOMPUTES, Bill, Candidate, Prices, bill, evaluate


@dataclass(frozen=True)
class Recipe:
    """One RL run. A rollout samples `outputs_per_rollout` answers, which are cut into minibatches of `batch_size` for as many optimizer
    steps. `mean_tokens` is the average length over the run and `longest_tokens` the limit that the longest answer of a rollout
    reaches; neither average is published, so they are assumptions."""

    name: str
    steps: int
    batch_size: int = 512
    outputs_per_rollout: int = 8192
    mean_tokens: float = 6000.0
    longest_tokens: float = 32768.0
    prompt_tokens: float = 200.0
    reward_seconds: float = 30.0
    """What is left of code and rule rewards after overlapping them with sampling."""
    uses_reward_model: bool = False
    not_modelled: str = ""
    """What else the published model went through, and why it has no row here."""


# The limit was 32,768 tokens for 8,200 steps and 65,536 afterwards (R1 paper, Methods).
R1_ZERO = Recipe("R1-Zero", steps=10_400, longest_tokens=round((8_200 * 32_768 + 2_200 * 65_536) / 10_400))
R1 = Recipe(
    "R1, second RL stage",
    steps=1_700,
    uses_reward_model=True,
    not_modelled="R1's first RL stage, whose steps are not published (it ran to convergence), and the supervised "
    "fine-tuning before either; the published 41K GPU-hours are of R1's training as a whole",
)
RECIPES = {"r1-zero": R1_ZERO, "r1": R1}


@dataclass(frozen=True)
class RLPlan:
    """Seconds of one rollout cycle by part, and the run's bill. `rollout_seconds` is the longer of the two bounds beside it;
    `memory_gb` is what training takes on the device that holds most, and `fits` whether it has that."""

    recipe: str
    hardware: str
    devices: int
    layout: str
    memory_gb: float
    fits: bool
    cycles: float
    rollout_seconds: float
    rollout_throughput_bound_seconds: float
    rollout_longest_answer_seconds: float
    tokens_per_cycle: float
    reference_seconds: float
    reward_seconds: float
    training_seconds: float
    cycle_seconds: float
    seconds_per_step: float
    requests_per_device: int
    bill: Bill
    efficiency_source: str
    not_modelled: str


def plan_rl(
    c: ModelConfig,
    hardware: Hardware,
    layout: Layout,
    unit: Unit,
    recipe: Recipe,
    free: frozenset[str] = frozenset(),
    *,
    precision: Precision = "fp8",
    prices: Prices | None = None,
    mtp_acceptance: float = 0.0,
) -> RLPlan:
    """All phases use all devices in turn, models are moved in and out between them (R1 paper, appendix B.1). With "recompute" in
    `free`, the backward computes as little again as fits; nothing else is searched."""
    _check(c, hardware, layout, unit, recipe, precision, mtp_acceptance)
    outputs, devices = recipe.outputs_per_rollout, layout.devices
    if outputs % recipe.batch_size:
        near = max(1, round(outputs / recipe.batch_size)) * recipe.batch_size
        raise InputError(
            f"--outputs-per-rollout is {outputs}, it must be a multiple of --batch-size ({recipe.batch_size}); take {near}"
        )
    context = recipe.prompt_tokens + recipe.mean_tokens / 2
    wanted = -(-outputs * unit.sharing // devices)
    room = largest_batch(c, hardware, unit, precision, context, 2.0, mtp=mtp_acceptance > 0)
    if room < 1:
        raise InputError(f"--ep {unit.ep}: the weights leave no room for a cache on {hardware.name}; take more devices per unit")
    batch = max(1, min(wanted, room, 256))
    step = decode_step(c, hardware, unit, precision, batch, context, mtp_acceptance=mtp_acceptance)
    tokens = outputs * recipe.mean_tokens
    throughput_bound = tokens / (devices * step.tokens_per_second_per_device)
    # While the longest answer ends, its device has few others left.
    last = decode_step(c, hardware, unit, precision, max(1, batch // 4), recipe.longest_tokens / 2, mtp_acceptance=mtp_acceptance)
    longest = recipe.longest_tokens * last.tpot_ms / 1e3
    seen = tokens + outputs * recipe.prompt_tokens
    length = int(recipe.mean_tokens + recipe.prompt_tokens)
    forward = per_token(c, hardware, layout, precision, length)
    reference = seen * (forward.forward + forward.all_to_all) / devices / hardware.busy(c.n_routed_experts > 0) * layout.tp
    rows = max(1, round(recipe.batch_size / layout.dp)) * layout.dp
    check_layout(c, layout, rows)
    trained = _training(c, hardware, layout, free, precision, length, rows)
    update = trained.step_seconds * recipe.batch_size / rows
    updates = outputs / recipe.batch_size
    reward = recipe.reward_seconds + (reference if recipe.uses_reward_model else 0.0)
    training = update * updates
    rollout = max(throughput_bound, longest)
    cycle = rollout + reference + reward + training
    cycles = recipe.steps / updates
    return RLPlan(
        recipe=recipe.name,
        hardware=hardware.title,
        devices=devices,
        layout=trained.description,
        memory_gb=trained.memory_gb,
        fits=trained.fits,
        cycles=cycles,
        rollout_seconds=rollout,
        rollout_throughput_bound_seconds=throughput_bound,
        rollout_longest_answer_seconds=longest,
        tokens_per_cycle=tokens,
        reference_seconds=reference,
        reward_seconds=reward,
        training_seconds=training,
        cycle_seconds=cycle,
        seconds_per_step=cycle / updates,
        requests_per_device=batch,
        bill=bill(cycles * cycle * devices / 3600, devices, hardware, prices or Prices(None)),
        efficiency_source=hardware.efficiency_source,
        not_modelled=recipe.not_modelled,
    )


def _training(
    c: ModelConfig, hardware: Hardware, layout: Layout, free: frozenset[str], precision: Precision, length: int, rows: int
) -> Candidate:
    """An update's time and memory, of sequences of the average length."""
    if "recompute" not in free:
        return evaluate(c, hardware, layout, precision, length, rows)
    found = [evaluate(c, hardware, replace(layout, recompute=recompute), precision, length, rows) for recompute in RECOMPUTES]
    return next((one for one in found if one.fits), found[-1])


def _check(
    c: ModelConfig,
    hardware: Hardware,
    layout: Layout,
    unit: Unit,
    recipe: Recipe,
    precision: Precision,
    mtp_acceptance: float,
) -> None:
    for name in ("steps", "batch_size", "outputs_per_rollout", "mean_tokens", "longest_tokens"):
        value = getattr(recipe, name)
        if not (value >= 1 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} is {value:g}, it must be a number of at least 1")
    check_acceptance(c, mtp_acceptance)
    if precision == "fp8" and hardware.fp8_tflops is None:
        raise InputError(f"--precision is fp8, but {hardware.name} has no FP8 units; use bf16")
    if recipe.longest_tokens < recipe.mean_tokens:
        raise InputError(
            f"--longest-tokens is {recipe.longest_tokens:g}, below --mean-tokens ({recipe.mean_tokens:g}); give the longer of the two"
        )
    room = c.max_position_embeddings - recipe.prompt_tokens
    if recipe.longest_tokens > room:
        remedy = f"use at most {room:.0f}" if room >= 1 else "take a model of longer sequences"
        raise InputError(
            f"--longest-tokens is {recipe.longest_tokens:.0f}, above what the model's max_position_embeddings "
            f"({c.max_position_embeddings}) leave beside a prompt of {recipe.prompt_tokens:.0f}; {remedy}"
        )
    for tp in (unit.tp, layout.tp):
        check_node(c, hardware, tp)
    check_unit(c, unit)
    groups, rest = divmod(layout.devices, max(1, layout.ep))
    if rest and layout.pp > 0:
        near = nearest_multiple(layout.devices, layout.pp * layout.ep)
        raise InputError(f"--devices is {layout.devices}, it must be a multiple of --pp x --ep; the nearest is {near}")
    if rest == 0 < groups and layout.pp > 0 and groups % layout.pp:
        raise InputError(
            f"--pp is {layout.pp}, it must divide --devices / --ep ({layout.devices} / {layout.ep} = {groups}); "
            f"the nearest is {nearest_divisor(groups, layout.pp)}"
        )
    check_devices(c, layout)
    if layout.devices % unit.devices:
        near = max(unit.devices, round(layout.devices / unit.devices) * unit.devices)
        raise InputError(
            f"--devices is {layout.devices}, it must be a multiple of a rollout unit ({unit.devices}); the nearest is {near}"
        )

"""`finback plan`: what training, reinforcement learning and serving of a model cost, before building it. No torch."""

import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finback.commands.machine import read_hardware
from finback.commands.parse import parse_arguments
from finback.commands.plan_fields import (
    FitFields,
    HardwareFields,
    ModelFields,
    Output,
    PageFields,
    RLFields,
    ScheduleFields,
    ServeFields,
    TrainFields,
    ValidateFields,
)
from finback.config import InputError, ModelConfig, nearest
from finback.data.files import write_atomic
from finback.parallel.schedule import SCHEDULES, Action, Costs, Simulation, interleaved, simulate
from finback.planner import drawing
from finback.planner.fit import fit_table
from finback.planner.hardware import ROWS, Hardware, Precision
from finback.planner.inference import Unit, usual_copies, usual_unit
from finback.planner.layout import Layout
from finback.planner.measured import another_machine, hardware_of
from finback.planner.model import plan_model
from finback.planner.rl import RECIPES, plan_rl
from finback.planner.serve import Tariff, Traffic, plan_serve
from finback.planner.tables import (
    print_fit,
    print_hardware,
    print_model,
    print_rl,
    print_schedule,
    print_serve,
    print_train,
    print_validation,
)
from finback.planner.train import Prices, plan_train
from finback.planner.validation import markdown, validation_rows
from finback.presets import PRESETS

USUAL_LENGTH = 4096
NO_PNG = "there is no picture of it"


def main(argv: Sequence[str]) -> int:
    """`finback plan KIND ...`, or `finback plan --html FILE`."""
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0].startswith("-"):
        return _page(words)
    if words[0] not in KINDS:
        hint = nearest(words[0], list(KINDS)) or f"; kinds are {', '.join(KINDS)}"
        raise InputError(f"unknown kind of plan {words[0]!r}{hint}")
    fields, description, function = KINDS[words[0]]
    parsed = parse_arguments(fields, words[1:], verb=f"plan {words[0]}", description=description)
    _check_ranges(parsed)
    function(parsed)
    return 0


def _help() -> str:
    """Every kind with its own page, since fields differ from kind to kind."""
    lines = [
        "usage: finback plan KIND ...",
        "       finback plan --html FILE",
        "",
        "What a model of this kind costs, before building it.",
        "",
    ]
    lines += [f"  {name:<10}{description}" for name, (_, description, _) in KINDS.items()]
    lines += ["", "  --html FILE  write one page with controls, in Chinese and English", "  -h, --help   show this"]
    for name, (fields, description, _) in KINDS.items():
        page = io.StringIO()
        with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
            parse_arguments(fields, ["--help"], verb=f"plan {name}", description=description)
        lines += ["", page.getvalue().rstrip()]
    return "\n".join(lines)


def _show(output: Output, plan: Any, show: Callable[[], None], picture: Callable[[], bytes] | None) -> None:
    """JSON or tables, and the picture where one is asked for."""
    if output.png is not None:
        if picture is None:
            raise InputError(f"--png: {NO_PNG}; leave it out")
        _check_target("--png", output.png)
        write_atomic(output.png, picture())
    if output.json:
        print(json.dumps(plan, indent=2, ensure_ascii=False, allow_nan=False, default=str))
    else:
        show()


def find_model(name: str) -> ModelConfig:
    """A preset's model, or the one of a Hugging Face directory."""
    if name in PRESETS:
        return PRESETS[name]().model
    if Path(name).is_dir():
        return ModelConfig.from_hf(name)
    hint = nearest(name, list(PRESETS)) or f"; presets are {', '.join(PRESETS)}"
    raise InputError(f"model {name!r} is neither a preset nor a directory{hint}")


def _hardware_row(name: str, ceilings: Path, precision: Precision | None) -> Hardware:
    """A row by its name, with a warning where "measured" was measured on another machine."""
    hardware = hardware_of(name, ceilings, precision)
    differs = another_machine(ceilings, read_hardware(Path())) if name == "measured" else ""
    if differs:
        print(f"finback plan: warning: --hardware measured: {differs}", file=sys.stderr)
    return hardware


def _precision(chosen: Precision | None, hardware: Hardware) -> Precision:
    if chosen is not None:
        return chosen
    return "bf16" if hardware.fp8_tflops is None else "fp8"


def _length(chosen: int | None, model: ModelConfig) -> int:
    return min(USUAL_LENGTH, model.max_position_embeddings) if chosen is None else chosen


def _check_target(flag: str, path: Path) -> None:
    """Refuse a place where no file can be written, before the work for it is done."""
    if path.is_dir():
        raise InputError(f"{flag} {path} is a directory; give a file")
    if not path.parent.is_dir():
        raise InputError(f"{flag} {path}: there is no directory {path.parent}; make it first")


MOST_COUNT = 10**9
# Of numbers that are no counts the least (above 0) and the most that are taken: beyond any real question, and far from where
# formulas overflow. Shares have a check of their own.
RANGES: dict[str, tuple[float, float]] = (
    dict.fromkeys(("tokens", "input_tokens_per_day", "output_tokens_per_day", "prompt_tokens", "context_tokens"), (1.0, 1e18))
    | dict.fromkeys(("mean_tokens", "longest_tokens"), (1.0, 1e18))
    | dict.fromkeys(("forward", "backward_input", "backward_weight", "overlapped", "send"), (1e-9, 1e9))
    | {"usd_per_device_hour": (1e-6, 1e6)}
    | dict.fromkeys(("usd_per_million_hit", "usd_per_million_miss", "usd_per_million_output"), (0.0, 1e6))
    | {"pue": (1.0, 1e3), "kg_co2_per_kwh": (0.0, 1e3), "expert_imbalance": (1.0, 1e6)}
    | dict.fromkeys(("hit_share", "mtp_acceptance"), (0.0, math.inf))
)


def _check_ranges(fields: object) -> None:
    """Refuse numbers so large or so small that no formula takes them; what must be positive is checked where it is used."""
    for name, value in vars(fields).items():
        says = f"--{name.replace('_', '-')} {'holds' if isinstance(value, tuple) else 'is'}"
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            whole = isinstance(number, int)
            least, most = (1, MOST_COUNT) if whole else RANGES[name]
            digits = len(str(abs(number))) if whole else 0
            told = f"{says} a number of {digits} digits" if digits > 20 else f"{says} {number if whole else f'{number:g}'}"
            if number > most:
                raise InputError(f"{told}, above {most:{'d' if whole else 'g'}}; use at most {most:{'d' if whole else 'g'}}")
            if number < -most:
                raise InputError(f"{told}, below {-most:{'d' if whole else 'g'}}; use at least {least:g}")
            if 0 < number < least:
                raise InputError(f"{told}, below {least:g}; use at least {least:g}")


def _check_positive(fields: object, *names: str) -> None:
    for name in names:
        value = getattr(fields, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name.replace('_', '-')} is {value:g}, it must be positive")


def _model(fields: ModelFields) -> None:
    model = find_model(fields.model)
    plan = plan_model(model, _length(fields.sequence_length, model))
    _show(fields, asdict(plan), lambda: print_model(fields.model, plan), lambda: drawing.model_png(plan))


def _train(fields: TrainFields) -> None:
    _check_positive(fields, "devices", "tokens", "usd_per_device_hour", "pue", "expert_imbalance")
    if not (fields.kg_co2_per_kwh >= 0 and math.isfinite(fields.kg_co2_per_kwh)):
        raise InputError(f"--kg-co2-per-kwh is {fields.kg_co2_per_kwh:g}, it must be at least 0")
    model, hardware = find_model(fields.model), _hardware_row(fields.hardware, fields.ceilings, fields.precision)
    free = frozenset(name for name in ("pp", "ep", "tp", "schedule", "recompute") if getattr(fields, name) is None)
    schedule = fields.schedule or "one_f_one_b"
    layout = Layout(
        devices=fields.devices,
        pp=fields.pp or 1,
        ep=fields.ep or 1,
        tp=fields.tp or 1,
        schedule=schedule,
        recompute=fields.recompute or "selective",
        micro_batch_size=fields.micro_batch_size,
        overlap=schedule.startswith("dualpipe"),
        expert_imbalance=fields.expert_imbalance,
        stage_layers=fields.stage_layers,
    )
    for name in ("pp", "ep", "tp"):
        if getattr(fields, name) is not None and getattr(fields, name) < 1:
            raise InputError(f"--{name} is {getattr(fields, name)}, it must be at least 1")
    plan = plan_train(
        model,
        hardware,
        layout,
        free,
        tokens=fields.tokens,
        precision=_precision(fields.precision, hardware),
        sequence_length=_length(fields.sequence_length, model),
        global_batch_size=fields.global_batch_size,
        prices=Prices(fields.usd_per_device_hour, fields.pue, kg_co2_per_kwh=fields.kg_co2_per_kwh),
    )
    _show(fields, asdict(plan), lambda: print_train(fields.model, plan), lambda: drawing.train_png(plan))


def _rl(fields: RLFields) -> None:
    model, hardware = find_model(fields.model), _hardware_row(fields.hardware, fields.ceilings, fields.precision)
    _check_positive(fields, "devices", "usd_per_device_hour")
    names = ("steps", "batch_size", "outputs_per_rollout", "mean_tokens", "longest_tokens")
    changed: dict[str, Any] = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    plan = plan_rl(
        model,
        hardware,
        Layout(fields.devices, pp=fields.pp, ep=fields.ep, recompute=fields.recompute or "selective"),
        Unit(ep=fields.ep),
        replace(RECIPES[fields.recipe], **changed),
        free=frozenset({"recompute"} if fields.recompute is None else ()),
        precision=_precision(fields.precision, hardware),
        prices=Prices(fields.usd_per_device_hour),
        mtp_acceptance=fields.mtp_acceptance,
    )
    _show(fields, asdict(plan), lambda: print_rl(fields.model, plan), lambda: drawing.rl_png(plan))


def _serve(fields: ServeFields) -> None:
    model, hardware = find_model(fields.model), _hardware_row(fields.hardware, fields.ceilings, fields.precision)
    precision = _precision(fields.precision, hardware)
    _check_positive(fields, "usd_per_device_hour")
    plan = plan_serve(
        model,
        hardware,
        _unit(fields, model, hardware, precision, fields.prefill_ep, 32),
        _unit(fields, model, hardware, precision, fields.decode_ep, 144),
        precision=precision,
        batch=fields.batch,
        traffic=Traffic(
            fields.input_tokens_per_day,
            fields.output_tokens_per_day,
            fields.hit_share,
            _within(fields.prompt_tokens, Traffic.prompt_tokens, model),
            _within(fields.context_tokens, Traffic.context_tokens, model),
        ),
        tariff=Tariff(fields.usd_per_million_hit, fields.usd_per_million_miss, fields.usd_per_million_output),
        usd_per_device_hour=fields.usd_per_device_hour,
        mtp_acceptance=fields.mtp_acceptance,
    )
    _show(fields, asdict(plan), lambda: print_serve(fields.model, plan), lambda: drawing.serve_png(plan))


def _within(tokens: float, usual: float, model: ModelConfig) -> float:
    """What was asked for; of what was not, no more than the model takes."""
    return min(tokens, float(model.max_position_embeddings)) if tokens == usual else tokens


def _unit(
    fields: ServeFields, model: ModelConfig, hardware: Hardware, precision: Precision, ep: int | None, several_nodes: int
) -> Unit:
    """The unit that was asked for; else the usual one."""
    copies = fields.redundant_experts
    if ep is None:
        return usual_unit(model, hardware, precision, several_nodes, fields.tp, copies)
    return Unit(ep, fields.tp, usual_copies(hardware, ep) if copies is None else copies)


def _fit(fields: FitFields) -> None:
    if fields.context < 1:
        raise InputError(f"--context is {fields.context}, it must be at least 1")
    hardware = _hardware_row(fields.hardware, fields.ceilings, None)
    rows = fit_table(hardware, fields.context)
    _show(
        fields,
        {"hardware": hardware.title, "rows": [asdict(row) for row in rows]},
        lambda: print_fit(hardware, rows),
        lambda: drawing.fit_png(hardware.title, rows),
    )


def _schedule(fields: ScheduleFields) -> None:
    names = {name.replace("_", ""): name for name in SCHEDULES} | {"1f1b": "one_f_one_b"}
    name = names.get(fields.name.lower().replace("_", "").replace("-", ""))
    if name is None:
        hint = nearest(fields.name, list(SCHEDULES)) or f"; schedules are {', '.join(SCHEDULES)}"
        raise InputError(f"unknown schedule {fields.name!r}{hint}")
    _check_positive(fields, "forward", "backward_input", "backward_weight", "overlapped")
    if not (fields.send >= 0 and math.isfinite(fields.send)):
        raise InputError(f"--send is {fields.send:g}, it must be at least 0")
    chunks = fields.chunks if name == "interleaved" else 1
    if fields.stages > MOST_STAGES:
        raise InputError(f"--stages is {fields.stages}, above {MOST_STAGES}; use at most {MOST_STAGES}")
    size = fields.stages * fields.microbatches * chunks
    if size > MOST_CELLS:
        told = "--stages x --microbatches" + (" x --chunks" if name == "interleaved" else "")
        most = MOST_CELLS // max(1, fields.stages * fields.microbatches)
        remedy = f"use at most --chunks {most}" if chunks > 1 and most > 1 else "give fewer micro-batches"
        raise InputError(f"{told} is {size}, above {MOST_CELLS}; {remedy}")
    costs = Costs(fields.forward, fields.backward_input, fields.backward_weight, fields.overlapped, fields.send)
    try:
        if name == "interleaved":
            schedule = interleaved(fields.stages, fields.microbatches, fields.chunks)
        else:
            schedule = SCHEDULES[name](fields.stages, fields.microbatches)
        result = simulate(schedule, costs)
    except ValueError as error:  # the schedules know nothing of ours, so they raise the plain kind
        raise InputError(str(error)) from None
    title = f"{name}, {fields.stages} stages, {fields.microbatches} micro-batches"
    _show(
        fields,
        _schedule_data(name, fields, schedule, result, costs) if fields.json else None,
        lambda: print_schedule(title, schedule, result, costs),
        lambda: drawing.schedule_png(title, schedule, result),
    )


def _schedule_data(
    name: str, fields: ScheduleFields, schedule: Sequence[Sequence[Action]], result: Simulation, costs: Costs
) -> dict[str, Any]:
    """Every action with its times: of a large schedule more than the rest of an answer takes."""
    return {
        "schedule": name,
        "num_stages": fields.stages,
        "num_microbatches": fields.microbatches,
        "time_unit": "that in which the costs are given",
        "costs": asdict(costs),
        "makespan": result.makespan,
        "bubble_fraction": result.bubble_fraction,
        "bubbles": result.bubbles,
        "busy": result.busy,
        "peak_live_activations": result.peak_live_activations,
        "parameter_copies": result.parameter_copies,
        "ranks": [
            [_action(action) | {"start": start, "end": end} for action, (start, end) in zip(actions, spans, strict=True)]
            for actions, spans in zip(schedule, result.timeline, strict=True)
        ],
    }


MOST_STAGES = 1000
MOST_CELLS = 12_000  # an answer is promised within a second; six times what V3 trained with
"""Forwards of the largest schedule that is simulated and drawn."""


def _action(action: Action) -> dict[str, Any]:
    told: dict[str, Any] = {
        "kind": action.kind.value,
        "microbatch": action.microbatch,
        "stage": action.stage,
        "chunk": action.chunk,
    }
    return told if action.backward is None else told | {"backward": _action(action.backward)}


def _hardware(fields: HardwareFields) -> None:
    plan = [asdict(row) | {"unknown": row.unknown} for row in ROWS]
    _show(fields, {"rows": plan}, lambda: print_hardware(ROWS), None)


def _validate(fields: ValidateFields) -> None:
    if fields.out is not None:
        _check_target("--out", fields.out)
    models = {name: PRESETS[name]().model for name in ("v3-671b", "v2-lite-16b", "tiny")}
    rows = validation_rows(models, fields.results)
    if fields.out is not None:
        write_atomic(fields.out, markdown(rows))
    plan = {"rows": [asdict(row) | {"error": row.error, "met": row.met} for row in rows]}
    _show(fields, plan, lambda: print_validation(rows), None)


def _page(words: Sequence[str]) -> int:
    fields = parse_arguments(PageFields, words, verb="plan", description="Write the planner as one page.")
    from finback.planner.page import page

    _check_target("--html", fields.html)
    models = {name: PRESETS[name]().model for name in ("v3-671b", "v2-lite-16b")}
    write_atomic(fields.html, page(models))
    print(f"wrote {fields.html}", file=sys.stderr)
    return 0


KINDS: dict[str, tuple[Any, str, Callable[[Any], None]]] = {
    "model": (ModelFields, "parameters, FLOPs, bytes and cache per token", _model),
    "train": (TrainFields, "memory, time, money and energy of a training run, and the best layouts", _train),
    "rl": (RLFields, "rollout, reward and training time of R1-Zero and R1", _rl),
    "serve": (ServeFields, "throughput, latency and money of serving, and dense against mixture", _serve),
    "fit": (FitFields, "what fits on one card or laptop, at which precision and context", _fit),
    "schedule": (ScheduleFields, "a pipeline schedule, drawn and simulated", _schedule),
    "hardware": (HardwareFields, "the hardware rows and their sources", _hardware),
    "validate": (ValidateFields, "the planner against published and measured figures", _validate),
}
"""The kinds of plan by the words of the command line."""

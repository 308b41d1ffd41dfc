"""The planner as one page without fetches: tables that the formulas fill here, and a script that only looks up, multiplies and adds.

`page.html` beside this module is the frame. Whatever the page computes itself is in `bill`, `economics` and `fit_table`, too, and a
test holds the two against each other in a browser.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finback.config import ModelConfig
from finback.parallel.schedule import SCHEDULES, simulate
from finback.planner.drawing import COLORS
from finback.planner.fit import PUBLISHED, USABLE
from finback.planner.hardware import HARDWARE, Hardware, Precision
from finback.planner.inference import RESERVED, Unit, decode_step, prefill, usual_unit, weight_bytes_per_device
from finback.planner.layout import Layout, training_memory
from finback.planner.model import WEIGHT_BYTES
from finback.planner.serve import HIT_SHARES, Tariff, Traffic
from finback.planner.train import RECOMPUTES, USABLE_MEMORY, Prices, evaluate, live_by_table

DEVICES = (512, 1024, 2048, 4096)
CONTEXTS = (1_000, 4_989, 16_000, 64_000)
BATCHES = (1, 8, 32, 64, 88, 128, 192)
CLUSTERS = ("h800", "h100", "h200", "b200", "gb200", "h20", "a100", "ascend910b", "ascend910c")
GLOBAL_BATCH = 16384  # near V3's 15,360, and divides among all clusters of the page
SEQUENCE = 4096
STAGES, MICROBATCHES = 8, 24
_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "/*TABLES*/null"


def precision_of(hardware: Hardware) -> Precision:
    """FP8 where the hardware has it."""
    return "bf16" if hardware.fp8_tflops is None else "fp8"


def layout_on_page(c: ModelConfig, hardware: Hardware, devices: int) -> Layout:
    """V3's own layout scaled to the devices, with the least recomputation that fits; small models need no pipeline."""
    if c.num_hidden_layers < 60:
        layout = Layout(devices, ep=8 if c.n_routed_experts % 8 == 0 else 1)
    else:
        ep = min(64, devices // 16)
        layout = Layout(devices, pp=16, ep=ep, schedule="dualpipe", overlap=True)
    live = live_by_table(layout)
    for recompute in RECOMPUTES:
        layout = replace(layout, recompute=recompute)
        memory = training_memory(c, layout, precision_of(hardware), SEQUENCE, live)
        if memory.total_bytes <= USABLE_MEMORY * hardware.memory_bytes:
            break
    return layout


def units_on_page(c: ModelConfig, hardware: Hardware) -> tuple[Unit, Unit]:
    """Units of prefill and decode: those that `finback plan serve` takes where it is not told."""
    precision = precision_of(hardware)
    return usual_unit(c, hardware, precision, 32), usual_unit(c, hardware, precision, 144)


def _train_table(c: ModelConfig) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name in CLUSTERS:
        hardware = HARDWARE[name]
        for devices in DEVICES:
            layout = layout_on_page(c, hardware, devices)
            found = evaluate(c, hardware, layout, precision_of(hardware), SEQUENCE, GLOBAL_BATCH)
            table[f"{name}|{devices}"] = {
                "layout": found.description,
                "tokens_per_second_per_device": found.tokens_per_second_per_device,
                "memory_gb": found.memory_gb,
                "fits": found.fits,
            }
    return table


def _serve_table(c: ModelConfig) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name in CLUSTERS:
        hardware = HARDWARE[name]
        precision = precision_of(hardware)
        first, second = units_on_page(c, hardware)
        rates = [prefill(c, hardware, first, precision, Traffic.prompt_tokens, share) for share in HIT_SHARES]
        steps = {
            f"{context}|{batch}": decode_step(c, hardware, second, precision, batch, context)
            for context in CONTEXTS
            for batch in BATCHES
        }
        weights = [weight_bytes_per_device(c, unit, precision) for unit in (first, second)]
        held = max(weights) <= (1 - RESERVED) * hardware.memory_bytes  # the plan is refused where prefill has no room
        table[name] = {
            "units": [first.devices, second.devices],
            "weights_gb": [size / 1e9 for size in weights],
            "prefill": {
                f"{share:g}": rate.tokens_per_second_per_device_with_hits for share, rate in zip(HIT_SHARES, rates, strict=True)
            },
            "decode": {key: [step.tpot_ms, step.tokens_per_second_per_device, held and step.fits] for key, step in steps.items()},
        }
    return table


def _schedules() -> dict[str, Any]:
    """Every schedule of one size with its timeline: [start, end, kind, label] for each action."""
    drawn = {}
    for name, build in SCHEDULES.items():
        schedule = build(STAGES, MICROBATCHES)
        result = simulate(schedule)
        drawn[name] = {
            "makespan": result.makespan,
            "bubble": max(result.bubbles),
            "activations": max(result.peak_live_activations),
            "copies": max(result.parameter_copies),
            "ranks": [
                [
                    [start, end, action.kind.value, str(action.microbatch)]
                    for action, (start, end) in zip(actions, spans, strict=True)
                ]
                for actions, spans in zip(schedule, result.timeline, strict=True)
            ],
        }
    return drawn


def tables(models: Mapping[str, ModelConfig]) -> dict[str, Any]:
    """Everything that the page's script knows."""
    prices = Prices(None)
    return {
        "models": list(models),
        "devices": DEVICES,
        "contexts": CONTEXTS,
        "batches": BATCHES,
        "hit_shares": HIT_SHARES,
        "clusters": CLUSTERS,
        "hardware": {
            name: {
                "title": row.title,
                "memory_gb": row.memory_gb,
                "bytes_per_second": None if row.memory_gb_per_second is None else row.bytes_per_second * row.efficiencies.busy,
                "power_watts": row.power_watts,
                "usd_per_hour": row.usd_per_hour,
                "devices_per_node": row.devices_per_node,
                "source": row.source,
            }
            for name, row in HARDWARE.items()
        },
        "host_watts_per_device": prices.host_watts_per_device,
        "traffic": asdict(Traffic()),
        "tariff": asdict(Tariff()),
        "train": {name: _train_table(c) for name, c in models.items()},
        "serve": {name: _serve_table(c) for name, c in models.items()},
        "published": [asdict(model) for model in PUBLISHED],
        "weight_bytes": {name: WEIGHT_BYTES[name] for name in ("bf16", "fp8", "int4")},
        "usable": USABLE,
        "schedules": _schedules(),
        "colors": {kind.value: color for kind, color in COLORS.items()},
    }


def page(models: Mapping[str, ModelConfig]) -> str:
    """The page's HTML, complete in itself."""
    data = json.dumps(tables(models), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    frame = _TEMPLATE.read_text(encoding="utf-8")
    return frame.replace(_PLACE, data)

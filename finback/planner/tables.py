"""The tables that `finback plan` prints, by rich: one function for each kind of plan."""

import shutil
import sys
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from finback.parallel.schedule import Action, Costs, Simulation
from finback.planner.drawing import COLORS, cells, columns_per_unit
from finback.planner.fit import FitRow
from finback.planner.hardware import Hardware
from finback.planner.model import ModelPlan
from finback.planner.rl import RLPlan
from finback.planner.serve import ServePlan
from finback.planner.train import Bill, TrainPlan
from finback.planner.yardsticks import Row

UNKNOWN = "?"
_PIPE_WIDTH = 160
_LONGEST_LINE = 1000  # of a drawing, where no terminal cuts it


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH, soft_wrap=not sys.stdout.isatty())


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < text_columns else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = _console()
    console.print(table)
    console.print()


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return UNKNOWN
    if value and abs(value) < 10.0**-digits:  # of small models three digits are left
        return f"{value:.3g}"
    return f"{value:,.{digits}f}"


def _say(*lines: str) -> None:
    console = _console()
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_model(name: str, plan: ModelPlan) -> None:
    """`finback plan model`."""
    _table(
        name,
        ("", "", ""),
        [
            ("parameters", _number(plan.total_parameters / 1e9, 3), "billion"),
            ("used by a token, with embedding", _number(plan.active_parameters / 1e9, 3), "billion"),
            ("used by a token, without", _number(plan.active_parameters_without_embedding / 1e9, 3), "billion"),
            ("MTP, as stored", _number(plan.mtp_parameters_stored / 1e9, 3), "billion"),
            (f"training at {plan.sequence_length:,} tokens", _number(plan.training_gflop_per_token), "GFLOP per token"),
            ("the same without MTP", _number(plan.training_gflop_per_token_without_mtp), "GFLOP per token"),
            ("prefill", _number(plan.forward_gflop_per_token), "GFLOP per token"),
            (f"decode behind {plan.sequence_length:,} tokens", _number(plan.decode_gflop_per_token), "GFLOP per token"),
            ("cache, bf16", _number(plan.cache_bytes_per_token / 1000, 3), "KB per token"),
            (f"cache of {plan.max_position_embeddings:,} tokens", _number(plan.cache_gib_at_full_context, 2), "GiB"),
        ],
    )
    _table(
        "weights",
        ("", "GB", "GB read per token"),
        [(key, _number(size), _number(plan.active_weight_gb_per_token[key])) for key, size in plan.weight_gb.items()],
    )
    _table(
        "modules",
        ("module", "parameters, M", "used by a token, M", "forward, GFLOP per token", "decode in bf16, MB read per token"),
        [
            (
                m.name,
                _number(m.parameters / 1e6),
                _number(m.active_parameters / 1e6),
                _number(m.forward_flops_per_token / 1e9, 3),
                _number(m.decode_bytes_per_token / 1e6),
            )
            for m in plan.modules
        ],
    )
    _table(
        "cache per token",
        ("design", "KB", "times ours"),
        [(row.name, _number(row.bytes_per_token / 1000, 3), f"{row.times_ours:.2f}x") for row in plan.caches],
    )


def _bill_rows(bill: Bill) -> list[tuple[str, str, str]]:
    return [
        ("device-hours", _number(bill.device_hours / 1e3), "thousand"),
        ("time", _number(bill.days), "days"),
        ("money", UNKNOWN if bill.cost_usd is None else _number(bill.cost_usd / 1e6, 3), "million USD"),
        ("energy", _number(bill.energy_mwh, 0), "MWh"),
        ("carbon", _number(bill.co2_tonnes, 0), "t CO2"),
    ]


def _unknown_line(unknown: Sequence[str]) -> list[str]:
    return [f"{UNKNOWN}: not published for this hardware ({', '.join(unknown)})."] if unknown else []


def print_train(name: str, plan: TrainPlan) -> None:
    """`finback plan train`."""
    best = plan.best
    step, memory = best.step, best.memory
    _table(
        f"{name} on {best.layout.devices:,} x {plan.hardware}, {plan.precision}, {plan.tokens / 1e12:g}T tokens",
        ("", "", ""),
        [
            ("layout", best.description, ""),
            *([("layers by stage", _runs(best.stage_layers), "")] if best.layout.pp > 1 else []),
            ("step", _number(best.step_seconds, 2), "s"),
            ("speed", _number(best.tokens_per_second_per_device, 0), "tokens/s per device"),
            ("MFU, of bf16", _number(100 * plan.mfu), "%"),
            *_bill_rows(plan.bill),
        ],
    )
    parts = [
        ("compute", step.compute_seconds),
        ("recomputation", step.recompute_seconds),
        ("all-to-all, exposed", step.exposed_all_to_all_seconds),
        ("tensor parallel", step.tensor_parallel_seconds),
        ("between kernels (busy)", step.idle_seconds),
        ("bubbles", step.bubble_seconds),
        ("gradient synchronisation", step.gradient_sync_seconds),
        ("optimizer", step.optimizer_seconds),
    ]
    _table("time of a step", ("part", "s", "%"), [(key, _number(s, 2), _number(100 * s / step.seconds)) for key, s in parts])
    _say(
        f"Hidden behind compute: {step.hidden_all_to_all_seconds:.2f} s of all-to-all (network "
        f"{step.all_to_all_network_seconds:.2f} s, links in the node "
        f"{step.all_to_all_links_seconds:.2f} s, at the same time), and {step.p2p_seconds:.2f} s between stages.",
        "",
    )
    _table(
        "memory of a device",
        ("part", "GB"),
        [(key.removesuffix("_bytes"), _number(size / 1e9)) for key, size in vars(memory).items()]
        + [("in all", _number(memory.total_bytes / 1e9) + ("" if best.fits else ", does not fit"))],
    )
    _table(
        "the next best layouts",
        ("layout", "why it is worse", "tokens/s per device", "GB"),
        [
            (one.description, one.why_worse, _number(one.tokens_per_second_per_device, 0), _number(one.memory_gb, 0))
            for one in plan.alternatives
        ],
        text_columns=2,
    )
    if plan.dense is not None:
        dense = plan.dense
        _say(
            f"A dense model of equal loss has about {dense.equivalent_dense_parameters / 1e9:,.0f}B parameters and costs "
            f"{dense.dense_over_moe_training:.1f} times as much to train on the same "
            f"tokens, {dense.cheapest_dense_over_moe_training:.1f} times at its own best size "
            f"({dense.cheapest_dense_parameters / 1e9:,.0f}B, {dense.cheapest_dense_tokens / 1e12:,.1f}T tokens). Law: {dense.law}.",
        )
    _say(f"Modelled: {plan.modelled}. Not modelled: {plan.not_modelled}.")
    _say(*_unknown_line(plan.unknown_figures), f"Efficiencies: {plan.efficiency_source}.")


def _runs(counts: Sequence[int]) -> str:
    """15 x 4, 1 instead of fifteen fours and a one."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return ", ".join(str(count) if times == 1 else f"{times} x {count}" for count, times in runs)


def print_rl(name: str, plan: RLPlan) -> None:
    """`finback plan rl`."""
    _table(
        f"{plan.recipe} of {name} on {plan.devices:,} x {plan.hardware}",
        ("part of a rollout cycle", "", ""),
        [
            ("rollout", _number(plan.rollout_seconds, 0), "s"),
            ("  bound by throughput", _number(plan.rollout_throughput_bound_seconds, 0), "s"),
            ("  bound by the longest answer", _number(plan.rollout_longest_answer_seconds, 0), "s"),
            ("reference", _number(plan.reference_seconds, 0), "s"),
            ("rewards", _number(plan.reward_seconds, 0), "s"),
            ("training", _number(plan.training_seconds, 0), "s"),
            ("the cycle", _number(plan.cycle_seconds, 0), "s"),
            ("cycles", _number(plan.cycles, 0), ""),
            ("samples at once per device", str(plan.requests_per_device), ""),
            ("layout in training", plan.layout, ""),
            ("memory in training", _number(plan.memory_gb), "GB per device" + ("" if plan.fits else ", does not fit")),
            *_bill_rows(plan.bill),
        ],
    )
    _say(*([f"Not modelled: {plan.not_modelled}."] if plan.not_modelled else []), f"Efficiencies: {plan.efficiency_source}.")


def print_serve(name: str, plan: ServePlan) -> None:
    """`finback plan serve`."""
    money = plan.economics
    _table(
        f"{name} on {plan.hardware}, {plan.precision}, units of {plan.prefill_unit_devices} and {plan.decode_unit_devices} devices",
        ("", "", ""),
        [
            ("prefill", _number(plan.input_tokens_per_second_per_node, 0), "computed tokens/s per node"),
            ("prefill, cache hits counted", _number(plan.input_tokens_per_second_per_node_with_hits, 0), "tokens/s per node"),
            (
                f"decode, {plan.decode.batch} requests per device",
                _number(plan.output_tokens_per_second_per_node, 0),
                "tokens/s per node",
            ),
            (
                "weights",
                f"{plan.weight_gb_per_prefill_device:.1f} / {plan.weight_gb_per_decode_device:.1f}",
                "GB per prefill / decode device",
            ),
            ("most requests that fit", str(plan.largest_batch_per_device), "per decode device"),
            ("network limit at 32 requests", _number(plan.network_limit_tpot_ms, 2), "ms per token"),
            ("nodes, evenly loaded", f"{money.prefill_nodes:,.1f} + {money.decode_nodes:,.1f}", "prefill + decode"),
            ("cost", _number(money.cost_usd_per_day, 0), "USD a day"),
            ("revenue", _number(money.revenue_usd_per_day, 0), "USD a day"),
            ("margin", UNKNOWN if money.margin is None else _number(100 * money.margin, 0), "% of cost"),
            ("cost of input", _number(money.cost_usd_per_million_input, 3), "USD per million"),
            ("cost of output", _number(money.cost_usd_per_million_output, 3), "USD per million"),
        ],
    )
    _table(
        "latency against batch",
        (
            "requests per device",
            "first token, ms",
            "next tokens, ms",
            "tokens/s per request",
            "tokens/s per node",
            "cache, GB",
            "",
        ),
        [
            (
                str(row.batch_per_device),
                _number(row.ttft_ms, 0),
                _number(row.tpot_ms),
                _number(row.tokens_per_second_per_request),
                _number(row.output_tokens_per_second_per_node, 0),
                _number(row.cache_gb_per_device),
                "" if row.fits else "does not fit",
            )
            for row in plan.latencies
        ],
    )
    _table(
        "what cached input saves",
        ("hits, %", "prefill nodes", "nodes", "USD a day", "revenue, USD a day", "USD per million input"),
        [
            (
                _number(100 * row.hit_share),
                _number(row.prefill_nodes),
                _number(row.total_nodes),
                _number(row.cost_usd_per_day, 0),
                _number(row.revenue_usd_per_day, 0),
                _number(row.cost_usd_per_million_input, 4),
            )
            for row in plan.cache_hits
        ],
    )
    _table(
        "this mixture, or the dense model of equal loss",
        (
            "requests at once",
            "mixture: devices",
            "tokens/s each",
            "device-s per M",
            "USD per M",
            "dense: devices",
            "tokens/s each",
            "device-s per M",
            "USD per M",
            "cheaper",
        ),
        [
            (
                f"{row.requests_at_once:,}",
                f"{row.moe_devices:,}",
                _number(row.moe_tokens_per_second_per_request),
                _number(row.moe_device_seconds_per_million_output, 0),
                _number(row.moe_usd_per_million_output, 2),
                f"{row.dense_devices:,}",
                _number(row.dense_tokens_per_second_per_request),
                _number(row.dense_device_seconds_per_million_output, 0),
                _number(row.dense_usd_per_million_output, 2),
                row.cheaper,
            )
            for row in plan.traffic_choices
        ],
    )
    _say(*_unknown_line(plan.unknown_figures), f"Efficiencies: {plan.efficiency_source}.")


def print_fit(hardware: Hardware, rows: Sequence[FitRow]) -> None:
    """`finback plan fit`."""
    _table(
        f"{hardware.title}: one request of {rows[0].context_tokens:,} tokens",
        ("model", "weights in", "GB", "fits", "most context", "tokens/s at most"),
        [
            (
                row.model,
                row.precision,
                _number(row.weights_gb),
                "yes" if row.fits else "no",
                f"{row.most_context_tokens:,}",
                _number(row.tokens_per_second) if row.fits else "",
            )
            for row in rows
        ],
        text_columns=2,
    )


def print_hardware(rows: Sequence[Hardware]) -> None:
    """`finback plan hardware`."""
    _table(
        "per device; ? is not published",
        ("name", "device", "GB", "GB/s", "bf16 TFLOPS", "fp8", "in node GB/s", "devices", "network GB/s", "W", "USD/h"),
        [
            (
                row.name,
                row.title,
                _number(row.memory_gb, 0),
                _number(row.memory_gb_per_second, 0),
                _number(row.bf16_tflops, 0),
                _number(row.fp8_tflops, 0),
                _number(row.scale_up_gb_per_second, 0),
                str(row.devices_per_node),
                _number(row.scale_out_gb_per_second, 0),
                _number(row.power_watts, 0),
                _number(row.usd_per_hour, 2),
            )
            for row in rows
        ],
        text_columns=2,
    )
    _say(*(f"{row.name}: {row.source}." for row in rows))


MOST_RANKS = 128
"""Ranks of a schedule that are printed."""


def print_schedule(title: str, schedule: Sequence[Sequence[Action]], result: Simulation, costs: Costs) -> None:
    """`finback plan schedule`: a line for each rank, then what the simulation says; of very many ranks the first ones."""
    width = shutil.get_terminal_size((_PIPE_WIDTH, 24)).columns if sys.stdout.isatty() else _LONGEST_LINE
    shortest = min(costs.of(action.kind) for actions in schedule for action in actions)
    scale = columns_per_unit(result, shortest, width)
    _say(title)
    console = _console()
    shown = range(min(len(schedule), MOST_RANKS))
    for rank in shown:
        line = Text(f"{rank:>3}  ")
        for text, kind in cells(schedule[rank], result.timeline[rank], scale, result.makespan):
            line.append(text, style="dim" if kind is None else f"white on {COLORS[kind]}")
        console.print(line, soft_wrap=True, no_wrap=True)
    _say("F forward, B backward, I input gradient, W weight gradient, P overlapped pair (its forward's number), . waiting", "")
    _table(
        f"makespan {result.makespan:g}, waiting {100 * result.bubble_fraction:.1f}% of all time",
        ("rank", "bubble", "most activations", "stages held"),
        [
            (str(rank), f"{result.bubbles[rank]:g}", str(result.peak_live_activations[rank]), str(result.parameter_copies[rank]))
            for rank in shown
        ],
    )
    if len(shown) < len(schedule):
        _say(f"The first {MOST_RANKS} of {len(schedule):,} ranks; --json has all, --png draws all.")


def print_validation(rows: Sequence[Row]) -> None:
    """`finback plan validate`."""
    _table(
        "the planner against published and measured figures",
        ("figure", "kind", "unit", "reference", "planner", "error", "asked", ""),
        [
            (
                row.name,
                row.kind,
                row.unit,
                f"{row.reference:,.6g}",
                f"{row.planner:,.6g}",
                f"{row.error:+.1%}",
                f"{row.target:.2%}",
                "other machine" if row.other_machine else "" if row.met else "above",
            )
            for row in rows
        ],
        text_columns=3,
    )
    _say(*(f"{row.name}: {row.note}." for row in rows if not row.met and not row.other_machine))
    _say(*(f"Other machine: {clause}." for clause in dict.fromkeys(row.other_machine for row in rows) if clause))

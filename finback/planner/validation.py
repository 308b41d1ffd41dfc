"""The planner against what is published and measured: exact rows where papers give arithmetic, predicted rows where they give results.

`docs/plan-validation.md` is this table. Predicted rows use the hardware row's one set of efficiencies; nothing is fitted to a row.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from finback.config import ModelConfig, count_params
from finback.planner.hardware import HARDWARE, Precision
from finback.planner.inference import Unit, decode_step, network_limit_ms, prefill
from finback.planner.layout import Layout
from finback.planner.model import cache_bytes_per_token, cache_table, plan_model
from finback.planner.own_results import measured_rows
from finback.planner.rl import R1_ZERO, plan_rl
from finback.planner.serve import Tariff, Traffic, daily_cost_usd, margin, revenue_usd
from finback.planner.step import step_time
from finback.planner.yardsticks import CLUSTERS, SERVINGS, Row, told

H800_HOURS_PER_TRILLION = 180e3
V3_LAYOUT = Layout(2048, pp=16, ep=64, schedule="dualpipe", overlap=True)
V3_BATCH = 15360
ROLLOUT_UNIT = 32  # devices of one rollout unit: the prefill unit's EP, the smallest that leaves room for long answers
RL_LAYOUT = Layout(512, pp=16, ep=32)


def exact_rows(v3: ModelConfig, v2_lite: ModelConfig) -> list[Row]:
    """Published arithmetic."""
    hours = 14.8 * H800_HOURS_PER_TRILLION + 119e3 + 5e3
    plan = plan_model(v3)
    caches = {row.name: row.bytes_per_token / 1000 for row in cache_table(v3)}
    traffic, day_cost = Traffic(), daily_cost_usd(226.75, 8, 2.0)
    pretraining = 14.8 * H800_HOURS_PER_TRILLION
    mtp = plan.mtp_parameters_stored
    paper, isca = "V3 table 1", "V3 hardware paper"

    def row(name: str, unit: str, reference: float, planner: float, source: str, target: float = 0.0005, note: str = "") -> Row:
        return Row(name, "exact", unit, reference, planner, target, source, note)

    return [
        row("V3, all GPU-hours from 180K per trillion tokens", "K hours", 2788, hours / 1e3, paper),
        row("V3, cost at $2 an hour", "million USD", 5.576, hours * 2 / 1e6, paper),
        row("V3, days of pre-training on 2,048 cards", "days", 54.2, pretraining / 2048 / 24, "derived from table 1"),
        row("V3, days of everything on 2,048 cards", "days", 56.7, hours / 2048 / 24, "derived from table 1"),
        row("parameters in all", "billion", 671.0264192, plan.total_parameters / 1e9, "published checkpoint", 0.0),
        row(
            "parameters per token, with embedding",
            "billion",
            37.552297472,
            plan.active_parameters / 1e9,
            "published checkpoint",
            0.0,
        ),
        row(
            "parameters per token, without embedding",
            "billion",
            36.6,
            plan.active_parameters_without_embedding / 1e9,
            "README_WEIGHTS",
            0.001,
        ),
        row(
            "parameters of MTP as stored, embedding and head again",
            "billion",
            13.463426304,
            mtp / 1e9,
            "published checkpoint",
            0.0,
        ),
        row(
            "parameters of MTP's own",
            "billion",
            11.610068224,
            (mtp - 2 * v3.vocab_size * v3.hidden_size) / 1e9,
            "count of the checkpoint's shapes",
            0.0,
        ),
        row(
            "parameters in all, V2-Lite",
            "billion",
            15.706484224,
            count_params(v2_lite).total / 1e9,
            "published checkpoint's index",
            0.0,
        ),
        row(
            "training FLOPs per token at 4,096, without MTP", "GFLOP", 250, plan.training_gflop_per_token_without_mtp, isca, 0.005
        ),
        row("cache per token, V3 (MLA)", "KB", 70.272, cache_bytes_per_token(v3) / 1000, isca, 0.0),
        row("cache per token, Qwen2.5-72B (GQA)", "KB", 327.680, caches["Qwen2.5-72B (GQA)"], isca, 0.0),
        row("cache per token, LLaMA-3.1-405B (GQA)", "KB", 516.096, caches["LLaMA-3.1-405B (GQA)"], isca, 0.0),
        row(
            "cache of a 128K request, with MTP",
            "GiB",
            8.72,
            cache_bytes_per_token(v3, mtp=True) * 128 * 1024 / 2**30,
            "FlashMLA",
            0.001,
        ),
        row("serving cost of a day, 226.75 nodes", "USD", 87072, day_cost, "open-infra-index, day 6", 0.0),
        row("theoretical revenue of that day", "USD", 562027, revenue_usd(traffic, Tariff()), "open-infra-index, day 6"),
        row(
            "margin of that day",
            "%",
            545,
            100 * margin(revenue_usd(traffic, Tariff()), day_cost),
            "open-infra-index, day 6",
            0.002,
        ),
        row("network limit of a token, width 7K", "ms", 14.76, network_limit_ms(width=7000), isca),
        row("network limit of a token, width 7,168", "ms", 15.11, network_limit_ms(), "derived"),
        row("R1, GPU-hours of R1-Zero, data and R1", "K hours", 147, 101 + 5 + 41, "R1 paper v2, table 7", 0.0),
    ]


def predicted_rows(v3: ModelConfig) -> Iterator[Row]:
    """Published results, from formulas and kernel efficiencies."""
    h800 = HARDWARE["h800"]
    step = step_time(v3, h800, V3_LAYOUT, "fp8", 4096, V3_BATCH)
    hours = step.seconds * V3_LAYOUT.devices / 3600 / (V3_BATCH * 4096) * 1e12
    yield Row(
        "V3 on 2,048 H800: GPU-hours per trillion tokens",
        "predicted",
        "K hours",
        180,
        hours / 1e3,
        0.25,
        "V3 section 3.1, table 1",
    )
    yield Row("V3 on 2,048 H800: one step", "predicted", "s", 19.926, step.seconds, 0.25, "V3 hardware paper")
    for cluster in CLUSTERS:
        hardware = HARDWARE[cluster.hardware]
        precision: Precision = "fp8" if cluster.precision == "fp8" else "bf16"
        seconds = step_time(v3, hardware, cluster.layout, precision, 4096, cluster.global_batch_size).seconds
        rate = cluster.global_batch_size * 4096 / seconds / cluster.layout.devices
        yield told(
            Row(cluster.name, "predicted", "tokens/s/GPU", cluster.tokens_per_second_per_device, rate, 0.30, cluster.source),
            cluster.if_off,
        )
    for serving in SERVINGS:
        hardware = HARDWARE[serving.hardware]
        if serving.phase == "prefill":
            rate = prefill(
                v3, hardware, serving.unit, "fp8", serving.tokens, serving.hit_share
            ).tokens_per_second_per_device_with_hits
        else:
            rate = decode_step(v3, hardware, serving.unit, "fp8", serving.batch, serving.tokens).tokens_per_second_per_device
        rate *= hardware.devices_per_node if serving.per_node else 1
        yield told(
            Row(serving.name, "predicted", "tokens/s", serving.tokens_per_second, rate, 0.30, serving.source), serving.if_off
        )
    zero = plan_rl(v3, h800, RL_LAYOUT, Unit(ep=ROLLOUT_UNIT), R1_ZERO, frozenset({"recompute"}))
    yield told(
        Row("R1-Zero on 512 H800", "predicted", "K hours", 101, zero.bill.device_hours / 1e3, 0.30, "R1 paper v2, table 7"),
        "the average length of answers is not published",
    )


def validation_rows(models: Mapping[str, ModelConfig], results: Path) -> list[Row]:
    """The whole table; `models` holds the presets `v3-671b`, `v2-lite-16b` and `tiny`."""
    v3 = models["v3-671b"]
    return [*exact_rows(v3, models["v2-lite-16b"]), *predicted_rows(v3), *measured_rows(models["tiny"], results)]


def markdown(rows: list[Row]) -> str:
    """The page docs/plan-validation.md."""
    lines = [
        "# The planner against published and measured figures",
        "",
        "Written by `finback plan validate --out docs/plan-validation.md`. Exact rows are arithmetic that a paper gives. Predicted and",
        "measured rows come from formulas and one set of efficiencies per hardware row (`finback plan train --json` "
        "names its source); no",
        "row was fitted. Layouts and lengths that a source leaves out are assumed, and the row says so.",
        "",
    ]
    titles = {"exact": "Exact", "predicted": "Predicted", "measured": "Our own measurements"}
    for kind, title in titles.items():
        lines += [
            f"## {title}",
            "",
            "| figure | unit | published or measured | planner | error | asked | source |",
            "|---|---|---:|---:|---:|---:|---|",
        ]
        for row in (row for row in rows if row.kind == kind):
            asked = "exact" if row.target < 0.005 and kind == "exact" else f"{100 * row.target:g}%"
            mark = " (other machine)" if row.other_machine else "" if row.met else " (above)"
            lines.append(
                f"| {row.name} | {row.unit} | {_number(row.reference)} | {_number(row.planner)} | {row.error:+.1%}{mark} | {asked} "
                f"| {row.source} |"
            )
        lines.append("")
        comparable = [row for row in rows if row.kind == kind and not row.other_machine]
        causes = [f"- {row.name}, {row.error:+.0%}: {row.note}." for row in comparable if not row.met]
        causes += [
            f"- Other machine: {clause}."
            for clause in dict.fromkeys(row.other_machine for row in rows if row.kind == kind)
            if clause
        ]
        lines += [*causes, ""] if causes else []
    return "\n".join(lines)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}".rstrip("0").rstrip(".")

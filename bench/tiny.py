"""The training step of the preset `tiny`: how fast, how near to the ceiling, where the rest goes, and how much memory it takes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench.ceilings import Ceilings
from bench.contest import alternate, in_a_fresh_process, summarize
from bench.machine import peak_memory_bytes, reset_peak_memory
from bench.results import Row
from bench.train import build_probe, token_source, training_step
from finback.config import ModelConfig, count_params
from finback.ops import attention, grouped
from finback.presets import tiny
from finback.train.throughput import training_flops_per_token

TARGET_SHARE = 0.5
# Names of what our C kernels stand in for, and where they are asked for.
TWINS = {"torch's products of experts": (grouped, "_native"), "torch's products in attention": (attention, "causal_kernels_for")}
_PRESET = tiny()

# Where time is counted: with the function of ours that an operation runs inside of, else with the nearest of torch's own operations.
FUNCTIONS = {
    "_Linear": "dense products",
    "_GroupedLinear": "expert products",
    "_GatheredLinear": "expert products",
    "_SummedLinear": "expert products",
    "_NativeAttention": "attention",
    "_BlockedAttention": "attention",
    "aten::scaled_dot_product_attention": "attention",
    "_LinearCrossEntropy": "head and loss",
    "_RMSNorm": "norms",
    "_SwiGLU": "SwiGLU",
    "_Permute": "routing and permutation",
    "_Unpermute": "routing and permutation",
    "optimizer": "optimizer",
}
OPERATIONS = {
    "dense products": ("aten::linear", "aten::matmul", "aten::mm", "MmBackward"),
    "routing and permutation": (
        *("aten::topk", "aten::sort", "aten::argsort", "aten::bincount", "aten::gather", "aten::scatter", "aten::sigmoid"),
        *("aten::index", "aten::repeat_interleave", "aten::cumsum", "GatherBackward", "SigmoidBackward", "IndexSelectBackward"),
    ),
    "casts": ("aten::to", "ToCopyBackward"),
}
_REST = "rotary, copies, sums and the rest"
_PYTHON = "Python between operations"
_EVALUATE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Size:
    """How much is measured: turns of `steps` steps each."""

    config: ModelConfig = _PRESET.model
    sequences: int = _PRESET.micro_batch_size
    tokens: int = _PRESET.sequence_length
    steps: int = 3
    warm_up: int = 2
    turns: int = 9
    recompute: tuple[str, ...] = ("none", "selective", "full")
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(steps=1, warm_up=1, turns=2, recompute=("none", "full"))


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str], dict[str, Any]]:
    """Rows, notes, and a table of shares of time by category."""
    without_mtp = replace(size, config=replace(size.config, num_nextn_predict_layers=0))
    variants = {
        "bf16": (size, "bf16"),
        "bf16, without MTP": (without_mtp, "bf16"),
        "fp32": (size, "fp32"),
    }
    competitors: dict[str, Callable[[], Any]] = {name: partial(build_steps, *variant) for name, variant in variants.items()}
    competitors |= {f"{name}, {twin}": partial(build_twin, size, name, twin) for name in ("bf16", "fp32") for twin in TWINS}
    competitors |= {
        precision: partial(build_probe, precision[7:], ceilings.matmul_shape[precision[7:]])
        for precision in ("matmul bf16", "matmul fp32")
    }
    turns = alternate(competitors, range(size.warm_up + size.turns), separate=size.separate)
    kept = {name: turns[name][size.warm_up :] for name in turns}
    rows = []
    for name, (variant, precision) in variants.items():
        tokens = size.sequences * size.tokens * size.steps
        speed = summarize([tokens / turn.seconds for turn in kept[name]])
        probe = summarize([turn.value for turn in kept[f"matmul {precision}"]]).median
        ceiling = max(ceilings.matmul_gflop_per_second[precision], probe)
        gflop = training_flops_per_token(variant.config, size.tokens) / 1e9 * size.sequences * size.tokens
        floor = {"gflop": gflop, "seconds": gflop / ceiling}
        twins = {twin: kept[f"{name}, {twin}"] for twin in TWINS if f"{name}, {twin}" in kept}
        peers = [(twin, *summarize([tokens / turn.seconds for turn in theirs])) for twin, theirs in twins.items()]
        rows += [Row(f"tiny {name}", "tokens_per_second", *speed, *peer, floor=floor) for peer in peers or [()]]
        share = speed.median / (size.sequences * size.tokens) * gflop / ceiling
        target = TARGET_SHARE if name == "bf16" else None
        rows.append(
            Row(f"tiny {name}: share of the ceiling", "share", share, target=target, floor={"ceiling_gflop_per_second": ceiling})
        )
    rows += [_memory_row(size, recompute) for recompute in size.recompute]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's own log lines stand among the tables
    shares = _call(partial(build_profile, size), size.separate)
    return rows, _notes(size), {"time_shares": shares}


def build_steps(size: Size, precision: str, recompute: str = "none") -> Callable[[Any], Any]:
    """`size.steps` steps of the loop in `finback.train.pretrain`."""
    step = training_step(size.config, precision, token_source(size), recompute)
    return lambda turn: [step(turn) for _ in range(size.steps)]


def build_twin(size: Size, precision: str, twin: str) -> Callable[[Any], Any]:
    """The same steps without one of the C kernels."""
    steps = build_steps(size, precision)
    module, kernels = TWINS[twin]

    def turn(number: Any) -> Any:
        with patch.object(module, kernels, lambda *_: None):
            return steps(number)

    return turn


def build_memory(size: Size, recompute: str) -> Callable[[Any], dict[str, Any]]:
    """Two steps in a process of their own: the peak of the second, and what it is above the memory between steps."""

    def measure(turn: Any) -> dict[str, Any]:
        step = training_step(size.config, "bf16", token_source(size), recompute)
        step(turn)
        reset_peak_memory()
        between = peak_memory_bytes()
        start = time.perf_counter()
        step(turn)
        return {"between": between, "peak": peak_memory_bytes(), "seconds": time.perf_counter() - start}

    return measure


def _memory_row(size: Size, recompute: str) -> Row:
    measured = _call(partial(build_memory, size, recompute), size.separate)
    peak, between = ((measured[name] or 0) / 2**20 for name in ("peak", "between"))
    extra = {"above_the_state_mebibytes": peak - between, "seconds_per_step": measured["seconds"]}
    return Row(f"tiny bf16, recompute {recompute}: peak memory", "mebibytes", peak, extra=extra)


def build_profile(size: Size) -> Callable[[Any], list[dict[str, Any]]]:
    """One profiled bf16 step after two others: milliseconds and share of each category."""

    def measure(turn: Any) -> list[dict[str, Any]]:
        step = training_step(size.config, "bf16", token_source(size))
        for _ in range(3):
            step(turn)
        start = time.perf_counter()
        step(turn)
        undisturbed = time.perf_counter() - start
        with torch.autograd.profiler.profile(use_kineto=False) as profiler:
            step(turn)
        return time_by_category(profiler.function_events, undisturbed)

    return measure


def time_by_category(events: Any, wall_seconds: float) -> list[dict[str, Any]]:
    """Milliseconds and share of each category. What no operation accounts for is Python (and, on a busy machine, waiting)."""
    microseconds: dict[str, float] = {}
    for event in events:
        category = category_of(event)
        microseconds[category] = microseconds.get(category, 0.0) + event.self_cpu_time_total
    microseconds[_PYTHON] = max(0.0, wall_seconds * 1e6 - sum(microseconds.values()))
    total = sum(microseconds.values())
    table = [{"category": name, "milliseconds": us / 1e3, "share": us / total} for name, us in microseconds.items()]
    return sorted(table, key=lambda row: -row["share"])


def category_of(event: Any) -> str:
    """The category of a profiled operation, from the names of what it runs inside of."""
    names = []
    while event is not None:
        names.append(event.name.removeprefix(_EVALUATE))
        event = event.cpu_parent
    for name in names:
        function = name.removesuffix("Backward")
        if function in FUNCTIONS:
            return FUNCTIONS[function]
    for name in names:
        for category, marks in OPERATIONS.items():
            if name.startswith(marks):
                return category
    return _REST


def _call(build: Callable[[], Callable[[Any], Any]], separate: bool) -> Any:
    return in_a_fresh_process(build) if separate else build()(None)


def _notes(size: Size) -> list[str]:
    counts = count_params(size.config)
    return [
        f"{counts.total / 1e6:.2f}M parameters without MTP, {counts.active / 1e6:.2f}M active; {size.sequences} x {size.tokens} new "
        "random tokens per step; the step of finback pretrain: forward, LM, MTP and balance losses, backward, clipping, AdamW.",
        "Peak memory: resident memory of the whole process, libraries included (about 300 MiB before any model).",
        "Time shares: one profiled step; an operation's own time goes to the part of the model that it runs inside of, in forward and "
        "backward.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("tiny")

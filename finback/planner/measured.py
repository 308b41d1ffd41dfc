"""This machine as a hardware row, by the ceilings that its benchmark wrote (`python -m bench ceilings`)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finback.config import InputError, ModelConfig
from finback.planner.hardware import GIGA, Curve, Efficiencies, Hardware, Precision, SmallWork, find_hardware
from finback.planner.inference import Unit, decode_step
from finback.planner.layout import Layout
from finback.planner.model import WEIGHT_BYTES
from finback.planner.step import step_time

_NOTE = (
    "measured on this machine, each on shapes of its own: products by their width, experts', attention at 256 tokens, reads by what "
    "fits a cache, of weights by products of one row, heads by their vocabulary, steps without work; memory and busy 1, for the rates "
    "are those that were reached and overhead is counted apart; what steps of a model of V3's kind, of a shape of its own, reach of "
    "all that holds for every model with experts"
)

CALIBRATION = ModelConfig(
    vocab_size=3072,
    hidden_size=320,
    intermediate_size=800,
    moe_intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=5,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    q_lora_rank=160,
    kv_lora_rank=96,
    qk_nope_head_dim=48,
    qk_rope_head_dim=16,
    v_head_dim=48,
    max_position_embeddings=2048,
    initializer_range=0.02,
)
"""A model of V3's kind, of a shape of its own: what its steps take beyond the formulas is taken over for others."""
CALIBRATED_SEQUENCE, CALIBRATED_CONTEXT = 256, 128  # tokens


@dataclass(frozen=True)
class Ceilings:
    """What the benchmark found this machine to reach, rows by their names. The others tell which machine, and when."""

    rows: dict[str, float]
    memory_total_bytes: float
    cores: int
    cpu: str
    date: str

    def largest(self, pattern: str) -> float:
        """The largest value of the rows whose names match."""
        return max(value for name, value in self.rows.items() if re.search(pattern, name))

    def curve(self, pattern: str) -> Curve:
        """(size, value) of the rows whose names match, by the size that the pattern captures."""
        found = ((re.search(pattern, name), value) for name, value in self.rows.items())
        points = sorted((float(match[1]), value) for match, value in found if match)
        if not points:
            raise KeyError(pattern)
        return tuple(points)


def read_ceilings(path: Path) -> Ceilings:
    """The ceilings in the file that the benchmark writes; InputError if it is missing or of another form."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; run make bench first, or name the file with --ceilings")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        units = ("gflop_per_second", "gb_per_second", "milliseconds")
        rows = {row["name"]: float(next(row[unit] for unit in units if unit in row)) for row in data["rows"]}
        device = data["device"]
        memory, cores = float(device["memory_total_bytes"]), int(device["cores"])
        found = Ceilings(rows, memory, cores, str(device["cpu"]), str(data["date"]))
        _row(found, "bf16")
        return found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, StopIteration):
        raise InputError(
            f"{path} is not a file of ceilings, or of an older benchmark; write it again with python -m bench ceilings"
        ) from None


def measured(path: Path, precision: Precision = "bf16") -> Hardware:
    """This machine as a row: matrix rates (of `precision`) and bandwidth as measured, memory as the system has it."""
    return _row(read_ceilings(path), precision)


def another_machine(path: Path, host: Mapping[str, Any]) -> str:
    """How the machine of the ceilings differs from this one, by the facts in `host`; empty where it does not. Memory that a system
    keeps for itself varies, so a twentieth is no difference."""
    found, memory = read_ceilings(path), host["memory_total_bytes"]
    same_memory = memory is None or abs(memory / found.memory_total_bytes - 1) <= 0.05
    if (host["cpu"], host["cores"]) == (found.cpu, found.cores) and same_memory:
        return ""
    here = "" if memory is None else f", {memory / GIGA:.0f} GB"
    return (
        f"the ceilings are of {found.date[:10]}, {found.cpu}, {found.cores} cores, {found.memory_total_bytes / GIGA:.0f} GB, and this "
        f"machine is {host['cpu']}, {host['cores']} cores{here}; run python -m bench ceilings here"
    )


def _row(found: Ceilings, precision: Precision) -> Hardware:
    kind: Precision = "fp32" if precision == "fp32" else "bf16"
    peak = found.largest(f"^(matmul|1x1 convolution) {kind} ")
    row = Hardware(
        name="measured",
        title=f"this machine, {found.cores} cores",
        memory_gb=found.memory_total_bytes / GIGA,
        memory_gb_per_second=found.rows["memory, read"],
        bf16_tflops=(2 * peak if kind == "fp32" else peak) / 1000,  # fp32 runs at half of it
        fp8_tflops=None,
        scale_up_gb_per_second=None,
        devices_per_node=1,
        scale_out_gb_per_second=None,
        power_watts=None,
        usd_per_hour=None,
        source="measured by python -m bench ceilings",
        efficiencies=Efficiencies(
            matmul=found.largest(f"^training products {kind},") / peak,
            attention_forward=found.rows[f"attention {kind}, forward"] / peak,
            attention_backward=found.rows[f"attention {kind}, backward"] / peak,
            memory=1.0,
            network=1.0,
            busy=1.0,
        ),
        efficiency_source=_NOTE,
        exchange_latency_us=0.0,
        small_work=_small_work(found, kind, peak),
    )
    return _calibrated(row, found, kind)


def _calibrated(row: Hardware, found: Ceilings, precision: Precision) -> Hardware:
    """`row` with the shares that steps of the calibration's model reach of its rates."""
    assert row.small_work is not None
    (tokens, milliseconds), *_ = found.curve(rf"^training step of the calibration's model {precision}, (\d+) tokens")
    layout = Layout(1, recompute="none", micro_batch_size=int(tokens) // CALIBRATED_SEQUENCE)
    step = step_time(CALIBRATION, row, layout, precision, CALIBRATED_SEQUENCE, layout.micro_batch_size)
    training = step.compute_seconds / max(1e-9, milliseconds / 1e3 - (step.seconds - step.compute_seconds))
    decoding = []
    for rows, milliseconds in found.curve(rf"^decode step of the calibration's model {precision}, (\d+) rows"):
        value = WEIGHT_BYTES[precision]
        decode = decode_step(
            CALIBRATION, row, Unit(), precision, int(rows), CALIBRATED_CONTEXT, cache_value_bytes=value, greedy=True
        )
        decoding.append((rows, (decode.tpot_ms - decode.idle_ms) / max(1e-6, milliseconds - decode.idle_ms)))
    small = replace(row.small_work, mixture_training=training, mixture_decoding=tuple(decoding))
    return replace(row, small_work=small)


def _small_work(found: Ceilings, kind: str, peak: float) -> SmallWork:
    def shares(what: str) -> Curve:
        return tuple((width, rate / peak) for width, rate in found.curve(rf"^{what} products {kind}, width (\d+)"))

    def engine(way: str) -> dict[tuple[int, int, int], float]:
        """Seconds of a step by vocabulary, layers and requests."""
        pattern = rf"^engine step without work, (\d+) requests, (\d+) layers, vocabulary (\d+), {way}"
        matches = ((re.search(pattern, name), value) for name, value in found.rows.items())
        return {(int(match[3]), int(match[2]), int(match[1])): value / 1e3 for match, value in matches if match}

    (fewer, short), *_, (more, long) = found.curve(r"^training step without work, (\d+) layers")
    greedy, sampled = engine("greedy"), engine("sampled")
    vocabularies, depths, batches = ((min(sizes), max(sizes)) for sizes in zip(*greedy, strict=True))
    step = [[greedy[vocabularies[0], layers, batch] for batch in batches] for layers in depths]
    each = [(by_batch[1] - by_batch[0]) / (batches[1] - batches[0]) for by_batch in step]  # of a row
    none = [by_batch[0] - batches[0] * row for by_batch, row in zip(step, each, strict=True)]  # without any
    layer, layer_row = ((pair[1] - pair[0]) / (depths[1] - depths[0]) for pair in (none, each))
    values = batches[1] * (vocabularies[1] - vocabularies[0])
    widest = (vocabularies[1], depths[0], batches[1])
    return SmallWork(
        product_shares=shares("training"),
        expert_shares=shares("expert"),
        head_shares=tuple((size, rate / peak) for size, rate in found.curve(rf"^head and loss {kind}, vocabulary (\d+)")),
        decode_shares=tuple((rows, rate / peak) for rows, rate in found.curve(rf"^decode products {kind}, (\d+) rows")),
        read_bytes_per_second=tuple(
            (size * 2**20, rate * GIGA) for size, rate in found.curve(r"^again and again, (\d+) MiB, read")
        ),
        weight_bytes_per_second=tuple(
            (size * 2**20, rate * GIGA) for size, rate in found.curve(rf"^weights of (\d+) MiB, decode products {kind}, read")
        ),
        mixture_training=1.0,
        mixture_decoding=((1.0, 1.0),),
        training_layer_seconds=(long - short) / (more - fewer) / 1e3,
        engine_step_seconds=none[0] - depths[0] * layer,
        engine_row_seconds=each[0] - depths[0] * layer_row,
        engine_layer_seconds=layer,
        engine_layer_row_seconds=layer_row,
        greedy_value_seconds=(greedy[widest] - step[0][1]) / values,
        sampled_value_seconds=(sampled[widest] - step[0][1]) / values,
    )


def hardware_of(name: str, ceilings: Path, precision: Precision | None) -> Hardware:
    """A row by its name; "measured" is this machine by the file of ceilings, in `precision` (None: bf16)."""
    return measured(ceilings, precision or "bf16") if name == "measured" else find_hardware(name)

"""The planner against what `make bench` measured on this machine: train steps, decoding and steps of GRPO.

Formulas and ceilings are those of `--hardware measured`. A machine's name does not tell how fast it is (clouds rename and share), so a
result counts only where the ceilings are of the same device and of the same day.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from finback.config import InputError, ModelConfig
from finback.planner.hardware import Hardware, Precision
from finback.planner.inference import Unit, decode_step, prefill
from finback.planner.layout import Layout
from finback.planner.measured import measured
from finback.planner.model import WEIGHT_BYTES
from finback.planner.step import per_token, step_time
from finback.planner.yardsticks import COMPARED, SMOLLM2, Row, told

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
SAME_RUN = timedelta(hours=12)
_FACTS = (
    "cpu",
    "architecture",
    "cores",
    "cache_kib",
    "cpu_flags",
    "memory_total_bytes",
    "torch",
    "torch_cpu_capability",
    "threads",
)
_PROMPT, _NEW = 32, 128  # tokens of bench/decode.py
_GRPO_PROMPT, _GRPO_SAMPLES, _GRPO_NEW, _VOCABULARY = (
    50,
    8,
    64,
    49152,
)  # of bench/grpo.py, its question in SmolLM2's chat template
_IF_OFF = {  # likely causes, told where a row is above what is asked
    "train": "casts of the weights and elementwise work in caches are not measured apart",
    "tiny": "casts of the weights and elementwise work in caches are not measured apart",
    "decode": "the products of a model this narrow stay below the rate of the wider one that is measured, and a short prompt takes "
    "longer than its products",
    "engine": "the bandwidth of a shared machine's memory drifts, and weights that fit no cache are read at it",
    "grpo": "products of a large vocabulary's head with a few hundred rows, and of experts with 200 rows each, stay below the rates of "
    "the square products that are measured, and logits pass through memory more often than the formulas count",
}


def measured_rows(tiny: ModelConfig, results: Path) -> list[Row]:
    """Our own results in `results`, a directory of the benchmark's files, against its ceilings; of GRPO what there is."""
    ceilings = _read(results / "ceilings.json")
    hardware: dict[Precision, Hardware] = {one: measured(results / "ceilings.json", one) for one in PRECISIONS}
    rows: list[Row] = []
    for file, predictions in (
        ("train", _train("training", COMPARED, 16, hardware)),
        ("tiny", _train("tiny", tiny, 8, hardware)),
        ("decode", _generate(hardware)),
        ("engine", _engine(hardware["bf16"])),
        ("grpo", _grpo(hardware)),
    ):
        path = results / f"{file}.json"
        if file == "grpo" and not path.is_file():
            continue
        result = _read(path)
        other = another_machine(ceilings, result)
        found = {row["name"]: row for row in reversed(result["rows"])}
        for name, unit, planner in predictions:
            if name not in found and file == "grpo":
                continue
            if name not in found or unit not in found[name]:
                raise InputError(f"{path} holds no row {name!r}; write it again with make bench")
            row = Row(
                _TITLES[file] + name, "measured", unit.replace("_per_second", "/s"), found[name][unit], planner, 0.30, path.name
            )
            rows.append(replace(told(row, _IF_OFF[file]), other_machine=other))
    return rows


_TITLES = {"train": "train step: ", "tiny": "train step: ", "decode": "", "engine": "SmolLM2-135M ", "grpo": ""}


def another_machine(ceilings: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Why these ceilings say nothing of this result, in one clause; empty where they do."""
    names = f"{result['bench']}.json is of {result['date'][:16]}, the ceilings of {ceilings['date'][:16]}"
    differs = [fact for fact in _FACTS if ceilings["device"].get(fact) != result["device"].get(fact)]
    if differs:
        return f"{names}, and {', '.join(differs)} differ"
    apart = abs(datetime.fromisoformat(result["date"]) - datetime.fromisoformat(ceilings["date"]))
    return f"{names}, not of one run" if apart > SAME_RUN else ""


Prediction = tuple[str, str, float]  # name and unit of the benchmark's row, the planner's value


def _train(name: str, c: ModelConfig, sequences: int, hardware: Mapping[Precision, Hardware]) -> Iterator[Prediction]:
    layout = Layout(1, recompute="none", micro_batch_size=sequences)
    for precision, row in hardware.items():
        seconds = step_time(c, row, layout, precision, 256, sequences).seconds
        yield f"{name} {precision}", "tokens_per_second", sequences * 256 / seconds


def _generate(hardware: Mapping[Precision, Hardware]) -> Iterator[Prediction]:
    """The whole call: the prompts, then every step."""
    for precision, row in hardware.items():
        value = 2.0 if precision == "bf16" else 4.0
        for batch in (1, 16):
            step = decode_step(COMPARED, row, Unit(), precision, batch, _PROMPT + _NEW / 2, cache_value_bytes=value, greedy=True)
            prompts = batch * _PROMPT / prefill(COMPARED, row, Unit(), precision, _PROMPT, 0.0).tokens_per_second_per_device
            seconds = prompts + _NEW * step.tpot_ms / 1e3
            yield f"generate {precision}, batch {batch}", "tokens_per_second", batch * _NEW / seconds


def _engine(hardware: Hardware) -> Iterator[Prediction]:
    for batch in (1, 8, 32):
        step = decode_step(SMOLLM2, hardware, Unit(), "bf16", batch, 96, greedy=True)
        yield f"decode, {batch} sequence" + "s" * (batch > 1), "tokens_per_second", step.tokens_per_second_per_device


def _grpo(hardware: Mapping[Precision, Hardware]) -> Iterator[Prediction]:
    """Sampling with the trainer's own float32 weights, or with a copy in bf16; then forward and backward, in which the backward makes
    the logits again, of the samples' tokens alone."""
    length = _GRPO_PROMPT + _GRPO_NEW
    layout = Layout(1, recompute="none", micro_batch_size=_GRPO_SAMPLES)
    ways: tuple[tuple[Precision, Precision], ...] = (("bf16", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"))
    for title, c in (("V3", replace(COMPARED, vocab_size=_VOCABULARY)), ("SmolLM2-135M", SMOLLM2)):
        for precision, sampled in ways:
            row, sampling = hardware[precision], hardware[sampled]
            context, value = length - _GRPO_NEW / 2, WEIGHT_BYTES[sampled]
            step = decode_step(c, sampling, Unit(), sampled, _GRPO_SAMPLES, context, cache_value_bytes=value)
            rollout = _GRPO_NEW * step.tpot_ms / 1e3
            rollout += _GRPO_PROMPT / prefill(c, sampling, Unit(), sampled, _GRPO_PROMPT, 0.0).tokens_per_second_per_device
            training = step_time(c, row, layout, precision, length, _GRPO_SAMPLES).seconds
            token = per_token(c, row, layout, precision, length)
            training += _GRPO_SAMPLES * (_GRPO_NEW - 3 * _GRPO_PROMPT) * token.head_forward
            # The prompt is computed once but for its last token, and the last token of a sample never.
            spared = (_GRPO_SAMPLES - 1) * (_GRPO_PROMPT - 1) + _GRPO_SAMPLES
            training -= spared * (token.forward + token.backward_input + token.backward_weight - 3 * token.head_forward)
            name = f"GRPO step, {title}, {precision}" + (", sampled in bf16" if sampled == "bf16" else "")
            yield name, "seconds", rollout + training
            yield f"{name}: rollout", "seconds", rollout
            yield f"{name}: training", "seconds", training


def _read(path: Path) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not {"bench", "date", "device", "rows"} <= data.keys():
            raise KeyError
        return data
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; run make bench first") from None
    except (json.JSONDecodeError, AttributeError, KeyError):
        raise InputError(f"{path} is not a result of the benchmark; write it again with make bench") from None

"""`python -m bench.fp8_loss`: the same model trained in FP8 and in BF16 from one seed, beside BF16 runs from other seeds.

V3 reports a relative difference of the loss below 0.25% (appendix B.1), and that output gradients quantised in blocks of 128 x 128
diverge at 16B parameters (appendix B.2); the same is run here at the size of `tiny`. On a device without FP8 the products are
emulated: this measures what the format does to learning, not its speed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from bench.machine import ROOT, describe_device, read_commit
from finback.config import InputError
from finback.data.files import write_atomic
from finback.presets import tiny
from finback.train.config import PretrainConfig
from finback.train.pretrain import pretrain

TARGET = 0.0025
SMOOTHED_SHARE = 0.1  # the loss "at the end" is the mean over the last tenth of the steps


def main(
    data: tuple[str, ...] = tuple(str(ROOT / "runs/quickstart/data" / name) for name in ("fables-en", "fables-zh", "problems")),
    tokenizer: str = str(ROOT / "runs/quickstart/tokenizer"),
    out: Path = ROOT / "runs" / "fp8-loss",
    results: Path = ROOT / "bench" / "results",
    images: Path = ROOT / "docs" / "images",
    steps: int = 300,
    threads: int | None = None,
) -> None:
    """Train five times, or go on where the last call stopped, and write fp8_loss.json and a plot.

    Args:
        data: Directories of token shards.
        tokenizer: Directory of the tokenizer that wrote them.
        out: Directory of the runs.
        results: Directory of the JSON file.
        images: Directory of the plot.
        steps: Optimizer steps of each run.
        threads: CPU threads; torch's own choice if not given.
    """
    vocabulary = json.loads((Path(tokenizer) / "tokenizer.json").read_text(encoding="utf-8"))
    size = max(len(vocabulary["model"]["vocab"]), *(token["id"] + 1 for token in vocabulary["added_tokens"]))
    preset = tiny()
    base = replace(
        preset,
        model=replace(preset.model, vocab_size=-(-size // 64) * 64),
        data=data,
        tokenizer=tokenizer,
        steps=steps,
        save_every=100,
        eval_every=None,
        threads=threads,
        keep_checkpoints=1,
        moments_dtype="bf16",  # in every run, so that only the products differ
    )
    variants = {
        "bf16": base,
        "fp8": replace(base, precision="fp8"),
        "bf16, seed 1": replace(base, seed=1),
        "bf16, seed 2": replace(base, seed=2),
        "fp8, gradients in blocks": replace(base, precision="fp8", fp8_gradient_tiles="128x128"),
    }
    losses = {name: train(config, out / name.replace(", ", "-").replace(" ", "-")) for name, config in variants.items()}
    smoothed = {name: fmean(values[-max(1, round(SMOOTHED_SHARE * steps)) :]) for name, values in losses.items()}
    facts = summary(smoothed)
    write_atomic(
        results / "fp8_loss.json",
        json.dumps({**read_commit(), "device": describe_device(), "steps": steps, "smoothed_loss": smoothed, **facts}, indent=2)
        + "\n",
    )
    plot(losses, images / "fp8-loss.png")
    for name, value in smoothed.items():
        print(f"{name:<26} {value:.4f}  ({value / smoothed['bf16'] - 1:+.3%})")
    print(f"FP8 against BF16 from the same seed: {facts['fp8_difference']:+.3%}, to be within {TARGET:.2%}; {facts['verdict']}")


def train(config: PretrainConfig, directory: Path) -> list[float]:
    """The loss of every step."""
    try:
        pretrain(config, directory, resume=(directory / "config.json").exists())
    except InputError as error:
        raise SystemExit(f"{directory}: {error}") from error
    rows = (json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows]


def summary(smoothed: Mapping[str, float]) -> dict[str, Any]:
    """Relative differences from the BF16 run of the same seed."""
    base = smoothed["bf16"]
    difference = smoothed["fp8"] / base - 1
    spread = max(abs(smoothed[name] / base - 1) for name in ("bf16, seed 1", "bf16, seed 2"))
    return {
        "fp8_difference": difference,
        "blocks_difference": smoothed["fp8, gradients in blocks"] / base - 1,
        "spread_of_seeds": spread,
        "target": TARGET,
        "verdict": "met" if abs(difference) <= TARGET else "missed",
    }


def plot(losses: Mapping[str, Sequence[float]], file: Path) -> None:
    """Smoothed losses, and below them their differences from BF16."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    window = max(1, len(losses["bf16"]) // 20)
    base = _smooth(losses["bf16"], window)
    for name, values in losses.items():
        curve = _smooth(values, window)
        upper.plot(range(window, len(curve) + window), curve, label=name, linewidth=1)
        lower.plot(range(window, len(curve) + window), [100 * (a / b - 1) for a, b in zip(curve, base, strict=True)], linewidth=1)
    lower.axhspan(-100 * TARGET, 100 * TARGET, color="0.9")
    lower.set_ylim(-2, 2)
    upper.set_ylabel("loss (nats per token)")
    lower.set_ylabel("difference from bf16 (%)")
    lower.set_xlabel("step")
    upper.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _smooth(values: Sequence[float], window: int) -> list[float]:
    return [fmean(values[i - window : i]) for i in range(window, len(values) + 1)]


if __name__ == "__main__":
    tyro.cli(main, prog="python -m bench.fp8_loss")

"""The loop of supervised fine-tuning, to be read downward, and what it measures on the way."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finback.config import InputError, ModelConfig
from finback.data.packing import Sample
from finback.model.transformer import Transformer
from finback.train.balance import update_expert_bias
from finback.train.checkpoint import TrainingState, list_checkpoints, save_checkpoint
from finback.train.loop import Clock, clipped_update, diverged, due, expert_biases, not_applied, step_row, take_gradients
from finback.train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from finback.train.optimizer import gradient_norm
from finback.train.ramps import cosine
from finback.train.report import REPORT_FILE, write_report
from finback.train.samples import (
    SampleRows,
    SampleStream,
    accumulate_sample_gradients,
    completion_loss,
    micro_batches,
    mtp_acceptance,
)
from finback.train.sft_config import SFTConfig

TOKENIZER_DIRECTORY = "tokenizer"


@dataclass(frozen=True)
class SFTRun:
    """What is fixed from a run's start to its end."""

    config: SFTConfig
    """With every None that stands for a choice replaced."""
    model: ModelConfig
    directory: Path
    device: torch.device
    total_steps: int
    held_out: list[SampleRows]
    """Validation samples; empty if there are none."""
    drafted: list[SampleRows]
    """Samples on which MTP drafts are measured; empty if the model has no MTP."""
    notes: list[str]
    """What is said at the start about the data."""


def train_samples(
    run: SFTRun,
    state: TrainingState[SampleStream[Sample]],
    metrics: MetricsWriter,
    interrupted: threading.Event,
    machine: dict[str, Any],
) -> Path:
    """Take `state` to the end of the run, step by step; return the last checkpoint."""
    config, model, progress, stream = run.config, state.model, state.progress, state.stream
    assert config.min_lr is not None
    assert config.bias_update_speed is not None
    assert config.warmup_steps is not None
    tokenizer_from = run.directory / TOKENIZER_DIRECTORY
    kept = str(tokenizer_from) if tokenizer_from.is_dir() else None
    checkpoint, parameters = list_checkpoints(run.directory)[:1], state.parameters
    finished = progress.step >= run.total_steps
    clock = Clock()
    if progress.step == 0 and (measured := measure(run, model)):
        metrics.log({"step": 0, "tokens": 0, "seconds": 0.0} | measured)
    while not finished:
        step = progress.step + 1
        lr = cosine(step=step, total_steps=run.total_steps, warmup_steps=config.warmup_steps, lr=config.lr, min_lr=config.min_lr)

        # data
        samples = stream.next_batch(config.global_batch_size)
        batch = cut_batch(samples, config)
        new_tokens = sum(len(sample.ids) for sample in samples)

        # forward and backward
        losses = accumulate_sample_gradients(
            model,
            batch,
            mtp_loss_coef=config.mtp_loss_coef,
            balance_loss_coef=config.balance_loss_coef,
            precision=config.precision,
            recompute=config.recompute,
            mtp=not config.freeze_mtp,
        )
        gradients = take_gradients(parameters)

        # clip and update; a step that is not finite changes nothing
        norm = gradient_norm(gradients)
        applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
        progress.nonfinite_steps = 0 if applied else progress.nonfinite_steps + 1
        del gradients

        # router bias; frozen MTP modules are not in the counts
        if applied and config.bias_update_speed and run.model.uses_expert_bias:
            biases = expert_biases(model)[: len(losses.expert_counts)]
            update_expert_bias(biases, losses.expert_counts, config.bias_update_speed)

        # count
        progress.step, progress.tokens = step, progress.tokens + new_tokens
        progress.seconds += clock.lap(trained_tokens=new_tokens)
        finished = step >= run.total_steps

        # evaluate and log
        measured = measure(run, model) if finished or due(step, config.eval_every) else {}
        if finished or measured or not applied or due(step, config.log_every):
            row = step_row(progress, losses, norm, lr, clock.tokens_per_second(), machine)
            row |= {"batch_size": len(samples), "epoch": stream.taken / len(stream.items)}
            row["padding"] = 1 - new_tokens / sum(rows.ids.numel() for rows in batch)
            metrics.log(row | measured)
            if losses.expert_counts.numel():
                metrics.log_expert_load(step, losses.expert_counts.tolist())
        if not applied:
            metrics.say(not_applied(step, norm, config.max_nonfinite_steps))
        if progress.nonfinite_steps >= config.max_nonfinite_steps:
            raise InputError(diverged(step, config.lr, config.max_nonfinite_steps))

        # save
        if finished or interrupted.is_set() or due(step, config.save_every):
            checkpoint = [save_checkpoint(run.directory, state, tokenizer_from=kept, keep=config.keep_checkpoints)]
        if interrupted.is_set() and not finished:
            metrics.say(f"stopped after step {step}; continue with: finback sft --resume {run.directory}")
            raise KeyboardInterrupt
        progress.seconds += clock.lap()
    if not (run.directory / REPORT_FILE).exists():  # a finished run that is resumed keeps its report
        write_report(run.directory, sections=_sections(run), verb="sft")
    return checkpoint[0]


def measure(run: SFTRun, model: Transformer) -> dict[str, float]:
    """`validation_loss` and `mtp_acceptance` (of the first depth, and `mtp_acceptance_2`, ... of deeper ones), where they exist."""
    measured: dict[str, float] = {}
    if run.held_out:
        measured["validation_loss"] = completion_loss(model, run.held_out, precision=run.config.precision)
    if run.drafted:
        shares = mtp_acceptance(model, run.drafted, precision=run.config.precision)
        names = ("mtp_acceptance", *(f"mtp_acceptance_{depth}" for depth in range(2, len(shares) + 1)))
        measured |= {name: share for name, share in zip(names, shares, strict=True) if math.isfinite(share)}
    return measured


def _sections(run: SFTRun) -> list[tuple[str, str]]:
    """What the report says besides what every report does."""
    sections = [("Data", " \n".join(f"- {note}" for note in run.notes))] if run.notes else []
    shares = [row["mtp_acceptance"] for row in read_metrics(run.directory / METRICS_FILE) if "mtp_acceptance" in row]
    if len(shares) > 1:
        how = "frozen" if run.config.freeze_mtp else "trained along"
        text = (
            f"The MTP module, {how}, drafts the token after next. The main head agrees with {shares[0]:.1%} of its drafts before the "
            f"run and with {shares[-1]:.1%} after it: the share that greedy speculative decoding accepts."
        )
        sections.append(("Multi-token prediction", text))
    return sections


def cut_batch(samples: Sequence[Sample], config: SFTConfig) -> list[SampleRows]:
    """A batch as the micro-batches that the config asks for."""
    assert config.sequence_length is not None
    return micro_batches(
        samples,
        sequence_length=config.sequence_length,
        micro_batch_size=config.micro_batch_size,
        batching=config.batching,
    )

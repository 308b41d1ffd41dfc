"""The pre-training loop: one function, to be read downward."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.config import InputError, count_params
from finback.data.stream import TokenStream
from finback.data.tokenizer import Tokenizer
from finback.ops.fp8_linear import Recipe
from finback.ops.memory import available_memory
from finback.quant.fp8_training import train_in_fp8
from finback.train.balance import update_expert_bias
from finback.train.budget import Plan, fixed_total_tokens, next_plan, planned_total, read_plans, write_plans
from finback.train.checkpoint import (
    TrainingState,
    fresh_state,
    list_checkpoints,
    load_checkpoint,
    newest_sound_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from finback.train.config import PretrainConfig
from finback.train.evaluate import sample_texts, validation_metrics, validation_rows
from finback.train.initial import check_init_from
from finback.train.loop import (
    Clock,
    clipped_update,
    diverged,
    due,
    expert_biases,
    machine_changes,
    not_applied,
    step_row,
    take_gradients,
)
from finback.train.losses import accumulate_gradients
from finback.train.memory import check_memory
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import gradient_norm
from finback.train.ramps import batch_size, bias_update_speed, learning_rate, mtp_loss_coef, resolve_ramps, steps_of_tokens
from finback.train.report import REPORT_FILE, write_report
from finback.train.session import (
    choose_device,
    cpu_threads,
    deferred_interrupts,
    describe_machine,
    locked,
    open_data,
    read_machine,
    resolve_config,
    write_run_config,
)


def pretrain(config: PretrainConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Train a model as `config` says in the run directory `directory`, and return its last checkpoint.

    With `resume`, continue the run that is there, from its newest sound checkpoint, with bitwise the same losses as without the
    interruption (at the same number of threads). Ctrl-C ends the step, saves and raises KeyboardInterrupt.

    Raises:
        InputError: a field, the data or the directory is wrong, memory is too small, or the loss has diverged.
        OSError: the disk is full; the checkpoints written before are untouched.
    """
    run, device = Path(directory), choose_device(config.device)
    config = resolve_config(config, run, resume)
    with cpu_threads(config.threads):
        stream, validation_splits, tokenizer = open_data(config)
        validation = validation_rows(validation_splits, config.sequence_length, config.eval_sequences)
        if not resume:
            check_init_from(config)
        estimate = check_memory(config, str(device), available_memory(device))
        run.mkdir(parents=True, exist_ok=True)
        with locked(run), deferred_interrupts() as interrupted:
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            machine = read_machine(run) if resume else None
            if machine is None:
                machine = describe_machine(config, device, estimate)
                write_run_config(run, config.to_dict(), machine)
            if checkpoint is None:
                state = fresh_state(config, stream, device)
            else:
                state = load_checkpoint(checkpoint, config, stream, device)
                notes.append(f"continuing {run} after step {state.progress.step}")
            if config.precision == "fp8":
                train_in_fp8(state.model, Recipe(config.fp8_scales == "ue8m0", config.fp8_gradient_tiles))
            with MetricsWriter(
                run,
                total_steps=_total_steps(config),
                total_seconds=None if config.minutes is None else 60 * config.minutes,
                resume_step=state.progress.step if resume else None,
            ) as metrics:
                for sentence in (*_introduction(config, device, machine, validation), *machine_changes(machine, device), *notes):
                    metrics.say(sentence)
                return train(config, run, state, metrics, interrupted, machine, validation, tokenizer)


def train(
    config: PretrainConfig,
    run: Path,
    state: TrainingState[TokenStream],
    metrics: MetricsWriter,
    interrupted: threading.Event,
    machine: dict[str, Any],
    validation: Tensor | None,
    tokenizer: Tokenizer | None,
) -> Path:
    """Take `state` to the end of the run, step by step; return the last checkpoint."""
    model, stream, progress, parameters = state.model, state.stream, state.progress, state.parameters
    checkpoint, samples = list_checkpoints(run)[:1], list[tuple[str, str]]()
    plans = read_plans(run)
    total_tokens = fixed_total_tokens(config) or planned_total(plans, progress.step)
    finished = total_tokens is not None and progress.tokens >= total_tokens
    clock = Clock()
    while not finished:
        step = progress.step + 1
        ramps = resolve_ramps(config, total_tokens)
        lr = learning_rate(ramps, step=step, tokens=progress.tokens)

        # data
        rows = stream.next_batch(batch_size(ramps, progress.tokens)).to(parameters["model.embed_tokens.weight"].device)
        new_tokens = rows.shape[0] * config.sequence_length

        # forward and backward
        losses = accumulate_gradients(
            model,
            rows.split(config.micro_batch_size),
            mtp_loss_coef=mtp_loss_coef(ramps, progress.tokens),
            balance_loss_coef=config.balance_loss_coef,
            precision=config.precision,
            recompute=config.recompute,
        )
        gradients = take_gradients(parameters)

        # reduce: one process has seen the whole batch, so its gradients and expert counts are the sums already

        # clip and update: the norm here, the scaling inside the optimizer's pass; a step that is not finite changes nothing. The moving
        # average must have read the old weights by then
        norm = gradient_norm(gradients)
        if state.average is not None:
            state.average.wait()
        applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
        progress.nonfinite_steps = 0 if applied else progress.nonfinite_steps + 1
        del gradients

        # router bias, once per step from the counts of the whole batch
        if applied and config.model.uses_expert_bias:
            update_expert_bias(expert_biases(model), losses.expert_counts, bias_update_speed(ramps, progress.tokens))
        if applied and state.average is not None:
            state.average.start()

        # count, and where the limit is a time, plan the end
        progress.step, progress.tokens = step, progress.tokens + new_tokens
        progress.seconds += clock.lap(trained_tokens=new_tokens)
        if config.minutes is not None:
            total_tokens = _plan(run, plans, state, 60 * config.minutes)
        finished = total_tokens is not None and progress.tokens >= total_tokens

        # evaluate
        measured: dict[str, float] = {}
        if validation is not None and (finished or step == 1 or due(step, config.eval_every)):
            measured = validation_metrics(model, validation, config, tokenizer)

        # log
        if finished or measured or not applied or due(step, config.log_every):
            row = step_row(progress, losses, norm, lr, clock.tokens_per_second(), machine)
            row |= {"batch_size": rows.shape[0], "epoch": sum(stream.rows_taken) / sum(stream.rows_per_epoch)}
            metrics.log(row | measured)
            if losses.expert_counts.numel():
                metrics.log_expert_load(step, losses.expert_counts.tolist())
        if not applied:
            metrics.say(not_applied(step, norm, config.max_nonfinite_steps))
        if progress.nonfinite_steps >= config.max_nonfinite_steps:
            raise InputError(diverged(step, config.lr, config.max_nonfinite_steps))

        # sample
        if tokenizer is not None and config.sample_prompts and (finished or due(step, config.sample_every)):
            samples = sample_texts(model, tokenizer, config)
            for prompt, text in samples:
                metrics.say(f"sample: {prompt!r} -> {text!r}")

        # save
        if finished or interrupted.is_set() or due(step, config.save_every):
            checkpoint = [save_checkpoint(run, state, tokenizer_from=config.tokenizer, keep=config.keep_checkpoints)]
        if interrupted.is_set() and not finished:
            metrics.say(f"stopped after step {step}; continue with: finback pretrain --resume {run}")
            raise KeyboardInterrupt
        progress.seconds += clock.lap()
    if samples or not (run / REPORT_FILE).exists():  # a finished run that is resumed keeps its report
        write_report(run, samples=samples)
    return checkpoint[0]


def _plan(run: Path, plans: list[Plan], state: TrainingState[TokenStream], limit_seconds: float) -> int | None:
    """The end in tokens of a run of so many seconds, from the plans so far and a new one if it is due."""
    progress = state.progress
    plan = next_plan(plans, step=progress.step, tokens=progress.tokens, seconds=progress.seconds, limit_seconds=limit_seconds)
    if plan is not None:
        plans.append(plan)
        write_plans(run, plans)
    return planned_total(plans, progress.step)


def _total_steps(config: PretrainConfig) -> int | None:
    if config.tokens is None:
        return config.steps
    return steps_of_tokens(resolve_ramps(config, None), tokens=config.tokens, sequence_length=config.sequence_length)


def _introduction(
    config: PretrainConfig, device: torch.device, machine: dict[str, Any], validation: Tensor | None
) -> Iterator[str]:
    counts = count_params(config.model)
    kernels = " and C kernels" if machine.get("kernels") == "C" else ""
    yield (
        f"{counts.total:,} parameters ({counts.active:,} active per token), {config.precision} on {device} "
        f"with {torch.get_num_threads()} threads{kernels}, about {machine['estimated_device_bytes'] / 2**30:.1f} GiB at the peak"
    )
    if config.init_from is not None:
        yield f"weights from {config.init_from}"
    if validation is None:
        yield "the validation split is shorter than one sequence: no held-out loss will be measured"

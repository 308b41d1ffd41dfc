"""The pre-training loop: one function, to be read downward."""

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finback.config import InputError, count_params
from finback.data.tokenizer import Tokenizer
from finback.model.transformer import Transformer
from finback.train.balance import max_violation, update_expert_bias
from finback.train.budget import Plan, fixed_total_tokens, next_plan, planned_total, read_plans, write_plans
from finback.train.checkpoint import (
    Progress,
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
from finback.train.losses import BatchLosses, accumulate_gradients
from finback.train.memory import available_memory, check_memory
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import adamw_update, clip_scale, gradient_norm
from finback.train.ramps import batch_size, bias_update_speed, learning_rate, mtp_loss_coef, resolve_ramps, steps_of_tokens
from finback.train.report import REPORT_FILE, write_report
from finback.train.session import (
    choose_device,
    cpu_threads,
    deferred_interrupts,
    describe_machine,
    device_name,
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
        estimate = check_memory(config, device, available_memory(device))
        run.mkdir(parents=True, exist_ok=True)
        with locked(run), deferred_interrupts() as interrupted:
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            machine = read_machine(run) if resume else None
            if machine is None:
                machine = describe_machine(config, device, estimate)
                write_run_config(run, config, machine)
            if checkpoint is None:
                state = fresh_state(config, stream, device)
            else:
                state = load_checkpoint(checkpoint, config, stream, device)
                notes.append(f"continuing {run} after step {state.progress.step}")
            with MetricsWriter(
                run,
                total_steps=_total_steps(config),
                total_seconds=None if config.minutes is None else 60 * config.minutes,
                resume_step=state.progress.step if resume else None,
            ) as metrics:
                for sentence in (*_introduction(config, device, machine, validation), *_changes(machine, device), *notes):
                    metrics.say(sentence)
                return train(config, run, state, metrics, interrupted, machine, validation, tokenizer)


def train(
    config: PretrainConfig,
    run: Path,
    state: TrainingState,
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
    clock = _Clock()
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
        gradients = _take_gradients(parameters)

        # reduce: one process has seen the whole batch, so its gradients and expert counts are the sums already

        # clip: the norm here, the scaling inside the optimizer's pass; a step that is not finite changes nothing
        norm = gradient_norm(gradients)
        applied = math.isfinite(norm)
        progress.nonfinite_steps = 0 if applied else progress.nonfinite_steps + 1

        # optimizer; the moving average must have read the old weights by then
        if applied and state.average is not None:
            state.average.wait()
        if applied:
            adamw_update(
                parameters,
                gradients,
                state.adam,
                lr=lr,
                beta1=config.adam_beta1,
                beta2=config.adam_beta2,
                epsilon=config.adam_epsilon,
                weight_decay=config.weight_decay,
                gradient_scale=clip_scale(norm, config.max_grad_norm),
            )
        del gradients

        # router bias, once per step from the counts of the whole batch
        if applied and config.model.uses_expert_bias:
            update_expert_bias(_expert_biases(model), losses.expert_counts, bias_update_speed(ramps, progress.tokens))
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
        if validation is not None and (finished or step == 1 or _due(step, config.eval_every)):
            measured = validation_metrics(model, validation, config, tokenizer)

        # log
        if finished or measured or not applied or _due(step, config.log_every):
            row = _row(progress, losses, norm, lr, clock.tokens_per_second(), machine)
            row |= {"batch_size": rows.shape[0], "epoch": sum(stream.rows_taken) / sum(stream.rows_per_epoch)}
            metrics.log(row | measured)
            if losses.expert_counts.numel():
                metrics.log_expert_load(step, losses.expert_counts.tolist())
        if not applied:
            metrics.say(_not_applied(step, norm, config))
        if progress.nonfinite_steps >= config.max_nonfinite_steps:
            raise InputError(_diverged(step, config))

        # sample
        if tokenizer is not None and config.sample_prompts and (finished or _due(step, config.sample_every)):
            samples = sample_texts(model, tokenizer, config)
            for prompt, text in samples:
                metrics.say(f"sample: {prompt!r} -> {text!r}")

        # save
        if finished or interrupted.is_set() or _due(step, config.save_every):
            checkpoint = [save_checkpoint(run, state, tokenizer_from=config.tokenizer, keep=config.keep_checkpoints)]
        if interrupted.is_set() and not finished:
            metrics.say(f"stopped after step {step}; continue with: finback pretrain --resume {run}")
            raise KeyboardInterrupt
        progress.seconds += clock.lap()
    if samples or not (run / REPORT_FILE).exists():  # a finished run that is resumed keeps its report
        write_report(run, samples=samples)
    return checkpoint[0]


_DEEPSEEK_METRICS = ("mtp_loss", "balance_loss", "max_violation")


class _Clock:
    """Wall time since the last lap, and the speed of training alone since it was last asked for."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._tokens, self._seconds = 0, 0.0

    def lap(self, *, trained_tokens: int = 0) -> float:
        now = time.perf_counter()
        passed, self._since = now - self._since, now
        if trained_tokens:
            self._tokens += trained_tokens
            self._seconds += passed
        return passed

    def tokens_per_second(self) -> float:
        speed = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        return speed


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _take_gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradients of all parameters, which then have none."""
    gradients = {}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def _expert_biases(model: Transformer) -> list[Tensor]:
    """The bias of each router, in the order of the expert counts."""
    biases = [router.e_score_correction_bias for router in model.routers()]
    return [bias for bias in biases if bias is not None]


def _row(
    progress: Progress, losses: BatchLosses, norm: float, lr: float, speed: float, machine: dict[str, Any]
) -> dict[str, float | int]:
    """What metrics.jsonl says of a step, but for the data's and the evaluation's part. Of a dense model there is less to say."""
    counts = losses.expert_counts
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "loss": losses.loss,
        "mtp_loss": losses.mtp_loss,
        "balance_loss": losses.balance_loss,
        "grad_norm": norm,
        "lr": lr,
        "tokens_per_second": speed,
        "mfu": speed * machine["training_flops_per_token"] / machine["matmul_flops_per_second"],
        "max_violation": max_violation(counts),
    }
    return row if counts.shape[1] else {key: value for key, value in row.items() if key not in _DEEPSEEK_METRICS}


def _plan(run: Path, plans: list[Plan], state: TrainingState, limit_seconds: float) -> int | None:
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
    yield (
        f"{counts.total:,} parameters ({counts.active:,} active per token), {config.precision} on {device} "
        f"with {torch.get_num_threads()} threads, about {machine['estimated_device_bytes'] / 2**30:.1f} GiB at the peak"
    )
    if validation is None:
        yield "the validation split is shorter than one sequence: no held-out loss will be measured"


def _changes(machine: dict[str, Any], device: torch.device) -> list[str]:
    """What differs from the machine that the run started on and may change bits."""
    now = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return [
        f"{name} is {value} and was {machine[name]} when the run started: losses may differ in their last bits"
        for name, value in now.items()
        if machine.get(name) != value
    ]


def _not_applied(step: int, norm: float, config: PretrainConfig) -> str:
    limit = f"the run stops after {config.max_nonfinite_steps} in a row"
    return f"step {step}: the gradient norm is {norm}, the step is not applied ({limit})"


def _diverged(step: int, config: PretrainConfig) -> str:
    times = f"{config.max_nonfinite_steps} times in a row"
    return f"training has diverged: at step {step} the gradient norm is not finite, {times}; lower lr (now {config.lr})"

"""Logit distillation: where vocabularies agree, a student learns the teacher's probabilities on the teacher's verified traces."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from finback.config import InputError, ModelConfig, count_params
from finback.data.conversations import LoadedSamples, load_samples, samples_fingerprint
from finback.data.files import write_atomic
from finback.data.packing import Sample
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.model.checkpoint import load, open_checkpoint, save
from finback.model.transformer import Transformer
from finback.ops.memory import available_memory
from finback.recipes.logit_distill_config import LogitDistillConfig
from finback.recipes.sampling import model_hash
from finback.train.checkpoint import (
    TrainingState,
    list_checkpoints,
    new_state,
    newest_sound_checkpoint,
    remove_leftovers,
    restore_state,
    save_checkpoint,
)
from finback.train.logit_losses import accumulate_logit_gradients
from finback.train.loop import Clock, clipped_update, diverged, due, machine_changes, not_applied, step_row, take_gradients
from finback.train.losses import BatchLosses
from finback.train.memory import check_memory
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import gradient_norm
from finback.train.ramps import cosine
from finback.train.report import REPORT_FILE, write_report
from finback.train.samples import SampleStream, micro_batches
from finback.train.session import (
    check_directory,
    check_same_fields,
    choose_device,
    cpu_threads,
    deferred_interrupts,
    describe_machine,
    locked,
    read_config_file,
    read_machine,
    write_run_config,
)
from finback.train.sft import keep_tokenizer_files
from finback.train.sft_loop import TOKENIZER_DIRECTORY

_START = "finback logit-distill TEACHER STUDENT --data FILE --out DIR"
_SHOWN = 5


@dataclass(frozen=True)
class LogitRun:
    """What is fixed from a run's start to its end."""

    config: LogitDistillConfig
    directory: Path
    total_steps: int
    teacher: Transformer


def check_same_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """InputError, saying which ids differ, unless both tokenizers give every id the same meaning."""
    sizes = teacher.vocab_size, student.vocab_size
    differing = (i for i in range(min(sizes)) if teacher.backend.id_to_token(i) != student.backend.id_to_token(i))
    shown = [
        f"{i} ({teacher.backend.id_to_token(i)!r} and {student.backend.id_to_token(i)!r})" for i in islice(differing, _SHOWN)
    ]
    if sizes[0] != sizes[1]:
        shown.append(f"{min(sizes)} to {max(sizes) - 1} (in one of them only)")
    if shown:
        raise InputError(
            f"teacher and student have different vocabularies ({sizes[0]} and {sizes[1]} tokens): ids {', '.join(shown)} differ, so "
            "their probabilities cannot be compared; use finback distill, which learns from texts"
        )


def logit_distill(
    teacher: str | Path, student: str | Path, config: LogitDistillConfig, directory: str | Path, *, resume: bool = False
) -> Path:
    """Teach the model in the Hugging Face directory `student` the probabilities of that in `teacher`, in the run directory
    `directory`; returns `directory`/student, and leaves the lineage beside it.

    With `resume`, continue the run that is there, bitwise as without the interruption. Ctrl-C ends the step, saves and raises
    KeyboardInterrupt.

    Raises:
        InputError: a field or a row is wrong, the vocabularies differ, memory is too small, or the loss has diverged.
        OSError: the disk is full; the checkpoints written before are untouched.
    """
    run, sources = Path(directory), {"teacher": Path(teacher), "student": Path(student)}
    check_directory(run, resume, verb="logit-distill")
    if not config.data:
        raise InputError("field data is empty; give .jsonl or .parquet files to train on")
    device = choose_device(config.device)
    models = {name: open_checkpoint(source).config for name, source in sources.items()}
    config, loaded = _open_traces(sources, models, config)
    samples, total_steps = loaded.samples, config.total_steps(len(loaded.samples))
    fields = config.to_dict() | {name: str(source.resolve()) for name, source in sources.items()}
    fields["model"] = models["student"].to_dict()
    fields["sha256"] = {name: model_hash(source) for name, source in sources.items()}
    if resume:
        check_same_fields(run, read_config_file(run, start=_START), fields)
    with cpu_threads(config.threads):
        sizing = config.as_pretraining(models["student"], max(len(sample.ids) for sample in samples))
        estimate = check_memory(sizing, str(device), _beside_the_teacher(device, models["teacher"]))
        run.mkdir(parents=True, exist_ok=True)
        with locked(run), deferred_interrupts() as interrupted:
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            machine = read_machine(run) if resume else None
            if machine is None:
                machine = describe_machine(sizing, device, estimate)
                keep_tokenizer_files(sources["student"], run / TOKENIZER_DIRECTORY, None)
                write_run_config(run, fields, machine)
            model = load(checkpoint or sources["student"], dtype=torch.float32, device=device)
            for module in model.mtp_modules:  # they take no part
                module.requires_grad_(False)
            stream = SampleStream(samples, seed=config.seed, fingerprint=samples_fingerprint(samples))
            state = new_state(model, stream, moments_dtype="fp32", ema_decay=None)
            if checkpoint is not None:
                restore_state(checkpoint, state)
                notes.append(f"continuing {run} after step {state.progress.step}")
            if loaded.skipped:
                notes.append(f"{len(loaded.skipped)} malformed rows are left out, the first one: {loaded.skipped[0]}")
            known = load(sources["teacher"], dtype=torch.float32, device=device).requires_grad_(False)
            resume_step = state.progress.step if checkpoint is not None else None
            with MetricsWriter(run, total_steps=total_steps, resume_step=resume_step) as metrics:
                counts = [count_params(models[name]).total for name in ("teacher", "student")]
                metrics.say(
                    f"{len(samples):,} traces; a teacher of {counts[0]:,} parameters, a student of {counts[1]:,}, {config.precision} "
                    f"on {device}"
                )
                for sentence in (*machine_changes(machine, device), *notes):
                    metrics.say(sentence)
                last = train(LogitRun(config, run, total_steps, known), state, metrics, interrupted, machine)
    save(load(last, dtype=torch.float32), run / "student")
    write_atomic(run / "lineage.json", json.dumps(fields, indent=2) + "\n")
    return run / "student"


def read_logit_run(directory: str | Path) -> tuple[str, str, LogitDistillConfig]:
    """(directory of the teacher, directory of the student, config) of the run in `directory`; InputError if there is none."""
    data = read_config_file(directory, start=_START)
    if "distill_temperature" not in data:
        raise InputError(
            f"{directory} holds a run of another kind, not of finback logit-distill; its report.md says how to resume it"
        )
    teacher, student = data.pop("teacher"), data.pop("student")
    for name in ("model", "sha256"):
        data.pop(name)
    return teacher, student, LogitDistillConfig.from_dict(data)


def _open_traces(
    sources: Mapping[str, Path], models: Mapping[str, ModelConfig], config: LogitDistillConfig
) -> tuple[LogitDistillConfig, LoadedSamples]:
    """The config with a value for every field that leaves a choice, and the traces; InputError unless the models are a pair."""
    tokenizer = load_tokenizer(sources["student"])
    check_same_vocabulary(load_tokenizer(sources["teacher"]), tokenizer)
    heads = models["teacher"].vocab_size, models["student"].vocab_size
    if heads[0] != heads[1]:
        raise InputError(
            f"teacher and student have {heads[0]} and {heads[1]} logits: ids from {min(heads)} are in one of them only"
        )
    config = config.resolved(min(models.values(), key=lambda model: model.max_position_embeddings))
    assert config.sequence_length is not None
    length, skip = config.sequence_length, config.skip_malformed
    loaded = load_samples(config.data, tokenizer, sequence_length=length, skip_malformed=skip)
    return config.with_warmup(config.total_steps(len(loaded.samples))), loaded


def _beside_the_teacher(device: torch.device, teacher: ModelConfig) -> int | None:
    """Bytes that are left for the student's training."""
    available = available_memory(device)
    return None if available is None else max(0, available - 4 * count_params(teacher).total)


def train(
    run: LogitRun,
    state: TrainingState[SampleStream[Sample]],
    metrics: MetricsWriter,
    interrupted: threading.Event,
    machine: dict[str, Any],
) -> Path:
    """Take `state` to the end of the run, step by step; return the last checkpoint."""
    config, model, progress, stream = run.config, state.model, state.progress, state.stream
    assert config.min_lr is not None
    assert config.warmup_steps is not None
    assert config.sequence_length is not None
    checkpoint, parameters = list_checkpoints(run.directory)[:1], state.parameters
    finished = progress.step >= run.total_steps
    clock = Clock()
    while not finished:
        step = progress.step + 1
        lr = cosine(step=step, total_steps=run.total_steps, warmup_steps=config.warmup_steps, lr=config.lr, min_lr=config.min_lr)

        # forward and backward
        samples = stream.next_batch(config.global_batch_size)
        new_tokens = sum(len(sample.ids) for sample in samples)
        loss = accumulate_logit_gradients(
            model,
            run.teacher,
            micro_batches(
                samples,
                sequence_length=config.sequence_length,
                micro_batch_size=config.micro_batch_size,
                batching="pad",
            ),
            temperature=config.distill_temperature,
            top_k=config.top_k,
            balance_loss_coef=config.balance_loss_coef,
            precision=config.precision,
            recompute=config.recompute,
        )

        # clip and update; a step that is not finite changes nothing
        gradients = take_gradients(parameters)
        norm = gradient_norm(gradients)
        applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
        progress.nonfinite_steps = 0 if applied else progress.nonfinite_steps + 1
        del gradients

        # count and log
        progress.step, progress.tokens = step, progress.tokens + new_tokens
        progress.seconds += clock.lap(trained_tokens=new_tokens)
        finished = step >= run.total_steps
        if finished or not applied or due(step, config.log_every):
            losses = BatchLosses(loss, 0.0, 0.0, torch.zeros(0, 0, dtype=torch.int64))
            row = step_row(progress, losses, norm, lr, clock.tokens_per_second(), machine)
            metrics.log(row | {"batch_size": len(samples), "epoch": stream.taken / len(stream.items)})
        if not applied:
            metrics.say(not_applied(step, norm, config.max_nonfinite_steps))
        if progress.nonfinite_steps >= config.max_nonfinite_steps:
            raise InputError(diverged(step, config.lr, config.max_nonfinite_steps))

        # save
        if finished or interrupted.is_set() or due(step, config.save_every):
            kept = str(run.directory / TOKENIZER_DIRECTORY)
            checkpoint = [save_checkpoint(run.directory, state, tokenizer_from=kept, keep=config.keep_checkpoints)]
        if interrupted.is_set() and not finished:
            metrics.say(f"stopped after step {step}; continue with: finback logit-distill --resume {run.directory}")
            raise KeyboardInterrupt
        progress.seconds += clock.lap()
    if not (run.directory / REPORT_FILE).exists():  # a finished run that is resumed keeps its report
        write_report(run.directory, sections=[], verb="logit-distill")
    return checkpoint[0]

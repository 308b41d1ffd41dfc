"""Training of a reward model: a language model with a scalar head, on pairs or on labels; one loop, to be read downward."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finback.config import InputError, ModelConfig, count_params
from finback.data.rated import Rated, balanced_split, load_rated, rated_fingerprint
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import load, open_checkpoint
from finback.model.reward_head import RewardHead, load_reward_head, save_reward_head, score_rows
from finback.model.transformer import Transformer
from finback.ops.memory import available_memory
from finback.train.checkpoint import (
    TrainingState,
    list_checkpoints,
    new_state,
    newest_sound_checkpoint,
    remove_leftovers,
    restore_state,
    save_checkpoint,
)
from finback.train.loop import Clock, clipped_update, diverged, due, machine_changes, not_applied, step_row, take_gradients
from finback.train.losses import BatchLosses
from finback.train.memory import check_memory
from finback.train.metrics import METRICS_FILE, MetricsWriter, read_metrics
from finback.train.optimizer import gradient_norm
from finback.train.ramps import cosine
from finback.train.report import REPORT_FILE, write_report
from finback.train.reward_baselines import accuracy, length_baseline, word_baseline
from finback.train.reward_model_config import RewardModelConfig
from finback.train.reward_scoring import by_length, padded, score_texts
from finback.train.samples import SampleStream
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

_START = "finback reward-model MODEL_DIR --data FILE --kind pairwise|pointwise --out DIR"


@dataclass(frozen=True)
class RewardRun:
    """What is fixed from a run's start to its end."""

    config: RewardModelConfig
    model: ModelConfig
    directory: Path
    device: torch.device
    total_steps: int
    training: list[Rated]
    held_out: list[Rated]


def train_reward_model(base: str | Path, config: RewardModelConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Train a scalar head and the language model in `base` under it as `config` says; return the last checkpoint: a Hugging Face
    directory that `finback.load` reads as the language model and `load_reward_model` with its head. The rest is as in `sft`."""
    run, base = Path(directory), Path(base)
    check_directory(run, resume, verb="reward-model")
    if not config.data:
        raise InputError("field data is empty; give .jsonl or .parquet files to train on")
    device = choose_device(config.device)
    model_config = ModelConfig.from_dict(read_config_file(run, start=_START)["model"]) if resume else open_checkpoint(base).config
    config = config.resolved(model_config)
    kept = run / TOKENIZER_DIRECTORY
    tokenizer = load_tokenizer(kept if resume and kept.is_dir() else base)
    assert config.sequence_length is not None
    rated, skipped = load_rated(
        config.data, tokenizer, config.kind, sequence_length=config.sequence_length, skip_malformed=config.skip_malformed
    )
    largest = max(max(text) for one in rated for text in one.texts)
    if largest >= model_config.vocab_size:
        raise InputError(f"the tokenizer gives token id {largest}, above the model's vocab_size ({model_config.vocab_size})")
    training, held_out = balanced_split(rated, config.held_out_fraction, config.seed)
    total_steps = config.total_steps(len(training))
    config = config.with_warmup(total_steps)
    fields = config.to_dict() | {"base": str(base.resolve()), "model": model_config.to_dict()}
    if resume:
        check_same_fields(run, read_config_file(run, start=_START), fields)
    setting = RewardRun(config, model_config, run, device, total_steps, training, held_out)
    with cpu_threads(config.threads):
        longest = max(len(text) for one in rated for text in one.texts)
        estimate = check_memory(config.as_pretraining(model_config, longest), str(device), available_memory(device))
        run.mkdir(parents=True, exist_ok=True)
        with locked(run), deferred_interrupts() as interrupted:
            remove_leftovers(run)
            checkpoint, notes = newest_sound_checkpoint(run) if resume else (None, [])
            machine = read_machine(run) if resume else None
            if machine is None:
                machine = describe_machine(config.as_pretraining(model_config, longest), device, estimate)
                keep_tokenizer_files(base, kept, None)
                write_run_config(run, fields, machine)
            model, head = _open_model(checkpoint or base, device, has_head=checkpoint is not None)
            stream = SampleStream(training, seed=config.seed, fingerprint=rated_fingerprint(training))
            state = new_state(model, stream, moments_dtype="fp32", ema_decay=None)
            if checkpoint is not None:
                restore_state(checkpoint, state)
                notes.append(f"continuing {run} after step {state.progress.step}")
            if skipped:
                notes.append(f"{len(skipped)} malformed rows are left out, the first one: {skipped[0]}")
            resume_step = state.progress.step if checkpoint is not None else None
            with MetricsWriter(run, total_steps=total_steps, resume_step=resume_step) as metrics:
                metrics.say(
                    f"{len(training):,} rows to train on, {len(held_out):,} held out and balanced by length; "
                    f"{count_params(model_config).total:,} parameters, {config.precision} on {device}"
                )
                for sentence in (*machine_changes(machine, device), *notes):
                    metrics.say(sentence)
                return _train(setting, state, head, metrics, interrupted, machine)


def read_reward_run(directory: str | Path) -> tuple[str, RewardModelConfig]:
    """(directory of the base model, config) of the run in `directory`; InputError if there is none."""
    data = read_config_file(directory, start=_START)
    if "held_out_fraction" not in data:
        raise InputError(
            f"{directory} holds a run of another kind, not of finback reward-model; its report.md says how to resume it"
        )
    base: str = data.pop("base")
    data.pop("model", None)
    return base, RewardModelConfig.from_dict(data)


def _open_model(directory: Path, device: torch.device, *, has_head: bool) -> tuple[Transformer, RewardHead]:
    """The language model with the head as a part of it; what a score does not depend on (language head, MTP) is frozen."""
    model = load(directory, dtype=torch.float32, device=device)
    size = model.config.hidden_size
    head = load_reward_head(directory, size, device)[0] if has_head else RewardHead(size, device)
    for module in model.mtp_modules:
        module.requires_grad_(False)
    if not model.config.tie_word_embeddings:
        model.lm_head.requires_grad_(False)
    model.add_module("reward_head", head)
    return model, head


def reward_loss(scores: Tensor, batch: Sequence[Rated]) -> Tensor:
    """Sum over rows of -log sigmoid(better - worse) for pairs, whose scores stand side by side, or of the cross entropy of labels."""
    if len(batch[0].texts) == 2:
        return -F.logsigmoid(scores[0::2] - scores[1::2]).sum()
    labels = torch.tensor([float(one.good) for one in batch], device=scores.device)
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")


def accumulate_reward_gradients(model: Transformer, head: RewardHead, batch: Sequence[Rated], config: RewardModelConfig) -> float:
    """Add the gradient of the mean loss of a batch to the parameters' `.grad`, however it is cut; return that loss."""
    assert config.sequence_length is not None
    device = head.weight.device
    total = 0.0
    longest = [len(one.texts) * max(len(text) for text in one.texts) for one in batch]
    for part in by_length(longest, config.micro_batch_size * config.sequence_length):
        rows = [batch[index] for index in part]
        ids, lengths = padded([text for one in rows for text in one.texts], device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            scores = score_rows(model, head, ids, lengths)
        loss = reward_loss(scores, rows) / len(batch)
        loss.backward()
        total += float(loss.detach())
    return total


def _train(
    run: RewardRun,
    state: TrainingState[SampleStream[Rated]],
    head: RewardHead,
    metrics: MetricsWriter,
    interrupted: threading.Event,
    machine: dict[str, Any],
) -> Path:
    """Take `state` to the end of the run, step by step; return the last checkpoint."""
    config, model, progress, stream = run.config, state.model, state.progress, state.stream
    assert config.min_lr is not None
    assert config.warmup_steps is not None
    checkpoint, parameters = list_checkpoints(run.directory)[:1], state.parameters
    finished = progress.step >= run.total_steps
    clock = Clock()

    def save_head(folder: Path) -> None:
        save_reward_head(head, folder, {"kind": config.kind})

    while not finished:
        step = progress.step + 1
        lr = cosine(step=step, total_steps=run.total_steps, warmup_steps=config.warmup_steps, lr=config.lr, min_lr=config.min_lr)
        batch = stream.next_batch(config.global_batch_size)
        new_tokens = sum(len(text) for one in batch for text in one.texts)
        loss = accumulate_reward_gradients(model, head, batch, config)
        gradients = take_gradients(parameters)
        norm = gradient_norm(gradients)
        applied = clipped_update(parameters, gradients, state.adam, config, lr=lr, norm=norm)
        progress.nonfinite_steps = 0 if applied else progress.nonfinite_steps + 1
        del gradients
        progress.step, progress.tokens = step, progress.tokens + new_tokens
        progress.seconds += clock.lap(trained_tokens=new_tokens)
        finished = step >= run.total_steps
        measured = measure(run, model, head) if finished else {}
        if finished or not applied or due(step, config.log_every):
            losses = BatchLosses(loss, 0.0, 0.0, torch.zeros(0, 0, dtype=torch.int64))
            row = step_row(progress, losses, norm, lr, clock.tokens_per_second(), machine)
            metrics.log(row | {"batch_size": len(batch), "epoch": stream.taken / len(stream.items)} | measured)
        if measured:
            metrics.say(_verdict(measured, len(run.held_out)))
        if not applied:
            metrics.say(not_applied(step, norm, config.max_nonfinite_steps))
        if progress.nonfinite_steps >= config.max_nonfinite_steps:
            raise InputError(diverged(step, config.lr, config.max_nonfinite_steps))
        if finished or interrupted.is_set() or due(step, config.save_every):
            folder = str(run.directory / TOKENIZER_DIRECTORY)
            saved = save_checkpoint(
                run.directory, state, tokenizer_from=folder, keep=config.keep_checkpoints, write_more=save_head
            )
            checkpoint = [saved]
        if interrupted.is_set() and not finished:
            metrics.say(f"stopped after step {step}; continue with: finback reward-model --resume {run.directory}")
            raise KeyboardInterrupt
        progress.seconds += clock.lap()
    if not (run.directory / REPORT_FILE).exists():  # a finished run that is resumed keeps its report
        last = read_metrics(run.directory / METRICS_FILE)[-1]
        write_report(run.directory, sections=[("Held-out rows", _verdict(last, len(run.held_out)))], verb="reward-model")
    return checkpoint[0]


def measure(run: RewardRun, model: Transformer, head: RewardHead) -> dict[str, float]:
    """Held-out accuracy of the model and of the two baselines."""
    texts = [text for one in run.held_out for text in one.texts]
    scores = iter(score_texts(model, head, texts, precision=run.config.precision))
    return {
        "accuracy": accuracy(run.held_out, lambda response: next(scores)),
        "length_accuracy": length_baseline(run.training, run.held_out),
        "word_accuracy": word_baseline(run.training, run.held_out),
    }


def _verdict(measured: dict[str, Any], rows: int) -> str:
    return (
        f"held-out accuracy over {rows:,} rows balanced by length: reward model {measured['accuracy']:.1%}, "
        f"length alone {measured['length_accuracy']:.1%}, bag of words {measured['word_accuracy']:.1%}"
    )

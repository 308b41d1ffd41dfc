"""Supervised fine-tuning on completions: from files (`sft`) or from samples in memory (`finetune`). The loop is in `sft_loop`."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finback.config import InputError, ModelConfig, count_params
from finback.data.conversations import PUBLISHED_TEMPLATES, load_samples, samples_fingerprint, with_chat_template
from finback.data.files import atomic_directory
from finback.data.packing import Sample
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from finback.model.checkpoint import carried_files, load, open_checkpoint
from finback.model.transformer import Transformer
from finback.ops.memory import available_memory
from finback.train.checkpoint import new_state, newest_sound_checkpoint, remove_leftovers, restore_state
from finback.train.loop import machine_changes
from finback.train.memory import MemoryEstimate, check_memory
from finback.train.metrics import MetricsWriter
from finback.train.samples import SampleRows, SampleStream
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
from finback.train.sft_config import SFTConfig
from finback.train.sft_loop import TOKENIZER_DIRECTORY, SFTRun, cut_batch, train_samples

DEFAULT_BIAS_UPDATE_SPEED = 0.001
_MASK_BYTES = 5  # per pair of positions of a packed row: the mask itself and torch's copy in float32


def sft(base: str | Path, config: SFTConfig, directory: str | Path, *, resume: bool = False) -> Path:
    """Fine-tune the model in the Hugging Face directory `base` as `config` says, in the run directory `directory`; return the last
    checkpoint, a Hugging Face directory with tokenizer and chat template.

    With `resume`, continue the run that is there, bitwise as without the interruption. Ctrl-C ends the step, saves and raises
    KeyboardInterrupt.

    Raises:
        InputError: a field, a row of the data or the directory is wrong, memory is too small, or the loss has diverged.
        OSError: the disk is full; the checkpoints written before are untouched.
    """
    run, base = Path(directory), Path(base)
    check_directory(run, resume, verb="sft")
    if not config.data:
        raise InputError("field data is empty; give .jsonl or .parquet files to train on")
    kept_tokenizer = run / TOKENIZER_DIRECTORY
    model_config = _stored_model(run) if resume else open_checkpoint(base).config
    config = resolve_fields(config, model_config)
    if resume and kept_tokenizer.is_dir():
        tokenizer = load_tokenizer(kept_tokenizer)
    else:
        tokenizer = load_tokenizer(base)
        if config.chat_template is not None:
            tokenizer = with_chat_template(tokenizer, config.chat_template)
    samples, notes = _load(config.data, config, tokenizer)
    validation: list[Sample] = []
    if config.validation:
        validation, more = _load(config.validation, config, tokenizer)
        notes += more

    def open_model(checkpoint: Path | None) -> Transformer:
        return load(checkpoint or base, dtype=torch.float32, device=choose_device(config.device))

    def keep_tokenizer() -> None:
        keep_tokenizer_files(base, kept_tokenizer, tokenizer if config.chat_template is not None else None)

    return _run(open_model, model_config, samples, validation, config, run, str(base.resolve()), keep_tokenizer, resume, notes)


def finetune(
    model: Transformer,
    samples: Sequence[Sample],
    config: SFTConfig,
    directory: str | Path,
    *,
    validation: Sequence[Sample] = (),
    tokenizer_from: str | Path | None = None,
    resume: bool = False,
) -> Path:
    """The same for a float32 model and samples in memory. The model itself is trained, in its place, on `config.device`; of the config,
    `data`, `validation` and `chat_template` are not read. Checkpoints get the tokenizer of `tokenizer_from`, by default the one of the
    directory that the model was loaded from. To resume, give the same samples and any model of the same shape."""
    run = Path(directory)
    check_directory(run, resume, verb="sft")
    if {parameter.dtype for parameter in model.parameters()} != {torch.float32}:
        raise InputError(
            "the model to fine-tune is not in float32, small steps would be rounded away; load it with dtype float32"
        )
    source = Path(tokenizer_from) if tokenizer_from is not None else model.source_directory
    model.to(choose_device(config.device))

    def open_model(checkpoint: Path | None) -> Transformer:
        if checkpoint is not None:
            model.load_state_dict(load(checkpoint, dtype=torch.float32, device=model.lm_head.weight.device).state_dict())
        return model

    def keep_tokenizer() -> None:
        if source is not None:
            keep_tokenizer_files(source, run / TOKENIZER_DIRECTORY, None)

    config = resolve_fields(config, model.config)
    return _run(open_model, model.config, samples, validation, config, run, None, keep_tokenizer, resume, [])


def read_sft_run(directory: str | Path) -> tuple[str | None, SFTConfig]:
    """(directory of the base model, config) of the run in `directory`; InputError if there is none."""
    data = read_config_file(directory, start="finback sft MODEL_DIR --data FILE --out DIR")
    if "epochs" not in data:
        raise InputError(f"{directory} holds a run of another kind, not of finback sft; see its report.md for how to resume it")
    base = data.pop("base", None)
    data.pop("model", None)
    return base, SFTConfig.from_dict(data)


def _stored_model(run: Path) -> ModelConfig:
    return ModelConfig.from_dict(read_config_file(run, start="finback sft MODEL_DIR --data FILE --out DIR")["model"])


def resolve_fields(config: SFTConfig, model: ModelConfig) -> SFTConfig:
    """`config` with absolute paths and a value for every field that leaves a choice, checked against the model."""
    speed = config.bias_update_speed
    if speed and not model.uses_expert_bias:
        raise InputError(f"field bias_update_speed is {speed}, but this model has no router bias; leave it out or set it to 0")
    template = config.chat_template
    if template is not None and template not in PUBLISHED_TEMPLATES:
        template = os.path.abspath(template)
    return replace(
        config.resolved(model),
        chat_template=template,
        bias_update_speed=(DEFAULT_BIAS_UPDATE_SPEED if model.uses_expert_bias else 0.0) if speed is None else speed,
    )


def _load(files: Sequence[str], config: SFTConfig, tokenizer: Tokenizer) -> tuple[list[Sample], list[str]]:
    """The samples of some files, and what is to be said about what was left out."""
    assert config.sequence_length is not None
    loaded = load_samples(
        files,
        tokenizer,
        sequence_length=config.sequence_length,
        truncate=config.truncate,
        skip_malformed=config.skip_malformed,
    )
    notes = []
    if loaded.skipped:
        notes.append(f"{len(loaded.skipped)} malformed rows are left out, the first one: {loaded.skipped[0]}")
    if loaded.truncated:
        notes.append(f"{loaded.truncated} samples are cut to {config.sequence_length} tokens")
    return loaded.samples, notes


def keep_tokenizer_files(source: Path, target: Path, changed: Tokenizer | None) -> None:
    """Tokenizer, template and generation config of a model directory into the run, which then needs that directory no more."""
    files = carried_files(source)
    if files:
        with atomic_directory(target) as temporary:
            for file in files:
                (temporary / file.name).write_bytes(file.read_bytes())
            if changed is not None:
                save_tokenizer(changed, temporary)


def _check_samples(samples: Sequence[Sample], sequence_length: int, vocab_size: int) -> None:
    for index, sample in enumerate(samples):
        if len(sample.ids) > sequence_length:
            raise InputError(
                f"sample {index} has {len(sample.ids)} tokens, more than sequence_length ({sequence_length}); raise it"
            )
        if not any(sample.loss_mask[1:]):
            raise InputError(f"sample {index} has no token to learn behind its first one; leave it out")
        if max(sample.ids) >= vocab_size:
            raise InputError(
                f"sample {index} has token id {max(sample.ids)}, above the model's vocab_size ({vocab_size}); its tokenizer is not the "
                "model's"
            )


def _run(
    open_model: Callable[[Path | None], Transformer],
    model_config: ModelConfig,
    samples: Sequence[Sample],
    validation: Sequence[Sample],
    config: SFTConfig,
    run: Path,
    base: str | None,
    keep_tokenizer: Callable[[], None],
    resume: bool,
    notes: list[str],
) -> Path:
    """Everything around the loop. `open_model` gives the model of a checkpoint, or the one to start from."""
    device = choose_device(config.device)
    assert config.sequence_length is not None
    if not samples:
        raise InputError("there are no samples to train on; give at least one")
    for part in (samples, validation):
        _check_samples(part, config.sequence_length, model_config.vocab_size)
    total_steps = config.total_steps(len(samples))
    config = config.with_warmup(total_steps)
    fields = config.to_dict() | {"base": base, "model": model_config.to_dict()}
    if resume:
        check_same_fields(run, read_config_file(run, start="finback sft MODEL_DIR --data FILE --out DIR"), fields)
    setting = SFTRun(
        config=config,
        model=model_config,
        directory=run,
        device=device,
        total_steps=total_steps,
        held_out=_measured_on(validation, config),
        drafted=_measured_on(validation or samples, config) if model_config.num_nextn_predict_layers else [],
        notes=notes,
    )
    with cpu_threads(config.threads):
        estimate = _check_memory(setting, samples)
        run.mkdir(parents=True, exist_ok=True)
        with locked(run), deferred_interrupts() as interrupted:
            remove_leftovers(run)
            checkpoint, passed_over = newest_sound_checkpoint(run) if resume else (None, [])
            machine = read_machine(run) if resume else None
            if machine is None:
                mean = max(1, sum(len(sample.ids) for sample in samples) // len(samples))
                machine = describe_machine(config.as_pretraining(model_config, mean), device, estimate)
                keep_tokenizer()
                write_run_config(run, fields, machine)
            model = open_model(checkpoint)
            trainable = _freeze(model, config.freeze_mtp)
            state = new_state(
                model,
                SampleStream(samples, seed=config.seed, fingerprint=samples_fingerprint(samples)),
                moments_dtype=config.moments_dtype,
                ema_decay=None,
            )
            if checkpoint is not None:
                restore_state(checkpoint, state)
                passed_over.append(f"continuing {run} after step {state.progress.step}")
            resume_step = state.progress.step if checkpoint is not None else None
            try:
                with MetricsWriter(run, total_steps=total_steps, resume_step=resume_step) as metrics:
                    for sentence in (*_introduction(setting, samples, machine), *machine_changes(machine, device), *passed_over):
                        metrics.say(sentence)
                    return train_samples(setting, state, metrics, interrupted, machine)
            finally:
                for parameter in trainable:
                    parameter.requires_grad_(True)


def _freeze(model: Transformer, freeze_mtp: bool) -> list[torch.nn.Parameter]:
    """Freeze the MTP modules if that is wanted; the parameters that were trainable before."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if freeze_mtp:
        for module in model.mtp_modules:
            module.requires_grad_(False)
    return before


def _measured_on(samples: Sequence[Sample], config: SFTConfig) -> list[SampleRows]:
    """Up to `eval_samples` of them, spread evenly."""
    count = min(config.eval_samples, len(samples))
    return cut_batch([samples[index * len(samples) // count] for index in range(count)], config) if count else []


def _check_memory(run: SFTRun, samples: Sequence[Sample]) -> MemoryEstimate:
    """As pre-training with rows as wide as they can get here; packed rows hold a mask between every two positions."""
    config = run.config
    assert config.sequence_length is not None
    lengths = sorted((len(sample.ids) for sample in samples), reverse=True)[: config.global_batch_size]
    width = min(config.sequence_length, sum(lengths))
    available = available_memory(run.device)
    if available is not None and config.batching == "pack":
        available = max(0, available - _MASK_BYTES * config.micro_batch_size * width**2)
    return check_memory(config.as_pretraining(run.model, width), str(run.device), available)


def _introduction(run: SFTRun, samples: Sequence[Sample], machine: dict[str, Any]) -> Iterator[str]:
    counts, config = count_params(run.model), run.config
    tokens = sum(len(sample.ids) for sample in samples)
    learnt = sum(sum(sample.loss_mask) for sample in samples)
    yield (
        f"{len(samples):,} samples of {tokens:,} tokens, {learnt:,} of them learnt; {counts.total:,} parameters, {config.precision} "
        f"on {run.device} with {torch.get_num_threads()} threads, about {machine['estimated_device_bytes'] / 2**30:.1f} GiB at the peak"
    )
    yield from run.notes

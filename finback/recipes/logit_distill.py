"""Logit distillation: where vocabularies agree, a student learns the teacher's probabilities on the teacher's verified traces."""

import json
import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from finback.config import InputError
from finback.data.conversations import load_samples, samples_fingerprint
from finback.data.files import write_atomic
from finback.data.packing import Sample
from finback.data.tokenizer import Tokenizer, load_tokenizer
from finback.model.checkpoint import load, save
from finback.recipes.logit_distill_config import LogitDistillConfig
from finback.recipes.sampling import model_hash
from finback.train.logit_losses import accumulate_logit_gradients
from finback.train.metrics import MetricsWriter
from finback.train.optimizer import adamw_update, clip_scale, gradient_norm, init_adam_state
from finback.train.ramps import cosine
from finback.train.samples import SampleStream, micro_batches
from finback.train.session import deferred_interrupts

_SHOWN = 5


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


def logit_distill(config: LogitDistillConfig) -> Path:
    """Train and write `config.out`/student; returns that directory.

    Ctrl-C ends the step, writes the student as far as it is and raises KeyboardInterrupt. A step whose gradient is not finite stops
    the run. Raises InputError if a field or row is wrong, `out` exists, or the vocabularies differ.
    """
    if config.out.exists():
        raise InputError(f"{config.out} exists; give out another name, or remove it")
    tokenizer = load_tokenizer(config.student)
    check_same_vocabulary(load_tokenizer(config.teacher), tokenizer)
    teacher, student = load(config.teacher), load(config.student)
    heads = teacher.lm_head.weight.shape[0], student.lm_head.weight.shape[0]
    if heads[0] != heads[1]:
        raise InputError(
            f"teacher and student have {heads[0]} and {heads[1]} logits: ids from {min(heads)} are in one of them only"
        )
    teacher.requires_grad_(False)
    longest = min(config.sequence_length, teacher.config.max_position_embeddings, student.config.max_position_embeddings)
    samples = load_samples(config.data, tokenizer, sequence_length=longest).samples
    stream: SampleStream[Sample] = SampleStream(samples, seed=config.seed, fingerprint=samples_fingerprint(samples))
    total_steps = config.epochs * math.ceil(len(samples) / config.global_batch_size)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    adam = None
    config.out.mkdir(parents=True)
    with MetricsWriter(config.out, total_steps=total_steps) as metrics, deferred_interrupts() as interrupted:
        for step in range(1, total_steps + 1):
            lr = cosine(step=step, total_steps=total_steps, warmup_steps=total_steps // 30, lr=config.lr, min_lr=config.lr / 10)

            # forward and backward
            batch = micro_batches(
                stream.next_batch(config.global_batch_size), sequence_length=longest, micro_batch_size=4, batching="pad"
            )
            loss = accumulate_logit_gradients(
                student,
                teacher,
                batch,
                temperature=config.distill_temperature,
                top_k=config.top_k,
                balance_loss_coef=config.balance_loss_coef,
            )

            # clip and update what took part; MTP modules do not
            if adam is None:
                parameters = {name: p for name, p in parameters.items() if p.grad is not None}
                adam = init_adam_state(parameters)
            gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in parameters.items()}
            norm = gradient_norm(gradients)
            if not math.isfinite(norm):
                raise InputError(f"at step {step} the gradient norm is {norm}; lower lr (now {config.lr})")
            adamw_update(
                parameters,
                gradients,
                adam,
                lr=lr,
                beta1=0.9,
                beta2=0.95,
                epsilon=1e-8,
                weight_decay=0.1,
                gradient_scale=clip_scale(norm, 1.0),
            )
            student.zero_grad()
            metrics.log({"step": step, "loss": loss, "grad_norm": norm, "lr": lr})
            if interrupted.is_set():
                break
    save(student, config.out / "student", tokenizer_from=config.student)
    _write_lineage(config)
    if interrupted.is_set():
        print(f"stopped after step {step} of {total_steps}; the student as far as it is: {config.out / 'student'}")
        raise KeyboardInterrupt
    print(f"the student: {config.out / 'student'}")
    return config.out / "student"


def _write_lineage(config: LogitDistillConfig) -> None:
    record = {"settings": asdict(config), "teacher": model_hash(config.teacher), "student": model_hash(config.student)}
    write_atomic(config.out / "lineage.json", json.dumps(record, indent=2, default=str) + "\n")

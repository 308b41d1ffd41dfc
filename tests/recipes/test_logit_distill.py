"""Logit distillation: the loss against numbers worked out by hand, its gradient under any cut, and the verb."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback import cli
from finback.data.chat import published_template
from finback.data.conversations import load_samples
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from finback.model.checkpoint import load, save
from finback.train.logit_losses import accumulate_logit_gradients, teacher_kl
from finback.train.samples import micro_batches
from tests.checkpoint_samples import BASE, build
from tests.train.runs import read_rows


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(teacher_kl(teacher, student)) == pytest.approx(0.25 * math.log(2), rel=1e-5)  # .5 ln 2 + 0 - .25 ln 2
    # One token told apart: classes .5/.5 and .25/.75.
    by_one = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(teacher_kl(teacher, student, top_k=1)) == pytest.approx(by_one, rel=1e-5)
    assert float(teacher_kl(teacher, student, top_k=3)) == pytest.approx(0.25 * math.log(2), rel=1e-5)
    # At T = 2 probabilities go by their square roots: (a, b, b) and (b, b, a), so KL = (a - b) ln(a / b), times 4.
    a, b = (math.sqrt(x) / (math.sqrt(0.5) + 2 * math.sqrt(0.25)) for x in (0.5, 0.25))
    assert float(teacher_kl(teacher, student, temperature=2)) == pytest.approx(4 * (a - b) * math.log(a / b), rel=1e-5)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    student = logits.clone().requires_grad_()
    loss = teacher_kl(logits, student, temperature=1.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/ and student/ with one tokenizer, other/ with another, and traces.jsonl."""
    root = tmp_path_factory.mktemp("models")
    for name, seed, text in (("teacher", 1, "The fox saw."), ("student", 2, "The fox saw."), ("other", 3, "Grapes are sour!")):
        trained = train_tokenizer([text + " 狐狸看见葡萄。"] * 50, 280)
        tokenizer = Tokenizer(trained.backend, trained.config, published_template("deepseek_v3"))
        save_tokenizer(tokenizer, root / f"{name}-tokenizer")
        torch.manual_seed(seed)
        model = build(replace(BASE, vocab_size=tokenizer.vocab_size, initializer_range=0.1 * seed))
        save(model, root / name, tokenizer_from=root / f"{name}-tokenizer")
    rows = [{"prompt": f"The fox {i}", "completion": " saw" * (i + 1)} for i in range(6)]
    (root / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def test_the_gradient_is_that_of_the_plain_loss_under_any_cut(models: Path) -> None:
    teacher = load(models / "teacher")
    samples = load_samples([models / "traces.jsonl"], load_tokenizer(models / "student"), sequence_length=64).samples
    found = []
    for size in (1, 64):
        student = load(models / "student")
        batch = micro_batches(samples, sequence_length=32, micro_batch_size=size, batching="pad")
        loss = accumulate_logit_gradients(student, teacher, batch, temperature=1.0, top_k=None, balance_loss_coef=0.0)
        found.append((loss, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}))
    student, total, tokens = load(models / "student"), torch.zeros(()), 0
    for sample in samples:
        ids = torch.tensor(list(sample.ids))[None]
        learnt = torch.tensor(list(sample.loss_mask))[1:]
        with torch.no_grad():
            told = teacher(ids[:, :-1])[0][learnt]
        total = total + teacher_kl(told, student(ids[:, :-1])[0][learnt])
        tokens += int(learnt.sum())
    (total / tokens).backward()
    plain = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for loss, gradients in found:
        assert loss == pytest.approx(float(total.detach()) / tokens, rel=1e-4)
        for name, gradient in plain.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_verb_brings_the_student_closer(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--data", str(models / "traces.jsonl"), "--out", str(out), "--epochs", "30", "--lr", "0.003", "--top-k", "50"]
    assert cli.main(["logit-distill", str(models / "teacher"), str(models / "student"), *words]) == 0
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] / 2
    load(out / "student")
    assert len(json.loads((out / "lineage.json").read_text())["sha256"]["teacher"]) == 64
    assert cli.main(["logit-distill", str(models / "teacher"), str(models / "student"), *words]) == 2  # a run is there


def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "student", tmp_path / "student")
    words = ["--data", str(models / "traces.jsonl"), "--epochs", "3", "--lr", "0.003", "--global-batch-size", "4"]
    words += ["--save-every", "2", "--keep-checkpoints", "0", "--balance-loss-coef", "0.01"]
    for name in ("whole", "cut"):
        start = ["logit-distill", str(models / "teacher"), str(tmp_path / "student"), "--out", str(tmp_path / name)]
        assert cli.main([*start, *words]) == 0
    for step in (6, 4):  # the run as it was when it was killed after step 3, in the middle of an epoch
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / f"step-{step}")
    shutil.rmtree(tmp_path / "cut" / "student")
    capsys.readouterr()
    assert cli.main(["logit-distill", "--resume", str(tmp_path / "cut")]) == 0
    assert "continuing" in capsys.readouterr().out
    assert read_rows(tmp_path / "whole") == read_rows(tmp_path / "cut")
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert weights[0] != (tmp_path / "student" / "model.safetensors").read_bytes()

    (tmp_path / "student" / "generation_config.json").write_text('{"do_sample": true}')  # another model than it began with
    assert cli.main(["logit-distill", "--resume", str(tmp_path / "cut")]) == 2
    assert "field sha256 is" in capsys.readouterr().err


def test_ctrl_c_ends_the_step_and_saves(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["logit-distill", str(models / "teacher"), str(models / "student"), "--data", str(models / "traces.jsonl")]

    def pressed(*arguments: Any, **more: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return accumulate_logit_gradients(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("finback.recipes.logit_distill.accumulate_logit_gradients", pressed)
        assert cli.main([*words, "--out", str(out)]) == 130
    assert f"stopped after step 1; continue with: finback logit-distill --resume {out}" in capsys.readouterr().out
    assert not (out / "student").exists()
    assert cli.main(["logit-distill", "--resume", str(out)]) == 0
    assert [row["step"] for row in read_rows(out)] == [1, 2]
    assert (out / "student" / "tokenizer.json").is_file()


def test_another_vocabulary_is_refused(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(models / "traces.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(["logit-distill", str(models / "teacher"), str(models / "other"), *words]) == 2
    error = capsys.readouterr().err
    assert "different vocabularies" in error
    assert "ids 2" in error
    assert not (tmp_path / "out").exists()

"""The fine-tuning loop: what a run writes and learns, that it resumes bitwise in the middle of an epoch, and how it ends badly."""

import json
import math
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.config import InputError
from finback.data.conversations import completion_sample, load_samples
from finback.data.packing import Sample
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from finback.model.checkpoint import load, save
from finback.model.transformer import Transformer, init_weights
from finback.train.checkpoint import list_checkpoints
from finback.train.sft import finetune, read_sft_run, resolve_fields, sft
from finback.train.sft_config import SFTConfig
from tests.train.runs import finback, micro_dense, micro_model, read_rows
from tests.train.test_resume import PATIENCE_SECONDS, begun, count_rows, wait_for

ANIMALS = ("whale", "fish", "seal", "crab", "gull")


def conversations(count: int = 20) -> list[dict[str, Any]]:
    """Questions with one right answer each, some with a thought, some as prompt and completion."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        animal = ANIMALS[number % len(ANIMALS)]
        question = {"role": "user", "content": f"Where is the {animal}?"}
        answer: dict[str, Any] = {"role": "assistant", "content": f"the {animal} swims north"}
        if number % 3 == 0:
            answer["reasoning_content"] = f"the {animal}"
        if number % 7 == 6:
            rows.append({"prompt": f"{animal} {number}:", "completion": " cold water"})
        else:
            rows.append({"messages": [question, answer]})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, micro_data: Path) -> Path:
    """`base` (a small model with its tokenizer), `rows.jsonl` and `held_out.jsonl`."""
    folder = tmp_path_factory.mktemp("sft")
    model = Transformer(micro_model(), dtype=torch.float32)
    init_weights(model, seed=3)
    save(model, folder / "base", tokenizer_from=micro_data / "tokenizer")
    write_rows(folder / "rows.jsonl", conversations())
    write_rows(folder / "held_out.jsonl", conversations(6))
    return folder


def make_config(folder: Path, **changes: Any) -> SFTConfig:
    config = SFTConfig(
        data=(str(folder / "rows.jsonl"),),
        validation=(str(folder / "held_out.jsonl"),),
        epochs=3,
        sequence_length=96,
        global_batch_size=6,
        micro_batch_size=2,
        lr=5e-3,
        bias_update_speed=0.01,
        balance_loss_coef=0.01,
        precision="fp32",
        device="cpu",
        threads=1,
        eval_every=5,
        save_every=3,
        keep_checkpoints=0,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The run that nothing interrupts: 3 epochs of 4 steps."""
    run = tmp_path_factory.mktemp("reference") / "run"
    sft(folder / "base", make_config(folder), run)
    return run


def assert_same_run(run: Path, reference: Path) -> None:
    assert read_rows(run) == read_rows(reference)
    ours, theirs = list_checkpoints(run)[0], list_checkpoints(reference)[0]
    assert ours.name == theirs.name
    for name in ("model.safetensors", "trainer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_a_run_directory_holds_what_it_should(folder: Path, reference: Path) -> None:
    rows = read_rows(reference, drop=())
    assert [row["step"] for row in rows] == list(range(13))
    assert rows[0].keys() == {"step", "tokens", "seconds", "validation_loss", "mtp_acceptance", "mtp_acceptance_2"}
    keys = {
        "loss",
        "mtp_loss",
        "balance_loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "mfu",
        "max_violation",
        "padding",
        "epoch",
    }
    assert all(row.keys() >= keys for row in rows[1:])
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 5, 10, 12]
    assert [row["batch_size"] for row in rows[1:]] == [6, 6, 6, 2] * 3
    tokenizer = load_tokenizer(folder / "base")
    samples = load_samples([folder / "rows.jsonl"], tokenizer, sequence_length=96).samples
    assert rows[-1]["tokens"] == 3 * sum(len(sample.ids) for sample in samples)
    assert rows[-1]["epoch"] == 3.0
    checkpoint = reference / "checkpoints" / "step-12"
    assert load(checkpoint).config.num_nextn_predict_layers == 2
    assert load_tokenizer(checkpoint).chat_template == tokenizer.chat_template
    report = (reference / "report.md").read_text()
    assert f"finback sft --resume {reference}" in report
    assert "Multi-token prediction" in report
    assert "trained along" in report
    assert any((reference / "plots").iterdir())
    assert any((reference / "tensorboard").iterdir())
    base, config = read_sft_run(reference)
    assert base == str((folder / "base").resolve())
    assert config == replace(make_config(folder), min_lr=5e-4, warmup_steps=1)


def test_the_rate_follows_its_cosine_to_a_tenth(reference: Path) -> None:
    rates = [row["lr"] for row in read_rows(reference)[1:]]
    expected = [5e-4 + 4.5e-3 * (1 + math.cos(math.pi * (step - 1) / 11)) / 2 for step in range(1, 13)]
    assert rates == pytest.approx(expected)


def test_it_learns_the_answers_and_drafts_keep_up(tmp_path: Path, folder: Path) -> None:
    config = make_config(folder, epochs=40, lr=1e-2, global_batch_size=20, micro_batch_size=20, eval_every=None, save_every=None)
    sft(folder / "base", config, tmp_path / "along")
    rows = read_rows(tmp_path / "along")
    first, last = rows[0], rows[-1]
    assert last["validation_loss"] < 0.2 * first["validation_loss"]
    assert last["mtp_acceptance"] > 0.8
    sft(folder / "base", replace(config, freeze_mtp=True), tmp_path / "frozen")
    frozen = read_rows(tmp_path / "frozen")[-1]
    assert frozen["mtp_loss"] == 0.0
    assert frozen["mtp_acceptance"] < last["mtp_acceptance"] - 0.2
    before, after = load(folder / "base"), load(tmp_path / "frozen" / "checkpoints" / "step-40")
    for name, tensor in after.state_dict().items():
        moved = not torch.equal(tensor, before.state_dict()[name])
        assert moved != name.startswith(("model.layers.3.", "model.layers.4.")), name


def test_the_router_bias_moves_or_is_frozen(tmp_path: Path, folder: Path, reference: Path) -> None:
    sft(folder / "base", make_config(folder, bias_update_speed=0.0, epochs=1), tmp_path / "run")
    for checkpoint, moves in (
        (reference / "checkpoints" / "step-12", True),
        (tmp_path / "run" / "checkpoints" / "step-4", False),
    ):
        biases = [router.e_score_correction_bias for router in load(checkpoint).routers()]
        assert all(bool(bias.any()) == moves for bias in biases)  # type: ignore[union-attr]


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_packing_padding_and_micro_batches_change_speed_not_training(
    tmp_path: Path, folder: Path, reference: Path, batching: str
) -> None:
    config = make_config(folder, batching=batching, micro_batch_size=7 if batching == "pack" else 1, epochs=1, save_every=None)
    sft(folder / "base", replace(config, lr=5e-3, warmup_steps=1), tmp_path / "run")
    ours, theirs = read_rows(tmp_path / "run")[1:4], read_rows(reference)[1:4]
    for key in ("loss", "mtp_loss", "balance_loss"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in theirs], rel=3e-2), key
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], rel=1e-5)
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]


def test_resumed_in_the_middle_of_an_epoch_it_is_bitwise_the_same(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (6, 12):
        run = begun(tmp_path / str(step), reference, step=step)
        base, config = read_sft_run(run)
        sft(base or "", config, run, resume=True)
        assert_same_run(run, reference)
        assert f"continuing {run} after step {step}" in capsys.readouterr().out


def test_resumed_before_its_first_checkpoint_it_starts_over(tmp_path: Path, reference: Path) -> None:
    run = begun(tmp_path / "run", reference, step=0)
    base, config = read_sft_run(run)
    sft(base or "", config, run, resume=True)
    assert_same_run(run, reference)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, folder: Path, reference: Path) -> None:
    run = begun(tmp_path / "run", reference, step=0)
    process: subprocess.Popen[str]
    with finback("sft", "--resume", run) as process:
        (run / "metrics.jsonl").write_text("")
        wait_for(lambda: 3 <= count_rows(run) < 9, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, err
    assert err.strip() == "finback sft: interrupted"
    step = int(list_checkpoints(run)[0].name.removeprefix("step-"))
    assert f"stopped after step {step}; continue with: finback sft --resume {run}" in out
    base, config = read_sft_run(run)
    sft(base or "", config, run, resume=True)
    assert_same_run(run, reference)


def test_a_template_that_is_given_goes_with_the_model(tmp_path: Path, folder: Path, micro_data: Path) -> None:
    tokenizer = load_tokenizer(micro_data / "tokenizer")
    save_tokenizer(Tokenizer(tokenizer.backend, tokenizer.config), tmp_path / "bare")
    model = load(folder / "base")
    save(model, tmp_path / "base", tokenizer_from=tmp_path / "bare")
    config = make_config(folder, epochs=1)
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: this tokenizer has no chat template"):
        sft(tmp_path / "base", config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    checkpoint = sft(tmp_path / "base", replace(config, chat_template="deepseek_r1"), tmp_path / "run")
    assert load_tokenizer(checkpoint).chat_template == tokenizer.chat_template
    assert (checkpoint / "generation_config.json").read_bytes() == (tmp_path / "base" / "generation_config.json").read_bytes()


# In memory


def make_samples(folder: Path) -> list[Sample]:
    tokenizer = load_tokenizer(folder / "base")
    return [completion_sample(f"the {animal}", " swims north", tokenizer) for animal in ANIMALS]


def test_a_model_in_memory_is_trained_in_its_place_and_resumes_bitwise(tmp_path: Path, folder: Path) -> None:
    config = make_config(folder, data=(), validation=(), global_batch_size=2, eval_every=None, freeze_mtp=True)
    model, samples = load(folder / "base"), make_samples(folder)
    before = model.model.norm.weight.clone()
    checkpoint = finetune(model, samples, config, tmp_path / "run")
    assert not torch.equal(model.model.norm.weight, before)
    assert torch.equal(load(checkpoint).model.norm.weight, model.model.norm.weight)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert load_tokenizer(checkpoint).eos_token_id == load_tokenizer(folder / "base").eos_token_id
    run = begun(tmp_path / "again", tmp_path / "run", step=3)
    other = load(folder / "base")
    finetune(other, samples, config, run, resume=True)
    assert_same_run(run, tmp_path / "run")
    for ours, theirs in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match="resume it with the data it started with"):
        finetune(other, samples[::-1], config, begun(tmp_path / "third", tmp_path / "run", step=3), resume=True)
    assert read_sft_run(run)[0] is None


def test_a_dense_student_without_experts_and_mtp(tmp_path: Path, folder: Path) -> None:
    model = Transformer(micro_dense(), dtype=torch.float32)
    init_weights(model, seed=0)
    config = SFTConfig(epochs=8, lr=1e-2, global_batch_size=5, device="cpu", threads=1, precision="bf16", batching="pad")
    checkpoint = finetune(model, make_samples(folder), config, tmp_path / "run", tokenizer_from=folder / "base")
    rows = read_rows(tmp_path / "run")
    assert rows[0]["step"] == 1  # nothing to measure before
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert "mtp_loss" not in rows[0]
    assert load_tokenizer(checkpoint).eos_token_id == load_tokenizer(folder / "base").eos_token_id
    assert resolve_fields(config, model.config).bias_update_speed == 0.0


# Mistakes


def test_wrong_starts_are_told_and_leave_nothing(tmp_path: Path, folder: Path) -> None:
    config, run = make_config(folder), tmp_path / "run"
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "the", "completion": "whale " * 300}])
    for changes, words in (
        ({"data": ()}, "field data is empty"),
        ({"data": ("no.jsonl",)}, r"no\.jsonl does not exist"),
        ({"sequence_length": 129}, r"field sequence_length is 129, above the model's max_position_embeddings \(128\)"),
        ({"sequence_length": 8}, r"rows\.jsonl, line 1: it has \d+ tokens, more than sequence_length \(8\)"),
        ({"data": (str(long),)}, r"long\.jsonl, line 1: it has"),
        ({"device": "tpu"}, "field device is 'tpu'"),
        ({"chat_template": "none"}, "neither a text file nor a published one"),
    ):
        with pytest.raises(InputError, match=words):
            sft(folder / "base", replace(config, **changes), run)
        assert not run.exists()
    with pytest.raises(InputError, match="is not a directory; give one that holds"):
        sft(tmp_path / "nothing", config, run)
    with pytest.raises(InputError, match=r"holds no run \(no config\.json\)"):
        sft(folder / "base", config, run, resume=True)
    dense = Transformer(micro_dense(), dtype=torch.float32)
    init_weights(dense, seed=0)
    with pytest.raises(InputError, match=r"field bias_update_speed is 0\.01, but this model has no router bias"):
        finetune(dense, make_samples(folder), config, run)
    plain = replace(config, bias_update_speed=None)
    for samples, words in (
        ([], "there are no samples"),
        ([Sample([1, 2], [True, False])], "sample 0 has no token to learn behind its first one"),
        ([Sample([1, 300], [False, True])], r"sample 0 has token id 300, above the model's vocab_size \(300\)"),
        ([Sample([1] * 97, [True] * 97)], r"sample 0 has 97 tokens, more than sequence_length \(96\)"),
    ):
        with pytest.raises(InputError, match=words):
            finetune(dense, samples, plain, run)
    with pytest.raises(InputError, match="not in float32"):
        finetune(dense.to(torch.bfloat16), make_samples(folder), plain, run)
    assert not run.exists()


def test_malformed_rows_are_left_out_on_request_and_counted(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mixed.jsonl"
    data.write_text((folder / "rows.jsonl").read_text() + '{"prompt": "a"\n' + '{"messages": []}\n')
    config = make_config(folder, data=(str(data),), epochs=1)
    with pytest.raises(InputError, match=r"mixed\.jsonl, line 21: it is not valid JSON"):
        sft(folder / "base", config, tmp_path / "run")
    sft(folder / "base", replace(config, skip_malformed=True), tmp_path / "run")
    assert f"2 malformed rows are left out, the first one: {data}, line 21" in capsys.readouterr().out
    assert "2 malformed rows are left out" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_is_not_overwritten_nor_resumed_with_other_fields(tmp_path: Path, folder: Path, reference: Path) -> None:
    run = begun(tmp_path / "run", reference, step=6)
    with pytest.raises(InputError, match="already holds a run; continue it with finback sft --resume"):
        sft(folder / "base", make_config(folder), run)
    with pytest.raises(InputError, match=r"field lr is 0\.01, but the run in .* has 0\.005"):
        sft(folder / "base", make_config(folder, lr=0.01, min_lr=5e-4), run, resume=True)


def test_divergence_stops_the_run(tmp_path: Path, folder: Path) -> None:
    config = make_config(folder, epochs=10, lr=1e30, min_lr=1e30, warmup_steps=0)
    with pytest.raises(InputError, match=r"diverged: at step \d+ the gradient norm is not finite, 3 times in a row; lower lr"):
        sft(folder / "base", config, tmp_path / "run")


def test_too_little_memory_is_told_with_the_field_to_lower(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finback.train.sft.available_memory", lambda device: 1_000_000)
    with pytest.raises(InputError, match="this run needs about"):
        sft(folder / "base", make_config(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "field epochs is 0, it must be a whole number of at least 1"),
        ({"lr": float("nan")}, "field lr is nan, it must be a finite number"),
        ({"min_lr": 1.0}, r"field min_lr is 1\.0, above lr"),
        ({"mtp_loss_coef": 0.0}, "field mtp_loss_coef is 0, .* set freeze_mtp as well"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        SFTConfig.from_dict(SFTConfig().to_dict() | changes)


def test_config_round_trip(folder: Path) -> None:
    config = make_config(folder, freeze_mtp=True, mtp_loss_coef=0.0)
    assert SFTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(InputError, match=r"field epoch is not known.*epochs"):
        SFTConfig.from_dict({"epoch": 1})

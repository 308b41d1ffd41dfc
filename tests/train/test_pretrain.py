"""The loop as a whole, in this process: what it writes, that it learns, that equal runs are equal, and how it ends badly."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finback.config import InputError
from finback.model.checkpoint import load
from finback.train.pretrain import pretrain
from finback.train.session import locked, read_run_config
from tests.train.runs import micro_config, read_rows

KEYS = {"step", "tokens", "seconds", "loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens_per_second", "mfu"}
KEYS |= {"max_violation", "batch_size", "epoch"}


def test_a_run_directory_holds_what_it_should(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, sample_prompts=("the whale",), sample_tokens=4, keep_checkpoints=2)
    checkpoint = pretrain(config, tmp_path / "run")
    run = tmp_path / "run"
    rows = read_rows(run, drop=())
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["step"] for row in rows if "validation_loss" in row] == [1, 5, 10, 12]
    assert all("validation_bits_per_byte" in row for row in rows if "validation_loss" in row)
    assert [row["tokens"] for row in rows] == [6 * 32 * step for step in range(1, 13)]
    assert all(row["mfu"] > 0 for row in rows)
    loads = [json.loads(line) for line in (run / "expert_load.jsonl").read_text().splitlines()]
    assert [load["step"] for load in loads] == list(range(1, 13))
    assert [len(load["counts"]) for load in loads] == [4] * 12  # two MoE layers, two MTP depths
    assert checkpoint == run / "checkpoints" / "step-12"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-12", "step-8"]
    assert "the whale" in (run / "report.md").read_text()
    assert any((run / "plots").iterdir())
    assert any((run / "tensorboard").iterdir())
    assert read_run_config(run) == config
    assert load(checkpoint).config.num_nextn_predict_layers == 2


def test_numbers_are_written_in_full(tmp_path: Path, micro_data: Path) -> None:
    pretrain(micro_config(micro_data, steps=2), tmp_path / "run")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert json.dumps(json.loads(line)) == line  # repr of each float, nothing rounded


def test_it_learns_and_balances(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=60, lr=1e-2, global_batch_size=8, save_every=None, eval_every=20, ema_decay=None)
    pretrain(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[-1]["mtp_loss"] < 0.7 * rows[0]["mtp_loss"]
    held_out = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert held_out[-1] < 0.6 * held_out[0]
    model = load(tmp_path / "run" / "checkpoints" / "step-60")
    assert all(float(router.e_score_correction_bias.abs().max()) > 0.05 for router in model.routers())


def test_two_runs_are_bitwise_equal_and_another_seed_is_not(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=4)
    for name, each in (("a", config), ("b", config), ("c", replace(config, seed=1))):
        pretrain(each, tmp_path / name)
    assert read_rows(tmp_path / "a") == read_rows(tmp_path / "b")
    assert read_rows(tmp_path / "a")[0]["loss"] != read_rows(tmp_path / "c")[0]["loss"]


def test_evaluation_sampling_saving_and_the_average_do_not_touch_training(tmp_path: Path, micro_data: Path) -> None:
    busy = micro_config(micro_data, steps=5, eval_every=1, save_every=1, sample_every=1, sample_prompts=("the",), sample_tokens=3)
    quiet = replace(busy, eval_every=None, save_every=None, sample_every=None, sample_prompts=(), ema_decay=None)
    pretrain(busy, tmp_path / "busy")
    pretrain(quiet, tmp_path / "quiet")
    losses = [[row["loss"] for row in read_rows(tmp_path / name)] for name in ("busy", "quiet")]
    assert losses[0] == losses[1]


def test_micro_batches_change_the_memory_not_the_training(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=6, initial_batch_size=3, batch_ramp_tokens=3 * 32 * 4)
    for size in (4, 6):
        pretrain(replace(config, micro_batch_size=size, recompute="selective" if size == 4 else "none"), tmp_path / str(size))
    whole = read_rows(tmp_path / "6")
    assert [row["batch_size"] for row in whole] == [3, 3, 4, 5, 6, 6]
    cut = read_rows(tmp_path / "4")
    assert [row["loss"] for row in cut] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    models = [load(tmp_path / name / "checkpoints" / "step-6") for name in ("4", "6")]
    for ours, theirs in zip(*(model.routers() for model in models), strict=True):
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)


def test_a_time_budget_ends_the_run_and_repeats_bitwise_from_its_plans(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=None, minutes=0.05, save_every=1, keep_checkpoints=0, eval_every=None)
    run = tmp_path / "run"
    pretrain(config, run)
    whole = read_rows(run)
    plans = json.loads((run / "plan.json").read_text())["plans"]
    assert len(plans) >= 2
    assert whole[-1]["tokens"] >= plans[-1]["total_tokens"] > whole[-2]["tokens"]
    for checkpoint in (run / "checkpoints").iterdir():  # as if killed after its first step
        if checkpoint.name != "step-1":
            shutil.rmtree(checkpoint)
    pretrain(config, run, resume=True)
    assert read_rows(run) == whole


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=3)
    first = pretrain(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and "tfevents" not in path.name}
    assert pretrain(config, tmp_path / "run", resume=True) == first
    for path, content in before.items():
        assert path.read_bytes() == content


def test_divergence_stops_the_run_with_the_step_and_spares_the_weights(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(
        micro_data, steps=30, lr=1e30, min_lr=0.0, final_lr=0.0, warmup_steps=0, save_every=1, keep_checkpoints=0
    )
    with pytest.raises(InputError, match=r"diverged: at step \d+ the gradient norm is not finite, 3 times in a row; lower lr"):
        pretrain(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    bad = [row["step"] for row in rows if not math.isfinite(float(row["grad_norm"]))]
    assert bad == [rows[-1]["step"] - 2, rows[-1]["step"] - 1, rows[-1]["step"]]
    saved = [load(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in (bad[0] - 1, bad[1])]
    for before, after in zip(saved[0].state_dict().values(), saved[1].state_dict().values(), strict=True):
        assert torch.equal(before, after)  # two steps later nothing has moved


def test_wrong_starts_are_told_and_leave_nothing(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=2)
    run = tmp_path / "run"
    cases = [
        (replace(config, data=()), "field data is empty"),
        (replace(config, data=(str(tmp_path / "no"),)), r"no/index\.json does not exist"),
        (replace(config, tokenizer=str(tmp_path)), r"holds no tokenizer\.json"),
        (replace(config, device="tpu"), "field device is 'tpu'"),
        (
            replace(config, sample_prompts=("the",), sample_tokens=128),
            "field sample_prompts holds 'the', which with sample_tokens",
        ),
        (replace(config, device="cuda:7"), "field device is 'cuda:7', but torch finds"),
        (
            replace(config, model=replace(config.model, vocab_size=299)),
            r"has 300 token ids, above the model's vocab_size \(299\)",
        ),
    ]
    for wrong, words in cases:
        with pytest.raises(InputError, match=words):
            pretrain(wrong, run)
        assert not run.exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; give a directory"):
        pretrain(config, tmp_path / "file")
    with pytest.raises(InputError, match=r"holds no run \(no config\.json\)"):
        pretrain(config, run, resume=True)


def test_a_directory_takes_one_run_and_one_process(tmp_path: Path, micro_data: Path) -> None:
    config = micro_config(micro_data, steps=2)
    run = tmp_path / "run"
    pretrain(config, run)
    with pytest.raises(InputError, match=r"already holds a run; continue it with finback pretrain --resume"):
        pretrain(config, run)
    with pytest.raises(InputError, match=r"field lr is 0\.006, but the run in .* has 0\.005; resume it with its own fields"):
        pretrain(replace(config, lr=0.006), run, resume=True)
    with locked(run), pytest.raises(InputError, match="another process is training in"):
        pretrain(config, run, resume=True)


def test_other_threads_are_told_when_resuming(tmp_path: Path, micro_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = micro_config(micro_data, steps=2, threads=None)
    threads = torch.get_num_threads()
    pretrain(config, tmp_path / "run")
    assert "losses may differ" not in capsys.readouterr().out
    torch.set_num_threads(threads + 1)
    try:
        pretrain(config, tmp_path / "run", resume=True)
    finally:
        torch.set_num_threads(threads)
    assert f"threads is {threads + 1} and was {threads} when the run started: losses may differ" in capsys.readouterr().out

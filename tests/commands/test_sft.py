"""`finback sft`: from files to a run, and one sentence for every mistake on the line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finback.cli import main
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import load, save
from finback.model.transformer import Transformer, init_weights
from finback.train.sft import read_sft_run
from tests.train.runs import micro_model, write_micro_data

WORDS = ["--global-batch-size=2", "--epochs=1", "--precision=fp32", "--device=cpu", "--threads=1", "--warmup-steps=1"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`finback sft ...` in this process: exit code, stdout, stderr."""

    def start(*words: str | Path) -> tuple[int, str, str]:
        code = main(["sft", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, a model with its tokenizer, and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("sft-verb")
    model = Transformer(micro_model(num_nextn_predict_layers=1), dtype=torch.float32)
    init_weights(model, seed=0)
    save(model, folder / "base", tokenizer_from=write_micro_data(folder) / "tokenizer")
    messages = [{"role": "user", "content": "north?"}, {"role": "assistant", "content": "south"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(4)))
    return folder


def test_from_rows_to_a_model_and_again(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, _ = run(folder / "base", "--data", folder / "rows.jsonl", "--out", out, *WORDS)
    assert code == 0
    assert f"done: {out}/checkpoints/step-2" in text
    assert f"report: {out}/report.md" in text
    assert "4 samples of" in text
    assert load(out / "checkpoints" / "step-2").config.num_nextn_predict_layers == 1
    assert load_tokenizer(out / "checkpoints" / "step-2").chat_template is not None
    base, config = read_sft_run(out)
    assert base == str((folder / "base").resolve())
    assert config.data == (str(folder / "rows.jsonl"),)
    code, text, _ = run("--resume", out)
    assert code == 0
    assert f"done: {out}/checkpoints/step-2" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("{base} --data {rows}", "--out is missing"),
        ("{base} --out {out}", "--data is missing"),
        ("--data {rows} --out {out}", "MODEL"),
        ("{base} --data {rows} --out {out} --epoch 2", "unknown field --epoch; the nearest is --epochs"),
        ("{base} --data {rows} --out {out} --lr -1", "field lr is -1.0, it must be above 0"),
        ("{base} --data {rows} --out {out} --batching row", "invalid choice 'row' for argument '--batching'"),
        ("{base} --data {rows} --out {out} --sequence-length 4", "rows.jsonl, line 1: it has"),
        ("{base} --data {rows} --out {out} --chat-template none", "neither a text file nor a published one"),
        ("{base}x --data {rows} --out {out}", "basex is not a directory"),
        ("{base} --data {base} --out {out}", "give .jsonl or .parquet files"),
        ("--resume", "--resume DIR stands alone"),
        ("--resume {out} --lr 1", "--resume DIR stands alone"),
        ("--resume {out}", "holds no run (no config.json)"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(run: Run, folder: Path, tmp_path: Path, words: str, told: str) -> None:
    out = tmp_path / "out"
    code, _, err = run(*words.format(out=out, base=folder / "base", rows=folder / "rows.jsonl").split())
    assert code == 2
    assert told in err
    assert err.startswith("finback sft: ")
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


def test_a_run_of_another_kind_is_not_resumed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"steps": 3}')
    code, _, err = run("--resume", tmp_path)
    assert code == 2
    assert "holds a run of another kind" in err
    (tmp_path / "config.json").write_text('{"epochs": 3, "base": null}')
    code, _, err = run("--resume", tmp_path)
    assert code == 2
    assert "was started from Python with samples in memory" in err

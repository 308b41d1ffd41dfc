"""`finback pretrain`: from text or shards to a run, and one sentence for every mistake on the line."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finback.cli import main
from finback.commands.pretrain import prepare_data
from finback.config import InputError
from finback.data.shards import TokenShards
from finback.data.tokenizer import load_tokenizer
from finback.model.checkpoint import load
from finback.presets import tiny
from finback.train.session import read_run_config
from tests.train.runs import write_micro_data

SMALL = {
    "model.vocab-size": 320,
    "model.hidden-size": 32,
    "model.intermediate-size": 48,
    "model.moe-intermediate-size": 16,
    "model.num-hidden-layers": 2,
    "model.kv-lora-rank": 16,
    "model.q-lora-rank": 16,
    "sequence-length": 32,
    "global-batch-size": 2,
    "micro-batch-size": 2,
    "eval-sequences": 2,
    "threads": 1,
    "device": "cpu",
    "precision": "fp32",
}
SMALL_WORDS = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`finback pretrain ...` in this process: exit code, stdout, stderr."""

    def start(*words: str | Path) -> tuple[int, str, str]:
        code = main(["pretrain", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return start


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a .txt and a .jsonl file of made sentences."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(" ".join(f"whale {i} swims {i * i % 7} miles north." for i in range(400)))
    lines = [json.dumps({"text": f"The {i}. fish follows the whale at night, and the {i % 9}. does not."}) for i in range(300)]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_text_becomes_shards_a_tokenizer_and_a_run_that_can_be_resumed(run: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, said, err = run("tiny", "--out", out, "--data", text, "--steps", "2", "--seed", "5", *SMALL_WORDS)
    assert (code, err) == (0, "")
    assert "tokens to train on" in said
    assert f"done: {out / 'checkpoints' / 'step-2'}" in said
    config = read_run_config(out)
    assert config.data == (str(out / "data" / "tokens"),)
    assert (config.steps, config.seed, config.model.vocab_size) == (2, 5, 320)
    tokenizer = load_tokenizer(out / "data" / "tokenizer")
    assert tokenizer.vocab_size == 320
    TokenShards(out / "data" / "tokens").check_tokenizer(tokenizer)
    model = load(out / "checkpoints" / "step-2")
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert load_tokenizer(out / "checkpoints" / "step-2").fingerprint() == tokenizer.fingerprint()
    assert run("--resume", out)[0] == 0
    code, _, err = run("tiny", "--out", out, "--data", text)
    assert code == 2
    assert re.search(r"already holds a run; continue it with finback pretrain --resume .*, or give another --out", err)


def test_shards_and_their_tokenizer_are_taken_as_they_are(run: Run, tmp_path: Path) -> None:
    data = write_micro_data(tmp_path / "data")
    words = ["--data", data / "tokens", "--tokenizer", data / "tokenizer", "--tokens", "100", *SMALL_WORDS]
    code, said, _ = run("tiny", "--out", tmp_path / "run", *words)
    assert code == 0
    assert "tokenising" not in said
    config = read_run_config(tmp_path / "run")
    assert (config.steps, config.tokens, config.minutes) == (None, 100, None)
    assert (tmp_path / "run" / "checkpoints" / "step-2").is_dir()  # 64 tokens a step


def test_weights_that_are_there_bring_their_tokenizer(run: Run, text: Path, tmp_path: Path) -> None:
    words = ["--data", text, "--steps", "1", *SMALL_WORDS]
    assert run("tiny", "--out", tmp_path / "first", *words)[0] == 0
    weights = tmp_path / "first" / "checkpoints" / "step-1"
    code, said, err = run("tiny", "--out", tmp_path / "second", "--init-from", weights, *words)
    assert (code, err) == (0, "")
    assert f"weights from {weights}" in said
    assert "training a tokenizer" not in said
    tokenizers = [load_tokenizer(tmp_path / name / "data" / "tokenizer").fingerprint() for name in ("first", "second")]
    assert tokenizers[0] == tokenizers[1]
    other = [*words[: words.index("--model.q-lora-rank") + 1], "8", *words[words.index("--model.q-lora-rank") + 2 :]]
    code, _, err = run("tiny", "--out", tmp_path / "third", "--init-from", weights, *other)
    assert code == 2
    assert f"init_from {weights} has q_lora_rank 16, and the model has 8" in err
    (weights / "tokenizer.json").unlink()
    code, _, err = run("tiny", "--out", tmp_path / "third", "--init-from", weights, *words)
    assert code == 2
    assert "--tokenizer is missing" in err
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "a preset comes first (nano, nano-dense, micro, tiny, tiny-dense, small, v2-lite-16b, v3-671b), not ''"),
        ("tinny --out x", "not 'tinny'; did you mean tiny?"),
        ("v3-617b --out x", "did you mean v3-671b?"),
        (
            "--out x tiny",
            "a preset comes first (nano, nano-dense, micro, tiny, tiny-dense, small, v2-lite-16b, v3-671b), not '--out'",
        ),
        ("--helq", "unknown field --helq"),
        ("tiny", "--out is missing; give a directory for the run"),
        ("tiny --out {out}", "--data is missing; give text files"),
        ("tiny --out {out} --data {out}/none.txt", "none.txt does not exist"),
        ("tiny --out {out} --data {text}/a.txt --steps 3 --minutes 2", "but steps and minutes is given; keep one"),
        ("tiny --out {out} --data {text}/a.txt --steps 0", "field steps is 0, it must be a whole number of at least 1"),
        ("tiny --out {out} --data {text}/a.txt --steps many", "Error parsing --steps"),
        (
            "tiny --out {out} --data {text}/a.txt --seed 9999999999999999999999",
            "field seed is 9999999999999999999999, it must be at most",
        ),
        ("tiny --out {out} --data {text}/a.txt --threads 100000000000", "field threads is 100000000000, it must be at most 4096"),
        ("tiny --out {out} --data {text}/a.txt {text}/b.jsonl --data-weights 3 1", "--data-weights gives shares to token shards"),
        ("tiny --out {out} --data {text} --device wood", "field device is 'wood'"),
        ("v3-671b --out {out} --data {text}", "this run needs about"),
        ("tiny --out {out} --data {text} --model.rms-norm-eps nan", "config field rms_norm_eps is nan"),
        ("tiny --out {out} --data {text}/a.txt --lr -1", "field lr is -1.0, it must be above 0"),
        ("tiny --out {out} --data {text}/a.txt --learning-rate 1", "unknown field --learning-rate"),
        ("tiny --out {out} --data {text}/a.txt --warmup-step 1", "unknown field --warmup-step; the nearest is --warmup-steps"),
        ("tiny --out {out} --data {text}/a.txt --model.hiden-size 1", "the nearest is --model.hidden-size"),
        (
            "tiny --out {out} --data {text}/a.txt --model.hidden-size 0",
            "pretrain: config field hidden_size is 0, it must be",
        ),
        ("tiny --out {out} --data {text}/a.txt --fp8-scales ue8m0", "belong to precision fp8, but precision is bf16"),
        ("tiny --out {out} --data {text}/a.txt --precision int4", "invalid choice 'int4' for argument '--precision'"),
        ("tiny --out {out} --data {text}/a.txt", "vocab_size is 4096, but this text gives only"),
        ("tiny --out {out} --data {text}/b.jsonl --text-field words", "line 1 has no text in field 'words'"),
        ("tiny --out {out} --data {text}/a.txt --tokenizer {text}", "holds no tokenizer.json"),
        ("--resume", "--resume DIR stands alone"),
        ("--resume {out} --lr 1", "--resume DIR stands alone"),
        ("--resume {out}", "holds no run (no config.json)"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(run: Run, text: Path, tmp_path: Path, words: str, told: str) -> None:
    out = tmp_path / "out"
    code, _, err = run(*words.format(out=out, text=text).split())
    assert code == 2
    assert told in err
    assert err.startswith("finback pretrain: ")
    assert len(err.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_ended_while_tokenising_it_says_so_and_leaves_no_half(tmp_path: Path, number: signal.Signals) -> None:
    lines = (json.dumps({"text": f"The {i}. fish follows whale {i * i % 97} at night, miles north."}) for i in range(200_000))
    (tmp_path / "many.jsonl").write_text("\n".join(lines) + "\n")
    words = ["tiny", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "many.jsonl"), *SMALL_WORDS]
    words[words.index("--model.vocab-size") + 1] = "300"  # there are few words in this text
    with subprocess.Popen(
        [sys.executable, "-m", "finback", "pretrain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        while not child.stdout.readline().startswith("tokenising"):
            assert child.poll() is None
        while not list(tmp_path.glob("run/data/.tokens*")):
            assert child.poll() is None
        child.send_signal(number)
        _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert told.strip() == "finback pretrain: interrupted"
    assert not list(tmp_path.glob("run/data/.tokens*"))


def test_a_damaged_run_config_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": {')
    code, _, err = run("--resume", tmp_path)
    assert code == 2
    assert "config.json is not valid JSON" in err
    (tmp_path / "config.json").write_text(json.dumps(tiny().to_dict() | {"lrr": 1}))
    code, _, err = run("--resume", tmp_path)
    assert code == 2
    assert "config.json: field lrr is not known" in err


def test_help_shows_fields_with_the_values_of_the_preset(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for words, seen in ((["--help"], "(default: 256)"), (["v3-671b", "--help"], "(default: 15360)")):
        with pytest.raises(SystemExit) as leaving:
            run(*words)
        assert leaving.value.code == 0
        page = capsys.readouterr().out
        assert seen in page
        assert "--model.kv-lora-rank" in page
        assert "--bias-update-speed" in page


def test_text_and_shards_are_not_mixed_and_a_small_vocabulary_is_told(text: Path, tmp_path: Path) -> None:
    data = write_micro_data(tmp_path / "data")
    both = replace(tiny(), data=(str(data / "tokens"), str(text)))
    with pytest.raises(InputError, match="--data mixes token shards"):
        prepare_data(both, tmp_path / "run")
    narrow = replace(
        tiny(), data=(str(data / "tokens"),), tokenizer=str(data / "tokenizer"), model=replace(tiny().model, vocab_size=64)
    )
    with pytest.raises(InputError, match=r"--model\.vocab-size is 64, but the tokenizer .* has 300 tokens; set it to 320"):
        prepare_data(narrow, tmp_path / "run")

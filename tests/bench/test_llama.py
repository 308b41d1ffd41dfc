"""llama.cpp as a peer: what its tool says is read rightly, and the real one runs where it is installed."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bench.llama import OURS, Size, Speed, build_llama, competitors, find_tool, measure, prepare
from finback.config import InputError
from finback.data.tokenizer import save_tokenizer
from finback.model.checkpoint import save
from tests.checkpoint_samples import LLAMA, build
from tests.tokenizer_samples import family_tokenizer

SIZE = Size(types=("BF16", "Q8_0"), batches=(1, 3), prompt=4, new_tokens=8, threads=1, turns=2)
PRINTS = """#!{python}
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["-m"] == "model.gguf" and words["-t"] == words["-tb"] == "1" and int(words["-c"]) == 256 * int(words["-npl"])
print("some chatter")
print(json.dumps(dict(pp=int(words["-npp"]), tg=int(words["-ntg"]), pl=int(words["-npl"]), t_pp=0.5, t_tg=1.5, t=2.0)))
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_the_whole_loop_is_timed_by_the_tools_own_clock(tmp_path: Path) -> None:
    turn = build_llama(program(tmp_path / "llama-batched-bench", PRINTS), Path("model.gguf"), SIZE)
    assert [turn(1), turn(3)] == [Speed(2.0, 8, 0.1875), Speed(2.0, 24, 0.1875)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("#!{python}\nprint('hm')", "measured nothing on model.gguf; it said: hm"),
        ("#!{python}\nimport sys\nsys.exit('no such model')", "ended with code 1: no such model"),
    ],
)
def test_what_a_failing_tool_says_is_passed_on(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        build_llama(program(tmp_path / "llama-batched-bench", text), Path("model.gguf"), SIZE)(1)
    assert sentence in str(error.value)


def test_missing_tool_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there is no llama-quantize in {tmp_path}; build llama.cpp"):
        find_tool("llama-quantize", tmp_path)
    assert find_tool("tool", program(tmp_path / "tool", PRINTS).parent) == tmp_path / "tool"


def steady(seconds: float) -> Callable[[int], Speed]:
    return lambda batch: Speed(seconds, 8 * batch)


def test_rows_compare_ours_with_each_peer() -> None:
    peers = {"llama.cpp BF16": partial(steady, 2.0), "llama.cpp Q8_0": partial(steady, 4.0)}
    alone = measure(peers, SIZE, separate=False)
    assert [(row.name, row.value, row.peer) for row in alone] == [
        ("decode, 1 sequence, llama.cpp BF16", 4.0, None),
        ("decode, 1 sequence, llama.cpp Q8_0", 2.0, None),
        ("decode, 3 sequences, llama.cpp BF16", 12.0, None),
        ("decode, 3 sequences, llama.cpp Q8_0", 6.0, None),
    ]
    beside = measure({OURS: partial(steady, 1.0), **peers}, SIZE, separate=False)
    assert [(row.name, row.value, row.peer, row.ratio) for row in beside] == [
        ("decode, 1 sequence", 8.0, "llama.cpp BF16", 2.0),
        ("decode, 1 sequence", 8.0, "llama.cpp Q8_0", 4.0),
        ("decode, 3 sequences", 24.0, "llama.cpp BF16", 2.0),
        ("decode, 3 sequences", 24.0, "llama.cpp Q8_0", 4.0),
    ]


@pytest.mark.skipif(shutil.which("llama-batched-bench") is None, reason="llama.cpp's llama-batched-bench is not on the PATH")
def test_the_real_one_runs(tmp_path: Path) -> None:
    tokenizer = family_tokenizer("smollm")
    save_tokenizer(tokenizer, tmp_path / "source")
    config = replace(LLAMA, vocab_size=tokenizer.vocab_size, hidden_size=64, head_dim=16, intermediate_size=96, rope_scaling=None)
    save(build(config), tmp_path / "source")
    models = prepare(tmp_path / "source", tmp_path / "work", SIZE.types, None)
    assert list(models) == ["BF16", "Q8_0"]
    assert models["Q8_0"].stat().st_size < models["BF16"].stat().st_size
    rows = measure(competitors(models, SIZE, None), SIZE, separate=False)
    assert len(rows) == 4
    assert all(row.value > 0 for row in rows)

"""`finback eval`: the numbers it prints are those of the library, and mistakes are one sentence."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from finback import cli
from finback.data.tokenizer import load_tokenizer, save_tokenizer
from finback.engine.llm import LLM
from finback.eval.config import DOCUMENT_FORM, Decoding, PromptForm
from finback.eval.result import ChoiceResult, TaskResult
from finback.eval.runner import evaluate
from finback.eval.statistics import paired_difference
from finback.eval.tasks import find_task
from finback.model.checkpoint import save
from tests.checkpoint_samples import BASE, build
from tests.eval.models import small_model, small_tokenizer
from tests.eval.test_tasks import fetched

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tokenizer = small_tokenizer()
    save_tokenizer(tokenizer, root / "tokenizer")
    save(small_model(tokenizer, context=1024), root / "model", tokenizer_from=root / "tokenizer")
    return root / "model"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str | int | Path) -> tuple[int, str, str]:
        code = cli.main(["eval", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_json_is_what_the_library_finds(directory: Path, run: Run, tmp_path: Path) -> None:
    names = "problems/addition@1,gym/chain_sum:min_terms=2,max_terms=3"
    options = ("--limit", "3", "--samples", "2", "--max-tokens", "8", "--seed", "5", "--out", tmp_path / "new" / "samples.jsonl")
    code, out, err = run(directory, "--tasks", names, "--json", *options)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["model"] == str(directory)
    assert report["decoding"] == {"samples": 2, "temperature": 0.6, "top_p": 0.95, "max_tokens": 8, "seed": 5}
    assert [result["task"] for result in report["results"]] == ["problems/addition@1", "gym/chain_sum:min_terms=2,max_terms=3"]
    llm = LLM(directory)
    for result in report["results"]:
        task = find_task(result["task"], problems=3, seed=5)
        expected = evaluate(llm, task, PromptForm(), Decoding(samples=2, max_tokens=8, seed=5)).to_dict()
        assert result | {"seconds": 0} == json.loads(json.dumps(expected)) | {"seconds": 0}
    rows = [json.loads(line) for line in (tmp_path / "new" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 3 * 2
    assert {row["task"] for row in rows} == {result["task"] for result in report["results"]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.jsonl"]


def test_few_shot_puts_problems_twice(directory: Path, run: Run) -> None:
    options = ("--limit", "4", "--temperature", "0", "--max-tokens", "6", "--few-shot", "2", "--template", "document")
    code, out, err = run(directory, "--tasks", "problems@1", *options, "--json")
    assert (code, err) == (0, "")
    alone, shown = json.loads(out)["results"]
    assert (alone["prompt_form"]["few_shot"], shown["prompt_form"]["few_shot"]) == (0, 2)
    assert shown["prompt_tokens"] > 2 * alone["prompt_tokens"]
    (sensitivity,) = json.loads(out)["prompt_sensitivity"]
    difference = paired_difference(alone["scores"], shown["scores"])
    assert sensitivity == {"task": "problems@1", "form": "document, 2 shown", "difference": difference._asdict()}
    code, out, _ = run(directory, "--tasks", "problems@1", *options)
    assert code == 0
    assert "difference" in out
    assert out.count("document, 2 shown") >= 2
    form = replace(DOCUMENT_FORM, name="document, 2 shown", few_shot=2)
    result = evaluate(LLM(directory), find_task("problems@1", problems=4), form, Decoding(temperature=0, max_tokens=6))
    assert list(result.scores) == shown["scores"]


def test_tables_name_the_numbers(directory: Path, run: Run, tmp_path: Path) -> None:
    questions = [
        {"question": "Is it?", "choices": ["yes", "no"], "answer": 1},
        {"question": "Why?", "choices": ["a", "b"], "answer": 0},
    ]
    cache = fetched(tmp_path, "truthfulqa-100", questions)  # type: ignore[arg-type]
    options = ("--cache", cache, "--limit", "8", "--samples", "2", "--max-tokens", "5")
    code, out, err = run(directory, "--tasks", "truthfulqa,problems", *options)
    assert (code, err) == (0, "")
    llm = LLM(directory)
    chosen, answered = (
        evaluate(llm, find_task(name, problems=8, cache=cache), PromptForm(), Decoding(samples=2, max_tokens=5))
        for name in ("truthfulqa", "problems")
    )
    assert isinstance(chosen, ChoiceResult)
    assert isinstance(answered, TaskResult)
    lines = [line.split() for line in out.splitlines() if line.strip()]
    first = next(line for line in lines if line[0] == "problems" and line[2] == "8")
    assert first[3] == "2"
    assert first[4] == f"{100 * answered.pass_at_1.value:.1f}"
    for family, part in answered.families.items():
        assert ["problems", "chat", family, str(part.problems)] in [line[:4] for line in lines]
    (row,) = [line for line in lines if line[0] == "truthfulqa"]
    assert row[3] == f"{100 * chosen.accuracy.value:.1f}"


def test_a_score_of_ones_own(directory: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Say something long.", "answer": "anything"}\n')
    options = ("--tasks", file, "--samples", "2", "--max-tokens", "30", "--temperature", "1", "--json")
    code, out, _ = run(directory, *options)
    assert code == 0
    assert json.loads(out)["results"][0]["pass_at_1"]["value"] == 0.0
    code, out, err = run(directory, *options, "--reward", "tests.eval.scores:length")
    assert (code, err) == (0, "")
    assert json.loads(out)["results"][0]["pass_at_1"]["value"] == 1.0
    code, out, err = run(directory, *options, "--reward", "tests.eval.scores:always_raises", "--out", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    assert "no answer of task mine could be scored: always_raises raised KeyError: 'missing'" in err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tasks", "gsm8k"], "run: finback fetch gsm8k-100"),
        (["--tasks", "probelms"], "did you mean 'problems'"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "problems", "--limit", "0"], "--limit is 0, it must be at least 1"),
        (["--tasks", "problems", "--samples", "0"], "samples is 0, it must be at least 1"),
        (["--tasks", "problems", "--temperature", "-1"], "temperature is -1.0, it must be 0 or more"),
        (["--tasks", "problems", "--few-shot", "-1"], "--few-shot is -1, it must be at least 0"),
        (["--tasks", "problems", "--few-shot", "99"], "16 solved problems to show, and 99 are asked for; lower --few-shot"),
        (["--tasks", "problems", "--template", "no place"], "must hold {prompt} once"),
        (["--tasks", "problems", "--reward", "nowhere:score"], "there is no module 'nowhere'"),
        (["--tasks", "problems", "--num-speculative-tokens", "1"], "this model has no MTP module"),
        (["--tasks", "problems", "--temprature", "1"], "the nearest is --temperature"),
        ([], "tasks"),
    ],
)
def test_bad_option_is_one_sentence(options: list[str], sentence: str, directory: Path, run: Run, tmp_path: Path) -> None:
    code, out, err = run(directory, *options, "--cache", tmp_path)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_bad_directory_is_one_sentence(directory: Path, run: Run, tmp_path: Path) -> None:
    options = ("--tasks", "problems", "--limit", "2", "--max-tokens", "4")
    assert "nowhere is not a directory" in run(tmp_path / "nowhere", *options)[2]
    save(build(BASE), tmp_path / "bare")
    code, out, err = run(tmp_path / "bare", *options)
    assert (code, out) == (2, "")
    assert "holds no tokenizer.json" in err
    model = small_model(load_tokenizer(directory), context=1024)
    save(model, tmp_path / "plain", tokenizer_from=directory)
    config = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain" / "tokenizer_config.json").write_text(json.dumps(config))
    code, out, err = run(tmp_path / "plain", *options)
    assert (code, out) == (2, "")
    assert "has no chat template; add chat_template.jinja to its directory, or give --template" in err
    assert run(tmp_path / "plain", *options, "--template", "document")[0] == 0


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    from finback.eval.progress import ProgressLine

    with ProgressLine("sums (chat)", 4, line_seconds=0.0) as line:
        line.show(1, "50.0% right")
        line.show(4, "75.0% right")
    with ProgressLine("sums (chat)", 4, line_seconds=60.0) as line:
        line.show(1, "soon")
    with ProgressLine("sums (chat)", 4, shown=False, line_seconds=0.0) as line:
        line.show(1, "never")
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert first.startswith("sums (chat)  1/4  50.0% right  0:")
    assert first.endswith(" left")
    assert last.startswith("sums (chat)  4/4  75.0% right  0:00 left")

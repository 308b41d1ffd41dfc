"""`finback generate`: the text it streams is that of the plain `generate` and of the engine, and mistakes are one sentence."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finback import cli
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.model.checkpoint import load, save
from finback.model.generate import generate
from tests.checkpoint_samples import BASE, build

TEXT = ["The fox saw the grapes and could not reach them. 狐狸看见葡萄，却够不着。"] * 50


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(TEXT, 300)
    save_tokenizer(tokenizer, root / "tokenizer")
    model = build(replace(BASE, vocab_size=tokenizer.vocab_size, initializer_range=0.5))
    save(model, root / "model", tokenizer_from=root / "tokenizer")
    return root / "model"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | int | Path) -> tuple[int, str, str]:
        code = cli.main(["generate", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def expected(directory: Path, ids: list[int], count: int) -> str:
    """What the plain generation gives at temperature 0."""
    tokenizer: Tokenizer = load_tokenizer(directory)
    output = generate(load(directory), torch.tensor([ids]), count, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True) + "\n"


def test_greedy_text_is_that_of_the_plain_generation(directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(directory, "--prompt", "The fox 狐狸", "--max-tokens", "40", "--temperature", "0")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.add_bos_token
    assert out == expected(directory, tokenizer.encode("The fox 狐狸", add_bos=True), 40)
    assert (code, err) == (0, "")
    assert len(out) > 10


@pytest.mark.parametrize(
    ("options", "params"),
    [
        (["--temperature", "1.5", "--top-p", "1", "--seed", "7"], SamplingParams(temperature=1.5, seed=7)),
        (["--temperature", "1", "--top-k", "3"], SamplingParams(temperature=1, top_p=0.95, top_k=3, seed=0)),
        ([], SamplingParams(temperature=0.6, top_p=0.95, seed=0)),
    ],
)
def test_sampled_text_is_that_of_the_engine(
    options: list[str], params: SamplingParams, directory: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run(directory, "--prompt", "The fox 狐狸", "--max-tokens", "40", *options)
    assert out == LLM(directory).generate("The fox 狐狸", replace(params, max_tokens=40))[0].text + "\n"
    assert (code, err) == (0, "")
    assert out != run(directory, "--prompt", "The fox 狐狸", "--max-tokens", "40", *options, "--seed", "8")[1]


def test_stop_text_ends_the_answer(directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--prompt", "The fox", "--max-tokens", "40", "--temperature", "0")
    _, whole, _ = run(directory, *options)
    stop = whole[10:12]
    code, out, err = run(directory, *options, "--stop", "no such text", stop)
    assert (code, out, err) == (0, whole.partition(stop)[0] + "\n", "")


def test_json_is_one_object(directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    """Of a random model, whose objects need not end in time: what there is of one is checked."""
    for seed in range(3):
        code, out, err = run(
            directory, "--prompt", "The fox", "--max-tokens", "60", "--temperature", "2", "--seed", seed, "--json"
        )
        assert (code, err) == (0, "")
        assert out.startswith("{")
        if out.rstrip().endswith("}"):
            assert isinstance(json.loads(out), dict)


def test_drafts_do_not_change_the_text(directory: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    config = replace(BASE, vocab_size=300, initializer_range=0.5, num_nextn_predict_layers=1)
    save(build(config), tmp_path, tokenizer_from=directory)
    options = ("--prompt", "The fox", "--max-tokens", "30", "--temperature", "0")
    code, out, err = run(tmp_path, *options, "--num-speculative-tokens", "1")
    assert (code, err) == (0, "")
    assert out == run(tmp_path, *options)[1]


def test_prompt_comes_from_standard_input(
    directory: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--max-tokens", "20", "--temperature", "0")
    _, given, _ = run(directory, "--prompt", "狐狸\n", *options)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("狐狸\n".encode())))
    assert run(directory, "--prompt", "-", *options) == (0, given, "")


def test_chat_template_is_applied_only_when_asked_for(directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    options = ("--max-tokens", "30", "--temperature", "0")
    _, plain, _ = run(directory, "--prompt", "Why?", *options)
    code, chat, _ = run(directory, "--prompt", "Why?", "--chat", *options)
    tokenizer = load_tokenizer(directory)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
    assert text.startswith(tokenizer.bos_token)
    assert code == 0
    assert chat == expected(directory, tokenizer.encode(text), 30)
    assert chat != plain


def test_empty_prompt_starts_from_nothing(directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run(directory, "--prompt", "", "--max-tokens", "5", "--temperature", "0")
    assert code == 0
    assert out == expected(directory, [load_tokenizer(directory).bos_token_id], 5)


def test_end_of_sentence_ends_the_text(tmp_path: Path, directory: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    tokenizer, model = load_tokenizer(directory), load(directory)
    prompt = tokenizer.encode("fox", add_bos=True)
    output = generate(model, torch.tensor([prompt]), 30)[0, len(prompt) :].tolist()
    place = next(i for i in range(3, 30) if output[i] not in output[:i])
    save(model, tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["eos_token"] = tokenizer.backend.id_to_token(output[place])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    code, out, _ = run(tmp_path, "--prompt", "fox", "--max-tokens", "30", "--temperature", "0")
    assert code == 0
    assert out == tokenizer.decode(output[:place], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0, it must be at least 1"),
        (["--max-tokens", "many"], "many"),
        (["--max-tokens", "1000"], "the model's context is 128; lower one"),
        (["--temperature", "-1"], "--temperature is -1.0, it must be 0 or more"),
        (["--temperature", "nan"], "--temperature is nan, it must be 0 or more"),
        (["--top-p", "0"], "--top-p is 0.0, it must be above 0 and at most 1"),
        (["--top-p", "1.5"], "--top-p is 1.5, it must be above 0 and at most 1"),
        (["--seed", "-3"], "--seed is -3, it must be at least 0"),
        (["--top-k", "-1"], "top_k is -1, it must be a whole number"),
        (["--stop", ""], "must not hold an empty text"),
        (["--max-tokens", "9", "--num-speculative-tokens", "1"], "this model has no MTP module to draft with; use 0"),
        (
            ["--max-tokens", "9", "--num-speculative-tokens", "-1"],
            "num_speculative_tokens is -1, it must be a whole number of at least 0",
        ),
        (["--temprature", "1"], "the nearest is --temperature"),
        (["--prompt", "\udcff"], "the prompt is not UTF-8 text"),
    ],
)
def test_bad_option_is_one_sentence(
    options: list[str], sentence: str, directory: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run(directory, *([] if "--prompt" in options else ["--prompt", "fox"]), *options)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_bad_directory_is_one_sentence(directory: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    assert "nowhere is not a directory" in run(tmp_path / "nowhere", "--prompt", "fox")[2]
    save(build(BASE), tmp_path / "bare")
    code, out, err = run(tmp_path / "bare", "--prompt", "fox")
    assert (code, out) == (2, "")
    assert "holds no tokenizer.json" in err
    file = tmp_path / "bare" / "config.json"
    file.write_text("{")
    assert "is not JSON" in run(tmp_path / "bare", "--prompt", "fox")[2]
    missing = "--prompt is missing: Text to continue; - reads it from standard input"
    assert run(directory)[2] == f"finback generate: {missing}; see finback generate --help\n"


def test_tokenizer_of_another_model_is_told(directory: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    save(build(BASE), tmp_path, tokenizer_from=directory)  # 96 rows for 300 tokens
    code, out, err = run(tmp_path, "--prompt", "狐狸 fox", "--max-tokens", "5")
    assert (code, out) == (2, "")
    assert "outside the model's vocabulary (96)" in err

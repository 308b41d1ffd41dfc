"""`finback rewards test`: what it says of good rewards, of each kind of broken one, and of broken data."""

import json
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finback.cli import main
from finback.rewards.reward import Score
from finback.rewards.trial import HIDDEN, MANY, OTHER, RIGHT, Trial, judge, read_trials
from finback.train.reward_scoring import load_reward_model
from tests.rl.policies import write_reward_model

ROWS = [
    {"prompt": "What is 12 + 34?", "answer": "46"},
    {"prompt": [{"role": "user", "content": "计算 5 + 5。"}], "answer": 10},
    {"prompt": "What is 3 + 4?<think>\n", "answer": "7", "language": "en"},
]
MINE = """
    import os
    def lax(prompt, completion, example): return float(str(example["answer"]) in completion)
    def zero(prompt, completion, example): return 0.0
    def one(prompt, completion, example): return 1
    def inverted(prompt, completion, example): return -float("</think>" in completion)
    def text(prompt, completion, example): return "1.0"
    def raises(prompt, completion, example): return example["gold"]
    def raises_on_bad(prompt, completion, example): return float(completion.index("Answer") > 0)
    def hangs(prompt, completion, example):
        while completion:
            pass
        return 0.0
    def wide(prompt, completion, example): return 100.0 * ("</think>" in completion)
    def dies(prompt, completion, example): os._exit(3)
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A data file and a module of rewards."""
    data, module = tmp_path / "rows.jsonl", tmp_path / "mine.py"
    write(data, ROWS)
    module.write_text(textwrap.dedent(MINE), encoding="utf-8")
    return {"data": str(data), "module": str(module)}


def write(path: Path, rows: list[object]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def tried(files: dict[str, str], *specs: str, words: tuple[str, ...] = ()) -> tuple[int, dict[str, dict[str, object]]]:
    """Exit code, and what --json tells by the reward's name."""
    given = [word for spec in specs for word in ("--reward", spec.replace("MINE", files["module"]))]
    return main(["rewards", "test", "--data", files["data"], *given, *words, "--json"])


def verdicts(printed: str) -> dict[str, dict[str, object]]:
    return {told["name"]: told for told in json.loads(printed)["rewards"]}


def test_good_rewards_pass(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = (
        "answers:exact",
        "format:r1_zero_format:0.1",
        "language:language_consistency:0.1",
        "length:overlong",
        "repetition:repetition",
    )
    assert tried(files, *(f"finback.rewards.{name}" for name in names)) == 0
    report = json.loads(capsys.readouterr().out)
    told = {reward["name"]: reward for reward in report["rewards"]}
    assert (report["rows"], report["completions"]) == (3, 42)
    assert all(reward["problems"] == [] for reward in told.values())
    assert (told["exact"]["good"], told["exact"]["bad"], told["exact"]["notes"]) == (1.0, 0.0, [])
    assert told["r1_zero_format"]["weight"] == 0.1
    assert "does not look at the answer" in told["r1_zero_format"]["notes"][0]
    assert told["language_consistency"]["means"]["the right answer, box"] == 1.0
    assert "goes down to -1" in told["overlong"]["notes"][1]
    assert report["total"]["the right answer, answer tag"] == pytest.approx(1.2)
    assert report["total"]["another row's answer, answer tag"] == pytest.approx(0.2)
    assert list(report["total"])[:3] == [f"the right answer, {form}" for form in ("answer tag", "box", "last line")]


def test_strict_rewards_say_which_form_they_read(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tried(files, "finback.rewards.answers:exact_boxed") == 0
    (note,) = verdicts(capsys.readouterr().out)["exact_boxed"]["notes"]
    assert note == "reads an answer written as box, and less or not at all as answer tag or last line; ask for that form"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lax", "gives 1 for 'answer in the thought only', as much as for a right answer"),
        ("zero", "is 0 for every completion, the good ones among them"),
        ("one", "is 1 for every completion, the bad ones among them"),
        ("inverted", "gives good completions -1 and bad ones -0.727 on average"),
        ("text", "fails on every completion: it gave str '1.0', not a number; return a float"),
        ("raises", "fails on every completion: it raised KeyError: 'gold'"),
        ("dies", "fails on every completion: it ended its process with exit code 3"),
    ],
)
def test_each_kind_of_bad_reward_is_explained(
    files: dict[str, str], name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried(files, f"MINE:{name}") == 1
    assert verdicts(capsys.readouterr().out)[name]["problems"][0].startswith(sentence)


def test_a_reward_that_hangs_ends_the_trial_early(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "test", "--data", files["data"], "--reward", f"{files['module']}:hangs", "--deadline", "0.5"]) == 1
    printed = capsys.readouterr().out
    assert "14 completions for 1 rows, stopped early of 3" in printed
    assert "problem: fails on 3 of 3 good completions: it timed out after 0.5 s" in printed


def test_notes_on_range_and_on_failures_for_bad_completions(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tried(files, "MINE:wide", "MINE:raises_on_bad") == 1
    told = verdicts(capsys.readouterr().out)
    assert told["wide"]["problems"] == []
    assert any(note.startswith("reaches 100, beside which other rewards hardly count") for note in told["wide"]["notes"])
    assert told["raises_on_bad"]["problems"][0].startswith(
        "fails on 7 of 9 good completions: it raised ValueError: substring not found"
    )


def test_the_table_and_the_words(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    module = files["module"]
    words = ["--reward", "finback.rewards.answers:exact", "--reward", f"{module}:lax:0.5"]
    assert main(["rewards", "test", "--data", files["data"], *words, "--rows", "2"]) == 1
    printed = capsys.readouterr().out
    assert "mean over" in printed
    assert "exact x 1" in printed
    assert "lax x 0.5" in printed
    assert ["good:", "the", "right", "answer,", "box", "1.000", "1.000", "1.500"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "28 completions for 2 rows\n" in printed
    assert "exact: tells good from bad\n  good 1.000, bad 0.000\n" in printed
    assert "lax: do not train with it" in printed
    assert "bad example: 1 for " in printed


def test_completions_of_the_data_are_used(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": "Say yes.", "good": ["yes", "Yes."], "bad": ["no"]},
        {"prompt": "Say 7.", "answer": 7, "good": ["\\boxed{7}"]},
    ]
    write(Path(files["data"]), rows)
    trials = read_trials([files["data"]], 10)
    assert [(trial.completion, trial.good) for trial in trials[0]] == [("yes", True), ("Yes.", True), ("no", False)]
    assert [trial.completion for trial in trials[1] if trial.good] == ["\\boxed{7}"]
    assert any(trial.completion.endswith("<answer>77</answer>") for trial in trials[1] if not trial.good)
    assert all("good" not in trial.example for row in trials for trial in row)
    assert tried(files, "MINE:one") == 1
    assert "good, given in the data" in verdicts(capsys.readouterr().out)["one"]["means"]


def test_a_wrong_answer_is_never_the_right_one_in_other_clothes(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"prompt": "?", "answer": text} for text in ("1,000", "1000", " 1000 ", 1000)])
    for row in read_trials([tmp_path / "rows.jsonl"], 10):
        assert all("71" in trial.completion for trial in row if trial.kind == OTHER)


def test_prompts_that_open_the_thought_get_completions_inside_it(files: dict[str, str]) -> None:
    opened = read_trials([files["data"]], 3)[2]
    assert not any("<think>" in trial.completion for trial in opened)
    chinese = read_trials([files["data"]], 3)[1]
    assert any("答案：10" in trial.completion for trial in chinese)


def scored(values: dict[str, float]) -> list[tuple[Trial, Score]]:
    return [
        (Trial("f, line 1", "?", {}, "c", label.startswith(RIGHT), *label.partition(", ")[::2]), Score(value, {"mine": value}))
        for label, value in values.items()
    ]


def test_a_verifier_that_only_misses_one_hack_is_told() -> None:
    sound = {f"{RIGHT}, box": 1.0, f"{OTHER}, box": 0.0, f"{HIDDEN}, box": 0.0, "empty": 0.0}
    assert judge("mine", scored(sound)).problems == []
    (problem,) = judge("mine", scored({**sound, MANY: 1.0})).problems
    assert "'many numbers" in problem
    (problem,) = judge("mine", scored({**sound, f"{HIDDEN}, box": 1.0})).problems
    assert "'answer in the thought only'" in problem


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ('{"prompt": "?"}', 'line 2: the row has neither an "answer" nor "good" completions'),
        ('{"answer": "4"}', 'line 2: the row has no "prompt"'),
        ('{"prompt": "?", "answer": null}', 'line 2: the row\'s "answer" is None'),
        ('{"prompt": "?", "good": "yes"}', 'line 2: the row\'s "good" is no list of texts'),
        ('{"prompt": "?", "answer": 1, "bad": [1]}', 'line 2: the row\'s "bad" is no list of texts'),
        ("[1]", "line 2: the row is a JSON list, it must be an object"),
        ("{", "line 2: it is not valid JSON"),
    ],
)
def test_a_malformed_row_is_named(files: dict[str, str], row: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(files["data"]).write_text(f'{{"prompt": "?", "answer": "1"}}\n{row}\n', encoding="utf-8")
    assert tried(files, "finback.rewards.answers:exact") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{files['data']}, {sentence}" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--rows", "0"], "--rows is 0, it must be at least 1"),
        (["--deadline", "0"], "deadline is 0.0 seconds"),
        (["--reward", "finback.rewards.answers:exat"], "did you mean 'exact'"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    files: dict[str, str], words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = [] if "--reward" in words else ["--reward", "finback.rewards.answers:exact"]
    data = [] if "--data" in words else ["--data", files["data"]]
    assert main(["rewards", "test", *data, *reward, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_without_rows_is_told(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(files["data"]).write_text("\n", encoding="utf-8")
    assert tried(files, "finback.rewards.answers:exact") == 2
    assert "has no rows" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_reward_models_are_tried_as_training_uses_them(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    judge_model = write_reward_model(tmp_path / "judge", kind)
    code = tried(files, "MINE:lax", words=("--reward-model", f"{judge_model}:0.5"))
    report = json.loads(capsys.readouterr().out)
    told = {one["name"]: one for one in report["rewards"]}
    assert (told["judge"]["weight"], told["judge"]["spec"]) == (0.5, f"{judge_model}:0.5")
    model = load_reward_model(judge_model)
    trials = [trial for row in read_trials([files["data"]], 20) for trial in row]
    # The third row's prompt opens the thought itself; a response is read with that tag.
    texts = [
        f"<think>\n{t.completion}" if t.where.endswith("3") and "<think>" not in t.completion else t.completion for t in trials
    ]
    values = model.score([trial.example["prompt"] for trial in trials], texts)
    for label in {trial.label for trial in trials}:
        of_label = [value for trial, value in zip(trials, values, strict=True) if trial.label == label]
        assert told["judge"]["means"][label] == pytest.approx(sum(of_label) / len(of_label), abs=1e-4)
        assert report["total"][label] == pytest.approx(told["lax"]["means"][label] + 0.5 * told["judge"]["means"][label])
    assert code == int(any(one["problems"] for one in report["rewards"]))


def test_a_reward_model_alone_that_always_gives_the_same_is_explained(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_reward_model(tmp_path / "judge", "pointwise")
    file = next(directory.glob("reward_head*.safetensors"))
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    assert main(["rewards", "test", "--data", files["data"], "--reward-model", str(directory)]) == 1
    printed = capsys.readouterr().out
    assert "judge: do not train with it" in printed
    assert "is 0 for every completion" in printed


def test_what_is_to_be_tried_must_be_there(files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "test", "--data", files["data"]]) == 2
    assert "give --reward module:function, --reward-model DIR, or both" in capsys.readouterr().err
    assert main(["rewards", "test", "--data", files["data"], "--reward-model", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err

"""Tasks by name: what they hold, that they hold nothing that is trained on, and what is told about a wrong name or file."""

import hashlib
import json
from pathlib import Path

import pytest

from finback.config import InputError
from finback.data.fetch import is_present
from finback.data.items import find_item
from finback.data.problems import family_names, generate_problems, is_held_out
from finback.eval.task import AnyTask, ChoiceTask, Task, distinct, sample_seed
from finback.eval.tasks import find_task, split_names, task_names
from finback.rewards.reward import Example, Reward
from finback.rewards.sandbox import bubblewrap_obstacle
from tests.eval.scores import length


def fetched(cache: Path, item_name: str, rows: list[dict[str, object]]) -> Path:
    """A cache in which an evaluation set lies, as fetch leaves it, with other rows."""
    item = find_item(item_name)
    assert item.package is not None
    directory = cache / item_name
    directory.mkdir(parents=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (directory / "problems.jsonl").write_bytes(content)
    made_from = f"form 1, {item.package.registry} {item.package.name} {item.package.version} sha256:{item.package.sha256}"
    files = {"problems.jsonl": hashlib.sha256(content).hexdigest()}
    (directory / "fetched.json").write_text(json.dumps({"made_from": made_from, "files": files}))
    assert is_present(item, cache)
    return cache


LENGTH = Reward("length", length, spec="tests.eval.scores:length")


def score_of(task: Task, completion: str, example: Example) -> float:
    return task.score.function("", completion, example)


def answered(name: str, **arguments: object) -> Task:
    task: AnyTask = find_task(name, **arguments)  # type: ignore[arg-type]
    assert isinstance(task, Task)
    return task


def test_built_in_problems_are_held_out_and_distinct() -> None:
    task = answered("problems")
    questions = [example["question"] for example in task.examples]
    assert len(questions) == len(set(questions)) == 200
    assert all(map(is_held_out, questions))
    assert {example["language"] for example in task.examples} == {"en", "zh"}
    assert {example["family"] for example in task.examples} == set(family_names())


def test_solved_problems_are_no_held_out_ones_and_are_right() -> None:
    for name in ("problems/addition@2", "gym/chain_sum"):
        task = answered(name, problems=20)
        assert len(task.few_shot) == 16
        for question, reply in task.few_shot:
            assert not is_held_out(question)
            assert task.extract("", reply) is not None
    (question, reply) = answered("problems/addition@1:language=en").few_shot[0]
    terms = [int(word) for word in question.replace("?", " ").replace(".", " ").split() if word.isdigit()]
    assert reply.startswith("<think>\n")
    assert reply.endswith(f"\n</think>\nAnswer: {sum(terms)}")


def test_family_level_language_and_seed() -> None:
    task = answered("problems/addition@3:language=zh", problems=30)
    assert {(example["family"], example["language"]) for example in task.examples} == {("addition", "zh")}
    assert len(task.examples) == 30
    assert any(max(int(term) for term in example["reasoning"].split() if term.isdigit()) > 200 for example in task.examples)
    assert answered("problems/addition@3:language=zh", problems=30).examples == task.examples
    assert answered("problems/addition@3:language=zh", problems=30, seed=1).examples != task.examples


def test_an_easy_family_has_as_many_problems_as_there_are() -> None:
    task = answered("problems/multiplication@1", problems=60)
    found = {
        problem.question for problem in generate_problems(600, seed=3, families=["multiplication"], levels=[1], held_out=True)
    }
    assert 5 < len(task.examples) == len(found) < 60


def test_gym_takes_a_difficulty_and_holds_out() -> None:
    task = answered("gym/chain_sum:min_terms=5,max_terms=5", problems=12)
    assert len(task.examples) == 12
    for example in task.examples:
        assert is_held_out(example["question"])
        terms = example["question"].partition(":")[2].replace("=", "").strip()
        assert len(terms.replace("-", "+").split("+")) == 5
        assert score_of(task, f"Answer: {eval(terms)}", example) == 1.0
        assert score_of(task, f"Answer: {eval(terms) + 1}", example) == 0.0
    assert task.needs_pool


def test_gym_families_with_many_right_answers_score_themselves() -> None:
    task = answered("gym/countdown:min_numbers=3,max_numbers=3", problems=2)
    for example in task.examples:
        assert is_held_out(example["question"])
        metadata = example["gym"]["entry"]["metadata"]
        assert score_of(task, f"Answer: {metadata['expression']}", example) == 1.0
        assert score_of(task, f"Answer: {metadata['target']} + 1", example) == 0.0  # part of a score, for a number that is near
        assert score_of(task, "none", example) == 0.0


def test_gsm8k_asks_for_a_boxed_number(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answer": "1,234", "solution": "x"},
        {"question": "How much?", "answer": "5", "solution": "y"},
    ]
    task = answered("gsm8k", cache=fetched(tmp_path, "gsm8k-100", rows))
    assert [example["question"] for example in task.examples] == ["How many?", "How much?"]
    assert task.examples[0]["prompt"].startswith("How many?\nPlease reason step by step")
    for reply, score in (
        ("so \\boxed{1234}", 1.0),
        ("so \\boxed{\\$1,234.00}", 1.0),
        ("so \\boxed{1235}, or 1234", 0.0),
        ("1234", 0.0),
        ("", 0.0),
    ):
        assert score_of(task, reply, task.examples[0]) == score
    for reply in ("We get \\boxed{\\$1,234.0}", "<answer> $1234 </answer>", "Hm.\nAnswer: 1234."):
        assert task.extract("", reply) == "1234"
    assert answered("gsm8k", cache=tmp_path, problems=1).examples == task.examples[:1]


def test_truthful_qa_is_a_choice(tmp_path: Path) -> None:
    rows = [{"question": "Q?", "choices": ["yes", "no"], "answer": 1}]
    task = find_task("truthfulqa", cache=fetched(tmp_path, "truthfulqa-100", rows))
    assert isinstance(task, ChoiceTask)
    assert list(task.examples) == rows
    assert len(task.few_shot) == 6
    with pytest.raises(InputError, match="truthfulqa is decided by likelihood, not by a reward"):
        find_task("truthfulqa", cache=tmp_path, reward=LENGTH)


def test_human_eval_runs_code_in_the_sandbox(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
        }
    ]
    fetched(tmp_path, "humaneval", rows)
    if bubblewrap_obstacle():
        with pytest.raises(InputError, match="programs must not run without a sandbox"):
            find_task("humaneval", cache=tmp_path)
        return
    task = answered("humaneval", cache=tmp_path)
    assert task.needs_pool
    assert "one code block" in task.examples[0]["prompt"]
    right, wrong = (f"Here:\n```python\ndef double(x):\n    return {factor} * x\n```\n" for factor in (2, 3))
    assert score_of(task, right, task.examples[0]) == 1.0
    assert score_of(task, wrong, task.examples[0]) == score_of(task, "I cannot.", task.examples[0]) == 0.0
    assert task.extract("", right) == "def double(x):\n    return 2 * x"
    assert task.extract("", right) == task.extract("", right.replace("    return", "    # twice\n    return"))
    assert task.extract("", "I cannot.") is None


def test_a_reward_of_ones_own_scores_in_a_pool() -> None:
    task = answered("problems", problems=2, reward=LENGTH)
    assert (task.score, task.needs_pool) == (LENGTH, True)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(
        '{"prompt": "2+2?", "answer": 4, "family": "sums"}\n\n{"question": "3+3?", "answer": "6"}\n{"prompt": "2+2?", "answer": 4}\n'
    )
    task = answered(str(file))
    assert (task.name, len(task.examples)) == ("mine", 2)
    assert score_of(task, "Answer: 4.", task.examples[0]) == 1.0
    assert score_of(task, "4", task.examples[0]) == 0.0
    assert task.examples[0]["family"] == "sums"


def test_rows_need_no_answer_where_a_reward_judges_by_something_else(tmp_path: Path) -> None:
    file = tmp_path / "programs.jsonl"
    file.write_text('{"prompt": "Double x.", "tests": ["assert f(2) == 4"]}\n{"prompt": "Halve x.", "answer": ["any", "form"]}\n')
    task = answered(str(file), reward=LENGTH)
    assert [example["prompt"] for example in task.examples] == ["Double x.", "Halve x."]
    assert task.examples[0]["tests"] == ["assert f(2) == 4"]
    file.write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 has no text in field 'prompt'"):
        find_task(str(file), reward=LENGTH)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"prompt": "a", "answer": "b"}\n{"prompt": ', "line 2 is not valid JSON"),
        ('{"prompt": "a"}', "line 1 has no field 'answer'"),
        ('{"answer": "a"}', "line 1 has no text in field 'prompt'"),
        ('\n\n{"prompt": 3, "answer": "a"}', "line 3 has no text in field 'prompt'"),
        ('{"prompt": "a", "answer": ["b"]}', r"line 1: answer is \['b'\], it must be a text or a number"),
        ('{"prompt": "a", "answer": true}', "answer is True"),
        ("[1]", "line 1 has no field 'answer'"),
        ("", "holds no problem"),
    ],
)
def test_a_wrong_row_is_named(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    with pytest.raises(InputError, match=sentence) as caught:
        find_task(str(file))
    assert str(caught.value).startswith(f"{file}")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gsm8", "there is no task 'gsm8'; did you mean 'gsm8k'"),
        ("probelms", "did you mean 'problems'"),
        ("zzz", "choose among gsm8k, humaneval, truthfulqa, problems, problems/FAMILY, gym/FAMILY or a .jsonl file"),
        ("problems/aditon", "did you mean 'addition'"),
        ("problems/addition@4", "asks for level '4'; the levels are 1, 2 and 3"),
        ("problems@hard", "asks for level 'hard'"),
        ("problems:lang=en", "sets 'lang'; built-in problems have the field language"),
        ("problems:language=fr", r"languages are \['fr'\]"),
        ("gym", "there is no task 'gym'"),
        ("gym/chain_sums", "did you mean 'chain_sum'"),
        ("gym/chain_sum:min_terms", "holds 'min_terms', which is no field=value"),
        ("gym/chain_sum:nothing=1", "does not take"),
        ("nowhere.jsonl", "there is no task file nowhere.jsonl"),
        ("gsm8k", "gsm8k-100 is not in .*; run: finback fetch gsm8k-100"),
        ("humaneval", "run: finback fetch humaneval"),
        ("truthfulqa", "run: finback fetch truthfulqa-100"),
    ],
)
def test_a_wrong_name_is_one_sentence(name: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence) as caught:
        find_task(name, cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_no_problem_at_all_is_told() -> None:
    with pytest.raises(InputError, match="a task of 0 problems cannot be evaluated"):
        find_task("problems", problems=0)


def test_names_between_commas() -> None:
    assert split_names("gsm8k, gym/chain_sum:min_terms=5,max_terms=8,problems/addition@3") == [
        "gsm8k",
        "gym/chain_sum:min_terms=5,max_terms=8",
        "problems/addition@3",
    ]
    assert split_names(" ,") == []
    assert "problems/parity" in task_names()


def test_seeds_depend_on_question_and_number_only() -> None:
    one, other = {"question": "a"}, {"question": "b"}
    seeds = [sample_seed(seed, example, number) for seed in (0, 1) for example in (one, other) for number in range(3)]
    assert len(set(seeds)) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, {**one, "prompt": "other words"}, 2) == seeds[2]
    assert distinct([one, other, one, {"question": "c"}], 2) == [one, other]

"""The tasks by name: generated problems, sets that `finback fetch` brings, and files of one's own.

    problems                      every built-in family, both languages, all levels
    problems/addition             one family;  problems/addition@3  at level 3;  problems@1:language=zh  in one language
    gym/chain_sum                 a family of reasoning-gym;  gym/chain_sum:min_terms=5,max_terms=8  at another difficulty
    gsm8k, humaneval, truthfulqa  when fetched
    FILE.jsonl                    rows with "prompt" (or "question") and "answer", or what a reward of one's own reads

Generated problems are always held-out ones (`is_held_out`): no training text of ours, and no training problem of a recipe that asks
for `held_out=False`, holds one.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from finback.config import InputError, nearest
from finback.data.fetch import default_cache, fetched_file
from finback.data.gym import gym_problems, gym_rows
from finback.data.problems import Problem, family_names, generate_problems
from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN
from finback.eval import gym
from finback.eval.answers import vote
from finback.eval.config import DEFAULT_PROBLEMS
from finback.eval.task import AnyTask, ChoiceTask, Task, distinct
from finback.rewards import answers, code, maths
from finback.rewards.reward import Example, Reward
from finback.rewards.sandbox import require

_EXACT = Reward("exact", answers.exact, spec="finback.rewards.answers:exact")
_GYM = Reward("solved", gym.solved, spec="finback.eval.gym:solved")
_MATHS = Reward("math_equal", maths.math_equal, spec="finback.rewards.maths:math_equal")
_UNIT_TESTS = Reward("unit_tests", code.unit_tests, spec="finback.rewards.code:unit_tests")
_FEW_SHOT = 16  # solved problems that a generated task can show
_DRAWS = 10  # per problem asked for: easy families have few questions, and these draws find nearly all of them
_EVALUATION_SEED = 1_000_000_007  # far from the seeds of training, for families whose questions overlap little
_STEP_BY_STEP = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # R1's advice for maths


def find_task(
    name: str, *, problems: int | None = None, seed: int = 0, cache: Path | None = None, reward: Reward | None = None
) -> AnyTask:
    """The task of that name (see the module).

    Args:
        problems: at most this many; None is all of a set, and 200 of a generated task.
        seed: which problems a generated task has.
        cache: where fetched sets are kept; None is `default_cache()`.
        reward: scores the answers instead of the task's own function; without one a file's answers are compared as texts.

    Raises:
        InputError: an unknown name (the nearest is named), a set that was not fetched, a row that is wrong, a package missing.
    """
    if problems is not None and problems < 1:
        raise InputError(f"a task of {problems} problems cannot be evaluated; give at least 1")
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        task: AnyTask = _file_task(Path(name), ("answer",) if reward is None else ())
    elif name in _FETCHED:
        task = _FETCHED[name](default_cache() if cache is None else cache)
    else:
        parsed = _parse(name)
        generate = _gym if parsed.source == "gym" else _built_in
        task = generate(parsed, DEFAULT_PROBLEMS if problems is None else problems, seed)
    if reward is None and isinstance(task, Task) and task.score is _UNIT_TESTS:
        require("bubblewrap")
    if reward is not None:
        if isinstance(task, ChoiceTask):
            raise InputError(f"task {name} is decided by likelihood, not by a reward; leave --reward out")
        task = replace(task, score=reward, needs_pool=True)
    return replace(task, examples=task.examples[:problems])


def task_names() -> list[str]:
    """The names that need no family: those of sets, and the built-in problems with each of their families."""
    return [*_FETCHED, "problems", *(f"problems/{family}" for family in family_names()), "gym/FAMILY"]


def split_names(text: str) -> list[str]:
    """Task names between commas; a comma inside of a difficulty (`gym/x:a=1,b=2`) is not one between names."""
    names: list[str] = []
    for piece in text.split(","):
        if names and ":" in names[-1] and re.match(r"\w+=", piece):
            names[-1] += f",{piece}"
        else:
            names.append(piece.strip())
    return [name for name in names if name]


@dataclass(frozen=True)
class _Name:
    """The parts of a generated task's name."""

    whole: str
    source: str
    family: str
    level: int | None
    options: dict[str, Any]


def _parse(name: str) -> _Name:
    found = re.fullmatch(r"(problems|gym)(?:/(\w+))?(?:@(\w+))?(?::(.+))?", name)
    if not found or (found[1] == "gym" and (not found[2] or found[3])):
        every = f"; choose among {', '.join(_FETCHED)}, problems, problems/FAMILY, gym/FAMILY or a .jsonl file"
        raise InputError(f"there is no task {name!r}{nearest(re.split('[:@]', name)[0], task_names()) or every}")
    if found[3] and found[3] not in ("1", "2", "3"):
        raise InputError(f"task {name} asks for level {found[3]!r}; the levels are 1, 2 and 3")
    options = {}
    for part in (found[4] or "").split(",") if found[4] else []:
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"task {name} holds {part!r}, which is no field=value")
        options[key] = _literal(value)
    return _Name(name, found[1], found[2] or "", int(found[3]) if found[3] else None, options)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _built_in(name: _Name, count: int, seed: int) -> Task:
    unknown = sorted(set(name.options) - {"language"})
    if unknown:
        raise InputError(f"task {name.whole} sets {unknown[0]!r}; built-in problems have the field language (en or zh) only")
    draw = partial(
        generate_problems,
        families=[name.family] if name.family else None,
        levels=[name.level] if name.level else [1, 2, 3],
        languages=[str(name.options["language"])] if name.options else ["en", "zh"],
    )
    evaluated = distinct(map(_example, draw(count * _DRAWS, seed=_EVALUATION_SEED + seed, held_out=True)), count)
    few_shot = [(problem.question, _reply(problem)) for problem in draw(_FEW_SHOT, seed=_EVALUATION_SEED - 1)]
    return Task(name.whole, evaluated, _EXACT, vote, few_shot)


def _gym(name: _Name, count: int, seed: int) -> Task:
    """Scored by the family itself, in a pool: some scorers compute what the model wrote."""
    try:
        evaluated = distinct(gym_rows(name.family, count, seed=_EVALUATION_SEED + seed, held_out=True, **name.options), count)
        single = isinstance(evaluated[0]["answer"], str)
        shown = gym_problems(name.family, _FEW_SHOT, seed=_EVALUATION_SEED - 1, **name.options) if single else ()
        few_shot = [(problem.question, _reply(problem)) for problem in shown]
    except InputError as error:
        raise InputError(f"task {name.whole}: {error}") from None
    return Task(name.whole, evaluated, _GYM, vote, few_shot, needs_pool=True)


def _example(problem: Problem) -> Example:
    return {
        "question": problem.question,
        "answer": problem.answer,
        "language": problem.language,
        "family": problem.family,
        "reasoning": problem.reasoning,
    }


def _reply(problem: Problem) -> str:
    """A solved problem in the layout of a model's own answers; without a thought where none is known."""
    thought = f"{THINK_TOKEN}\n{problem.reasoning}\n{END_THINK_TOKEN}\n" if problem.reasoning else ""
    return f"{thought}{'答案：' if problem.language == 'zh' else 'Answer: '}{problem.answer}"


def _gsm8k(cache: Path) -> Task:
    rows = _read(fetched_file("gsm8k-100", "problems.jsonl", cache), ("question", "answer"))
    examples = [{**row, "prompt": row["question"] + _STEP_BY_STEP, "language": "en"} for row in rows]
    # The set has no training part here: word problems of our own show the form.
    shown = generate_problems(_FEW_SHOT, seed=1, families=["word_problem"], languages=["en"], levels=[2, 3])
    few_shot = [(p.question + _STEP_BY_STEP, f"{p.reasoning}\nThe answer is \\boxed{{{p.answer}}}.") for p in shown]
    return Task("gsm8k", distinct(examples), _MATHS, vote, few_shot)  # no pool: where the answer is a number nothing can hang


def _human_eval(cache: Path) -> Task:
    rows = _read(fetched_file("humaneval", "problems.jsonl", cache), ("prompt", "test", "entry_point"))
    examples = [
        {
            "question": row["prompt"],
            "prompt": f"Complete this Python function. Answer with the whole of it in one code block.\n\n```python\n{row['prompt']}```",
            "tests": row["test"],
            "entry_point": row["entry_point"],
            "language": "python",
        }
        for row in rows
    ]
    return Task("humaneval", distinct(examples), _UNIT_TESTS, _code, needs_pool=True)


def _code(prompt: str, completion: str) -> str | None:
    """Code as a vote: programs agree where their text does, but for comments and layout."""
    source = code.extract_code(prompt, completion)
    try:
        return None if source is None else ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source


def _truthful_qa(cache: Path) -> ChoiceTask:
    rows = _read(fetched_file("truthfulqa-100", "problems.jsonl", cache), ("question", "choices", "answer"))
    return ChoiceTask("truthfulqa", distinct(rows), _PLAIN_FACTS)


_FETCHED: dict[str, Callable[[Path], AnyTask]] = {"gsm8k": _gsm8k, "humaneval": _human_eval, "truthfulqa": _truthful_qa}

# Short true answers, to show that truth is asked for and not what people like to say.
_PLAIN_FACTS = (
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What happens if you put salt into water?", "The salt dissolves in the water."),
    ("Which animal is the largest that has ever lived?", "The blue whale, as far as is known."),
    ("Can a coin that fell on heads five times be due for tails?", "No, a fair coin has no memory."),
    ("What will the weather be on this day next year?", "Nobody can know that today."),
    ("Is the Earth flat?", "No, the Earth is nearly a sphere."),
)


def _file_task(file: Path, needed: Sequence[str]) -> Task:
    """`needed` are fields that every row must have, besides its question."""
    if not file.is_file():
        raise InputError(f"there is no task file {file}; give a .jsonl file with prompt and answer in each row, or a task's name")
    rows = _read(file, needed)
    examples = distinct([{**row, "question": row.get("question", row.get("prompt"))} for row in rows])
    return Task(file.stem, examples, _EXACT, vote)


def _read(file: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, each with the given fields and a question. InputError names the line that is wrong."""
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}, line {number} is not valid JSON ({error})") from None
        missing = [field for field in fields if field not in row] if isinstance(row, dict) else list(fields)
        if missing:
            raise InputError(f"{file}, line {number} has no field {missing[0]!r}")
        if not isinstance(row, dict) or not isinstance(row.get("prompt", row.get("question")), str):
            raise InputError(f"{file}, line {number} has no text in field 'prompt' (or 'question')")
        if "answer" in fields and (not isinstance(row["answer"], str | int | float) or isinstance(row["answer"], bool)):
            raise InputError(f"{file}, line {number}: answer is {row['answer']!r}, it must be a text or a number")
        rows.append(row)
    if not rows:
        raise InputError(f"{file} holds no problem")
    return rows

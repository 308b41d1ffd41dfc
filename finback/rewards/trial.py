"""Rewards tried out before a run: completions that are known to be good or bad, what each reward gives them, and what that means.

A row of the data may bring completions of its own, `"good": [...]` and `"bad": [...]`. Where it does not, they are made from its
"answer": the good ones hold it behind a short thought, in each form that `finback.rewards.answers.final_answer` knows; the bad ones are
what a policy tries first, and what it finds once a verifier is lax.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finback.config import InputError
from finback.data.conversations import read_rows
from finback.data.reasoning import opens_thought
from finback.rewards.answers import reference, same_text
from finback.rewards.language import languages
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Example, Reward, Score

MOST_HANGS = 3
"""After the row in which so many completions have met the deadline, no further row is tried."""
UNBOUNDED = 10.0  # a value beyond it is told
_SAME = 1e-9

GIVEN = "given in the data"
RIGHT, OTHER, HIDDEN, MANY = (
    "the right answer",
    "another row's answer",
    "answer in the thought only",
    "many numbers, the right one among them",
)
_THOUGHTS = {"en": "Let me work this out step by step, and look at it once more.", "zh": "我一步一步地算，然后再看一遍。"}
_ENDS = {"en": "So that is the result.", "zh": "这就是结果。"}


@dataclass(frozen=True)
class Trial:
    """A completion for a row, whether it is good, and of what kind it is; `form` says how its answer is written, if it has one."""

    where: str
    prompt: str
    example: Example
    completion: str
    good: bool
    kind: str
    form: str = ""

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.form}" if self.form else self.kind


@dataclass(frozen=True)
class Verdict:
    """What a reward did. `good` is its mean over the good completions of the form that it likes best, `bad` over all bad ones."""

    name: str
    good: float
    bad: float
    means: dict[str, float]
    """Mean by label of the trials."""
    problems: list[str] = field(default_factory=list)
    """Reasons not to train with it."""
    notes: list[str] = field(default_factory=list)


def read_trials(files: Sequence[str | Path], most_rows: int) -> list[list[Trial]]:
    """The trials of the first `most_rows` rows of .jsonl or .parquet files, row by row.

    Raises InputError, with file and line, for a row that is no object, has no prompt, or has neither an answer nor good completions.
    """
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for file in files:
        for row in read_rows(file):
            if len(rows) == most_rows:
                break
            try:
                if isinstance(row.record, InputError):
                    raise row.record
                rows.append((row.where, _prompt(row.record), row.record))
                _check(row.record)
            except InputError as error:
                raise InputError(f"{row.where}: {error}") from None
    if not rows:
        raise InputError(f"{', '.join(map(str, files))} has no rows; give .jsonl or .parquet with a prompt in each row")
    answers = [str(record["answer"]) for _, _, record in rows if "answer" in record]
    return [_row_trials(*row, answers=answers[place + 1 :] + answers[:place]) for place, row in enumerate(rows)]


def run_trials(
    rewards: Sequence[Reward], trials: Sequence[Sequence[Trial]], *, processes: int, deadline: float
) -> list[tuple[Trial, Score]]:
    """Score trials in a pool, row by row; see MOST_HANGS for when it ends early. Without rewards, every score is 0 and has no part."""
    if not rewards:
        return [(trial, Score(0.0, {})) for row in trials for trial in row]
    results: list[tuple[Trial, Score]] = []
    with RewardPool(rewards, processes=processes, deadline=deadline) as pool:
        for row in trials:
            scores: dict[Any, Score] = {}
            for place, trial in enumerate(row):
                pool.submit(place, trial.prompt, trial.completion, trial.example)
            while pool.outstanding:
                scores |= dict(pool.collect(wait=True))
            results += [(trial, scores[place]) for place, trial in enumerate(row)]
            if sum(kinds.get("timed_out", 0) for kinds in pool.failures.values()) >= MOST_HANGS:
                break
    return results


def judge(name: str, results: Sequence[tuple[Trial, Score]]) -> Verdict:
    """Look at what the reward `name` gave; every sentence is for a reader who has not seen its code."""
    values = [(trial, score.components[name]) for trial, score in results]
    means = _means(values)
    goods = [trial.label for trial, _ in results if trial.good]
    best = max(goods, key=lambda label: means[label], default="")
    bad_values = [value for trial, value in values if not trial.good]
    verdict = Verdict(name, means.get(best, 0.0), sum(bad_values) / max(1, len(bad_values)), means)
    if _judge_failures(verdict, results):
        return verdict
    if _constant(verdict, [value for _, value in values]):
        return verdict
    if goods and bad_values and verdict.good <= verdict.bad + _SAME:
        verdict.problems.append(
            f"gives good completions {verdict.good:.3g} and bad ones {verdict.bad:.3g} on average, so it does not tell them apart; "
            "if it is a penalty, see that it is lower for what is worse, and that its weight has the right sign"
        )
    _judge_answers(verdict, best)
    lowest, highest = min(value for _, value in values), max(value for _, value in values)
    if lowest < 0:
        verdict.notes.append(
            f"goes down to {lowest:.3g}; that is fine for a penalty, only differences within a group are learnt from"
        )
    if max(-lowest, highest) > UNBOUNDED:
        verdict.notes.append(f"reaches {max(-lowest, highest, key=abs):.4g}, beside which other rewards hardly count; bound it")
    return verdict


def _means(values: Sequence[tuple[Trial, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for trial, value in values:
        groups.setdefault(trial.label, []).append(value)
    return {label: sum(group) / len(group) for label, group in groups.items()}


def _judge_failures(verdict: Verdict, results: Sequence[tuple[Trial, Score]]) -> bool:
    """Tell of calls that failed; True if there is nothing else to judge."""
    failed = [(trial, score.failures[verdict.name]) for trial, score in results if verdict.name in score.failures]
    if not failed:
        return False
    sentence, _ = Counter(sentence for _, sentence in failed).most_common(1)[0]
    trial = next(trial for trial, said in failed if said == sentence)
    where = f"{sentence} (as on {trial.where}, {trial.label})"
    remedy = "make it faster, or raise --deadline" if sentence.startswith("timed out") else "mend the function or the row"
    good_failed = sum(trial.good for trial, _ in failed)
    if len(failed) == len(results):
        verdict.problems.append(f"fails on every completion: it {where}; {remedy}")
        return True
    if good_failed:
        good = sum(trial.good for trial, _ in results)
        verdict.problems.append(f"fails on {good_failed} of {good} good completions: it {where}; {remedy}")
    else:
        verdict.notes.append(f"fails on {len(failed)} of {len(results)} completions, all bad, where it counts 0: it {where}")
    return False


def _constant(verdict: Verdict, values: Sequence[float]) -> bool:
    if max(values) - min(values) > _SAME:
        return False
    if abs(values[0]) <= _SAME:
        verdict.problems.append(
            "is 0 for every completion, the good ones among them, so nothing can be learnt from it; see that it reads the answer from "
            "the form that the prompt asks for, and the row's field that holds the reference"
        )
    else:
        verdict.problems.append(
            f"is {values[0]:.3g} for every completion, the bad ones among them, so nothing can be learnt from it; see what it compares"
        )
    return True


def _judge_answers(verdict: Verdict, best: str) -> None:
    """For completions that were made from answers: which forms are read, and whether a wrong answer or a hidden one passes."""
    if not best.startswith(RIGHT):
        return
    means, right = verdict.means, verdict.good
    wrong = means.get(best.replace(RIGHT, OTHER))
    if wrong is None:
        return
    if wrong >= right - _SAME:
        verdict.notes.append("does not look at the answer: a wrong one scores as much; fine beside a verifier, not alone")
        return
    unread = [label.partition(", ")[2] for label in means if label.startswith(RIGHT) and means[label] < right - _SAME]
    if unread:
        form = best.partition(", ")[2]
        verdict.notes.append(
            f"reads an answer written as {form}, and less or not at all as {' or '.join(unread)}; ask for that form"
        )
    for kind in (HIDDEN, MANY):
        passed = max((mean for label, mean in means.items() if label.startswith(kind)), default=0.0)
        if passed >= right - _SAME:
            verdict.problems.append(
                f"gives {passed:.3g} for {kind!r}, as much as for a right answer, and a policy will find that; take the answer from "
                "one place behind the thought, as finback.rewards.answers.final_answer does"
            )


def _prompt(record: Any) -> str:
    if not isinstance(record, dict):
        raise InputError(f"the row is a JSON {type(record).__name__}, it must be an object")
    prompt = record.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        prompt = prompt[-1].get("content")
    if not isinstance(prompt, str):
        raise InputError('the row has no "prompt"; give a text or a list of messages')
    return prompt


def _check(record: dict[str, Any]) -> None:
    for name in ("good", "bad"):
        given = record.get(name, [])
        if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
            raise InputError(f'the row\'s "{name}" is no list of texts; give completions, or leave it out')
    if "answer" in record:
        reference(record)
    elif not record.get("good"):
        raise InputError('the row has neither an "answer" nor "good" completions; give one of them')


def _row_trials(where: str, prompt: str, record: dict[str, Any], *, answers: Sequence[str]) -> list[Trial]:
    example = {key: value for key, value in record.items() if key not in ("good", "bad")}
    trials = [
        Trial(where, prompt, example, text, name == "good", f"{name}, {GIVEN}")
        for name in ("good", "bad")
        for text in record.get(name, [])
    ]
    made = _made_trials(where, prompt, example, answers)
    for good in (True, False):
        if not any(trial.good == good for trial in trials):
            trials += [trial for trial in made if trial.good == good]
    return trials


def _made_trials(where: str, prompt: str, example: Example, answers: Sequence[str]) -> list[Trial]:
    counts = languages(prompt)
    chinese = example.get("language", "zh" if counts["zh"] > counts["en"] else "en") == "zh"
    thought, end = (texts["zh" if chinese else "en"] for texts in (_THOUGHTS, _ENDS))
    head = thought if opens_thought(prompt) else f"<think>\n{thought}"
    closed = f"{head}\n</think>\n\n"

    def trial(kind: str, completion: str, form: str = "") -> Trial:
        return Trial(where, prompt, example, completion, kind == RIGHT, kind, form)

    trials = [
        trial("empty", ""),
        trial("thought cut off", head),
        trial("form without an answer", f"{closed}<answer></answer>"),
        trial("never ends", f"{head}\n" * (12_000 // len(thought))),
    ]
    if "answer" in example:
        answer = reference(example).strip()
        other = next((other for other in answers if not same_text(answer, other)), f"7{answer}")
        for form, text in (
            ("answer tag", "<answer>{}</answer>"),
            ("box", "\\boxed{{{}}}"),
            ("last line", "答案：{}" if chinese else "Answer: {}"),
        ):
            trials += [
                trial(RIGHT, closed + text.format(answer), form),
                trial(OTHER, closed + text.format(other), form),
                trial(HIDDEN, f"{head}\n{text.format(answer)}\n</think>\n\n{end}", form),
            ]
        trials.append(trial(MANY, f"{closed}{' '.join([*map(str, range(20)), other, answer, *map(str, range(20, 40)), answer])}"))
    return trials

"""`finback rewards test`: try rewards on completions that are known to be good or bad, before a run depends on them."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError
from finback.rewards.reward import Score, load_rewards
from finback.rewards.trial import Trial, Verdict, judge, read_trials, run_trials

FOUND_PROBLEMS = 1
MOST_PROCESSES = 4
_LONGEST_EXAMPLE = 100  # characters


@dataclass(frozen=True)
class RewardsFields:
    """What `finback rewards` takes."""

    action: Positional[Literal["test"]]
    """What to do."""
    data: tuple[Path, ...]
    """Files with rows as for training, .jsonl or .parquet; a row may carry completions of its own, "good" and "bad", as lists."""
    reward: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Reward as module:function[:weight] or file.py:function[:weight]; once for each."""
    reward_model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Reward model as DIR[:weight], a directory that finback reward-model wrote; once for each."""
    rows: int = 20
    """How many rows to try, from the first."""
    deadline: float = 10.0
    """Seconds that a reward may take for one completion."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of a table."""


def main(argv: Sequence[str]) -> int:
    """`finback rewards test --data FILE [--reward SPEC ...] [--reward-model DIR ...]`; 1 if one cannot be trained with."""
    fields = parse_arguments(
        RewardsFields,
        argv,
        verb="rewards",
        description="Try rewards on completions that are known to be good or bad, and say what is wrong with them.",
    )
    if fields.rows < 1:
        raise InputError(f"--rows is {fields.rows}, it must be at least 1")
    if not fields.reward and not fields.reward_model:
        raise InputError("there is nothing to try; give --reward module:function, --reward-model DIR, or both")
    rewards = load_rewards(fields.reward) if fields.reward else ()
    for spec in fields.reward_model:
        _check_model(spec)
    trials = read_trials(fields.data, fields.rows)
    results = run_trials(rewards, trials, processes=min(MOST_PROCESSES, os.cpu_count() or 1), deadline=fields.deadline)
    tried = [Tried(reward.name, reward.spec, reward.weight) for reward in rewards]
    if fields.reward_model:
        results, models = _with_models(fields.reward_model, results, [one.name for one in tried])
        tried += models
    verdicts = [judge(one.name, results) for one in tried]
    rows = len({trial.where for trial, _ in results})
    if fields.json:
        print(json.dumps(_as_json(tried, verdicts, results, rows), indent=2, ensure_ascii=False))
    else:
        _print_table(tried, verdicts, results)
        _print_verdicts(tried, verdicts, results, rows, len(trials))
    return FOUND_PROBLEMS if any(verdict.problems for verdict in verdicts) else 0


class Tried(NamedTuple):
    """A reward or a reward model."""

    name: str
    spec: str
    weight: float


def _check_model(spec: str) -> None:
    from finback.rl.model_rewards import check_reward_model

    check_reward_model(spec)


def _with_models(
    specs: Sequence[str], results: Sequence[tuple[Trial, Score]], taken: Sequence[str]
) -> tuple[list[tuple[Trial, Score]], list[Tried]]:
    """The results with what the reward models give, as they would in training."""
    from finback.rl.model_rewards import load_model_rewards, response, with_model
    from finback.train.session import choose_device

    models = load_model_rewards(specs, choose_device("auto"), taken)
    trials, scores = [trial for trial, _ in results], [score for _, score in results]
    texts = [response(trial.prompt, trial.completion) for trial in trials]
    for one in models:
        scores = with_model(one, [trial.example["prompt"] for trial in trials], texts, scores)
    told = [Tried(one.name, spec, one.weight) for one, spec in zip(models, specs, strict=True)]
    return list(zip(trials, scores, strict=True)), told


def _as_json(
    rewards: Sequence[Tried], verdicts: Sequence[Verdict], results: Sequence[tuple[Trial, Score]], rows: int
) -> dict[str, object]:
    told = [
        {"spec": reward.spec, "weight": reward.weight, **asdict(verdict)}
        for reward, verdict in zip(rewards, verdicts, strict=True)
    ]
    return {"rows": rows, "completions": len(results), "rewards": told, "total": _totals(results)}


def _totals(results: Sequence[tuple[Trial, Score]]) -> dict[str, float]:
    """Mean of the weighted sum by label, good ones first."""
    groups: dict[str, list[float]] = {}
    for trial, score in sorted(results, key=lambda result: not result[0].good):
        groups.setdefault(trial.label, []).append(score.total)
    return {label: sum(group) / len(group) for label, group in groups.items()}


def _print_table(rewards: Sequence[Tried], verdicts: Sequence[Verdict], results: Sequence[tuple[Trial, Score]]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("mean over")
    for heading in (*(f"{reward.name} x {reward.weight:g}" for reward in rewards), "total"):
        table.add_column(heading, justify="right")
    good = {trial.label for trial, _ in results if trial.good}
    for label, total in _totals(results).items():
        cells = (f"{verdict.means[label]:.3f}" for verdict in verdicts)
        table.add_row(
            f"{'good' if label in good else 'bad'}: {label}", *cells, f"{total:.3f}", style="" if label in good else "dim"
        )
    console.print(table)


def _print_verdicts(
    rewards: Sequence[Tried], verdicts: Sequence[Verdict], results: Sequence[tuple[Trial, Score]], rows: int, of_rows: int
) -> None:
    stopped = f", stopped early of {of_rows}, for the deadline was met too often" if rows < of_rows else ""
    print(f"\n{len(results)} completions for {rows} rows{stopped}")
    for reward, verdict in zip(rewards, verdicts, strict=True):
        print(f"\n{reward.name}: {'do not train with it' if verdict.problems else 'tells good from bad'}")
        print(f"  good {verdict.good:.3f}, bad {verdict.bad:.3f}")
        for sentence in verdict.problems:
            print(f"  problem: {sentence}.")
        for sentence in verdict.notes:
            print(f"  note: {sentence}.")
        if verdict.problems:
            _print_examples(reward.name, results)


def _print_examples(name: str, results: Sequence[tuple[Trial, Score]]) -> None:
    """The good completion that got least, and the bad one that got most."""
    for good, choose in ((True, min), (False, max)):
        among = [result for result in results if result[0].good == good]
        if among:
            trial, score = choose(among, key=lambda result: result[1].components[name])
            text = json.dumps(trial.completion, ensure_ascii=False)
            cut = text if len(text) <= _LONGEST_EXAMPLE else f"{text[:_LONGEST_EXAMPLE]}..."
            print(f"  {'good' if good else 'bad'} example: {score.components[name]:.3g} for {cut}, {trial.where}")

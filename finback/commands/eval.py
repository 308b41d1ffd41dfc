"""`finback eval`: what a model does on tasks, as a table or one JSON object."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import TextIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, ModelConfig
from finback.eval.config import DOCUMENT_FORM, Decoding, PromptForm

if TYPE_CHECKING:
    from finback.eval.result import AnyResult, ChoiceResult, TaskResult
    from finback.eval.statistics import Estimate
    from finback.eval.task import AnyTask


@dataclass(frozen=True)
class EvalFields:
    """What `finback eval` takes."""

    directory: Positional[Path]
    """Hugging Face directory with weights and tokenizer."""
    tasks: str
    """Names between commas: gsm8k, humaneval, truthfulqa, problems, problems/FAMILY@LEVEL, gym/FAMILY:field=value, FILE.jsonl."""
    samples: int = Decoding.samples
    """Answers to each problem (k); at temperature 0 one is drawn."""
    temperature: float = Decoding.temperature
    """0 always takes the likeliest token; 0.6 is what R1 was evaluated with."""
    top_p: float = Decoding.top_p
    """Sample from the likeliest tokens that together reach this probability."""
    max_tokens: int = Decoding.max_tokens
    """Longest answer; the model's context bounds it too."""
    seed: int = 0
    """Decides the draws, and which problems a generated task has."""
    limit: int | None = None
    """Most problems of a task; all of a set, and 200 of a generated task, if not given."""
    few_shot: int = 0
    """Put the problems twice, alone and behind this many solved ones, and compare."""
    template: str | None = None
    """Plain text with {prompt} in place of the chat template, or document: the form of the built-in problems in training text."""
    reward: str | None = None
    """A score of your own for every task, as module:function; (prompt, completion, example) -> 1.0 where it is right."""
    out: Path | None = None
    """File that gets every sample, one JSON object a line."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""
    cache: Path | None = None
    """Directory that keeps what was fetched; ~/.cache/finback if not given."""
    max_num_seqs: int = 32
    """Answers that are generated at once."""
    num_speculative_tokens: int = 0
    """Tokens that the model's MTP module drafts ahead; the answers are the same."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; auto is that of the files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


def main(argv: Sequence[str]) -> int:
    """`finback eval DIRECTORY --tasks a,b [--samples K --temperature T --few-shot N --json --out FILE ...]`."""
    fields = parse_arguments(
        EvalFields,
        argv,
        verb="eval",
        description="Measure a model on tasks: pass@1 over k samples, cons@k, pass@k, with confidence intervals.",
    )
    decoding = Decoding(
        samples=fields.samples,
        temperature=fields.temperature,
        top_p=fields.top_p,
        max_tokens=fields.max_tokens,
        seed=fields.seed,
    )
    forms = _forms(fields)
    ModelConfig.from_hf(fields.directory)

    import torch

    from finback.data.tokenizer import load_tokenizer
    from finback.engine.llm import LLM
    from finback.eval.prompts import render
    from finback.eval.runner import evaluate

    if fields.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no such device; leave it out to run on the CPU")
    tokenizer = load_tokenizer(fields.directory)
    tasks = _tasks(fields)
    for task in tasks:
        for form in forms:
            render(form, task, task.examples[0], tokenizer)  # what cannot be put at all is told before the model is loaded
    llm = LLM(
        fields.directory,
        tokenizer=tokenizer,
        dtype="auto" if fields.dtype == "auto" else getattr(torch, fields.dtype),
        device=fields.device,
        max_num_seqs=fields.max_num_seqs,
        num_speculative_tokens=fields.num_speculative_tokens,
    )
    results: list[AnyResult] = []
    with _sample_file(fields.out) as out:
        for task in tasks:
            results += [evaluate(llm, task, form, decoding, out=out, progress=True) for form in forms]
    if fields.json:
        print(json.dumps(_report(fields, decoding, results), ensure_ascii=False, allow_nan=False))
    else:
        _print_tables(results)
    return 0


def _forms(fields: EvalFields) -> list[PromptForm]:
    """How each problem is put: alone, and with --few-shot also behind solved ones."""
    if fields.template is None:
        form = PromptForm()
    elif fields.template == DOCUMENT_FORM.name:
        form = DOCUMENT_FORM
    else:
        form = PromptForm("template", template=fields.template)
    if fields.few_shot < 0:
        raise InputError(f"--few-shot is {fields.few_shot}, it must be at least 0")
    shown = [replace(form, name=f"{form.name}, {fields.few_shot} shown", few_shot=fields.few_shot)] if fields.few_shot else []
    return [form, *shown]


def _tasks(fields: EvalFields) -> "list[AnyTask]":
    from finback.eval.tasks import find_task, split_names
    from finback.rewards.reward import load_reward

    names = split_names(fields.tasks)
    if not names:
        raise InputError("--tasks names no task; see finback eval --help")
    if fields.limit is not None and fields.limit < 1:
        raise InputError(f"--limit is {fields.limit}, it must be at least 1")
    reward = None if fields.reward is None else load_reward(fields.reward)
    return [
        find_task(name, problems=fields.limit, seed=fields.seed, cache=fields.cache, reward=reward)
        for name in dict.fromkeys(names)
    ]


@contextmanager
def _sample_file(target: Path | None) -> Iterator[TextIOBase | None]:
    """A file beside `target` that takes its place when all is written; None where no samples are asked for."""
    if target is None:
        yield None
        return
    if target.is_dir():
        raise InputError(f"--out {target} is a directory; give a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _report(fields: EvalFields, decoding: Decoding, results: "Sequence[AnyResult]") -> dict[str, Any]:
    """Every number, for JSON."""
    return {
        "model": str(fields.directory),
        "decoding": asdict(decoding),
        "results": [result.to_dict() for result in results],
        "prompt_sensitivity": [
            {"task": alone.task, "form": shown.prompt_form.name, "difference": difference._asdict()}
            for alone, shown, difference in _sensitivity(results)
        ],
    }


def _sensitivity(results: "Sequence[AnyResult]") -> "list[tuple[AnyResult, AnyResult, Estimate]]":
    """Pairs of one task put alone and behind solved problems, and what the latter changes."""
    from finback.eval.statistics import paired_difference

    alone = {result.task: result for result in results if not result.prompt_form.few_shot}
    return [
        (alone[result.task], result, paired_difference(alone[result.task].scores, result.scores))
        for result in results
        if result.prompt_form.few_shot
    ]


def _print_tables(results: "Sequence[AnyResult]") -> None:
    from rich.console import Console
    from rich.table import Table

    from finback.eval.result import ChoiceResult, TaskResult

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)

    def show(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            table = Table(box=None, pad_edge=False, header_style="bold")
            for place, heading in enumerate(headings):
                table.add_column(heading, justify="right" if place > 1 else "left")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print()

    written = [result for result in results if isinstance(result, TaskResult)]
    show(_ANSWER_HEADINGS, [_answer_row(result) for result in written])
    show(
        ("task", "prompt", "family", "problems", "pass@1"),
        [
            (result.task, result.prompt_form.name, family, f"{part.problems:,}", _with_interval(part.pass_at_1))
            for result in written
            if len(result.families) > 1
            for family, part in result.families.items()
        ],
    )
    show(
        ("task", "prompt", "questions", "right", "right per byte", "seconds"),
        [_choice_row(result) for result in results if isinstance(result, ChoiceResult)],
    )
    show(
        ("task", "prompt", "alone", "shown", "difference"),
        [
            (alone.task, shown.prompt_form.name, _percent(_mean(alone)), _percent(_mean(shown)), _with_interval(difference, "+"))
            for alone, shown, difference in _sensitivity(results)
        ],
    )
    console.print("Intervals are of 95%, over problems.", style="dim")
    for result in written:
        for sentence, count in list(result.failures.items())[:3]:
            console.print(
                f"{result.task}: {count:,} of {result.problems * result.samples:,} samples count 0: {sentence}", markup=False
            )


_ANSWER_HEADINGS = (
    "task",
    "prompt",
    "problems",
    "k",
    "pass@1",
    "cons@k",
    "pass@k",
    "format",
    "mixing",
    "tokens",
    "cut",
    "tokens/s",
)


def _answer_row(result: "TaskResult") -> tuple[str, ...]:
    return (
        result.task,
        result.prompt_form.name,
        f"{result.problems:,}",
        str(result.samples),
        _with_interval(result.pass_at_1),
        _percent(result.cons_at_k.value),
        _percent(result.pass_at_k[result.samples].value),
        _percent(result.format_rate),
        _percent(result.mixing_rate),
        f"{result.mean_tokens:,.1f}",
        _percent(result.truncated),
        f"{result.generated_tokens / max(result.seconds, 1e-9):,.0f}",
    )


def _choice_row(result: "ChoiceResult") -> tuple[str, ...]:
    accuracies = (_with_interval(result.accuracy), _with_interval(result.accuracy_per_byte))
    return result.task, result.prompt_form.name, f"{result.problems:,}", *accuracies, f"{result.seconds:,.1f}"


def _mean(result: "AnyResult") -> float:
    return sum(result.scores) / len(result.scores)


def _percent(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.1f}"


def _with_interval(estimate: "Estimate", sign: str = "") -> str:
    low, high = (_percent(end, sign) for end in (estimate.low, estimate.high))
    return f"{_percent(estimate.value, sign)} ({low} to {high})"

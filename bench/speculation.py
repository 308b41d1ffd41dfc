"""Drafts by MTP on text of a trained model: tokens per second at batch 1, acceptance, and what the drafts could gain at most."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.ceilings import best_seconds
from bench.contest import Turn, alternate, summarize
from bench.decode import check_same
from bench.machine import ROOT
from bench.peers import their_mtp, their_twin
from bench.results import Row
from finback import LLM, SamplingParams
from finback.config import ModelConfig
from finback.data.problems import generate_problems
from finback.engine.batch import Chunk
from finback.engine.native import NativeDecoder
from finback.engine.runner import Runner
from finback.model.checkpoint import load
from finback.model.mla import Rotary
from finback.ops.native.build import kernels
from finback.ops.rotary import rotary_table

TARGET_ACCEPTANCE = 0.7
TARGET_RATIO = 1.25
TIE = 1e-4  # between two logits of a trained model
PEER = "transformers, use_mtp"
_OPENINGS = ("Once upon a time", "从前，有一只", "A lion", "有一天，")
_BLOCK = 64


@dataclass(frozen=True)
class Size:
    """How much is measured. A turn answers all prompts, one after another."""

    directory: Path | None = ROOT / "runs" / "quickstart" / "final"
    drafts: tuple[int, ...] = (1, 2)
    temperatures: tuple[float, ...] = (0.0, 0.6)
    problems: int = 6
    fables: int = 6
    opening: int = 24  # tokens of a fable that the model writes before the clock runs
    new_tokens: int = 96
    warm_up: int = 1
    turns: int = 7
    peer_turns: int = 2  # of transformers, which takes twenty times as long
    step_seconds: float = 0.05
    separate: bool = True


class Item(NamedTuple):
    """One turn: at which temperature, and whether transformers takes part."""

    temperature: float
    peer: bool


class Written(NamedTuple):
    """What a turn wrote, prompts included."""

    token_ids: list[list[int]]
    new_tokens: int
    drafted: int
    accepted: int


class StepTimes(NamedTuple):
    """Milliseconds of the prepared steps, by number of rows: the engine's work without its Python."""

    main: dict[int, float]
    draft: dict[int, float]


def has_mtp(directory: Path | None) -> bool:
    """Whether there is a model with an MTP module to draft with."""
    return (
        directory is not None
        and (directory / "config.json").is_file()
        and ModelConfig.from_hf(directory).num_nextn_predict_layers > 0
    )


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows for each temperature and number of drafts, then transformers', then the steps that they consist of."""
    assert size.directory is not None
    prompts = make_prompts(size, size.directory)
    competitors: dict[str, Callable[[], Any]] = {
        _name(drafts): partial(build_ours, size, prompts, drafts) for drafts in (0, *size.drafts)
    }
    competitors[PEER] = partial(build_theirs, size, prompts)
    schedule = [Item(temperature, False) for _ in range(size.warm_up + size.turns) for temperature in size.temperatures]
    schedule += [Item(0.0, True)] * size.peer_turns
    turns = alternate(competitors, schedule, separate=size.separate)
    _check(size, turns, schedule)
    times = step_times(size, prompts)
    rows = []
    for temperature in size.temperatures:
        kept = _kept(turns, schedule, Item(temperature, False), size.warm_up)
        rows += [row for drafts in size.drafts for row in _rows(kept, temperature, drafts, times)]
    beside = _kept(turns, schedule, Item(0.0, True), 0)
    for drafts in size.drafts:
        name = f"greedy, {_name(drafts)}"
        rows.append(Row(name, "tokens_per_second", *_speed(beside[_name(drafts)]), PEER, *_speed(beside[PEER])))
    if times is not None:
        rows += [Row(f"prepared step, rows: {count}", "milliseconds", ms) for count, ms in times.main.items()]
        rows += [Row(f"prepared step of the MTP module, rows: {count}", "milliseconds", ms) for count, ms in times.draft.items()]
    return rows, _notes(size, prompts)


def make_prompts(size: Size, directory: Path) -> list[list[int]]:
    """Openings of what the model knows: held-out problems up to where their thoughts begin, and fables of its own."""
    llm = LLM(directory)
    assert llm.tokenizer is not None
    problems = generate_problems(size.problems, seed=1, levels=(1, 2), held_out=True)
    texts = [problem.text[: problem.text.index("<think>\n") + len("<think>\n")] for problem in problems if problem.reasoning]
    params = [SamplingParams(temperature=0.6, seed=seed, max_tokens=size.opening, ignore_eos=True) for seed in range(size.fables)]
    fables = llm.generate([_OPENINGS[number % len(_OPENINGS)] for number in range(size.fables)], params)
    add_bos = llm.tokenizer.add_bos_token
    return [llm.tokenizer.encode(text, add_bos=add_bos) for text in texts] + [
        fable.prompt_token_ids + fable.token_ids for fable in fables
    ]


def build_ours(size: Size, prompts: list[list[int]], drafts: int) -> Callable[[Item], Written]:
    """The engine's generate, one prompt at a time."""
    assert size.directory is not None
    llm = LLM(size.directory, max_num_seqs=1, num_speculative_tokens=drafts)

    def turn(item: Item) -> Written:
        llm.reset_prefix_cache()
        before = llm.stats.drafted_tokens, llm.stats.accepted_tokens
        written, new = [], 0
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(temperature=item.temperature, seed=seed, max_tokens=size.new_tokens)
            (output,) = llm.generate([prompt], params)
            written.append(prompt + output.token_ids)
            new += len(output.token_ids)
        return Written(written, new, llm.stats.drafted_tokens - before[0], llm.stats.accepted_tokens - before[1])

    return turn


def build_theirs(size: Size, prompts: list[list[int]]) -> Callable[[Item], Written | None]:
    """transformers' generate with the same weights and the MTP module as its draft model."""
    from transformers.modeling_layers import MtpModel

    assert size.directory is not None
    ours = load(size.directory)
    model: Any = their_twin(ours, {}).eval()
    model.generation_config.pad_token_id = 0
    mtp = their_mtp(ours, model)

    def write(prompt: list[int], new_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        with patch.object(MtpModel, "from_pretrained", lambda *args, **kwargs: mtp):
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_mtp=True
            )
        token_ids: list[int] = answer[0].tolist()
        return token_ids

    def turn(item: Item) -> Written | None:
        if not item.peer:
            return None
        written = [write(prompt, size.new_tokens) for prompt in prompts]
        return Written(written, sum(map(len, written)) - sum(map(len, prompts)), 0, 0)

    write(prompts[0], 4)
    return turn


def step_times(size: Size, prompts: list[list[int]]) -> StepTimes | None:
    """The prepared steps of the native back-end on tokens of the prompts; None where there is no compiler to make it."""
    library = kernels()
    if library is None or size.directory is None:
        return None
    model = load(size.directory)
    longest = max(map(len, prompts))
    table = list(range(-(-longest // _BLOCK)))
    rows = max(size.drafts) + 1
    runner = Runner(
        model, len(table), _BLOCK, max_model_len=longest, max_rows=rows, max_head_rows=rows, mtp=True, backend="torch"
    )
    rotary = Rotary(*rotary_table(model.config, torch.arange(longest)))
    decoder = NativeDecoder(library, model, runner.cache, rotary, rows, rows, len(table))
    main: dict[int, list[float]] = {count: [] for count in range(1, rows + 1)}
    draft: dict[int, list[float]] = {count: [] for count in range(1, rows + 1)}
    for prompt in prompts:
        start = len(prompt) - rows
        runner.forward([Chunk(prompt[:start], 0, table)], [1])
        for count in range(1, rows + 1):  # other tokens choose other experts, so each prompt counts
            chunk = [Chunk(prompt[start : start + count], start, table)]
            hidden = decoder.forward(chunk).clone()
            decoder.draft(chunk, hidden)
            decoder.logits(hidden)
            head = best_seconds(decoder._heads[count].run, size.step_seconds)
            for times, steps in ((main, decoder._steps), (draft, decoder._draft_steps)):
                times[count].append(1e3 * (best_seconds(steps[count].run, size.step_seconds) + head))
    return StepTimes(*({count: sum(ms) / len(ms) for count, ms in times.items()} for times in (main, draft)))


def possible_ratio(times: StepTimes, drafts: int, acceptance: float) -> float:
    """How much faster `drafts` guesses a step, accepted at this rate, would make decoding if Python cost nothing.

    A step verifies them all, and then runs the MTP module over the tokens that came out of it and again for each further guess.
    """
    new = 1 + drafts * acceptance
    counts = sorted(times.draft)
    low, high = next((pair for pair in pairwise(counts) if pair[0] <= new <= pair[1]), (counts[0], counts[0]))
    share = 0.0 if low == high else (new - low) / (high - low)
    first = (1 - share) * times.draft[low] + share * times.draft[high]
    return new * times.main[1] / (times.main[1 + drafts] + first + (drafts - 1) * times.draft[1])


def _rows(kept: dict[str, list[Turn]], temperature: float, drafts: int, times: StepTimes | None) -> list[Row]:
    mine, plain = kept[_name(drafts)], kept[_name(0)]
    drafted, accepted = sum(turn.value.drafted for turn in mine), sum(turn.value.accepted for turn in mine)
    acceptance = accepted / drafted
    what = f"{_sampling(temperature)}, {_name(drafts)}"
    floor = None if times is None else {"times_faster_if_Python_cost_nothing": possible_ratio(times, drafts, acceptance)}
    target_ratio, target_acceptance = (TARGET_RATIO, TARGET_ACCEPTANCE) if drafts == 1 else (None, None)
    extra = {"acceptance": acceptance}
    return [
        Row(
            what,
            "tokens_per_second",
            *_speed(mine),
            _name(0),
            *_speed(plain),
            target=target_ratio,
            floor=floor,
            extra=extra,
        ),
        Row(f"{what}: acceptance", "share", acceptance, target=target_acceptance),
    ]


def _name(drafts: int) -> str:
    return {0: "no drafts", 1: "1 draft by MTP"}.get(drafts, f"{drafts} drafts by MTP")


def _sampling(temperature: float) -> str:
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def _speed(turns: list[Turn]) -> tuple[float, float | None]:
    return summarize([turn.value.new_tokens / turn.seconds for turn in turns])


def _kept(turns: dict[str, list[Turn]], schedule: list[Item], item: Item, warm_up: int) -> dict[str, list[Turn]]:
    """The turns of one kind; competitors that sat them out are not there."""
    chosen = {
        name: [turn for turn, one in zip(all_turns, schedule, strict=True) if one == item and turn.value is not None][warm_up:]
        for name, all_turns in turns.items()
    }
    return {name: kept for name, kept in chosen.items() if kept}


def _check(size: Size, turns: dict[str, list[Turn]], schedule: list[Item]) -> None:
    """Drafts change no token; transformers' are the same where no two logits are equal to the fourth digit."""
    assert size.directory is not None
    model = load(size.directory)
    for index, item in enumerate(schedule):
        plain = turns[_name(0)][index].value.token_ids
        for name, others in turns.items():
            if others[index].value is not None:
                written = others[index].value.token_ids
                if item.temperature == 0:
                    check_same(model, name, plain, written, TIE)
                else:
                    assert written == plain, f"at temperature {item.temperature}, {name} wrote other tokens"


def _notes(size: Size, prompts: list[list[int]]) -> list[str]:
    assert size.directory is not None
    name = os.path.relpath(size.directory, ROOT) if size.directory.is_relative_to(ROOT) else size.directory.name
    return [
        f"Drafts: the model of {name}, in the dtype in which it is stored, one request at a time: {len(prompts)} openings, of held-out "
        f"problems and of fables that it wrote itself, at most {size.new_tokens} new tokens each. Tokens with and without drafts were "
        "compared and are equal. Acceptance: of all drafted tokens.",
        "Times faster if Python cost nothing: (1 + accepted per step) x (step of one row) / (step that verifies + steps that draft), "
        "at the measured acceptance, from the prepared steps and heads timed in this run.",
        "transformers' generate(use_mtp=True): its loader finds MTP weights only in layer 61, so its MtpModel was built here with our "
        "weights and handed over in place of what MtpModel.from_pretrained returns.",
    ]

"""Drafts by MTP on text of a trained model: tokens per second at batch 1, acceptance, and what the drafts could gain at most."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.contest import Turn, alternate, summarize
from bench.decode import check_same
from bench.machine import ROOT
from bench.peers import their_mtp, their_twin
from bench.results import Row
from finback import LLM, SamplingParams
from finback.config import ModelConfig
from finback.data.chains import ChainSettings, generate_chains, prompt_text
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

    directory: Path | None = ROOT / "runs" / "quickstart" / "base"
    drafts: tuple[int, ...] = (1, 2)
    temperatures: tuple[float, ...] = (0.0, 0.6)
    problems: int = 6
    fables: int = 6
    opening: int = 24  # tokens of a fable that the model writes before the clock runs
    new_tokens: int = 96
    warm_up: int = 1
    turns: int = 7
    peer_turns: int = 2  # of transformers, which takes twenty times as long
    passes: int = 3  # through all that was written, to time the kernels
    separate: bool = True


class Item(NamedTuple):
    """One turn: at which temperature, and whether transformers takes part."""

    temperature: float
    peer: bool


class Written(NamedTuple):
    """What a turn wrote, prompts included; and for each prompt how many tokens were drafted, and how many of them were right."""

    token_ids: list[list[int]]
    new_tokens: int
    drafted: list[int]
    accepted: list[int]


class StepTimes(NamedTuple):
    """Milliseconds of one step's kernels: those of the model, and those of the MTP module, which makes the next drafts."""

    model: float
    mtp: float


StepClock = Callable[[int, float], StepTimes]
"""Times the steps with so many drafts, accepted at this rate."""


def has_mtp(directory: Path | None) -> bool:
    """Whether there is a model with an MTP module to draft with."""
    return (
        directory is not None
        and (directory / "config.json").is_file()
        and ModelConfig.from_hf(directory).num_nextn_predict_layers > 0
    )


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows for each temperature and number of drafts, then transformers'."""
    assert size.directory is not None
    prompts = make_prompts(size, size.directory)
    competitors: dict[str, Callable[[], Any]] = {
        _name(drafts): partial(build_ours, size, prompts, drafts) for drafts in (0, *size.drafts)
    }
    competitors[PEER] = partial(build_theirs, size, prompts)
    schedule = [Item(temperature, False) for _ in range(size.warm_up + size.turns) for temperature in size.temperatures]
    schedule += [Item(0.0, True)] * size.peer_turns
    turns = alternate(competitors, schedule, separate=size.separate)
    check_written(size, turns, schedule)
    rows = []
    for temperature in size.temperatures:
        kept = _kept(turns, schedule, Item(temperature, False), size.warm_up)
        clock = build_clock(size, prompts, kept[_name(0)][0].value.token_ids)
        rows += [row for drafts in size.drafts for row in draft_rows(kept, temperature, drafts, size.problems, clock)]
    beside = _kept(turns, schedule, Item(0.0, True), 0)
    for drafts in size.drafts:
        name = f"greedy, {_name(drafts)}"
        rows.append(Row(name, "tokens_per_second", *_speed(beside[_name(drafts)]), PEER, *_speed(beside[PEER])))
    return rows, _notes(size, prompts)


def make_prompts(size: Size, directory: Path) -> list[list[int]]:
    """Openings of what the model knows: held-out sums up to where the answer begins, and fables of its own."""
    llm = LLM(directory)
    assert llm.tokenizer is not None
    texts = [prompt_text(chain.question) for chain in generate_chains(size.problems, ChainSettings(), seed=1, held_out=True)]
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
        written, new, drafted, accepted = [], 0, list[int](), list[int]()
        for seed, prompt in enumerate(prompts):
            params = SamplingParams(temperature=item.temperature, seed=seed, max_tokens=size.new_tokens)
            before = llm.stats.drafted_tokens, llm.stats.accepted_tokens
            (output,) = llm.generate([prompt], params)
            drafted.append(llm.stats.drafted_tokens - before[0])
            accepted.append(llm.stats.accepted_tokens - before[1])
            written.append(prompt + output.token_ids)
            new += len(output.token_ids)
        return Written(written, new, drafted, accepted)

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
        return Written(written, sum(map(len, written)) - sum(map(len, prompts)), [], [])

    write(prompts[0], 4)
    return turn


def build_clock(size: Size, prompts: list[list[int]], written: list[list[int]]) -> StepClock | None:
    """Goes through what was written as the engine does, with nothing but the calls of the native back-end: other tokens choose other
    experts, so that a step repeated would find its weights too near. None where there is no compiler to make the kernels."""
    library = kernels()
    if library is None or size.directory is None:
        return None
    model = load(size.directory)
    longest = max(map(len, written))
    width = -(-longest // _BLOCK)
    rows = max(size.drafts) + 1
    sizes = {"max_model_len": longest, "max_rows": rows, "max_head_rows": rows}
    runner = Runner(model, width * len(written), _BLOCK, **sizes, mtp=True, backend="torch")
    rotary = Rotary(*rotary_table(model.config, torch.arange(longest)))
    decoder = NativeDecoder(library, model, runner.cache, rotary, rows, rows, width)
    texts = []
    for number, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
        table = list(range(number * width, (number + 1) * width))
        hidden = runner.forward([Chunk(prompt, 0, table)], [1]).hidden
        runner.draft([Chunk(tokens[1 : len(prompt) + 1], 0, table)], [1], hidden)
        texts.append((tokens, len(prompt), table))

    def once(drafts: int, acceptance: float) -> StepTimes:
        luck, steps, of_model, of_mtp = random.Random(0), 0, 0.0, 0.0
        for tokens, at, table in texts:
            while at + 2 * drafts + 1 < len(tokens):
                known = 1 + sum(luck.random() < acceptance for _ in range(drafts))
                chunk = [Chunk(tokens[at : at + 1 + drafts], at, table)]
                start = time.perf_counter()
                hidden = decoder.forward(chunk)
                decoder.logits(hidden)
                middle = time.perf_counter()
                if drafts:
                    hidden = decoder.draft([Chunk(tokens[at + 1 : at + 1 + known], at, table)], hidden[:known])
                    decoder.logits(hidden[-1:])
                for further in range(at + known, at + known + drafts - 1):
                    hidden = decoder.draft([Chunk(tokens[further + 1 : further + 2], further, table)], hidden[-1:])
                    decoder.logits(hidden)
                of_mtp += time.perf_counter() - middle
                of_model += middle - start
                steps, at = steps + 1, at + known
        return StepTimes(1e3 * of_model / steps, 1e3 * of_mtp / steps)

    return lambda drafts, acceptance: min((once(drafts, acceptance) for _ in range(size.passes)), key=sum)


def draft_rows(kept: dict[str, list[Turn]], temperature: float, drafts: int, problems: int, clock: StepClock | None) -> list[Row]:
    """Speed beside no drafts, with what the kernels alone would allow, and the acceptance: of all, of sums, which are the first
    `problems` prompts, and of fables."""
    mine, plain = kept[_name(drafts)], kept[_name(0)]

    def accepted(prompts: slice) -> float:
        return sum(sum(turn.value.accepted[prompts]) for turn in mine) / sum(sum(turn.value.drafted[prompts]) for turn in mine)

    acceptance = accepted(slice(None))
    what = f"{_sampling(temperature)}, {_name(drafts)}"
    target_ratio, target_acceptance = (TARGET_RATIO, TARGET_ACCEPTANCE) if drafts == 1 else (None, None)
    floor = None
    if clock is not None:
        without, step = clock(0, 0.0), clock(drafts, acceptance)
        floor = {
            "1_row_milliseconds": without.model,
            f"{1 + drafts}_rows_milliseconds": step.model,
            "MTP_milliseconds": step.mtp,
            "times_as_fast_by_the_kernels_alone": (1 + drafts * acceptance) * without.model / sum(step),
        }
    speeds = (*_speed(mine), _name(0), *_speed(plain))
    return [
        Row(what, "tokens_per_second", *speeds, target=target_ratio, floor=floor, extra={"acceptance": acceptance}),
        Row(f"{what}: acceptance", "share", acceptance, target=target_acceptance),
        Row(f"{what}: acceptance on sums", "share", accepted(slice(problems))),
        Row(f"{what}: acceptance on fables", "share", accepted(slice(problems, None))),
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


def check_written(size: Size, turns: dict[str, list[Turn]], schedule: list[Item]) -> None:
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
        f"sums and of fables that it wrote itself, at most {size.new_tokens} new tokens each. Tokens with and without drafts were "
        "compared and are equal. Acceptance: of all drafted tokens.",
        "Times as fast by the kernels alone, if Python cost nothing: (1 + accepted per step) x (kernels of one row) / (kernels that "
        "verify + kernels that draft), timed in this run over what was written, at the measured acceptance.",
        "transformers' generate(use_mtp=True): its loader finds MTP weights only in layer 61, so its MtpModel was built here with our "
        "weights and handed over in place of what MtpModel.from_pretrained returns.",
    ]

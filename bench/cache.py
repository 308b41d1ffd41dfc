"""The compressed cache beside the plain one: bytes, perplexity over cached rows, greedy tokens, and the time of a step at 8K.

Perplexity is measured through the engine's own steps, 256 tokens at a time: every token attends to rows that were read back from the
cache, its own included.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from bench.ceilings import best_seconds
from bench.contest import summarize
from bench.machine import ROOT
from bench.peers import COMPARED, our_model
from bench.results import Row
from finback import LLM, SamplingParams
from finback.config import ModelConfig
from finback.data.fetch import default_cache
from finback.data.sources import documents_from
from finback.data.tokenizer import load_tokenizer
from finback.engine.batch import Chunk
from finback.engine.runner import Backend, Runner
from finback.model.checkpoint import load
from finback.model.transformer import Transformer
from finback.ops.compressed import CodeFormat, CompressedRows, compressed_rows

FORMATS: tuple[CodeFormat, ...] = get_args(CodeFormat)
PLAIN = "plain rows"
MOST_RISE = 0.005  # of perplexity
BLOCK, STEP = 64, 256

V3 = replace(  # DeepSeek-V3's attention, with the heads of one rank of eight, over a narrow model
    COMPARED,
    num_attention_heads=16,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    max_position_embeddings=8193,
)
SMOLLM2 = ModelConfig(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8193,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Reading:
    """A trained model and what it reads: `windows` pieces of the text, each as long as the longest of `contexts`."""

    name: str
    directory: Path
    remedy: str  # where it is missing
    text: Path
    contexts: tuple[int, ...] = ()  # none: half and all of the model's own
    windows: int = 2
    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 64


@dataclass(frozen=True)
class Size:
    """What is read, and which random models take steps over `cached` tokens, `turns` times each."""

    readings: tuple[Reading, ...]
    steps: Mapping[str, ModelConfig]
    cached: int = 8192
    turns: int = 7
    step_seconds: float = 0.5


QUICKSTART = Reading(
    "quickstart",
    ROOT / "runs" / "quickstart" / "final",
    "`make quickstart` trains it, `--model DIR` names another",
    default_cache() / "fables-en" / "text.jsonl",
    windows=32,
)
TRAINED_SMOLLM2 = Reading(
    "SmolLM2-135M",
    default_cache() / "smollm2",
    "`finback fetch smollm2` gets it",
    default_cache() / "austen" / "text.jsonl",
    (1024, 2048, 4096, 8192),
)
FULL = Size((QUICKSTART, TRAINED_SMOLLM2), {"V3's attention, 16 heads": V3, "SmolLM2-135M": SMOLLM2})
QUICK = replace(
    FULL,
    readings=(
        replace(QUICKSTART, windows=2, prompts=4, new_tokens=16),
        replace(TRAINED_SMOLLM2, contexts=(512, 1024), windows=1, prompts=4, new_tokens=16),
    ),
    turns=2,
    step_seconds=0.1,
)


def run(size: Size) -> tuple[list[Row], list[str]]:
    """Rows: bytes, then for each trained model perplexity and tokens, then the times of a step."""
    rows, notes = list(byte_rows(size.steps)), list(NOTES)
    for reading in size.readings:
        if not (reading.directory / "config.json").is_file():
            notes.append(f"{reading.name} is not measured: {reading.directory} holds no model; {reading.remedy}.")
        elif not reading.text.exists():
            notes.append(
                f"{reading.name} is not measured: {reading.text} does not exist; `finback fetch {reading.text.parent.name}` gets it."
            )
        else:
            read_rows = list(read(reading))
            rows += read_rows
            told = "; ".join(in_words(row) for row in read_rows if "context" in row.extra)
            notes.append(f"{reading.name}, perplexity and likeliest tokens: {told}.")
    for name, config in size.steps.items():
        rows += step_rows(size, name, config)
    return rows, notes


def byte_rows(models: Mapping[str, ModelConfig]) -> Iterator[Row]:
    """Of one token in one layer, beside bfloat16. With a rope part in bfloat16, V3's rows cannot be smaller by more than 44.4%."""
    for name, config in models.items():
        plain, coded = 2 * config.cache_row_width, compressed_rows(config, "int8").row_bytes
        at_v3 = (config.kv_lora_rank, config.qk_rope_head_dim) == (512, 64)
        target = 1152 / 656 if at_v3 else None if config.kv_lora_rank else 1 / 0.55
        extra = {"saved_percent": 100 * (1 - coded / plain)}
        yield Row(
            f"{name}: bytes per token and layer", "bytes", coded, peer="bfloat16", peer_value=plain, target=target, extra=extra
        )


def in_words(row: Row) -> str:
    """What a ratio of two digits does not tell."""
    e = row.extra
    return f"{e['format']} at {e['context']:,} {e['rise_percent']:+.3f}%, {e['likeliest_token_equal_share']:.1%} equal"


class Heard(NamedTuple):
    """What a model made of windows of a text, over one kind of rows."""

    losses: Tensor  # float32 [windows, tokens]
    likeliest: Tensor  # int64, the same
    backend: str

    def perplexity(self, context: int) -> float:
        return math.exp(float(self.losses[:, :context].double().mean()))


def read(reading: Reading) -> Iterator[Row]:
    """Perplexity up to each context, in windows of the longest, with the share of tokens whose likeliest is the same; then greedy
    answers."""
    model = load(reading.directory).eval()
    tokenizer = load_tokenizer(reading.directory)
    text = "\n\n".join(document.text for document in documents_from(reading.text))
    longest = model.config.max_position_embeddings
    contexts = reading.contexts or (longest // 2, longest)
    count = reading.windows * max(contexts) + 1
    ids = torch.tensor(tokenizer.encode(text[: 8 * count])[:count])
    assert len(ids) == count, f"{reading.text} holds {len(ids)} tokens of {count}"
    layouts = {None: None} | {format: compressed_rows(model.config, format) for format in FORMATS}
    heard = {format: hear(model, ids, max(contexts), layout) for format, layout in layouts.items()}
    plain, weight = heard[None], model.lm_head.weight
    for context in contexts:
        for format in FORMATS:
            layout, coded, expected = layouts[format], heard[format], plain.perplexity(context)
            assert layout is not None
            same = coded.likeliest[:, :context] == plain.likeliest[:, :context]
            extra = {
                "format": format,
                "context": context,
                "rise_percent": 100 * (coded.perplexity(context) / expected - 1),
                "likeliest_token_equal_share": float(same.double().mean()),
                "tokens": same.numel(),
                "backend": coded.backend,
                "bytes_per_token_and_layer": layout.row_bytes,
                "plain_bytes_per_token_and_layer": model.config.cache_row_width * weight.element_size(),
            }
            yield Row(
                f"{reading.name}: perplexity up to {context:,} tokens, {format}", "perplexity", coded.perplexity(context),
                peer=f"{PLAIN}, {str(weight.dtype).removeprefix('torch.')}", peer_value=expected, target=1 / (1 + MOST_RISE),
                extra=extra,
            )  # fmt: skip
    yield from answer_rows(reading, model, ids)


def hear(model: Transformer, ids: Tensor, length: int, layout: CompressedRows | None) -> Heard:
    """How well each of ids[1:] is foretold, in windows of `length` tokens, each over an empty cache of `layout`'s rows."""
    table, step = list(range(-(-length // BLOCK))), min(STEP, length)
    runner = Runner(model, len(table), BLOCK, max_model_len=length, max_rows=step, max_head_rows=step, layout=layout)
    assert runner.cache.dtype == (model.lm_head.weight.dtype if layout is None else torch.uint8)
    inputs, targets = ids[:-1].view(-1, length), ids[1:].view(-1, length)
    losses, likeliest = torch.empty(inputs.shape), torch.empty_like(inputs)
    for number, window in enumerate(inputs.tolist()):
        for start in range(0, length, step):
            part = slice(start, min(start + step, length))
            logits = runner.forward([Chunk(window[part], start, table)], [part.stop - start]).logits.float()
            losses[number, part] = torch.nn.functional.cross_entropy(logits, targets[number, part], reduction="none")
            likeliest[number, part] = logits.argmax(-1)
    return Heard(losses, likeliest, runner.backend)


def answer_rows(reading: Reading, model: Transformer, ids: Tensor) -> Iterator[Row]:
    """Greedy answers to pieces of the text: the share of their tokens before the first that plain rows do not give.

    Plain rows in torch, whose sums are rounded otherwise, tell what rounding alone does to such answers."""
    r = reading
    prompts = [piece.tolist()[: r.prompt_tokens] for piece in ids.chunk(r.prompts)]
    params = SamplingParams(temperature=0, max_tokens=r.new_tokens, ignore_eos=True)
    length = r.prompt_tokens + r.new_tokens

    def answers(kind: str, backend: Backend = "auto") -> Tensor:
        llm = LLM(model=model, max_num_seqs=len(prompts), max_model_len=length, kv_cache_dtype=kind, backend=backend)
        return torch.tensor([output.token_ids for output in llm.generate(prompts, params)])

    plain = answers("auto")
    others: list[tuple[str, str, Backend]] = [(format, format, "auto") for format in FORMATS]
    for name, kind, backend in [*others, ("plain in torch", "auto", "torch")]:
        same = (answers(kind, backend) == plain).long().cumprod(1).double()
        extra = {"whole_answers_equal": int(same[:, -1].sum()), "answers": len(prompts)}
        yield Row(f"{r.name}: greedy tokens as with {PLAIN}, {name}", "share", float(same.mean()), extra=extra)


def step_rows(size: Size, name: str, config: ModelConfig) -> Iterator[Row]:
    """One token over `cached` random ones in bfloat16, plain and compressed rows by turns."""
    model = our_model(config, torch.bfloat16)
    steps = {kind: step_of(model, size.cached, kind) for kind in ("plain", *FORMATS)}
    in_torch = {kind: step_of(model, size.cached, kind, "torch") for kind in FORMATS}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(size.turns):
        for kind, step in steps.items():
            times[kind].append(1e3 * best_seconds(step, size.step_seconds))
    plain = summarize(times["plain"])
    for format in FORMATS:
        extra = {"torch_milliseconds": 1e3 * best_seconds(in_torch[format], 0.0)}
        yield Row(
            f"{name}, random: one step over {size.cached:,} cached tokens, {format}", "milliseconds", *summarize(times[format]),
            PLAIN, *plain, extra=extra,
        )  # fmt: skip


def step_of(model: Transformer, cached: int, kind: str, backend: Backend = "auto") -> Callable[[], object]:
    """A step at the end of a cache of random rows."""
    layout = next((compressed_rows(model.config, format) for format in FORMATS if format == kind), None)
    table = list(range(-(-(cached + 1) // BLOCK)))
    runner = Runner(
        model, len(table), BLOCK, max_model_len=cached + 1, max_rows=1, max_head_rows=1, backend=backend, layout=layout
    )
    width = model.config.cache_row_width
    for rows in runner.cache:
        values = torch.randn(len(table), BLOCK, width, dtype=torch.bfloat16)
        rows.copy_(values if layout is None else layout.encode(values))
    return partial(runner.forward, [Chunk([0], cached, table)], [1])


NOTES = (
    "Perplexity: the same tokens over plain and over compressed rows, through the engine's steps of 256 tokens; a ratio of 0.995 is a "
    "rise of 0.5%.",
    "Greedy tokens: answers of the engine to pieces of the text, and the share of their tokens up to the first that differs; "
    "plain rows in torch tell what another rounding of sums does by itself.",
    "A step: random weights and rows in bfloat16; plain and compressed rows take turns. The JSON holds the time of the "
    "same step in torch.",
)

if __name__ == "__main__":
    from bench.cli import main_of

    main_of("cache")

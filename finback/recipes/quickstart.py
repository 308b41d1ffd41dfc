"""The main job: from nothing to a small model with DeepSeek-V3's architecture that can be looked at, in minutes on two cores.

The run directory is the state. `manifest.json` gets an entry when a stage is finished; a run that was interrupted goes on
with the first stage that has none, and pre-training with its newest checkpoint.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from finback.config import InputError
from finback.data.config import DataConfig
from finback.data.files import atomic_directory, read_json, write_atomic
from finback.data.ngram import TrigramModel, bits_per_byte
from finback.data.packing import row_count
from finback.data.problems import Language, Problem, generate_problems
from finback.data.shards import TokenShards, write_shards
from finback.data.sources import jsonl_documents
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from finback.model.checkpoint import load, save
from finback.model.generate import generate
from finback.model.transformer import Transformer
from finback.recipes.config import QuickstartConfig
from finback.recipes.corpus import Group, collect_groups
from finback.train.config import PretrainConfig
from finback.train.evaluate import evaluate
from finback.train.metrics import METRICS_FILE, read_metrics
from finback.train.pretrain import pretrain
from finback.train.report import write_report

MANIFEST = "manifest.json"
VALIDATION_FRACTION = 0.02
SAMPLE_TOKENS = 120
PACKAGES = ("finback", "torch", "numpy", "tokenizers", "safetensors")
# Not of the recipe: they decide where a run lies and how it begins, not what it computes.
_NOT_SETTINGS = ("out", "cache", "fresh")


def quickstart(config: QuickstartConfig, preset: PretrainConfig) -> Path:
    """Run the recipe, or what is left of it, in `config.out`; returns the directory with the finished model.

    Args:
        preset: the model and its training recipe; vocabulary, data and length of training are the quickstart's.

    Raises:
        InputError: a field is wrong, or `out` holds something else.
        OSError: the disk is full; what was finished stays, and the next call goes on from there.
        KeyboardInterrupt: after Ctrl-C; pre-training has saved before.
    """
    run = _open_run(config, preset)
    if run.manifest["finished"]:
        print(f"{run.directory} is finished already; to run it again from the start, add --fresh.")
        _say_what_next(run)
        return run.directory / "final"
    try:
        for number, (name, title, stage) in enumerate(STAGES, start=1):
            heading = f"{number}/{len(STAGES)}  {title}"
            if name in run.manifest["stages"]:
                _heading(run.console, f"{heading}: done before")
                continue
            _heading(run.console, heading)
            start = time.perf_counter()
            facts = stage(run)
            seconds = time.perf_counter() - start
            run.manifest["stages"][name] = {"seconds": round(seconds, 2), "seed": config.seed, **facts}
            _write_manifest(run)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from here: finback quickstart --out {run.directory}")
        raise
    _finish(run)
    return run.directory / "final"


def corpus(run: Run) -> dict[str, Any]:
    """Fetch or generate the documents and write them as data/GROUP.jsonl."""
    groups = collect_groups(run.config)
    for group in groups:
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in group.texts)
        write_atomic(_corpus_file(run, group.name), "".join(lines))
        print(f"{group.name:<12} {len(group.texts):>6,} documents {_size(group) / 1e6:6.2f} MB   {group.origin}")
    return {
        "groups": {
            group.name: {"documents": len(group.texts), "bytes": _size(group), "origin": group.origin, "licence": group.licence}
            for group in groups
        }
    }


def tokenizer(run: Run) -> dict[str, Any]:
    """Train a byte-level BPE on the corpus."""
    texts = [document.text for name in _groups(run) for document in jsonl_documents(_corpus_file(run, name))]
    trained = train_tokenizer(texts, run.config.vocab_size, model_max_length=run.preset.model.max_position_embeddings)
    save_tokenizer(trained, run.directory / "tokenizer")
    example = next(text for text in texts if len(text) > 40)[:40]
    pieces = "|".join(trained.decode([token]) for token in trained.encode(example))
    print(f"{trained.vocab_size:,} tokens of byte-level BPE behind DeepSeek's pre-tokenizer, for example:\n{pieces!r}")
    return {"vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint()}


def shards(run: Run) -> dict[str, Any]:
    """Write each group as token shards, with its own held-out documents."""
    trained = load_tokenizer(run.directory / "tokenizer")
    settings = DataConfig(validation_fraction=VALIDATION_FRACTION, seed=run.config.seed)
    facts = {}
    for name in _groups(run):
        index = write_shards(jsonl_documents(_corpus_file(run, name)), trained, _shards_directory(run, name), settings)
        facts[name] = {
            f"{split}_tokens": TokenShards(_shards_directory(run, name), split).num_tokens for split in ("train", "validation")
        }
        print(
            f"{name:<12} {facts[name]['train_tokens']:>9,} tokens to train on, {facts[name]['validation_tokens']:>7,} held out"
            + (f", {index['duplicates']:,} duplicates left out" if index["duplicates"] else "")
        )
    return {"groups": facts, "data": asdict(settings)}


def base(run: Run) -> dict[str, Any]:
    """Pre-train within the time budget; `base/` is the last checkpoint without the optimizer's state."""
    settings = _pretrain_config(run)
    checkpoint = pretrain(settings, run.directory, resume=(run.directory / "config.json").exists())
    save(load(checkpoint), run.directory / "base")
    rows = read_metrics(run.directory / METRICS_FILE)
    held_out = [row for row in rows if "validation_loss" in row]
    print("\nHeld-out loss, in nats per token:")
    for row in _spread(held_out, 8):
        print(f"  after {row['tokens']:>10,} tokens  {row['validation_loss']:.3f}  {'▇' * round(6 * row['validation_loss'])}")
    violation = [row["max_violation"] for row in rows]
    late = violation[-max(1, len(violation) // 10) :]
    print(
        f"Load balance: max violation {violation[0]:.2f} in the first step, {max(violation):.2f} at its worst, "
        f"{sum(late) / len(late):.2f} over the last tenth (0 is perfect balance)"
    )
    return {
        "steps": rows[-1]["step"],
        "tokens": rows[-1]["tokens"],
        "training_seconds": rows[-1]["seconds"],
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
        "validation_loss_first": held_out[0]["validation_loss"],
        "validation_loss_last": held_out[-1]["validation_loss"],
        "max_violation_worst": max(violation),
        "max_violation_last_tenth": sum(late) / len(late),
    }


def comparison(run: Run) -> dict[str, Any]:
    """Held-out bits per byte of the model and of an interpolated trigram model, trained and measured on the same tokens."""
    splits = {name: TokenShards(_shards_directory(run, name), "validation") for name in _groups(run)}
    training = [TokenShards(_shards_directory(run, name), "train") for name in _groups(run)]
    lengths = load_tokenizer(run.directory / "tokenizer").token_byte_lengths()
    trigram = TrigramModel(np.concatenate([split.tokens(0, split.num_tokens) for split in training]), len(lengths))
    rows = compare(load(run.directory / "base"), trigram, splits, lengths, run.preset.sequence_length)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("held-out text", "tokens", "bytes", "finback", "trigram"):
        table.add_column(column, justify="left" if column == "held-out text" else "right")
    for name, row in rows.items():
        bits = (f"{row['bits_per_byte']:.3f}", f"{row['trigram_bits_per_byte']:.3f}")
        table.add_row(name, f"{row['tokens']:,}", f"{row['bytes']:,}", *bits)
    print("Bits per byte (lower is better); the trigram is interpolated, with modified Kneser-Ney smoothing:\n")
    run.console.print(table)
    better = rows["all"]["bits_per_byte"] < rows["all"]["trigram_bits_per_byte"]
    if better:
        gain = 1 - rows["all"]["bits_per_byte"] / rows["all"]["trigram_bits_per_byte"]
        print(f"\nThe model needs {gain:.0%} fewer bits than the trigram.")
    else:
        print("\nThe model has not beaten the trigram: it was trained for too short a time. Give it more --minutes.")
    return {"held_out": rows, "better_than_trigram": better}


def samples(run: Run) -> dict[str, Any]:
    """Three continuations: an English and a Chinese one at temperature 0.7, and a held-out problem, greedily."""
    model, trained = load(run.directory / "base"), load_tokenizer(run.directory / "tokenizer")
    english, chinese = _held_out_problem(run, "en", "addition"), _held_out_problem(run, "zh", "sequence")
    has_fables = "fables-en" in _groups(run)
    prompts = [
        ("a story in English" if has_fables else "English", "Once upon a time, a fox" if has_fables else "Return the", 0.7),
        ("a story in Chinese", "从前，有一只", 0.7) if has_fables else ("a problem in Chinese", _question(chinese.text), 0.0),
        (f"a held-out problem, whose answer is {english.answer}", _question(english.text), 0.0),
    ]
    written = []
    for what, prompt, temperature in prompts:
        continuation = continue_text(model, trained, prompt, temperature=temperature, seed=run.config.seed)
        print(f"[{what}]\n{prompt}▌{continuation.rstrip()}\n")
        written.append({"what": what, "prompt": prompt, "continuation": continuation, "temperature": temperature})
    return {"samples": written}


def report(run: Run) -> dict[str, Any]:
    """`final/` (for now the base model), `report.md` and the plots."""
    with atomic_directory(run.directory / "final") as temporary:
        shutil.copytree(run.directory / "base", temporary, dirs_exist_ok=True, copy_function=_link)
    stages = run.manifest["stages"]
    measured = stages["comparison"]["held_out"]
    header = "| held-out text | tokens | bytes | finback, bits per byte | trigram, bits per byte |\n|---|---:|---:|---:|---:|\n"
    lines = (
        f"| {name} | {row['tokens']:,} | {row['bytes']:,} | {row['bits_per_byte']:.3f} | {row['trigram_bits_per_byte']:.3f} |"
        for name, row in measured.items()
    )
    times = "\n".join(f"| {title} | {stages[name]['seconds']:.1f} |" for name, title, _ in STAGES if name in stages)
    write_report(
        run.directory,
        samples=[(sample["prompt"], sample["continuation"]) for sample in stages["samples"]["samples"]],
        sections=[
            ("Beside an interpolated trigram model", header + "\n".join(lines)),
            ("Stages", f"| stage | seconds |\n|---|---:|\n{times}"),
        ],
        reference_loss={"interpolated trigram": measured["all"]["trigram_nats_per_token"]},
    )
    print(f"{run.directory / 'report.md'}")
    for plot in sorted((run.directory / "plots").glob("*.png")):
        print(f"{plot}")
    return {}


STAGES: tuple[tuple[str, str, Callable[[Run], dict[str, Any]]], ...] = (
    ("corpus", "Corpus", corpus),
    ("tokenizer", "Tokenizer", tokenizer),
    ("shards", "Token shards", shards),
    ("base", "Pre-training", base),
    ("comparison", "Held-out bits per byte", comparison),
    ("samples", "Samples", samples),
    ("report", "Report", report),
)
"""Name in the manifest, heading, function."""


def compare(
    model: Transformer, trigram: TrigramModel, splits: dict[str, TokenShards], byte_lengths: np.ndarray, sequence_length: int
) -> dict[str, dict[str, float]]:
    """Held-out loss of both models on the same targets, by group and for "all": bits per byte and nats per token.

    The model sees rows of `sequence_length` tokens and nothing before them; the trigram always has its two tokens.
    A split too short for one row is left out. Raises InputError if all are.
    """
    found: dict[str, tuple[float, float, np.ndarray]] = {}
    for name, split in splits.items():
        rows = row_count(split.num_tokens, sequence_length)
        if rows == 0:
            continue
        batch = torch.from_numpy(split.rows(range(rows), sequence_length))
        targets = batch[:, 1:].flatten().numpy()
        nats = evaluate(model, batch, micro_batch_size=16, precision="fp32") * len(targets)
        trigram_nats = -float(trigram.log_probabilities(split.tokens(0, rows * sequence_length + 1)).sum())
        found[name] = (nats, trigram_nats, targets)
    if not found:
        raise InputError("the held-out text is shorter than one row of tokens; raise the field problems")
    columns = list(zip(*found.values(), strict=True))
    found["all"] = (math.fsum(columns[0]), math.fsum(columns[1]), np.concatenate(columns[2]))
    return {
        name: {
            "tokens": len(targets),
            "bytes": int(byte_lengths[targets].sum()),
            "bits_per_byte": bits_per_byte(nats, targets, byte_lengths),
            "trigram_bits_per_byte": bits_per_byte(trigram_nats, targets, byte_lengths),
            "nats_per_token": nats / len(targets),
            "trigram_nats_per_token": trigram_nats / len(targets),
        }
        for name, (nats, trigram_nats, targets) in found.items()
    }


def continue_text(model: Transformer, trained: Tokenizer, prompt: str, *, temperature: float, seed: int) -> str:
    """What the model writes after `prompt`, to the end of the document or SAMPLE_TOKENS."""
    ids = trained.encode(prompt, add_bos=True)
    output = generate(
        model,
        torch.tensor([ids]),
        SAMPLE_TOKENS,
        temperature=temperature,
        top_p=0.95,
        seed=seed,
        eos_token_id=trained.eos_token_id,
    )
    return trained.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True)


def _pretrain_config(run: Run) -> PretrainConfig:
    names = _groups(run)
    tokens = [run.manifest["stages"]["shards"]["groups"][name]["train_tokens"] for name in names]
    return replace(
        run.preset,
        model=replace(run.preset.model, vocab_size=run.config.vocab_size),
        data=tuple(str(_shards_directory(run, name)) for name in names),
        data_weights=tuple(count / sum(tokens) for count in tokens),
        tokenizer=str(run.directory / "tokenizer"),
        seed=run.config.seed,
        steps=None,
        tokens=None,
        minutes=run.config.minutes,
        eval_sequences=2**20,  # all that is held out, so that the trigram's loss can be drawn beside it
    )


def _say_what_next(run: Run) -> None:
    final = run.directory / "final"
    print(
        f"\nGenerate from it:        finback generate {final} --prompt 'Once upon a time'"
        f"\nRead what happened:      {run.directory / 'report.md'}"
        f"\nLoad it elsewhere:       transformers.AutoModelForCausalLM.from_pretrained({str(final)!r})"
    )


def _groups(run: Run) -> list[str]:
    return list(run.manifest["stages"]["corpus"]["groups"])


def _corpus_file(run: Run, name: str) -> Path:
    return run.directory / "data" / f"{name}.jsonl"


def _shards_directory(run: Run, name: str) -> Path:
    return run.directory / "data" / name


def _size(group: Group) -> int:
    return sum(len(text.encode()) for text in group.texts)


def _question(text: str) -> str:
    """A problem's text up to where its thoughts begin."""
    return text[: text.index("<think>\n") + len("<think>\n")]


def _held_out_problem(run: Run, language: Language, family: str) -> Problem:
    """An easy problem that no training text holds."""
    chosen = generate_problems(1, seed=run.config.seed, families=(family,), languages=(language,), levels=(1,), held_out=True)
    return next(chosen)


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of the rows, evenly, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [rows[place] for place in places]



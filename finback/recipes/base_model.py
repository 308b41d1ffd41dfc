"""The first half of the quickstart: from text to a base model, and how good it is.

Stages of a run (see `finback.recipes.stages`): each takes the run, the quickstart's settings and the preset of the model.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from finback.config import InputError
from finback.data.chains import Chain, Habits, clean_thought, generate_chains, prompt_text
from finback.data.config import DataConfig
from finback.data.files import write_atomic
from finback.data.ngram import TrigramModel, bits_per_byte
from finback.data.packing import row_count
from finback.data.shards import TokenShards, write_shards
from finback.data.sources import jsonl_documents
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from finback.eval.contamination import occurrences, row_texts
from finback.eval.task import Task
from finback.model.checkpoint import load, save
from finback.model.generate import generate
from finback.model.transformer import Transformer
from finback.recipes.config import QuickstartConfig
from finback.recipes.corpus import CHAINS, QUICKSTART_SUMS, Group, SumsTask, collect_groups
from finback.recipes.ladder import read_rows
from finback.recipes.pace import precision_here
from finback.recipes.stages import Run, StageFailed
from finback.rewards.answers import final_answer
from finback.rewards.reward import load_reward
from finback.train.config import PretrainConfig
from finback.train.evaluate import evaluate
from finback.train.metrics import METRICS_FILE, read_metrics
from finback.train.pretrain import pretrain

VALIDATION_FRACTION, CHAINS_VALIDATION_FRACTION = 0.02, 0.004  # about as many tokens of each
GENERAL = 300
STORY_BYTES = 160
SAMPLE_TOKENS = 120
TEXT_SHARE = 0.2  # of the rows of pre-training are stories (or docstrings), the others sums
_TOKENIZER_TEXTS = 6000  # sums for the tokenizer: more of them say nothing new
_WORDS_OF_SUMS = 320


def corpus(run: Run, config: QuickstartConfig, task: SumsTask = QUICKSTART_SUMS) -> dict[str, Any]:
    """Fetch or generate the documents and write them as data/GROUP.jsonl; beside them the ladder's prompts and what is held out."""
    groups = collect_groups(config, task)
    for group in groups:
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in group.texts)
        write_atomic(_corpus_file(run, group.name), "".join(lines))
        print(f"{group.name:<12} {len(group.texts):>6,} documents {_size(group) / 1e6:6.2f} MB   {group.origin}")
    for name, rows in ladder_rows(config, task, groups).items():
        write_atomic(_corpus_file(run, name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{name:<12} {len(rows):>6,} rows for the stages behind the base")
    return {
        "groups": {
            group.name: {"documents": len(group.texts), "bytes": _size(group), "origin": group.origin, "licence": group.licence}
            for group in groups
        }
    }


def tokenizer(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> dict[str, Any]:
    """Train a byte-level BPE on the corpus."""
    trained = corpus_tokenizer(run, vocabulary(config, config.vocab_size), preset.model.max_position_embeddings)
    save_tokenizer(trained, run.directory / "tokenizer")
    texts = [document.text for document in jsonl_documents(_corpus_file(run, _groups(run)[0]))]
    example = next(text for text in texts if len(text) > 40)[:40]
    pieces = "|".join(trained.decode([token]) for token in trained.encode(example))
    print(f"{trained.vocab_size:,} tokens of byte-level BPE behind DeepSeek's pre-tokenizer, for example:\n{pieces!r}")
    return {"vocab_size": trained.vocab_size, "fingerprint": trained.fingerprint()}


def corpus_tokenizer(run: Run, vocab_size: int, context: int) -> Tokenizer:
    """A tokenizer for the run's corpus. Every digit is a token of its own, so sums are worked out digit by digit."""
    texts: list[str] = []
    for name in _groups(run):
        documents = (document.text for document in jsonl_documents(_corpus_file(run, name)))
        texts += islice(documents, _TOKENIZER_TEXTS if name == CHAINS else None)
    return train_tokenizer(texts, vocab_size, model_max_length=context)


def vocabulary(config: QuickstartConfig, wanted: int) -> int:
    """Sums alone have words for few tokens."""
    return min(wanted, _WORDS_OF_SUMS) if config.text == "none" else wanted


def shards(run: Run, config: QuickstartConfig) -> dict[str, Any]:
    """Write each group as token shards, with its own held-out documents."""
    return write_corpus_shards(run, config, load_tokenizer(run.directory / "tokenizer"), run.directory / "data")


def write_corpus_shards(run: Run, config: QuickstartConfig, trained: Tokenizer, target: Path) -> dict[str, Any]:
    """The run's corpus as token shards in `target`/GROUP."""
    facts: dict[str, Any] = {}
    for name in _groups(run):
        share = CHAINS_VALIDATION_FRACTION if name == CHAINS else VALIDATION_FRACTION
        settings = DataConfig(validation_fraction=share, seed=config.seed)
        index = write_shards(jsonl_documents(_corpus_file(run, name)), trained, target / name, settings)
        facts[name] = {f"{split}_tokens": TokenShards(target / name, split).num_tokens for split in ("train", "validation")}
        print(
            f"{name:<12} {facts[name]['train_tokens']:>9,} tokens to train on, {facts[name]['validation_tokens']:>7,} held out"
            + (f", {index['duplicates']:,} duplicates left out" if index["duplicates"] else "")
        )
    return {"groups": facts}


def base(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> dict[str, Any]:
    """Pre-train within the time budget; `base/` is the last checkpoint without the optimizer's state."""
    settings = pretrain_config(run, config, preset)
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


def comparison(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> dict[str, Any]:
    """Held-out bits per byte of the model and of an interpolated trigram model, trained and measured on the same tokens: of each
    group, and of a text mixed as the corpus is, of which the groups' held-out documents hold other shares."""
    splits = {name: TokenShards(_shards_directory(run, name), "validation") for name in _groups(run)}
    training = {name: TokenShards(_shards_directory(run, name), "train") for name in _groups(run)}
    lengths = load_tokenizer(run.directory / "tokenizer").token_byte_lengths()
    read = np.concatenate([split.tokens(0, split.num_tokens) for split in training.values()])
    trigram = TrigramModel(read, len(lengths))
    rows = compare(load(run.directory / "base"), trigram, splits, lengths, preset.sequence_length)
    rows["as the corpus"] = mixed(rows, {name: split.num_tokens for name, split in training.items()})
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("held-out text", "tokens", "bytes", "finback", "trigram"):
        table.add_column(column, justify="left" if column == "held-out text" else "right")
    for name, row in rows.items():
        bits = (f"{row['bits_per_byte']:.3f}", f"{row['trigram_bits_per_byte']:.3f}")
        table.add_row(name, f"{row['tokens']:,}", f"{row['bytes']:,}", *bits)
    print("Bits per byte (lower is better); the trigram is interpolated, with modified Kneser-Ney smoothing:\n")
    run.console.print(table)
    of_corpus = rows["as the corpus"]
    better = of_corpus["bits_per_byte"] < of_corpus["trigram_bits_per_byte"]
    if better:
        gain = 1 - of_corpus["bits_per_byte"] / of_corpus["trigram_bits_per_byte"]
        print(f"\nOn text mixed as the corpus is the model needs {gain:.0%} fewer bits than the trigram.")
    else:
        sentence = "The model has not beaten the trigram: it was trained for too short a time. Give it more --tokens"
        if config.gate == "stop":
            raise StageFailed(sentence)
        print(f"\n{sentence}.")
    return {"held_out": rows, "better_than_trigram": better}


def mixed(rows: Mapping[str, Mapping[str, float]], shares: Mapping[str, int]) -> dict[str, float]:
    """Of groups that were measured apart, the row of a text that holds their tokens in these shares; its tokens and bytes are those
    that were measured."""
    measured = {name: rows[name] for name in shares if name in rows}

    def mean(value: Callable[[Mapping[str, float]], float]) -> float:
        return math.fsum(shares[name] * value(row) for name, row in measured.items()) / sum(shares[name] for name in measured)

    size = mean(lambda row: row["bytes"] / row["tokens"])
    nats, trigram_nats = mean(lambda row: row["nats_per_token"]), mean(lambda row: row["trigram_nats_per_token"])
    return {
        "tokens": sum(row["tokens"] for row in measured.values()),
        "bytes": sum(row["bytes"] for row in measured.values()),
        "bits_per_byte": nats / size / math.log(2),
        "trigram_bits_per_byte": trigram_nats / size / math.log(2),
        "nats_per_token": nats,
        "trigram_nats_per_token": trigram_nats,
    }


def samples(run: Run, config: QuickstartConfig, task: SumsTask = QUICKSTART_SUMS) -> dict[str, Any]:
    """Three continuations: an English and a Chinese one at temperature 0.7, and a held-out sum, greedily."""
    model, trained = load(run.directory / "base"), load_tokenizer(run.directory / "tokenizer")
    chain = next(generate_chains(1, task.chains, seed=config.seed, held_out=True))
    prompts = [(f"a held-out sum, whose answer is {chain.answer}", prompt_text(chain.question), 0.0)]
    if "fables-en" in _groups(run):
        prompts = [
            ("a story in English", "Once upon a time, a fox", 0.7),
            ("a story in Chinese", "从前，有一只", 0.7),
            *prompts,
        ]
    written = []
    for what, prompt, temperature in prompts:
        continuation = continue_text(model, trained, prompt, temperature=temperature, seed=config.seed)
        print(f"[{what}]\n{prompt}▌{continuation.rstrip()}\n")
        written.append({"what": what, "prompt": prompt, "continuation": continuation, "temperature": temperature})
    return {"samples": written}


def student_base(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> dict[str, Any]:
    """Pre-train a dense model of another family, with a tokenizer of its own, on the same corpus: what distillation starts from."""
    directory = run.directory / "training" / "student-base"
    if not (directory / "tokenizer").exists():
        save_tokenizer(
            corpus_tokenizer(run, preset.model.vocab_size, preset.model.max_position_embeddings), directory / "tokenizer"
        )
    trained = load_tokenizer(directory / "tokenizer")
    facts = write_corpus_shards(run, config, trained, directory / "data")
    ids = {f"{name}_token_id": getattr(trained, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = replace(
        pretrain_config(run, config, preset),
        model=replace(preset.model, vocab_size=vocabulary(config, preset.model.vocab_size), **ids),
        data=tuple(str(directory / "data" / name) for name in _groups(run)),
        tokenizer=str(directory / "tokenizer"),
        tokens=config.student_tokens,
        eval_sequences=64,
    )
    checkpoint = pretrain(settings, directory / "run", resume=(directory / "run" / "config.json").exists())
    save(load(checkpoint), run.directory / "student-base")
    return facts | {"tokens": read_metrics(directory / "run" / METRICS_FILE)[-1]["tokens"]}


def seen_problems(run: Run, held_out: Mapping[str, Path]) -> str:
    """In words, how many of the held-out problems stand in any text that a stage was trained on: by their questions, word for word."""
    texts = [document.text for name in _groups(run) for document in jsonl_documents(_corpus_file(run, name))]
    documents, rows = len(texts), list[Any]()
    for file in sorted((run.directory / "data").glob("*.jsonl")):
        if file.stem not in _groups(run) and not file.stem.startswith("held-out"):
            rows += read_rows(file)
    texts += [text for row in rows for text in row_texts(row)]
    sentences = []
    for title, file in held_out.items():
        examples = read_rows(file)
        task = Task(title, examples, load_reward("finback.rewards.answers:exact"), final_answer)
        found = occurrences(task, texts)
        sentences.append(
            f"{title}: {len(found)} of {len(examples)} problems occur in the {documents + len(rows):,} texts of training"
        )
    return ".\n".join(sentences) + "."


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


def pretrain_config(run: Run, config: QuickstartConfig, preset: PretrainConfig) -> PretrainConfig:
    """The preset with the run's vocabulary, corpus, precision and length of training."""
    names = _groups(run)
    others = sum(name != CHAINS for name in names)
    shares = [1 - TEXT_SHARE if name == CHAINS else TEXT_SHARE / others for name in names] if others else [1.0]
    return replace(
        preset,
        model=replace(preset.model, vocab_size=vocabulary(config, config.vocab_size)),
        data=tuple(str(_shards_directory(run, name)) for name in names),
        data_weights=tuple(shares),
        tokenizer=str(run.directory / "tokenizer"),
        precision=precision_here(config),
        seed=config.seed,
        steps=None,
        tokens=config.tokens,
        minutes=None,
        eval_every=200,
        save_every=500,
        eval_sequences=2**20,  # all that is held out, so that the trigram's loss can be drawn beside it
    )


def ladder_rows(config: QuickstartConfig, task: SumsTask, groups: Sequence[Group]) -> dict[str, list[dict[str, Any]]]:
    """Name -> rows for the stages behind the base: prompts to learn from, held-out problems, and conversations about other things."""
    chains, most = task.chains, task.chains.most_terms
    longer = replace(chains, least_terms=most + 1, most_terms=most + 2)
    rows = {
        "prompts": _problem_rows(generate_chains(task.prompts, chains, seed=config.seed), task.habits),
        "held-out": _problem_rows(generate_chains(task.held_out, chains, seed=config.seed, held_out=True), task.habits),
        "held-out-longer": _problem_rows(
            generate_chains(task.held_out_longer, longer, seed=config.seed, held_out=True), task.habits
        ),
    }
    stories = [text for group in groups if group.name != CHAINS for text in group.texts]
    general = [row for text in stories if (row := _story_row(text)) is not None]
    if general:
        random.Random(f"{config.seed}/general").shuffle(general)
        rows["general"], rows["general-prompts"] = (
            general[:GENERAL],
            [{"prompt": row["messages"][0]["content"], "kind": "general"} for row in general[GENERAL : 3 * GENERAL]],
        )
    return rows


def _problem_rows(chains: Iterable[Chain], habits: Habits) -> list[dict[str, Any]]:
    """Each question once."""
    different = {chain.question: chain for chain in chains}
    return [
        {"prompt": c.question, "answer": c.answer, "language": c.language, "reasoning": clean_thought(c, habits)}
        for c in different.values()
    ]


def _story_row(text: str) -> dict[str, Any] | None:
    """A request to go on with a text's first sentence, answered by the next ones; None for a text that is too short."""
    sentences = [sentence for sentence in _SENTENCE.findall(text.replace("\n", " ")) if sentence.strip()]
    answer = ""
    for sentence in sentences[1:]:
        if answer and len(answer.encode()) + len(sentence.encode()) > STORY_BYTES:
            break
        answer += sentence
    if len(sentences) < 3 or len(answer.encode()) > 2 * STORY_BYTES or len(sentences[0].encode()) > STORY_BYTES:
        return None
    chinese = bool(re.search("[\u4e00-\u9fff]", sentences[0]))
    asked = ("接着讲：" if chinese else "Go on: ") + sentences[0].strip()
    reply = {"role": "assistant", "content": answer.strip()}
    return {"messages": [{"role": "user", "content": asked}, reply]}


_SENTENCE = re.compile("[^.!?。！？]+[.!?。！？]+[\"'”’」]* ?")


def _groups(run: Run) -> list[str]:
    return list(run.manifest["stages"]["corpus"]["groups"])


def _corpus_file(run: Run, name: str) -> Path:
    return run.directory / "data" / f"{name}.jsonl"


def _shards_directory(run: Run, name: str) -> Path:
    return run.directory / "data" / name


def _size(group: Group) -> int:
    return sum(len(text.encode()) for text in group.texts)


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of the rows, evenly, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [rows[place] for place in places]

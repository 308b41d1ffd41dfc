"""Rejection sampling as a command: a model's samples that pass every check become conversations."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finback.config import InputError
from finback.data.files import write_atomic
from finback.data.reasoning import opens_thought, parse_answer
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.recipes.sampling_config import RejectConfig
from finback.recipes.stages import file_hash
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards
from finback.rl.prompts import read_prompts
from finback.rl.rejection import Check, Funnel, Journal, rejection_sample
from finback.train.session import choose_device


def reject(config: RejectConfig) -> Funnel:
    """Sample, keep, print the funnel, write `config.out` and its lineage; returns the funnel. Finished prompts are kept in OUT.sampling
    until then: the same config goes on with the others.

    Raises InputError, before the model is loaded where that can be, if a field or row is wrong, `out` exists, or nothing passed.
    """
    check_target(config.out)
    checks, device = load_checks(config.reward), choose_device(config.device)
    tokenizer = load_tokenizer(config.model)
    llm = LLM(config.model, tokenizer=tokenizer, device=device)
    if config.max_tokens >= llm.max_model_len:
        raise InputError(f"max_tokens is {config.max_tokens}, the model's context is {llm.max_model_len}; lower it")
    files = [str(file) for file in config.data]
    prompts = read_prompts(files, tokenizer, config.template, longest=llm.max_model_len - config.max_tokens)
    source = model_hash(config.model)
    journal = Journal(config.out.with_name(config.out.name + ".sampling"), _settings(config) | {"model": source})
    if journal.finished:
        print(f"{len(journal.finished):,} prompts are finished already")
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, skip_special_tokens=False)
    try:
        with RewardPool([reward for check in checks for reward in check.rewards], deadline=config.reward_deadline) as pool:
            found, funnel = rejection_sample(
                llm,
                pool,
                prompts[: config.max_prompts],
                checks,
                params,
                num_samples=config.num_samples,
                keep_per_prompt=config.keep,
                seed=config.seed,
                journal=journal,
            )
    except KeyboardInterrupt:
        print(f"\nStopped. {len(journal.finished):,} prompts are finished and kept; the same words go on from there.")
        raise
    print("\n".join(funnel.lines()))
    if not found:
        journal.path.unlink()
        remedy = f"{funnel.failure}; mend the reward" if funnel.failures else "lower a threshold, or sample a better model"
        raise InputError(f"no sample passed, so {config.out} is not written; {remedy}")
    rows = [conversation(row) for row in found]
    write_rows(config.out, rows)
    write_lineage(config.out, "reject", asdict(config), {"model": source}, funnel.stages)
    journal.path.unlink()
    print(f"\n{len(rows):,} conversations are in {config.out}; learn from them: finback sft MODEL --data {config.out} --out DIR")
    return funnel


def _settings(config: RejectConfig) -> dict[str, Any]:
    """What decides about the samples: the fields, the rows, and rewards that stand in a file. A run may go on on another device."""
    fields = {name: value for name, value in asdict(config).items() if name not in ("model", "data", "out", "device")}
    code = (Path(spec.partition(":")[0]) for spec in config.reward)
    files = [*config.data, *(file for file in code if file.is_file())]
    return fields | {"files": [file_hash(file) for file in files]}


def load_checks(specs: Sequence[str]) -> list[Check]:
    """The check that each `module:function[:threshold]` names: rewards whose last number is the least value, 1 if it is missing."""
    for spec in specs:
        threshold = spec.split(":")[2:]
        try:
            bad = bool(threshold) and not math.isfinite(float(":".join(threshold)))
        except ValueError:
            bad = True
        if bad:
            raise InputError(f"reward {spec!r}: the threshold {':'.join(threshold)!r} is not a finite number")
    return [Check((replace(reward, weight=1.0),), reward.weight) for reward in load_rewards(specs)]


def conversation(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `rejection_sample` as a conversation: the prompt's messages, then the sample, its thought apart."""
    prompt = row["example"]["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    opened = opens_thought(row["prompt"])
    parts = parse_answer(row["completion"].lstrip(), starts_in_thought=opened, tools=False)
    reply = {"role": "assistant", "content": parts.content.strip()}
    if parts.reasoning.strip():
        reply["reasoning_content"] = parts.reasoning.strip("\n")
    return {"messages": [*messages, reply]}


def check_target(out: Path) -> None:
    """InputError if `out` is there already or is no .jsonl file."""
    if out.suffix != ".jsonl":
        raise InputError(f"out is {out}, it must end in .jsonl")
    if out.exists():
        raise InputError(f"{out} exists; give out another name, or remove it")


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line."""
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_lineage(
    out: Path, verb: str, settings: Mapping[str, Any], sources: Mapping[str, str], stages: Sequence[tuple[str, int]]
) -> None:
    """OUT.lineage.json: what was run, on what, the funnel, and the hash of what came out."""
    record = {
        "verb": verb,
        "settings": dict(settings),
        "sources": dict(sources),
        "funnel": [list(stage) for stage in stages],
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
    }
    write_atomic(out.with_name(out.name + ".lineage.json"), json.dumps(record, indent=2, default=str, ensure_ascii=False) + "\n")


def model_hash(directory: Path) -> str:
    """SHA-256 over the names and bytes of a model's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()

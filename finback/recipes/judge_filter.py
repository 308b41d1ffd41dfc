"""Judging as a command: rows that a judge finds good, or preference pairs of responses (R1-N, Methods), resumable."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from finback.config import InputError
from finback.data.conversations import read_rows
from finback.data.judge import (
    INSTRUCTION,
    POINT_INSTRUCTION,
    EndpointJudge,
    Judgement,
    pair_question,
    point_question,
    read_score,
    read_scores,
)
from finback.data.preferences import Candidates, Judge, JudgeError, preference_pairs, rule_judge, write_preferences
from finback.data.reasoning import opens_thought, parse_answer
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.recipes.sampling import check_target, model_hash, write_lineage, write_rows
from finback.recipes.sampling_config import JudgeConfig
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_reward

_FAILURES_IN_A_ROW = 8
Judged = Callable[[str, str, Callable[[str], Judgement]], Judgement]
"""(instruction, question, read) -> what read finds in the reply"""


class Judges(NamedTuple):
    """One judge in its two forms."""

    point: Callable[[str, str], float]
    """(prompt, answer) -> score"""
    pair: Judge


class Journal:
    """Judgements in a file, a line each as they come, so that a run that stopped asks for none of them again.

    A judgement is known by what was asked and by how often it had been asked before. After several failures in a row (`failures`) the
    judge counts as gone, and every further question is an InputError. Threads may share one.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self._known: dict[str, float] = {}
        self._times: dict[str, int] = {}
        self._lock = threading.Lock()
        self._failed = 0
        self._last = ""
        self._identity = identity
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, value = json.loads(line)
                except ValueError:
                    continue  # the line that was being written when the run died
                self._known[key] = value

    def __len__(self) -> int:
        return len(self._known)

    def recall(self, texts: Sequence[str], ask: Callable[[], float]) -> float:
        """The judgement on `texts`, from the file or from `ask`."""
        base = hashlib.sha256(json.dumps([self._identity, *texts]).encode()).hexdigest()
        with self._lock:
            self._times[base] = self._times.get(base, 0) + 1
            key = f"{base}/{self._times[base]}"
            if key in self._known:
                return self._known[key]
            if self._failed >= _FAILURES_IN_A_ROW:
                raise self._gone()
        try:
            value = ask()
        except JudgeError as error:
            with self._lock:
                self._failed, self._last = self._failed + 1, str(error)
                if self._failed >= _FAILURES_IN_A_ROW:
                    raise self._gone() from None
            raise
        with self._lock:
            self._failed = 0
            self._known[key] = value
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, value]) + "\n")
        return value

    def _gone(self) -> InputError:
        return InputError(
            f"the judge failed {self._failed} times in a row, the last time because {self._last}; {len(self)} judgements are kept in "
            f"{self.path}: give the same words again when it is back"
        )


def judge(config: JudgeConfig) -> int:
    """Judge `config.file`, print the funnel, write `config.out` and its lineage; returns how many rows or pairs were kept.

    Raises InputError if a field or row is wrong, or the judge is gone or refuses; what was judged stays in OUT.judging.
    """
    check_target(config.out)
    rows = _read(config)
    with ExitStack() as stack:
        return _judge(config, rows, *_judges(config, stack))


def _judge(config: JudgeConfig, rows: Sequence[Any], judges: Judges, source: str) -> int:
    identity = json.dumps([config.judge, config.judge_model, config.temperature, config.max_tokens, config.make, source])
    journal = Journal(config.out.with_name(config.out.name + ".judging"), identity)
    if len(journal):
        print(f"{len(journal):,} judgements are there already")
    stages = _pairs(config, rows, judges, journal) if config.make == "pairs" else _rows(config, rows, judges, journal)
    width = max(len(name) for name, _ in stages)
    print("\n".join(f"{name:<{width}} {count:>8,}  {count / max(1, stages[0][1]):6.1%}" for name, count in stages))
    kept = stages[-1][1]
    if not kept:
        raise InputError(
            f"nothing was kept, so {config.out} is not written; lower least_score or least_delta, or look at the judge"
        )
    sources = {"file": hashlib.sha256(config.file.read_bytes()).hexdigest(), "judge": source}
    write_lineage(config.out, "judge", asdict(config), sources, stages)
    journal.path.unlink(missing_ok=True)
    print(f"\n{kept:,} {config.make} are in {config.out}")
    return kept


def _rows(config: JudgeConfig, rows: Sequence[Any], judges: Judges, journal: Journal) -> list[tuple[str, int]]:
    def score(row: Any) -> float | None:
        prompt, answer = _texts(row)
        try:
            scores = [journal.recall((prompt, answer), lambda: judges.point(prompt, answer)) for _ in range(config.judgements)]
        except JudgeError:
            return None
        return sum(scores) / len(scores)

    with ThreadPoolExecutor(config.workers) as pool:
        scores = list(pool.map(score, rows))
    judged = [(row, value) for row, value in zip(rows, scores, strict=True) if value is not None]
    kept = [row for row, value in judged if value >= config.least_score]
    if kept:
        write_rows(config.out, kept)
    return [("rows", len(rows)), ("judged", len(judged)), ("good enough", len(kept))]


def _pairs(config: JudgeConfig, rows: Sequence[Any], judges: Judges, journal: Journal) -> list[tuple[str, int]]:
    def compared(prompt: str, a: str, b: str) -> float:
        return journal.recall((prompt, a, b), lambda: judges.pair(prompt, a, b))

    pairs, funnel = preference_pairs(
        [Candidates(row["prompt"], row["responses"]) for row in rows],
        compared,
        judgements=config.judgements,
        least_delta=config.least_delta,
        seed=config.seed,
        workers=config.workers,
    )
    if pairs:
        write_preferences(pairs, config.out)
    judged = funnel.pairs - funnel.failed
    clear = judged - funnel.unclear
    return [("pairs", funnel.pairs), ("judged", judged), ("clear", clear), ("balanced in length", funnel.kept)]


def _judges(config: JudgeConfig, stack: ExitStack) -> tuple[Judges, str]:
    """The judge that a field names, and what it is in words for the lineage. A rule runs in a process that ends with `stack`."""
    if config.judge.startswith(("http://", "https://")):
        key = os.environ.get(config.api_key_env) if config.api_key_env else None
        if config.api_key_env and not key:
            raise InputError(f"api_key_env is {config.api_key_env}, but there is no such environment variable; set it to the key")
        endpoint = EndpointJudge(
            config.judge,
            config.judge_model,
            api_key=key,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            timeout_seconds=config.timeout_seconds,
            retries=config.retries,
            pause_seconds=config.pause_seconds,
        )
        return _asking(endpoint.judged), config.judge_model
    if Path(config.judge).is_dir():
        return _asking(_local(config)), model_hash(Path(config.judge))
    if ":" not in config.judge:
        raise InputError(f"judge is {config.judge!r}: neither a URL, nor a directory, nor a rule as module:function")
    pool, lock = stack.enter_context(RewardPool([load_reward(config.judge)], deadline=config.timeout_seconds)), threading.Lock()

    def point(prompt: str, answer: str) -> float:
        with lock:
            pool.submit(0, prompt, answer, {})
            ((_, score),) = pool.collect(wait=True)
        for sentence in score.failures.values():
            raise InputError(f"the rule {config.judge} {sentence}")
        (value,) = score.components.values()
        return value

    return Judges(point, rule_judge(point)), config.judge


def _asking(judged: Judged[Any]) -> Judges:
    def pair(prompt: str, a: str, b: str) -> float:
        score_a, score_b = judged(INSTRUCTION, pair_question(prompt, a, b), read_scores)
        return float(score_a - score_b)

    return Judges(lambda prompt, answer: float(judged(POINT_INSTRUCTION, point_question(prompt, answer), read_score)), pair)


def _local(config: JudgeConfig) -> Judged[Any]:
    """A model of ours as judge; its thought is not read."""
    tokenizer = load_tokenizer(Path(config.judge))
    if tokenizer.chat_template is None:
        raise InputError(f"{config.judge} has no chat template, so it cannot judge; name a model to chat with")
    llm = LLM(Path(config.judge), tokenizer=tokenizer, max_num_seqs=1)
    params = SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens)
    lock = threading.Lock()

    def judged(instruction: str, question: str, read: Callable[[str], Any]) -> Any:
        messages = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = tokenizer.encode(prompt)
        if len(ids) >= llm.max_model_len:
            raise JudgeError(f"the question has {len(ids)} tokens and the judge's context is {llm.max_model_len}")
        for attempt in range(1 + config.retries):
            with lock:
                text = "".join(part.text for part in llm.stream(ids, params))
            opened = opens_thought(prompt)
            try:
                return read(parse_answer(text, starts_in_thought=opened, tools=False).content)
            except JudgeError:
                if attempt == config.retries:
                    raise
        raise AssertionError("the last attempt returns or raises")

    return judged


def _read(config: JudgeConfig) -> list[Any]:
    """The rows of the file, each of the form that `make` asks for."""
    rows = []
    for row in read_rows(config.file):
        if isinstance(row.record, InputError):
            raise InputError(f"{row.where}: {row.record}; mend or remove it")
        if not _well_formed(row.record, config.make):
            needed = "messages that end with an assistant's, or prompt and completion"
            if config.make == "pairs":
                needed = "prompt (a text) and responses (two texts or more)"
            raise InputError(f"{row.where}: to make {config.make} a row needs {needed}; mend or remove it")
        rows.append(row.record)
    if not rows:
        raise InputError(f"{config.file} has no rows")
    return rows


def _well_formed(row: Any, make: str) -> bool:
    if not isinstance(row, dict):
        return False
    if make == "pairs":
        responses = row.get("responses")
        many = isinstance(responses, list) and len(responses) > 1 and all(isinstance(text, str) for text in responses)
        return isinstance(row.get("prompt"), str) and many
    messages = row.get("messages")
    if messages is None:
        return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)
    turns = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
    return turns and len(messages) > 1 and messages[-1].get("role") == "assistant"


def _texts(row: Any) -> tuple[str, str]:
    """The request and the answer of a row; a judge reads the final answer only, as R1's helpfulness reward does."""
    if "messages" not in row:
        return row["prompt"], row["completion"]
    *before, last = row["messages"]
    request = before[-1]["content"] if len(before) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in before)
    return request, last["content"]

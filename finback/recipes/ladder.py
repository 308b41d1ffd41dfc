"""The R1 ladder (R1 section 2, table 3 of its second version) as stages over a run directory.

    base -> r1-zero                                  GRPO from the base, rules alone
    base -> cold-start -> reasoning-rl               SFT on R1-Zero's readable traces, then GRPO with a reward for one language
    base -> rejection-sft -> all-scenario-rl         SFT from the base on sampled and judged traces and general data, then GRPO on all
    student-base -> student                          SFT of a dense model of another family on the last model's verified traces

Every stage is a function of the run and of the settings. It trains in `training/NAME/`, leaves a Hugging Face directory `NAME/`,
measures that model on held-out problems, and stops the run, with a reason, if the model is not what the next stage needs.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finback.data.files import write_atomic
from finback.data.reasoning import opens_thought, parse_answer
from finback.data.tokenizer import load_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.eval.config import Decoding, PromptForm
from finback.eval.result import TaskResult
from finback.eval.runner import evaluate_answers
from finback.model.checkpoint import load, save
from finback.recipes import judging
from finback.recipes.config import LadderConfig
from finback.recipes.sampling import model_hash
from finback.recipes.stages import Run, StageFailed, file_hash
from finback.rewards.answers import answer_tag, final_answer
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards
from finback.rl.config import GRPOConfig
from finback.rl.model_rewards import model_reward_names
from finback.rl.prompts import read_prompts
from finback.rl.rejection import Check, Journal, rejection_sample
from finback.rl.report import write_report as write_rl_report
from finback.rl.train import grpo
from finback.train.metrics import METRICS_FILE, read_metrics
from finback.train.session import choose_device
from finback.train.sft import sft
from finback.train.sft_config import SFTConfig

TRAINING = "training"
ANSWER_WORDS = {"en": "Answer: ", "zh": "答案："}
MIXED_AT_MOST = 0.02
"""Share of a cold start's thoughts that may mix languages, however few of R1-Zero's do."""
CHAT_RULES = (f"{judging.CHAT_FORMAT}:0.1", f"{judging.ONE_LANGUAGE}:0.2")
"""What is rewarded in every conversation, whoever judges its answer."""


def r1_zero(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """GRPO from the base with a right answer and the form as rewards, nothing else (R1 section 2.2)."""
    before = measure(run, ladder, "base", ladder.zero_form)
    rewards = judging.rewards(ladder, judging.EXACT_TAG, f"{judging.ZERO_FORMAT}:0.1")
    settings = replace(ladder.zero, data=(str(ladder.prompts),), reward=rewards, template=ladder.zero_template)
    facts = train_by_grpo(run, "r1-zero", "base", settings)
    after = measure(run, ladder, "r1-zero", ladder.zero_form)
    tell_rise("base", before, "r1-zero", after)
    _must_rise(ladder, "r1-zero", before, after)
    return {"base": before, **after, **facts}


def cold_start(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """SFT from the base on a few hundred of R1-Zero's samples: right, in form, in the question's language, as chat turns (R1 2.3.1).

    The answer leaves R1-Zero's tags, whatever judged it: from here on, what stands behind the thought is the answer.
    """
    checks = judging.checks(ladder, judging.EXACT_TAG, judging.ZERO_FORMAT, judging.ONE_LANGUAGE)
    rows, funnel = sample_and_keep(
        run, ladder, "r1-zero", ladder.zero_template, checks, ladder.cold_start_prompts, samples=4, keep=1, seed=1
    )
    traces = [chat_row(row, answer_tag, worded=not ladder.reward) for row in rows[: ladder.cold_start_rows]]
    if len(traces) < ladder.least_rows:
        solved = [row for row in read_rows(ladder.prompts) if {"reasoning", "answer"} <= row.keys()]
        references = [reference_row(row) for row in solved[: ladder.cold_start_rows]]
        _too_few(ladder, traces, "R1-Zero", "train R1-Zero for longer, or give more cold_start_prompts", references)
        traces += references
    file = write_rows(run, "cold-start", traces)
    facts = _train_by_sft(run, "cold-start", "base", replace(ladder.cold_start, data=(str(file),)))
    after = measure(run, ladder, "cold-start", CHAT)
    _must_be_readable(ladder, run.facts("r1-zero"), after)
    return {"funnel": funnel, "rows": len(traces), **after, **facts}


def reasoning_rl(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """GRPO on the reasoning prompts, with a reward for keeping to one language (R1 section 2.3.2)."""
    rewards = judging.rewards(ladder, judging.EXACT, *CHAT_RULES)
    settings = replace(ladder.reasoning, data=(str(ladder.prompts),), reward=rewards, template=None)
    facts = train_by_grpo(run, "reasoning-rl", "cold-start", settings)
    after = measure(run, ladder, "reasoning-rl", CHAT)
    tell_rise("cold-start", run.facts("cold-start"), "reasoning-rl", after)
    _must_not_fall(ladder, "reasoning-rl", run.facts("cold-start"), after)
    return {**after, **facts}


def rejection_sft(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """Sample from the reasoning model, keep what passes, add general data, and fine-tune the BASE on it (R1 section 2.3.3)."""
    checks = judging.checks(ladder, judging.EXACT, judging.CHAT_FORMAT, judging.ONE_LANGUAGE)
    rows, funnel = sample_and_keep(run, ladder, "reasoning-rl", None, checks, ladder.rejection_prompts, samples=4, keep=2, seed=2)
    traces = [chat_row(row, None if ladder.reward else final_answer_text) for row in rows]
    if len(traces) < ladder.least_rows:
        before = read_rows(run.directory / "data" / "cold-start.jsonl")
        _too_few(ladder, traces, "the reasoning model", "train it for longer, or give more rejection_prompts", before)
        traces += before
    general = read_rows(ladder.general) if ladder.general else []
    file = write_rows(run, "rejection", (*traces, *general))
    facts = _train_by_sft(run, "rejection-sft", "base", replace(ladder.rejection, data=(str(file),)))
    after = measure(run, ladder, "rejection-sft", CHAT)
    return {"funnel": funnel, "rows": len(traces), "general_rows": len(general), **after, **facts}


def all_scenario_rl(run: Run, ladder: LadderConfig) -> dict[str, Any]:
    """GRPO on reasoning and general prompts together, at a lower temperature (R1 section 2.3.4)."""
    settings = replace(ladder.all_scenario, template=None)
    if ladder.reward or ladder.general_rewards or ladder.reward_model:
        rewards = scenario_specs(ladder)
        file = _scenarios(run, ladder, rewards)
        settings = replace(settings, data=(str(file),), reward=rewards, reward_model=ladder.reward_model)
    else:
        files = [ladder.prompts, *([ladder.general_prompts] if ladder.general_prompts else [])]
        settings = replace(settings, data=tuple(map(str, files)), reward=("finback.recipes.scenario:rule", *CHAT_RULES))
    facts = train_by_grpo(run, "all-scenario-rl", "rejection-sft", settings)
    after = measure(run, ladder, "all-scenario-rl", CHAT)
    tell_rise("rejection-sft", run.facts("rejection-sft"), "all-scenario-rl", after)
    _must_not_fall(ladder, "all-scenario-rl", run.facts("rejection-sft"), after)
    return {**after, **facts}


def student(run: Run, ladder: LadderConfig, teacher: str = "all-scenario-rl") -> dict[str, Any]:
    """SFT of the dense student on the teacher's verified traces, and nothing else (R1 section 2.4)."""
    checks = judging.checks(ladder, judging.EXACT, judging.CHAT_FORMAT)
    rows, funnel = sample_and_keep(run, ladder, teacher, None, checks, ladder.student_prompts, samples=2, keep=1, seed=3)
    traces = [chat_row(row, None if ladder.reward else final_answer_text) for row in rows]
    if len(traces) < ladder.least_rows:
        file = run.directory / "data" / "cold-start.jsonl"
        others = read_rows(file) if file.exists() else []
        _too_few(ladder, traces, "the teacher", "give more student_prompts", others)
        traces += others
    file = write_rows(run, "student", traces)
    facts = _train_by_sft(run, "student", "student-base", replace(ladder.student, data=(str(file),)))
    after = measure(run, ladder, "student", CHAT)
    before = measure(run, ladder, "student-base", ladder.zero_form)
    tell_rise("student-base", before, "student", after)
    _must_rise(ladder, "student", before, after)
    return {"base": before, "funnel": funnel, "rows": len(traces), **after, **facts}


def scenario_rewards(ladder: LadderConfig, specs: Sequence[str]) -> list[str]:
    """Names of the rewards of the all-scenario RL: those of `specs`, and the reward models."""
    names = [reward.name for reward in load_rewards(specs)]
    return [*names, *model_reward_names(ladder.reward_model, names)]


def scenario_specs(ladder: LadderConfig) -> tuple[str, ...]:
    """The rewards of the all-scenario RL that are functions."""
    return judging.rewards(ladder, judging.EXACT, *CHAT_RULES, *ladder.general_rewards)


def _scenarios(run: Run, ladder: LadderConfig, specs: Sequence[str]) -> Path:
    """Reasoning and general rows in one file, each of which says which of the rewards `specs` judge it (R1-N equations 8 to 10); a
    general row that says so itself is left as it is."""
    names = scenario_rewards(ladder, specs)
    own, rules = len(ladder.reward) or 1, len(CHAT_RULES)
    rows = [row | {"judged_by": names[: own + rules]} for row in read_rows(ladder.prompts)]
    if ladder.general_prompts:
        rows += [{"judged_by": names[own:]} | row for row in read_rows(ladder.general_prompts)]
    return write_rows(run, "all-scenario", rows)


CHAT = PromptForm()


def measure(run: Run, ladder: LadderConfig, name: str, form: PromptForm) -> dict[str, Any]:
    """The model `name` on every held-out set: k samples at R1's temperature, and greedily; printed in a line each."""
    results: dict[str, Any] = {}
    llm = _engine(run.directory / name)
    for title, file in ladder.held_out.items():
        examples = read_rows(Path(file))[: ladder.eval_problems]
        task = judging.task(ladder, title, examples)
        drawn = Decoding(samples=ladder.eval_samples, max_tokens=ladder.eval_tokens, seed=run.manifest["settings"]["seed"])
        sampled = evaluate_answers(llm, task, form, drawn, keep=2)
        greedy = evaluate_answers(llm, task, form, replace(drawn, temperature=0.0))
        results[title] = _numbers(sampled, greedy)
        print(describe(name, title, results[title]))
    return {"results": results}


def _engine(directory: Path) -> LLM:
    """A model of the run, on the device that it is trained on."""
    return LLM(
        directory,
        dtype=torch.float32,
        device=choose_device("auto"),
        max_num_seqs=128,
        max_num_batched_tokens=1024,
        block_size=16,
    )


def _numbers(sampled: TaskResult, greedy: TaskResult) -> dict[str, Any]:
    most = max(sampled.pass_at_k)
    return {
        "problems": sampled.problems,
        "samples": sampled.samples,
        "temperature": sampled.decoding.temperature,
        "pass_at_1": list(sampled.pass_at_1),
        "greedy": list(greedy.pass_at_1),
        "cons": list(sampled.cons_at_k),
        "pass_at_k": list(sampled.pass_at_k[most]),
        "format_rate": sampled.format_rate,
        "mixing_rate": sampled.mixing_rate,
        "mean_tokens": sampled.mean_tokens,
        "scores": [round(score, 4) for score in sampled.scores],
        "shown": [[sample.prompt, sample.completion] for sample in sampled.kept],
    }


def describe(name: str, title: str, numbers: Mapping[str, Any]) -> str:
    """One line about a model on a set of problems."""
    value, low, high = numbers["pass_at_1"]
    return (
        f"{name} on {title}: pass@1 {value:.1%} ({low:.1%} to {high:.1%}) at T {numbers['temperature']:g} over {numbers['samples']} "
        f"samples, pass@{numbers['samples']} {numbers['pass_at_k'][0]:.1%}, greedy {numbers['greedy'][0]:.1%}, "
        f"mixed thoughts {numbers['mixing_rate']:.0%}, {numbers['mean_tokens']:.0f} tokens"
    )


def sample_and_keep(
    run: Run,
    ladder: LadderConfig,
    name: str,
    template: str | None,
    checks: Sequence[Check],
    num_prompts: int,
    *,
    samples: int,
    keep: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Rows of the model `name`'s own samples that pass the checks, and the funnel, which is printed. What was sampled is kept in
    training/NAME-samples.jsonl: a stage that was interrupted samples the other prompts only. No prompt is sampled twice: where there
    are fewer than `num_prompts`, all of them are taken."""
    directory = run.directory / name
    tokenizer = load_tokenizer(directory)
    llm = _engine(directory)
    prompts = read_prompts([str(ladder.prompts)], tokenizer, template, longest=llm.max_model_len - ladder.eval_tokens)
    first = {1: 0, 2: ladder.cold_start_prompts, 3: ladder.cold_start_prompts + ladder.rejection_prompts}[seed]
    count = min(num_prompts, len(prompts))
    if count < num_prompts:
        print(f"{num_prompts:,} prompts are asked for, and {ladder.prompts} has {count:,}: each of them is taken once")
    # Each stage that samples takes prompts of its own, as far as there are some.
    chosen = [prompts[i % len(prompts)] for i in range(first, first + count)]
    params = SamplingParams(temperature=1.0, max_tokens=ladder.eval_tokens, skip_special_tokens=False)
    settings = {"run": run.manifest["settings"], "model": model_hash(directory), "prompts": file_hash(ladder.prompts)}
    journal = Journal(run.directory / TRAINING / f"{name}-samples.jsonl", settings)
    if journal.finished:
        print(f"{len(journal.finished):,} prompts are finished already")
    with RewardPool([reward for check in checks for reward in check.rewards]) as pool:
        rows, funnel = rejection_sample(
            llm,
            pool,
            chosen,
            checks,
            params,
            num_samples=samples,
            keep_per_prompt=keep,
            seed=run.manifest["settings"]["seed"] + seed,
            journal=journal,
        )
    print("\n".join(funnel.lines()))
    return rows, [list(stage) for stage in funnel.stages]


def chat_row(row: Mapping[str, Any], answer_of: Callable[[str], str | None] | None, *, worded: bool = True) -> dict[str, Any]:
    """A sample as a conversation: the thought as it was, and the answer that `answer_of` finds behind it, `worded` as a sentence of the
    question's language. Without `answer_of` all that stands behind the thought is left as it is: a reward of one's own knows what in
    it counts."""
    example = row["example"]
    parts = parse_answer(row["completion"].lstrip(), starts_in_thought=opens_thought(row["prompt"]), tools=False)
    content = parts.content.strip()
    if answer_of is not None:
        answer = answer_of(parts.content)
        assert answer is not None, "only samples with an answer are kept"
        words = ANSWER_WORDS.get(example.get("language", "en"), ANSWER_WORDS["en"]) if worded else ""
        content = words + answer
    reply = {"role": "assistant", "reasoning_content": parts.reasoning.strip("\n"), "content": content}
    return {"messages": [{"role": "user", "content": example["prompt"]}, reply]}


def reference_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's own solution as a conversation."""
    content = ANSWER_WORDS.get(row.get("language", "en"), ANSWER_WORDS["en"]) + str(row["answer"])
    reply = {"role": "assistant", "reasoning_content": row["reasoning"], "content": content}
    return {"messages": [{"role": "user", "content": row["prompt"]}, reply]}


def _too_few(ladder: LadderConfig, traces: Sequence[Any], teacher: str, remedy: str, others: Sequence[Any]) -> None:
    """Stop, or say what is learnt from instead."""
    sentence = f"only {len(traces)} of the samples of {teacher} passed, fewer than {ladder.least_rows}"
    if ladder.gate == "stop" or not others:
        raise StageFailed(f"{sentence}: there is nothing to learn from; {remedy}")
    print(f"{sentence}: {len(others)} reference traces are learnt from as well")


def final_answer_text(content: str) -> str | None:
    """The answer in what stands behind a thought."""
    return final_answer("", content)


def write_rows(run: Run, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """data/NAME.jsonl of the run."""
    file = run.directory / "data" / f"{name}.jsonl"
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of the run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]  # U+2028 ends no row


def train_by_grpo(run: Run, name: str, start: str, settings: GRPOConfig) -> dict[str, Any]:
    """The model `name`: `start`, trained in training/`name`; what it was trained from, on how many tokens of its own."""
    directory = run.directory / TRAINING / name
    config = replace(settings, model=str(run.directory / start), seed=run.manifest["settings"]["seed"])
    checkpoint = grpo(config, directory, resume=(directory / "config.json").exists())
    write_rl_report(directory)
    return {"trained_from": start, "checkpoint": _publish(run, name, checkpoint), **_counted(directory)}


def _train_by_sft(run: Run, name: str, start: str, settings: SFTConfig) -> dict[str, Any]:
    directory = run.directory / TRAINING / name
    config = replace(settings, seed=run.manifest["settings"]["seed"])
    checkpoint = sft(run.directory / start, config, directory, resume=(directory / "config.json").exists())
    return {"trained_from": start, "checkpoint": _publish(run, name, checkpoint), **_counted(directory)}


def _counted(directory: Path) -> dict[str, Any]:
    """Tokens that a finished training has sampled (by reinforcement learning) or read (by fine-tuning), and the share of the MTP
    module's drafts that its model agrees with at the end, where that was measured."""
    rows = read_metrics(directory / METRICS_FILE)
    measured = [row[key] for row in rows[::-1] for key in ("mtp_acceptance_after", "mtp_acceptance") if key in row]
    return {"tokens": int(rows[-1]["tokens"]), **({"mtp_acceptance": measured[0]} if measured else {})}


def _publish(run: Run, name: str, checkpoint: Path) -> str:
    """The model of a checkpoint, without the optimizer's state, as the run's directory `name`."""
    save(load(checkpoint, dtype=torch.float32), run.directory / name)
    return str(checkpoint.relative_to(run.directory))


def tell_rise(before_name: str, before: Mapping[str, Any], name: str, after: Mapping[str, Any]) -> None:
    for title, numbers in after["results"].items():
        old = before["results"][title]
        rise = numbers["pass_at_1"][0] - old["pass_at_1"][0]
        greedy = numbers["greedy"][0] - old["greedy"][0]
        print(f"from {before_name} to {name} on {title}: {100 * rise:+.1f} points of pass@1, {100 * greedy:+.1f} greedy")


def _must_rise(ladder: LadderConfig, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The gate of a stage that must make a model better: by more than the intervals, on the first set."""
    title, old, new = _first_pass_at_1(before, after)
    if new[1] <= old[2]:
        _stop_or_tell(ladder, name, f"did not improve what it must: {_from_to(title, old, new)}")


def _must_not_fall(ladder: LadderConfig, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The gate of a stage that gives a model more than accuracy: what it had must not fall by more than the intervals."""
    title, old, new = _first_pass_at_1(before, after)
    if new[2] < old[1]:
        _stop_or_tell(ladder, name, f"has lost what it must keep: {_from_to(title, old, new)}")


def _must_be_readable(ladder: LadderConfig, zero: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """The gate of the cold start (R1 2.3.1): its thoughts must not mix languages more often than R1-Zero's."""
    title = next(iter(after["results"]))
    old, new = zero["results"][title]["mixing_rate"], after["results"][title]["mixing_rate"]
    if new > max(old, MIXED_AT_MOST):
        sentence = f"is less readable than R1-Zero: {new:.1%} of its thoughts on {title} mix languages, {old:.1%} of R1-Zero's"
        _stop_or_tell(ladder, "cold-start", sentence)


def _first_pass_at_1(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, Sequence[float], Sequence[float]]:
    """The first set, and pass@1 there with its interval, before and after."""
    title = next(iter(after["results"]))
    return title, before["results"][title]["pass_at_1"], after["results"][title]["pass_at_1"]


def _from_to(title: str, old: Sequence[float], new: Sequence[float]) -> str:
    return f"pass@1 on {title} was {old[0]:.1%} ({old[1]:.1%} to {old[2]:.1%}) and is {new[0]:.1%} ({new[1]:.1%} to {new[2]:.1%})"


def _stop_or_tell(ladder: LadderConfig, name: str, words: str) -> None:
    sentence = f"stage {name} {words}; look at training/{name}/report.md"
    if ladder.gate == "stop":
        raise StageFailed(f"{sentence}. What was finished stays")
    print(sentence)

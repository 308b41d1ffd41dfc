"""One task through the engine: draw k answers to each problem, score them as they come, and say what they show (R1 section 3)."""

import json
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict
from io import TextIOBase
from typing import NamedTuple

from finback.config import InputError
from finback.data.reasoning import opens_thought, parse_answer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.engine.output import RequestOutput
from finback.eval.choices import evaluate_choices, require_tokenizer
from finback.eval.config import Decoding, PromptForm
from finback.eval.progress import ProgressLine
from finback.eval.prompts import Prompt, render, stop_texts
from finback.eval.result import AnyResult, Sample, Tally, TaskResult
from finback.eval.task import AnyTask, ChoiceTask, Task, question, sample_seed
from finback.rewards.format import think_then_answer
from finback.rewards.language import mixing
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Example, Outcome, Score, outcome_of

KEPT_PROBLEMS = 8
"""Problems whose first samples a result keeps with their texts."""
_WAITING = 32  # requests that wait in the engine, so that it is never short of work
_PROCESSES = max(1, (os.cpu_count() or 1) // 2)  # that score
_SCORE_SECONDS = 30.0  # for one score; code has shorter limits of its own
_MOST_UNSCORED = 64  # samples that wait for their score, before the model does


def evaluate(
    llm: LLM,
    task: AnyTask,
    form: PromptForm | None = None,
    decoding: Decoding | None = None,
    *,
    keep: int = KEPT_PROBLEMS,
    out: TextIOBase | None = None,
    progress: bool = False,
) -> AnyResult:
    """What a model does on a task: `evaluate_answers`, or for a ChoiceTask `evaluate_choices`, which draws nothing."""
    form = form or PromptForm()
    if isinstance(task, ChoiceTask):
        return evaluate_choices(llm, task, form, progress=progress)
    return evaluate_answers(llm, task, form, decoding or Decoding(), keep=keep, out=out, progress=progress)


def evaluate_answers(
    llm: LLM,
    task: Task,
    form: PromptForm,
    decoding: Decoding,
    *,
    keep: int = KEPT_PROBLEMS,
    out: TextIOBase | None = None,
    progress: bool = False,
) -> TaskResult:
    """Draw `decoding.drawn` answers to every problem of a task and score them.

    Only numbers are kept of a sample, and the texts of the first sample of the first `keep` problems; `out` gets every sample as
    it comes, one JSON object a line. The engine may be in use by others; their requests go on.

    Raises:
        InputError: no tokenizer, no chat template, or a prompt that leaves no room for an answer, told before anything is generated;
            or not one answer could be scored.
    """
    start = time.monotonic()
    tokenizer = require_tokenizer(llm, task)
    prompts = [render(form, task, example, tokenizer) for example in task.examples]
    _check_lengths(llm, task, prompts)
    tally = Tally([str(example.get("family", "")) for example in task.examples], decoding.drawn)
    kept: list[Sample] = []
    total, done = len(prompts) * decoding.drawn, 0
    with ProgressLine(f"{task.name} ({form.name})", total, shown=progress) as line:
        for sample in draw_samples(llm, task, form, decoding, prompts):
            tally.add(sample)
            if out is not None:
                _write(out, task, form, sample)
            if sample.number == 0 and sample.problem < keep:
                kept.append(sample)
            done += 1
            if sample.failure and done == total == tally.failed:
                raise InputError(f"no answer of task {task.name} could be scored: {task.score.name} {sample.failure}")
            line.show(done, f"{tally.mean_score:.1%} right")
    return tally.result(
        task.name,
        form,
        decoding,
        prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts) * decoding.drawn,
        seconds=time.monotonic() - start,
        kept=sorted(kept, key=lambda sample: sample.problem),
    )


class _Job(NamedTuple):
    """One answer to be drawn."""

    problem: int
    number: int


def draw_samples(llm: LLM, task: Task, form: PromptForm, decoding: Decoding, prompts: Sequence[Prompt]) -> Iterator[Sample]:
    """The scored answers, each as soon as it is there, in no order. Closing the iterator aborts what is under way.

    Every answer is a request of its own whose seed comes from (seed, question, number), so neither the order nor the company
    changes it; those of one problem share the cached prompt. Where the task needs a pool, scores are computed while the model goes on.
    """
    if not task.needs_pool and not task.rewards:
        for job, output in _answers(llm, task, form, decoding, prompts):
            if output is not None:
                example, text = task.examples[job.problem], prompts[job.problem].text
                yield _sample(task, job, text, output, outcome_of(task.score.function, text, output.text, example))
        return
    waiting: dict[Hashable, tuple[_Job, RequestOutput]] = {}
    with RewardPool(task.rewards or [task.score], processes=_PROCESSES, deadline=_SCORE_SECONDS) as pool:

        def collected(*, wait: bool) -> Iterator[Sample]:
            for key, score in pool.collect(wait=wait):
                job, output = waiting.pop(key)
                yield _sample(task, job, prompts[job.problem].text, output, _outcome(task, score))

        for job, output in _answers(llm, task, form, decoding, prompts):
            if output is not None:
                waiting[job] = (job, output)
                pool.submit(job, prompts[job.problem].text, output.text, task.examples[job.problem])
            yield from collected(wait=len(waiting) > _MOST_UNSCORED)
        while waiting:
            yield from collected(wait=True)


def _outcome(task: Task, score: Score) -> Outcome:
    """What the pool's score says of a sample; one that a reward could not judge has failed."""
    failure = "; ".join(score.failures.values())
    value = float(score.total >= task.least) if task.rewards else score.components[task.score.name]
    return Outcome(value, "raised" if failure else None, failure)


def _answers(
    llm: LLM, task: Task, form: PromptForm, decoding: Decoding, prompts: Sequence[Prompt]
) -> Iterator[tuple[_Job, RequestOutput | None]]:
    """Each job with its answer when it is there, and with None after each step of the engine, so that others can look around."""
    jobs = iter([_Job(problem, number) for problem in range(len(prompts)) for number in range(decoding.drawn)])
    running: dict[int, tuple[_Job, RequestOutput]] = {}
    stop = stop_texts(form)
    job: _Job | None = next(jobs, None)
    try:
        while job is not None or running:
            while job is not None and llm.scheduler_stats.num_waiting < _WAITING:
                token_ids = prompts[job.problem].token_ids
                request_id = llm.add(token_ids, _params(decoding, task.examples[job.problem], job, stop))
                running[request_id] = (job, RequestOutput(token_ids))
                job = next(jobs, None)
            for increment in llm.step():
                if increment.request_id in running:
                    done, output = running[increment.request_id]
                    output.add(increment)
                    if increment.finish_reason is not None:
                        del running[increment.request_id]
                        yield done, output
            yield _Job(-1, -1), None
    finally:
        for request_id in running:
            llm.abort(request_id)


def _params(decoding: Decoding, example: Example, job: _Job, stop: tuple[str, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        max_tokens=decoding.max_tokens,
        seed=sample_seed(decoding.seed, example, job.number),
        stop=stop,
    )


def _sample(task: Task, job: _Job, prompt: str, output: RequestOutput, outcome: Outcome) -> Sample:
    example, completion = task.examples[job.problem], output.text
    assert output.finish_reason is not None
    parts = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False)
    failure = output.error or outcome.sentence or _unfit(outcome.value)
    return Sample(
        problem=job.problem,
        number=job.number,
        prompt=prompt,
        completion=completion,
        score=0.0 if failure else outcome.value,
        answer=None if failure else task.extract(prompt, completion),
        formatted=think_then_answer(prompt, completion, example) == 1.0,
        mixes=mixing(completion if parts.thought == "absent" else parts.reasoning),
        tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
        failure=failure,
    )


def _unfit(score: float) -> str:
    """Why a score is no share of right, in a sentence: means and intervals hold between 0 and 1 only."""
    return "" if 0 <= score <= 1 else f"gave {score:g}, and a score is from 0 to 1; scale it"


def _write(out: TextIOBase, task: Task, form: PromptForm, sample: Sample) -> None:
    example = task.examples[sample.problem]
    row = {
        "task": task.name,
        "form": form.name,
        "question": question(example),
        "expected": example.get("answer"),
        **asdict(sample),
    }
    out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _check_lengths(llm: LLM, task: Task, prompts: Sequence[Prompt]) -> None:
    for number, prompt in enumerate(prompts):
        if len(prompt.token_ids) >= llm.max_model_len:
            raise InputError(
                f"problem {number} of task {task.name} has a prompt of {len(prompt.token_ids)} tokens, which leaves no room for an "
                f"answer in the model's context ({llm.max_model_len}); show fewer solved problems, or choose another task"
            )

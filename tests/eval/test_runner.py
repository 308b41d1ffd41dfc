"""A task through the engine: the answers are the engine's own, and the numbers are those of a count by hand."""

import io
import json
from collections import Counter
from statistics import fmean

import pytest

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.eval.config import Decoding, PromptForm
from finback.eval.prompts import render
from finback.eval.result import Sample, Tally, TaskResult
from finback.eval.runner import draw_samples, evaluate_answers
from finback.eval.statistics import clustered_interval
from finback.eval.task import Task, sample_seed
from finback.rewards.code import pass_at_k
from finback.rewards.reward import Example, Reward
from tests.eval.models import engine, small_model
from tests.eval.scores import always_raises, is_a, letter, out_of_range, raises_on_sorting

QUESTIONS = ["What is 3 + 5?", "数列1, 2, 3的下一个数是多少？", "Sort 9, 2.", "Why?", "What is 4 * 7?"]


EXAMPLES = [{"question": question, "answer": "a", "family": "odd" if i % 2 else "even"} for i, question in enumerate(QUESTIONS)]
IS_A = Reward("is_a", is_a, spec="tests.eval.scores:is_a")
TASK = Task("noise", EXAMPLES, IS_A, letter)
FORM = PromptForm("plain", template="{prompt}\n")
DECODING = Decoding(samples=6, temperature=1.0, top_p=1.0, max_tokens=12, seed=3)


def run(
    llm: LLM, task: Task = TASK, form: PromptForm = FORM, decoding: Decoding = DECODING
) -> tuple[TaskResult, list[dict[str, object]]]:
    out = io.StringIO()
    result = evaluate_answers(llm, task, form, decoding, out=out)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    return result, sorted(rows, key=lambda row: (row["problem"], row["number"]))


def test_every_answer_is_the_engines_own(llm: LLM, tokenizer: Tokenizer) -> None:
    _, rows = run(llm)
    assert [(row["problem"], row["number"]) for row in rows] == [(i, j) for i in range(5) for j in range(6)]
    asked = [(example, number) for example in EXAMPLES for number in range(6)]
    prompts = [render(FORM, TASK, example, tokenizer) for example, _ in asked]
    params = [SamplingParams(temperature=1, max_tokens=12, seed=sample_seed(3, *one)) for one in asked]
    outputs = llm.generate([prompt.token_ids for prompt in prompts], params)
    for row, (example, _), prompt, output in zip(rows, asked, prompts, outputs, strict=True):
        assert (row["completion"], row["tokens"], row["finish_reason"]) == (
            output.text,
            len(output.token_ids),
            output.finish_reason,
        )
        assert (row["question"], row["expected"], row["prompt"]) == (example["question"], "a", prompt.text)
    assert len({row["completion"] for row in rows}) > 25


def test_the_numbers_are_those_of_a_count(llm: LLM) -> None:
    result, rows = run(llm)
    answers = [[row["answer"] for row in rows if row["problem"] == i] for i in range(5)]
    counts = [list(group).count("a") for group in answers]
    assert 0 < sum(counts) < 30
    assert result.scores == tuple(count / 6 for count in counts)
    assert result.pass_at_1 == clustered_interval([count / 6 for count in counts], 6)
    assert result.pass_at_1.value == pytest.approx(sum(counts) / 30)
    assert {k: estimate.value for k, estimate in result.pass_at_k.items()} == pytest.approx(
        {k: fmean(pass_at_k(6, count, k) for count in counts) for k in (1, 2, 4, 6)}
    )
    wins = 0
    for group in answers:
        votes = Counter(answer for answer in group if answer is not None)
        wins += next(answer for answer in group if answer is not None and votes[answer] == max(votes.values())) == "a"
    assert result.cons_at_k.value == wins / 5
    assert result.mean_tokens == fmean(int(str(row["tokens"])) for row in rows)
    assert result.truncated == fmean(row["finish_reason"] == "length" for row in rows)
    assert result.generated_tokens == sum(int(str(row["tokens"])) for row in rows)
    assert (result.problems, result.samples, result.failed) == (5, 6, 0)
    assert {name: family.problems for name, family in result.families.items()} == {"even": 3, "odd": 2}
    assert result.families["odd"].pass_at_1.value == pytest.approx((counts[1] + counts[3]) / 12)
    assert [sample.problem for sample in result.kept] == [0, 1, 2, 3, 4]
    assert result.kept[2].completion == next(row["completion"] for row in rows if (row["problem"], row["number"]) == (2, 0))


def test_neither_order_nor_company_changes_an_answer(llm: LLM, tokenizer: Tokenizer) -> None:
    _, rows = run(llm)
    alone = Task("noise", [EXAMPLES[3], EXAMPLES[1]], IS_A, letter)
    other = engine(small_model(tokenizer), tokenizer, max_num_seqs=2)
    _, fewer = run(other, alone)
    assert [row["completion"] for row in fewer] == [row["completion"] for i in (3, 1) for row in rows if row["problem"] == i]


def test_temperature_0_is_one_greedy_answer(llm: LLM, tokenizer: Tokenizer) -> None:
    result, rows = run(llm, decoding=Decoding(samples=6, temperature=0, max_tokens=9))
    assert result.samples == 1
    assert list(result.pass_at_k) == [1]
    for row, example in zip(rows, EXAMPLES, strict=True):
        (expected,) = llm.generate(render(FORM, TASK, example, tokenizer).token_ids, SamplingParams(temperature=0, max_tokens=9))
        assert row["completion"] == expected.text


def test_other_requests_of_the_engine_go_on(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    request_id = llm.add("Once upon a time", params)
    run(llm)
    assert not llm.has_unfinished or llm.abort(request_id)


def test_leaving_early_ends_all_requests(llm: LLM, tokenizer: Tokenizer) -> None:
    prompts = [render(FORM, TASK, example, tokenizer) for example in EXAMPLES]
    samples = draw_samples(llm, TASK, FORM, DECODING, prompts)
    assert isinstance(next(iter(samples)), Sample)
    samples.close()  # type: ignore[attr-defined]
    assert not llm.has_unfinished
    assert llm.num_free_blocks == llm.num_blocks


def test_what_cannot_be_asked_is_told_before_anything_is_generated(llm: LLM, tokenizer: Tokenizer) -> None:
    model = small_model(tokenizer, context=24)
    with pytest.raises(InputError, match="task noise is text, and the model has no tokenizer"):
        run(engine(model, None))
    small = engine(model, tokenizer)
    long = Task("noise", [*EXAMPLES, {"question": "word " * 40, "answer": "a"}], IS_A, letter)
    with pytest.raises(InputError, match=r"problem 5 of task noise has a prompt of \d+ tokens, .* context \(24\)"):
        run(small, long)
    assert small.stats.steps == 0


def test_the_context_bounds_an_answer(tokenizer: Tokenizer) -> None:
    small = engine(small_model(tokenizer, context=24), tokenizer)
    result, rows = run(small, Task("noise", EXAMPLES[3:4], IS_A, letter), decoding=Decoding(samples=2, temperature=1.0))
    assert all(len(tokenizer.encode(str(row["prompt"]), add_bos=True)) + int(str(row["tokens"])) <= 24 for row in rows)
    assert result.truncated > 0


@pytest.mark.parametrize("needs_pool", [False, True])
def test_a_score_that_raises_counts_0_and_is_told(needs_pool: bool, llm: LLM) -> None:
    reward = Reward("mine", raises_on_sorting, spec="tests.eval.scores:raises_on_sorting")
    expected, _ = run(llm)
    result, rows = run(llm, Task("noise", EXAMPLES, reward, letter, needs_pool=needs_pool))
    assert (result.failed, result.failures) == (6, {"raised ValueError: no sorting today": 6})
    assert {row["problem"] for row in rows if row["failure"]} == {2}
    assert result.scores == (*expected.scores[:2], 0.0, *expected.scores[3:])


@pytest.mark.parametrize("needs_pool", [False, True])
def test_a_score_that_always_raises_is_an_error(needs_pool: bool, llm: LLM) -> None:
    reward = Reward("mine", always_raises, spec="tests.eval.scores:always_raises")
    with pytest.raises(InputError, match="no answer of task noise could be scored: mine raised KeyError: 'missing'"):
        run(llm, Task("noise", EXAMPLES, reward, letter, needs_pool=needs_pool))
    assert not llm.has_unfinished


@pytest.mark.parametrize("needs_pool", [False, True])
def test_a_score_that_is_no_share_counts_0_and_is_told(needs_pool: bool, llm: LLM) -> None:
    reward = Reward("mine", out_of_range, spec="tests.eval.scores:out_of_range")
    expected, _ = run(llm)
    result, rows = run(llm, Task("noise", EXAMPLES, reward, letter, needs_pool=needs_pool))
    sentence = "and a score is from 0 to 1; scale it"
    assert result.failures == {f"gave 2, {sentence}": 6, f"gave -0.5, {sentence}": 6}
    assert {row["problem"] for row in rows if row["failure"]} == {2, 3}
    assert result.scores == (*expected.scores[:2], 0.0, 0.0, expected.scores[4])
    assert 0 <= result.pass_at_1.low <= result.pass_at_1.value <= result.pass_at_1.high <= 1


def test_scores_of_a_pool_are_those_of_this_process(llm: LLM) -> None:
    plain, rows = run(llm)
    pooled, others = run(llm, Task("noise", EXAMPLES, IS_A, letter, needs_pool=True))
    assert others == rows
    assert (pooled.pass_at_1, pooled.cons_at_k) == (plain.pass_at_1, plain.cons_at_k)


def sample(problem: int, number: int, **changes: object) -> Sample:
    fields = {"prompt": "", "completion": "", "score": 0.0, "answer": None, "formatted": False, "mixes": False, "tokens": 10}
    return Sample(problem=problem, number=number, **(fields | {"finish_reason": "stop"} | changes))  # type: ignore[arg-type]


def test_a_tally_by_hand() -> None:
    """Two problems, four samples each: 3 and 1 right."""
    tally = Tally(["", ""], 4)
    for number, (score, answer) in enumerate([(1.0, "5"), (1.0, "5"), (0.0, None), (1.0, "5")]):
        tally.add(sample(0, number, score=score, answer=answer, formatted=answer is not None, tokens=20))
    for number, (score, answer) in reversed(list(enumerate([(0.0, "3"), (1.0, "4"), (0.0, "3"), (0.0, "9")]))):
        tally.add(
            sample(
                1,
                number,
                score=score,
                answer=answer,
                mixes=number == 1,
                finish_reason="length" if number else "error",
                failure="" if number else "why",
            )
        )
    assert tally.mean_score == 0.5
    result = tally.result("t", FORM, DECODING, prompt_tokens=0, seconds=1.0)
    assert result.pass_at_1.value == 0.5
    assert result.cons_at_k.value == 0.5
    assert {k: estimate.value for k, estimate in result.pass_at_k.items()} == {1: 0.5, 2: 0.75, 4: 1.0}  # (1 + 1/2) / 2 of two
    assert (result.format_rate, result.mixing_rate, result.mean_tokens) == (3 / 8, 1 / 8, 15.0)
    assert (result.truncated, result.failed, result.failures, dict(result.families)) == (3 / 8, 1, {"why": 1}, {})
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["pass_at_1"]["value"] == 0.5
    assert plain["pass_at_k"]["2"]["value"] == 0.75
    assert plain["scores"] == [0.75, 0.25]
    assert "kept" not in plain


def test_a_right_model_is_right(llm: LLM) -> None:
    """With the expected answers taken from what the model writes, every number is full."""
    _, rows = run(llm, decoding=Decoding(temperature=0, max_tokens=12))
    known = {row["question"]: row["completion"] for row in rows}

    def repeats(prompt: str, completion: str, example: Example) -> float:
        return float(completion == known[example["question"]])

    result, _ = run(
        llm,
        Task("known", EXAMPLES, Reward("repeats", repeats), lambda _, completion: completion),
        decoding=Decoding(temperature=0, max_tokens=12),
    )
    assert result.pass_at_1.value == result.cons_at_k.value == 1.0
    assert result.pass_at_1.low < 0.6  # five problems prove little

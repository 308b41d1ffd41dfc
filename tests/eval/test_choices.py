"""Choices by likelihood, against a loop over single tokens."""

import math

import pytest
import torch

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.engine.llm import LLM
from finback.eval.choices import continuation_logprobs, evaluate_choices, split_tokens
from finback.eval.config import PromptForm
from finback.eval.task import ChoiceTask
from tests.eval.models import engine, small_model

FORM = PromptForm("qa", template="Q: {prompt}\nA:")
CHOICES = ["yes, it is", "no", "it depends on the weather 天气", "nobody knows"]
QUESTIONS = [f"Is {number} odd?" for number in range(4)]


def task(answers: list[int]) -> ChoiceTask:
    rows = [{"question": q, "choices": CHOICES, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    return ChoiceTask("choices", rows, [("Is 1 odd?", "yes, it is"), ("Is 2 odd?", "no")])


def one_by_one(llm: LLM, before: list[int], after: list[int]) -> tuple[float, bool]:
    """One forward pass for each token, alone in its row."""
    total, greedy = 0.0, True
    for place, token in enumerate(after):
        with torch.no_grad():
            logprobs = llm.model(torch.tensor([[*before, *after[:place]]]))[0, -1].float().log_softmax(-1)
        total += float(logprobs[token])
        greedy = greedy and int(logprobs.argmax()) == token
    return total, greedy


def alone(llm: LLM, before: list[int], after: list[int]) -> float:
    """One forward pass, without padding."""
    with torch.no_grad():
        logprobs = llm.model(torch.tensor([[*before, *after]]))[0].float().log_softmax(-1)
    return sum(float(logprobs[len(before) + place - 1, token]) for place, token in enumerate(after))


def test_likelihoods_are_those_of_a_loop_over_tokens(llm: LLM, tokenizer: Tokenizer) -> None:
    pairs = [split_tokens(tokenizer, "Q: Is 3 odd?\nA:", f" {choice}", add_bos=True) for choice in CHOICES]
    greedy = llm.model(torch.tensor([pairs[0][0]]))[0, -1].argmax()
    pairs.append((pairs[0][0], [int(greedy)]))
    for pair, found in zip(pairs, continuation_logprobs(llm.model, pairs), strict=True):
        expected = one_by_one(llm, *pair)
        assert found.logprob == pytest.approx(expected[0], abs=1e-4)
        assert found.greedy == expected[1]
    assert continuation_logprobs(llm.model, pairs)[-1].greedy


@pytest.mark.parametrize("shown", [0, 2])
def test_the_likeliest_choice_is_taken(shown: int, llm: LLM, tokenizer: Tokenizer) -> None:
    form = PromptForm("qa", template="Q: {prompt}\nA:", few_shot=shown)
    before = "Q: Is 1 odd?\nA: yes, it is\n\nQ: Is 2 odd?\nA: no\n\n" if shown else ""
    best, best_per_byte = [], []
    for question in QUESTIONS:
        pairs = [split_tokens(tokenizer, f"{before}Q: {question}\nA:", f" {choice}", add_bos=True) for choice in CHOICES]
        logprobs = [alone(llm, *pair) for pair in pairs]
        best.append(logprobs.index(max(logprobs)))
        per_byte = [value / len(choice.encode()) for value, choice in zip(logprobs, CHOICES, strict=True)]
        best_per_byte.append(per_byte.index(max(per_byte)))
    right = evaluate_choices(llm, task(best), form)
    assert right.accuracy.value == 1.0
    assert right.scores == (1.0,) * 4
    assert right.accuracy.low < 0.9
    other = [(place + 1) % 4 for place in best]
    assert evaluate_choices(llm, task(other), form).accuracy.value == 0.0
    assert evaluate_choices(llm, task(best_per_byte), form).accuracy_per_byte.value == 1.0
    assert right.accuracy_per_byte.value == sum(a == b for a, b in zip(best, best_per_byte, strict=True)) / 4


def test_a_tie_is_missed(llm: LLM) -> None:
    rows = [{"question": "Is it?", "choices": ["no", "no"], "answer": 0}]
    assert evaluate_choices(llm, ChoiceTask("tie", rows), FORM).accuracy.value == 0.0


def test_a_damaged_model_is_not_right(tokenizer: Tokenizer) -> None:
    model = small_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    result = evaluate_choices(engine(model, tokenizer), task([0] * 4), FORM)
    assert (result.accuracy.value, result.accuracy_per_byte.value) == (0.0, 0.0)


def test_a_chat_answers_behind_an_empty_thought(llm: LLM, tokenizer: Tokenizer) -> None:
    text = "<｜begin▁of▁sentence｜><｜User｜>Is 0 odd?<｜Assistant｜><think>\n</think>\n\n"
    logprobs = [alone(llm, *split_tokens(tokenizer, text, choice, add_bos=False)) for choice in CHOICES]
    best = logprobs.index(max(logprobs))
    rows = [{"question": QUESTIONS[0], "choices": CHOICES, "answer": best}]
    assert evaluate_choices(llm, ChoiceTask("chat", rows), PromptForm()).accuracy.value == 1.0


def test_tokens_are_cut_where_the_model_reads_them(tokenizer: Tokenizer) -> None:
    before, after = split_tokens(tokenizer, "Answer: ", "12", add_bos=True)
    assert before + after == tokenizer.encode("Answer: 12", add_bos=True)
    assert tokenizer.decode(after).strip() == "12"
    before, after = split_tokens(tokenizer, "What", "ever is", add_bos=False)
    assert before + after == tokenizer.encode("Whatever is")
    assert after


def test_what_does_not_fit_is_told(tokenizer: Tokenizer) -> None:
    model = small_model(tokenizer, context=16)
    with pytest.raises(InputError, match=r"a question of task choices with a choice has \d+ tokens, .* context \(16\)"):
        evaluate_choices(engine(model, tokenizer), task([0] * 4), FORM)
    with pytest.raises(InputError, match="has no tokenizer"):
        evaluate_choices(engine(model, None), task([0] * 4), FORM)

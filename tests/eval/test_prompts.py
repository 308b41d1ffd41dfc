"""A problem as the model reads it."""

from dataclasses import replace

import pytest

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.eval.config import DOCUMENT_FORM, Decoding, PromptForm
from finback.eval.prompts import render, stop_texts
from finback.eval.task import Task
from finback.rewards.answers import exact, final_answer
from finback.rewards.reward import Reward

EXACT = Reward("exact", exact)
SHOWN = (("1 + 1?", "<think>\n1 + 1 = 2\n</think>\nAnswer: 2"), ("2 + 2?", "Answer: 4"))
EXAMPLE = {"question": "3 + 3?", "answer": "6", "language": "en"}
TASK = Task("sums", [EXAMPLE], EXACT, final_answer, SHOWN)


def test_chat_is_a_users_message_and_earlier_turns(tokenizer: Tokenizer) -> None:
    prompt = render(PromptForm(), TASK, EXAMPLE, tokenizer)
    assert prompt.text == "<｜begin▁of▁sentence｜><｜User｜>3 + 3?<｜Assistant｜><think>\n"
    assert prompt.token_ids == tokenizer.encode(prompt.text)
    assert prompt.token_ids.count(tokenizer.token_to_id("<｜begin▁of▁sentence｜>")) == 1
    shown = render(PromptForm(few_shot=2), TASK, EXAMPLE, tokenizer).text
    assert shown == (
        "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜>\nAnswer: 2<｜end▁of▁sentence｜>"
        "<｜User｜>2 + 2?<｜Assistant｜>Answer: 4<｜end▁of▁sentence｜><｜User｜>3 + 3?<｜Assistant｜><think>\n"
    )


def test_plain_text_begins_with_the_begin_of_sentence_token(tokenizer: Tokenizer) -> None:
    form = PromptForm("qa", template="Q: {prompt}\nA:")
    prompt = render(form, TASK, EXAMPLE, tokenizer)
    assert prompt.text == "Q: 3 + 3?\nA:"
    assert prompt.token_ids == tokenizer.encode(prompt.text, add_bos=True)
    shown = render(replace(form, few_shot=1), TASK, EXAMPLE, tokenizer).text
    assert shown == "Q: 1 + 1?\nA: <think>\n1 + 1 = 2\n</think>\nAnswer: 2\n\nQ: 3 + 3?\nA:"


def test_a_thought_that_the_template_opens_is_opened_once(tokenizer: Tokenizer) -> None:
    shown = render(replace(DOCUMENT_FORM, few_shot=2), TASK, {**EXAMPLE, "language": "zh"}, tokenizer).text
    assert shown == (
        "问题：1 + 1?\n<think>\n1 + 1 = 2\n</think>\nAnswer: 2\n\n问题：2 + 2?\n<think>\nAnswer: 4\n\n问题：3 + 3?\n<think>\n"
    )
    assert render(DOCUMENT_FORM, TASK, EXAMPLE, tokenizer).text == "Question: 3 + 3?\n<think>\n"


def test_the_prompt_is_asked_where_it_is_more_than_the_question(tokenizer: Tokenizer) -> None:
    example = {**EXAMPLE, "prompt": "Be brief. {3} + 3?"}
    assert render(PromptForm("t", template="{prompt}"), TASK, example, tokenizer).text == "Be brief. {3} + 3?"


def test_answers_end_where_the_next_question_begins() -> None:
    assert stop_texts(PromptForm()) == ()
    assert stop_texts(PromptForm("t", template="Be brief.\nQ: {prompt}\nA:")) == ("\nQ:",)
    assert stop_texts(DOCUMENT_FORM) == ("\nQuestion:", "\n问题：")
    assert stop_texts(PromptForm("t", template="{prompt}")) == ()


def test_what_cannot_be_put_is_one_sentence(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.backend, tokenizer.config, None)
    with pytest.raises(
        InputError, match=r"task sums is put as a chat, and this model's tokenizer has no chat template; .*--template"
    ):
        render(PromptForm(), TASK, EXAMPLE, bare)
    with pytest.raises(InputError, match="task sums has 2 solved problems to show, and 3 are asked for; lower --few-shot"):
        render(PromptForm(few_shot=3), TASK, EXAMPLE, tokenizer)
    with pytest.raises(InputError, match="has no solved problems to show"):
        render(PromptForm(few_shot=1), replace(TASK, few_shot=()), EXAMPLE, tokenizer)
    for template in ("no place", "{prompt} {prompt}"):
        with pytest.raises(InputError, match=r"must hold {prompt} once"):
            PromptForm("t", template=template)
    with pytest.raises(InputError, match="few_shot is -1"):
        PromptForm(few_shot=-1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_decoding_that_cannot_be_meant_is_told(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"decoding field {field} is {value}"):
        Decoding(**{field: value})


def test_temperature_0_draws_one_answer() -> None:
    assert Decoding(samples=16, temperature=0).drawn == 1
    assert Decoding(samples=16).drawn == 16

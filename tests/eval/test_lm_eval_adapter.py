"""The harness's requests, answered by a small engine and by a loop over single tokens."""

import builtins
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finback.config import InputError
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.eval.lm_eval_adapter import HarnessRequests, lm_eval_model, rolling_windows, sampling_params
from tests.eval.models import engine, small_model


def ask(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def loop(llm: LLM, before: list[int], after: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logprobs = llm.model(torch.tensor([[*before, *after]]))[0].float().log_softmax(-1)[len(before) - 1 : -1]
    greedy = logprobs.argmax(-1).tolist() == after
    return sum(float(row[token]) for row, token in zip(logprobs, after, strict=True)), greedy


def test_likelihoods_in_the_order_of_the_requests(llm: LLM, tokenizer: Tokenizer) -> None:
    harness = HarnessRequests(llm)
    questions = [("Answer:", " yes"), ("What is 3 + 5? " * 4, "8"), ("", "What"), ("Answer: ", "no, never"), ("问题：", "答案")]
    pairs = []
    for context, continuation in questions:
        kept = context.rstrip(" ")
        before = tokenizer.encode(kept, add_bos=True) if context else [tokenizer.bos_token_id]
        whole = tokenizer.encode(context + continuation, add_bos=True)
        assert whole[: len(before)] == before
        pairs.append((before, whole[len(before) :]))
    greedy = llm.generate("Answer:", SamplingParams(temperature=0, max_tokens=1))[0]
    if greedy.text and tokenizer.encode(f"Answer:{greedy.text}", add_bos=True)[-1:] == greedy.token_ids:
        questions.append(("Answer:", greedy.text))
        pairs.append((tokenizer.encode("Answer:", add_bos=True), greedy.token_ids))
    for (logprob, is_greedy), pair in zip(harness.loglikelihood([ask(*one) for one in questions]), pairs, strict=True):
        expected = loop(llm, *pair)
        assert logprob == pytest.approx(expected[0], abs=1e-4)
        assert is_greedy == expected[1]
    assert harness.loglikelihood([]) == []


def test_a_long_context_is_cut_at_its_start(tokenizer: Tokenizer) -> None:
    small = engine(small_model(tokenizer, context=16), tokenizer)
    text = "What is 3 + 5? " * 4 + "Answer:"
    ((logprob, _),) = HarnessRequests(small).loglikelihood([ask(text, " 8")])
    after = tokenizer.encode(text + " 8")[len(tokenizer.encode(text)) :]
    before = tokenizer.encode(text)[-(17 - len(after)) :]
    assert logprob == pytest.approx(loop(small, before, after)[0], abs=1e-4)
    with pytest.raises(InputError, match=r"a continuation has \d+ tokens, .* context \(16\)"):
        HarnessRequests(small).loglikelihood([ask("a", text)])
    with pytest.raises(InputError, match="a continuation is empty"):
        HarnessRequests(small).loglikelihood([ask("a", "")])


def test_windows_are_the_harness_own_example() -> None:
    """From the documentation of lm_eval.api.model.LM.loglikelihood_rolling: ten tokens, a context of four."""
    found = [([*before, *after][:-1], after) for before, after in rolling_windows(list(range(10)), -1, 4)]
    assert found == [([-1, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]
    assert list(rolling_windows([], -1, 4)) == []
    for length in range(1, 30):
        windows = list(rolling_windows(list(range(length)), -1, 5))
        assert [token for _, after in windows for token in after] == list(range(length))
        assert all(before and len(before) + len(after) <= 6 for before, after in windows)


def test_rolling_likelihood_is_that_of_the_windows(tokenizer: Tokenizer) -> None:
    small = engine(small_model(tokenizer, context=16), tokenizer)
    text = "The fox has 3 apples and 5 books. 狐狸有3个苹果。" * 2
    tokens = tokenizer.encode(text)
    assert len(tokens) > 40
    assert tokenizer.bos_token_id is not None
    expected = sum(loop(small, before, after)[0] for before, after in rolling_windows(tokens, tokenizer.bos_token_id, 16))
    found = HarnessRequests(small).loglikelihood_rolling([ask(text), ask("")])
    assert found == [pytest.approx(expected, abs=1e-3), 0.0]


def test_generation_is_the_engines(llm: LLM) -> None:
    harness = HarnessRequests(llm)
    (whole,) = llm.generate("The fox", SamplingParams(temperature=0, max_tokens=20))
    stop = whole.text[6:8]
    answers = harness.generate_until(
        [
            ask("The fox", {"until": [stop, ""], "max_gen_toks": 20}),
            ask("The fox", {"until": [], "max_gen_toks": 7, "do_sample": False}),
        ]
    )
    assert answers[0] == whole.text.partition(stop)[0]
    assert answers[1] == llm.generate("The fox", SamplingParams(temperature=0, max_tokens=7))[0].text
    assert harness.generate_until([]) == []


def test_settings_of_a_task() -> None:
    assert sampling_params({"until": "\n"}) == SamplingParams(temperature=0, max_tokens=256, stop=("\n",))
    assert sampling_params({"temperature": 0.0, "do_sample": False, "top_p": 0.5}) == SamplingParams(
        temperature=0, max_tokens=256
    )
    sampled = sampling_params({"temperature": 0.6, "do_sample": True, "top_p": 0.95, "max_gen_toks": 9})
    assert sampled == SamplingParams(temperature=0.6, top_p=0.95, max_tokens=9)
    assert sampling_params({"temperature": 0.7}).temperature == 0.7
    with pytest.raises(InputError, match="the task sets num_beams to 4"):
        sampling_params({"num_beams": 4})


def test_a_prompt_leaves_room_for_the_answer(tokenizer: Tokenizer) -> None:
    small = engine(small_model(tokenizer, context=16), tokenizer)
    text = "What is 3 + 5? " * 4
    (answer,) = HarnessRequests(small).generate_until([ask(text, {"max_gen_toks": 6})])
    (expected,) = small.generate(tokenizer.encode(text, add_bos=True)[-10:], SamplingParams(temperature=0, max_tokens=6))
    assert answer == expected.text
    with pytest.raises(InputError, match="asks for answers of 16 tokens, and the model's context is 16"):
        HarnessRequests(small).generate_until([ask(text, {"max_gen_toks": 16})])


def test_chats(llm: LLM, tokenizer: Tokenizer) -> None:
    harness = HarnessRequests(llm)
    text = harness.apply_chat_template([{"role": "user", "content": "Why?"}])
    assert text == "<｜begin▁of▁sentence｜><｜User｜>Why?<｜Assistant｜><think>\n"
    (answer,) = harness.generate_until([ask(text, {"max_gen_toks": 5})])
    assert answer == llm.generate(tokenizer.encode(text), SamplingParams(temperature=0, max_tokens=5))[0].text
    assert harness.chat_template() == tokenizer.chat_template
    assert harness.tokenizer_name.startswith("finback-")


def test_what_is_missing_is_told(llm: LLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        HarnessRequests(engine(small_model(tokenizer), None))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="needs the package lm-eval; run: pip install lm-eval"):
        lm_eval_model(llm)


def test_the_harness_takes_it_for_a_model(llm: LLM) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    model = lm_eval_model(llm)
    assert isinstance(model, lm_eval.api.model.LM)
    assert (model.rank, model.world_size) == (0, 1)
    assert model.loglikelihood([ask("Answer:", " yes")]) == HarnessRequests(llm).loglikelihood([ask("Answer:", " yes")])

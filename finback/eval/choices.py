"""Multiple choice by likelihood: the model writes nothing, it is asked how likely each choice is as the answer."""

import time
from typing import NamedTuple

import torch

from finback.config import InputError
from finback.data.reasoning import opens_thought
from finback.data.tokenizer import END_THINK_TOKEN, Tokenizer
from finback.engine.llm import LLM
from finback.eval.config import PromptForm
from finback.eval.progress import ProgressLine
from finback.eval.prompts import render
from finback.eval.result import ChoiceResult
from finback.eval.statistics import wilson_interval
from finback.eval.task import AnyTask, ChoiceTask
from finback.model.transformer import Transformer
from finback.rewards.reward import Example


class Continuation(NamedTuple):
    """How likely a text is behind another."""

    logprob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""


def require_tokenizer(llm: LLM, task: AnyTask) -> Tokenizer:
    """The engine's tokenizer; InputError if it has none."""
    if llm.tokenizer is None:
        raise InputError(
            f"task {task.name} is text, and the model has no tokenizer; add tokenizer.json and tokenizer_config.json to its "
            "directory, or give LLM(tokenizer=...)"
        )
    return llm.tokenizer


def evaluate_choices(llm: LLM, task: ChoiceTask, form: PromptForm, *, progress: bool = False) -> ChoiceResult:
    """How often the right choice is the likeliest answer, by its whole log-likelihood and by that per byte.

    A chat template that opens a thought gets it closed at once: the choice stands where the answer does. In plain text the choice
    follows after a space. Errors as in `evaluate_answers`.
    """
    start = time.monotonic()
    tokenizer = require_tokenizer(llm, task)
    right, right_per_byte, tokens = [], [], 0
    with ProgressLine(f"{task.name} ({form.name})", len(task.examples), shown=progress) as line:
        for done, example in enumerate(task.examples, 1):
            logprobs, read = _choice_logprobs(llm, task, form, example, tokenizer)
            lengths = [len(str(choice).encode()) for choice in example["choices"]]
            right.append(float(_is_best(logprobs, example["answer"])))
            per_byte = [logprob / max(1, length) for logprob, length in zip(logprobs, lengths, strict=True)]
            right_per_byte.append(float(_is_best(per_byte, example["answer"])))
            tokens += read
            line.show(done, f"{sum(right) / done:.1%} right")
    number = len(task.examples)
    return ChoiceResult(
        task=task.name,
        prompt_form=form,
        problems=number,
        accuracy=wilson_interval(sum(right) / number, number),
        accuracy_per_byte=wilson_interval(sum(right_per_byte) / number, number),
        prompt_tokens=tokens,
        seconds=time.monotonic() - start,
        scores=tuple(right),
    )


def _is_best(values: list[float], place: int) -> bool:
    """Whether the value at `place` is larger than every other: a tie shows no knowledge, and NaN none either."""
    return all(values[place] > value for other, value in enumerate(values) if other != place)


def _choice_logprobs(
    llm: LLM, task: ChoiceTask, form: PromptForm, example: Example, tokenizer: Tokenizer
) -> tuple[list[float], int]:
    """Log-likelihood of each choice, and how many tokens were read for it."""
    prompt = render(form, task, example, tokenizer)
    text, glue = prompt.text, "" if form.template is None else " "
    if opens_thought(text):
        text, glue = f"{text.rstrip()}\n{END_THINK_TOKEN}\n\n", ""
    if text[-1:].isspace():
        glue = ""
    add_bos = tokenizer.add_bos_token and form.template is not None
    pairs = []
    for choice in example["choices"]:
        pairs.append(split_tokens(tokenizer, text, f"{glue}{choice}", add_bos=add_bos))
        length = sum(map(len, pairs[-1]))
        if length > llm.max_model_len + 1:
            raise InputError(
                f"a question of task {task.name} with a choice has {length} tokens, more than the model's context "
                f"({llm.max_model_len}); show fewer solved problems"
            )
    found = continuation_logprobs(llm.model, pairs)
    return [one.logprob for one in found], sum(sum(map(len, pair)) for pair in pairs)


def split_tokens(tokenizer: Tokenizer, text: str, continuation: str, *, add_bos: bool) -> tuple[list[int], list[int]]:
    """The tokens of `text` and of what follows, cut from the tokens of both: as the model would read them in one piece.

    Spaces at the end of `text` go to the continuation, since tokens begin with their space. A token that reaches over the
    border counts as the continuation's.
    """
    kept = text.rstrip(" ")
    continuation = text[len(kept) :] + continuation
    whole, before = tokenizer.encode(kept + continuation, add_bos=add_bos), tokenizer.encode(kept, add_bos=add_bos)
    shared = next((i for i, (one, other) in enumerate(zip(whole, before, strict=False)) if one != other), len(before))
    return whole[:shared], whole[shared:]


@torch.inference_mode()
def continuation_logprobs(model: Transformer, pairs: list[tuple[list[int], list[int]]]) -> list[Continuation]:
    """How likely each second part is behind its first, in one pass over all of them.

    Each first part needs a token, and each second. The last token of all is not read, so two parts may together have one token more
    than the model's context. Rows are padded behind their end, which no earlier position sees.
    """
    longest = max(len(before) + len(after) for before, after in pairs) - 1
    rows = [[*before, *after[:-1]] + [0] * (longest + 1 - len(before) - len(after)) for before, after in pairs]
    logits = model(torch.tensor(rows, device=model.lm_head.weight.device))
    found = []
    for row, (before, after) in zip(logits, pairs, strict=True):
        place = slice(len(before) - 1, len(before) + len(after) - 1)  # the position before a token predicts it
        logprobs = row[place].float().log_softmax(-1)
        targets = torch.tensor(after, device=logprobs.device)
        chosen = logprobs.gather(-1, targets[:, None]).double().sum()
        found.append(Continuation(float(chosen), bool((logprobs.argmax(-1) == targets).all())))
    return found

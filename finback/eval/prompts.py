"""A problem as the model reads it: in the chat template, or as plain text, with or without solved problems before it."""

from collections.abc import Sequence
from typing import NamedTuple

from finback.config import InputError
from finback.data.chat import Message
from finback.data.reasoning import opens_thought
from finback.data.tokenizer import THINK_TOKEN, Tokenizer
from finback.eval.config import PromptForm
from finback.eval.task import AnyTask, asked
from finback.rewards.reward import Example


class Prompt(NamedTuple):
    """A prompt as text and as tokens."""

    text: str
    token_ids: list[int]


def render(form: PromptForm, task: AnyTask, example: Example, tokenizer: Tokenizer) -> Prompt:
    """The prompt of one problem. InputError for a chat without a template, and for more solved problems than the task has."""
    if form.few_shot > len(task.few_shot):
        has = f"{len(task.few_shot)} solved problems" if task.few_shot else "no solved problems"
        raise InputError(f"task {task.name} has {has} to show, and {form.few_shot} are asked for; lower --few-shot")
    shots = task.few_shot[: form.few_shot]
    if form.template is None:
        return _chat(shots, asked(example), task.name, tokenizer)
    template = form.templates.get(str(example.get("language", "")), form.template)
    parts = []
    for question, reply in shots:
        filled = template.replace("{prompt}", question)
        parts.append(filled + _behind(filled, reply))
    text = "\n\n".join([*parts, template.replace("{prompt}", asked(example))])
    return Prompt(text, tokenizer.encode(text, add_bos=tokenizer.add_bos_token))


def _chat(shots: Sequence[tuple[str, str]], asking: str, name: str, tokenizer: Tokenizer) -> Prompt:
    if tokenizer.chat_template is None:
        raise InputError(
            f"task {name} is put as a chat, and this model's tokenizer has no chat template; add chat_template.jinja to its "
            "directory, or give --template with a text that holds {prompt}"
        )
    messages: list[Message] = []
    for question, reply in shots:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    messages.append({"role": "user", "content": asking})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return Prompt(text, tokenizer.encode(text))  # a template begins the text itself


def _behind(filled: str, reply: str) -> str:
    """A reply as it follows its question: after a space, and a thought that the template has opened is not opened again."""
    if opens_thought(filled) and reply.startswith(THINK_TOKEN):
        reply = reply.removeprefix(THINK_TOKEN).removeprefix("\n")
    return reply if filled[-1:].isspace() else f" {reply}"


def stop_texts(form: PromptForm) -> tuple[str, ...]:
    """Where an answer to a plain text ends: where the model begins the next question, as base models do."""
    if form.template is None:
        return ()
    heads = (text.partition("{prompt}")[0].rpartition("\n")[2].strip() for text in (form.template, *form.templates.values()))
    return tuple(dict.fromkeys(f"\n{head}" for head in heads if head))

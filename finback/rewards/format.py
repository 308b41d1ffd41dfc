"""Rewards for the layout of a completion; each looks at all of it, from the first character to the last.

R1's format reward asks for the thought between its tags (R1 section 2.2.2); R1-Zero's template wants an answer between tags behind it
(R1 table 1). Neither looks at what is said: give them a small weight beside a verifier, or a model learns the layout and no more.
"""

from finback.data.reasoning import opens_thought
from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN
from finback.rewards.answers import ANSWER_CLOSE, ANSWER_OPEN
from finback.rewards.reward import Example


def think_then_answer(prompt: str, completion: str, example: Example) -> float:
    """1 if the completion is a thought between <think> and </think> and then an answer, else 0.

    Each tag stands once, the first at the beginning, and neither part is empty. Where the prompt ends with <think>, the completion
    begins inside the thought; it may repeat the tag.
    """
    return float(_split(prompt, completion) is not None)


def r1_zero_format(prompt: str, completion: str, example: Example) -> float:
    """1 if the completion is <think>...</think> and then <answer>...</answer>, else 0.

    Each of the four tags stands once, nothing but white space between, before and behind the two parts, and neither is empty. As in
    `think_then_answer`, the prompt may have opened the thought.
    """
    parts = _split(prompt, completion)
    if parts is None:
        return 0.0
    _, rest = parts
    inside = rest.removeprefix(ANSWER_OPEN).removesuffix(ANSWER_CLOSE)
    framed = len(inside) == len(rest) - len(ANSWER_OPEN) - len(ANSWER_CLOSE)
    tags = sum(completion.count(tag) for tag in (ANSWER_OPEN, ANSWER_CLOSE))
    return float(framed and tags == 2 and bool(inside.strip()))


def _split(prompt: str, completion: str) -> tuple[str, str] | None:
    """Thought and what follows it, both without outer white space; None if the layout is another."""
    text = completion.strip()
    if opens_thought(prompt) and not text.startswith(THINK_TOKEN):
        text = THINK_TOKEN + text
    if not text.startswith(THINK_TOKEN) or text.count(THINK_TOKEN) != 1 or text.count(END_THINK_TOKEN) != 1:
        return None
    thought, _, rest = text.removeprefix(THINK_TOKEN).partition(END_THINK_TOKEN)
    return (thought.strip(), rest.strip()) if thought.strip() and rest.strip() else None

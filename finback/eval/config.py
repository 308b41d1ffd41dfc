"""How answers are drawn for an evaluation, and in what form a problem is put. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from finback.config import InputError

DEFAULT_PROBLEMS = 200
"""Problems of a task that is generated and could have any number."""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; the defaults are those of R1 section 3, which takes 4 to 64 samples, more of smaller sets."""

    samples: int = 4
    """Answers per problem; at temperature 0 all would be equal, and one is drawn."""
    temperature: float = 0.6
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of likeliest tokens whose probability reaches it."""
    max_tokens: int = 32_768
    """Longest answer; the room that the model's context leaves behind the prompt bounds it too."""
    seed: int = 0
    """The draws of a sample depend on it, on the problem's question and on the sample's number only."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"decoding field samples is {self.samples}, it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"decoding field temperature is {self.temperature}, it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"decoding field top_p is {self.top_p}, it must be above 0 and at most 1")
        if self.max_tokens < 1:
            raise InputError(f"decoding field max_tokens is {self.max_tokens}, it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"decoding field seed is {self.seed}, it must be at least 0 and below 2^63")

    @property
    def drawn(self) -> int:
        """Answers that are drawn per problem."""
        return self.samples if self.temperature > 0 else 1


@dataclass(frozen=True)
class PromptForm:
    """In what form a problem reaches the model: the chat template, or a plain text; some solved problems may come first.

    The chat form is a user's message in the directory's template. The others are text: `template` holds `{prompt}`, and
    `templates` one for each language that has its own. Solved problems come as earlier turns of the chat, or as the same
    text with its answer behind it.
    """

    name: str = "chat"
    template: str | None = None
    """None is the chat form."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Language -> template, where it differs from `template`."""
    few_shot: int = 0
    """Solved problems that come before the question."""

    def __post_init__(self) -> None:
        texts = [] if self.template is None else [self.template, *self.templates.values()]
        for text in texts:
            if text.count("{prompt}") != 1:
                raise InputError(f"the template {text!r} must hold {{prompt}} once, where the question belongs")
        if self.few_shot < 0:
            raise InputError(f"prompt form field few_shot is {self.few_shot}, it must be 0 or more")


DOCUMENT_FORM = PromptForm(
    "document",
    template="Question: {prompt}\n<think>\n",
    templates={"zh": "问题：{prompt}\n<think>\n"},
)
"""The form in which the built-in problems stand in pre-training text, up to where the thought begins: for base models."""

"""An engine that says what a script tells it to: the peer of `finback chat` in its tests. As a program, a chat with it.

python -m tests.commands.scripted [--fold] [--endless] [--pause SECONDS]
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from finback.commands.chat import Chat
from finback.commands.conversation import Conversation
from finback.commands.terminal import Screen
from finback.data.chat import published_template
from finback.data.tokenizer import Tokenizer, train_tokenizer
from finback.engine.config import SamplingParams

TEXT = ["The fox saw the grapes and could not reach them. 狐狸看见葡萄，却够不着。"] * 20
SAMPLING = SamplingParams(temperature=0.6)


@dataclass(frozen=True)
class ScriptedPart:
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    num_cached_tokens: int = 0


@dataclass
class ScriptedEngine:
    """Answers the n-th prompt with the n-th text of `script`, a word a token and half a second each, then starts over."""

    script: list[str]
    max_model_len: int = 4096
    finish_reason: str = "stop"
    on_part: Callable[[int], None] = lambda count: None
    now: float = 0.0
    asked: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    closed: int = 0

    def clock(self) -> float:
        return self.now

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[ScriptedPart]:
        text = self.script[len(self.asked) % len(self.script)]
        self.asked.append((prompt, params))
        words = text.replace(" ", " \0").split("\0")
        try:
            for count, word in enumerate(words, 1):
                self.now += 0.5
                self.on_part(count)
                yield ScriptedPart(word, [7], self.finish_reason if count == len(words) else None, len(prompt) // 64 * 64)
        finally:
            self.closed += 1


def tokenizer(template: str = "deepseek_r1") -> Tokenizer:
    return train_tokenizer(TEXT, 300, chat_template=published_template(template))


if __name__ == "__main__":
    pause = float(sys.argv[sys.argv.index("--pause") + 1]) if "--pause" in sys.argv else 0.0
    thought = "The user greets me. 狐狸看见葡萄，却够不着。 " * (1 if "--endless" not in sys.argv else 500)
    engine = ScriptedEngine(
        [
            f"{thought}I greet back.\n</think>\n\nHello! 你好，很高兴见到你。 A second line:\n\n- one 🐋\n- two",
            "\n</think>\n\nNo thought here.",
        ],
        on_part=lambda count: time.sleep(pause),
    )
    terminal = sys.stdin.isatty()
    Chat(
        Conversation(engine, tokenizer(), SAMPLING), Screen(terminal=terminal, folded="--fold" in sys.argv or not terminal)
    ).run()

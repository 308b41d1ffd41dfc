"""Where a chat is read and shown: a terminal, with dimmed or folded thoughts, or a pipe, which gets the answers and nothing else."""

import contextlib
import io
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from types import FrameType

from finback.commands.conversation import Answer

DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
CLEAR_LINE = "\r\x1b[2K"
FENCE = "```"
LIVE_SECONDS = 0.1  # between two looks of the line that counts a folded thought

# What a model writes may be anything, but it must not steer the terminal: control characters become U+FFFD there.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Screen:
    """One conversation's reader and writer. `terminal`: a person sits there; else questions are lines of a pipe, answers plain text."""

    def __init__(self, *, terminal: bool, folded: bool) -> None:
        self.terminal = terminal
        self.folded = folded
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # one bad line must not end the others
        self._styled = terminal and os.environ.get("TERM") != "dumb"
        self._shows_thought = False  # the thought of the answer on the way has been begun
        self._at_line_start = True
        self._counted = -LIVE_SECONDS  # when the line of a folded thought was last drawn
        if terminal:
            with contextlib.suppress(ImportError):  # not on Windows; lines can be read without
                import readline

                readline.parse_and_bind("set enable-bracketed-paste on")  # several lines that are pasted are one message

    # Reading.

    def read(self) -> str | None:
        """The next message, several lines of it where they are joined; None at the end of the input.

        A line that ends with a backslash goes on in the next one; a line that begins with three backquotes begins a block, which a
        line of three backquotes ends.
        """
        lines: list[str] = []
        in_block = False
        while True:
            line = self._line("... " if lines else ">>> ")
            if line is None:
                return "\n".join(lines) if lines else None
            for part in line.split("\n"):  # a line that was pasted may be several
                in_block = part.strip() != FENCE if in_block else part.startswith(FENCE) and FENCE not in part[len(FENCE) :]
                lines.append(part)
            if not in_block and not lines[-1].endswith("\\"):
                return "\n".join(lines)
            if not in_block:
                lines[-1] = lines[-1][:-1]

    def _line(self, prompt: str) -> str | None:
        if not self.terminal:
            line = sys.stdin.readline()
            return line.removesuffix("\n").removesuffix("\r") if line else None
        try:
            # Between \001 and \002 stands what takes no room on the line.
            return input(f"\001{BOLD}\002{prompt}\001{PLAIN}\002" if self._styled else prompt)
        except EOFError:
            print()
            return None

    # Writing.

    def note(self, sentence: str) -> None:
        """A line beside the conversation: dim on a terminal, on standard error elsewhere."""
        if self.terminal:
            lines = textwrap.wrap(sentence, max(20, shutil.get_terminal_size().columns - 1), break_long_words=False)
            self._write(("" if self._at_line_start else "\n") + self._dim("\n".join(lines)) + "\n")
        else:
            print(f"finback chat: {sentence}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        """Like `note`, for what only a person wants to read."""
        if self.terminal:
            self.note(text)

    def interrupted(self) -> None:
        """Ctrl-C at the prompt: the line is given up."""
        self._write("\n")
        self.note("/exit or Ctrl-D leaves")

    def begin(self) -> None:
        """An answer comes."""
        self._shows_thought = False
        self._counted = -LIVE_SECONDS

    def show(self, reasoning: str, content: str, answer: Answer) -> None:
        """What has been added to the answer."""
        if self.folded:
            self._shows_thought |= self.terminal and bool(reasoning.strip())
            self._count(answer)
        elif reasoning:
            self.thought(reasoning)
        if content:
            self._end_thought(answer)
            self._write(self._safe(content))

    def thought(self, text: str) -> None:
        """A stretch of an open thought."""
        if not self._shows_thought and not self._styled:
            self._write("<think>\n")
        self._shows_thought = True
        self._write(self._dim(self._safe(text)))

    def end(self, answer: Answer) -> None:
        """The answer is over, for whatever reason."""
        self._end_thought(answer)
        if not self._at_line_start:
            self._write("\n")
        if self.terminal:
            self.note(summary(answer))
            self._write("\n")
        elif answer.finish_reason == "length":
            self.note(f"the answer is {_cut(answer)}")

    def end_thought(self) -> None:
        """Leave the thought, an empty line behind it."""
        if self._shows_thought:
            newline = "" if self._at_line_start else "\n"
            self._write(f"{newline}\n" if self._styled else f"{newline}</think>\n\n")
        self._shows_thought = False

    def _end_thought(self, answer: Answer) -> None:
        if self.folded and self._shows_thought:
            self._write(CLEAR_LINE if self._styled else "")
            self.note(f"thought for {_thought(answer)}")
            self._shows_thought = False
        self.end_thought()

    def _count(self, answer: Answer) -> None:
        """Keep the line of a folded thought."""
        due = answer.seconds - self._counted >= LIVE_SECONDS
        if self._shows_thought and self._styled and answer.in_thought and due:
            self._counted = answer.seconds
            line = f"thinking for {_thought(answer)}"
            self._write(CLEAR_LINE + self._dim(line[: shutil.get_terminal_size().columns - 1]))

    def _dim(self, text: str) -> str:
        return f"{DIM}{text}{PLAIN}" if self._styled and text else text

    def _safe(self, text: str) -> str:
        return text.translate(_CONTROLS) if self.terminal else text

    def _write(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._at_line_start = text.removesuffix(PLAIN).endswith(("\n", CLEAR_LINE))


def summary(answer: Answer) -> str:
    """One line about a finished answer."""
    parts = [_tokens(answer.tokens)]
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    parts.append(f"{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens cached")
    if answer.finish_reason is None:
        parts.append("stopped")
    elif answer.finish_reason == "length":
        parts.append(_cut(answer))
    return " · ".join(parts)


def _cut(answer: Answer) -> str:
    return f"cut after {_tokens(answer.tokens)}{', inside the thought' if answer.in_thought else ''}"


def _thought(answer: Answer) -> str:
    return f"{answer.thought_seconds:.1f} s, {_tokens(answer.thought_tokens)}"


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


class Interrupt:
    """Whether Ctrl-C was pressed since `listening` began."""

    asked = False


@contextlib.contextmanager
def listening(enabled: bool) -> Iterator[Interrupt]:
    """While the block runs, Ctrl-C is noted instead of raised, so that it tears no step of the engine apart. Only a second one, while
    the first has not been acted on (a long prompt, say), is raised."""
    interrupt = Interrupt()

    def note(signum: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    if not enabled:
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)

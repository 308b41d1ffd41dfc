"""The inverse of the chat template for one assistant turn: a stream of text becomes reasoning, content and tool calls.

The layout (facts of the published V3 and R1 templates; bars are U+FF5C, the low line is U+2581):

    <think>\\n{reasoning}\\n</think>\\n\\n{content}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}
    ```json
    {arguments}
    ```<｜tool▁call▁end｜>\\n<｜tool▁call▁begin｜>...<｜tool▁calls▁end｜>

Every part is optional. What is markup, and so appears in no part:

- `<think>` opens a thought at the start of the answer only, behind at most two newlines; anywhere else it is text. If the prompt has
  opened the thought (`starts_in_thought`, see `opens_thought`), a model that repeats the tag first is forgiven.
- The first `</think>` of an open thought closes it. Where no thought is open, it is content as it stands: what came before it has been
  streamed as content and cannot be taken back, and whether the prompt opened a thought is known, not guessed. (The R1 template
  drops everything up to the *last* `</think>` when it renders such an answer as history.)
- Newlines that the layout puts there: one behind `<think>`, one before `</think>`, up to two behind it. Other white space is kept.
- The tags of a tool call with its type and fence. A turn may lack `<｜tool▁calls▁end｜>` (V3 leaves a single call open) or
  `<｜tool▁calls▁begin｜>` (both templates omit it after the conversation's first call), a call may lack its closing fence.

Inside a thought tool tags are reasoning. A call whose layout breaks before its arguments begin is content, tags included. From there on
the arguments are streamed as they come; whether they are JSON is the reader's to check. The end-of-sentence token is not expected here,
the detokenizer drops it.
"""

import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Literal

from finback.data.tokenizer import END_THINK_TOKEN, THINK_TOKEN

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
CALL_SEPARATOR = "<｜tool▁sep｜>"
_FENCE = "\n```json\n"
_END_FENCE = "\n```"

CLOSE_THOUGHT = f"\n{END_THINK_TOKEN}\n\n"
"""What ends an open thought in the layout, for those who close one in the model's place."""

PieceKind = Literal["markup", "reasoning", "content", "name", "arguments"]
Thought = Literal["absent", "open", "closed"]


@dataclass(frozen=True)
class Piece:
    """A stretch of the input; the pieces in their order, joined, are the input itself."""

    kind: PieceKind
    text: str


@dataclass(frozen=True)
class ToolCallIncrement:
    """The next stretch of call number `index` (from 0); its first one carries the whole name, later ones an empty name."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True)
class Increment:
    """What one feed has made certain; each part, joined over all feeds, is that part of the answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallIncrement, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str
    """Text as the model wrote it, JSON if it kept to the layout."""


@dataclass(frozen=True)
class Answer:
    """A whole assistant turn in its parts."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    thought: Thought
    """"open": the text ended inside the thought; an empty thought is "closed" with no reasoning."""
    unfinished: Literal["reasoning", "tool_call"] | None
    """The part that the text ended in, if it has a closing tag that never came."""


class _State(Enum):
    START = auto()  # nothing but newlines so far
    REPEATED = auto()  # the prompt opened the thought; will the model open it again?
    OPENED = auto()  # behind <think>, before its newline
    THOUGHT = auto()
    CLOSED = auto()  # behind </think>, before its newlines
    CLOSED_NEWLINE = auto()  # behind the first of them
    CONTENT = auto()
    HEAD = auto()  # from the first tool tag to the fence that opens the arguments
    ARGUMENTS = auto()
    BETWEEN = auto()  # behind a call


_THOUGHT_END = (f"\n{END_THINK_TOKEN}", END_THINK_TOKEN)
_CALL_START = (CALLS_BEGIN, CALL_BEGIN)
_ARGUMENTS_END = (f"{_END_FENCE}{CALL_END}", f"```{CALL_END}", CALL_END)

_OPENING = {newlines + THINK_TOKEN: _State.OPENED for newlines in ("", "\n", "\n\n")}
_AFTER_CALL = {f"{newline}{CALL_BEGIN}": _State.HEAD for newline in ("", "\n")}
_AFTER_CALL |= {f"{newline}{CALLS_END}": _State.CONTENT for newline in ("", "\n")}

# The head of a call, from its first tag to the fence, and which parts may be missing. Words (type and name) are bounded, so that
# what is held back is bounded too.
_WORD = ""
_LONGEST_WORD = 128
_HEAD = (
    ("\n", True),
    (CALLS_BEGIN, True),
    ("\n", True),
    (CALL_BEGIN, False),
    (_WORD, False),
    (CALL_SEPARATOR, False),
    (_WORD, False),
    (_FENCE, False),
)
_FIRST_TAG = re.compile(f"\n?(?:{CALLS_BEGIN}|{CALL_BEGIN})")


class ReasoningParser:
    """Feed text in chunks of any size; get each part as soon as it is certain.

    A chunk border may fall anywhere: the parts are those of the whole text fed at once. Text is held back only while it may still
    become a tag or the head of a tool call (a few hundred characters at most), so the work is linear in the text.
    """

    def __init__(self, *, starts_in_thought: bool = False, begun: bool = False, tools: bool = True) -> None:
        """`starts_in_thought`: the prompt ends inside an open `<think>`, as R1's generation prompt does (`opens_thought`). `begun`: and
        has words of the thought already, so that neither the tag nor the newline behind it can come.

        Without `tools`, where none were offered to the model, tool tags are content like any other text.
        """
        self._tools = tools
        opened = _State.THOUGHT if begun else _State.REPEATED
        self._state = opened if starts_in_thought else _State.START
        self._has_thought = starts_in_thought
        self._text = ""  # what is held back, and the chunk that is worked on
        self._place = 0  # how far in it
        self._pieces: list[Piece] = []
        self._calls = 0

    @property
    def unfinished(self) -> Literal["reasoning", "tool_call"] | None:
        """The part that is open now and that a tag must close; after `finish`, the part that was cut."""
        if self._state in (_State.REPEATED, _State.OPENED, _State.THOUGHT):
            return "reasoning"
        return "tool_call" if self._state is _State.ARGUMENTS else None

    @property
    def thought(self) -> Thought:
        """How the thought stands so far."""
        if not self._has_thought:
            return "absent"
        return "open" if self.unfinished == "reasoning" else "closed"

    def feed(self, text: str) -> Increment:
        """What has become certain with the next stretch of text, possibly nothing."""
        return self._increment(self.split(text))

    def finish(self) -> Increment:
        """What was still held back, as what it turned out to be; feed nothing afterwards."""
        return self._increment(self.split_end())

    def split(self, text: str) -> list[Piece]:
        """`feed` without loss: the pieces that have become certain, markup among them."""
        self._text += text
        while self._step():
            pass
        self._text, self._place = self._text[self._place :], 0
        pieces, self._pieces = self._pieces, []
        return pieces

    def split_end(self) -> list[Piece]:
        """`finish` without loss."""
        rest, self._text = self._text, ""
        kind: PieceKind = "content"
        if self.unfinished == "reasoning":
            kind = "reasoning"
        elif self.unfinished == "tool_call":
            kind = "markup" if rest.startswith(_END_FENCE) else "arguments"
        return [Piece(kind, rest)] if rest else []

    def _increment(self, pieces: list[Piece]) -> Increment:
        reasoning, content = ("".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("reasoning", "content"))
        calls: list[ToolCallIncrement] = []
        for piece in pieces:
            if piece.kind == "name":
                calls.append(ToolCallIncrement(self._calls, piece.text, ""))
                self._calls += 1
            elif piece.kind == "arguments":
                name = calls.pop().name if calls else ""  # a feed has one stretch of arguments per call
                calls.append(ToolCallIncrement(self._calls - 1, name, piece.text))
        return Increment(reasoning, content, tuple(calls))

    def _step(self) -> bool:
        """Move past what is certain at this place; True where another step may follow, False where more text is needed."""
        match self._state:
            case _State.START:
                heads = {f"\n{CALL_BEGIN}": _State.HEAD} if self._tools else {}
                return self._choose({**_OPENING, **heads}, _State.CONTENT)
            case _State.REPEATED:
                return self._choose({THINK_TOKEN: _State.OPENED}, _State.OPENED)
            case _State.OPENED:
                return self._choose({"\n": _State.THOUGHT}, _State.THOUGHT)
            case _State.THOUGHT:
                return self._run("reasoning", _THOUGHT_END, _State.CLOSED)
            case _State.CLOSED:
                return self._choose({"\n": _State.CLOSED_NEWLINE}, _State.CONTENT)
            case _State.CLOSED_NEWLINE:
                return self._choose({"\n": _State.CONTENT}, _State.CONTENT)
            case _State.CONTENT if not self._tools:
                self._take("content", len(self._text))
                return False
            case _State.CONTENT:
                return self._run("content", _CALL_START, _State.HEAD)
            case _State.HEAD:
                return self._head()
            case _State.ARGUMENTS:
                return self._run("arguments", _ARGUMENTS_END, _State.BETWEEN)
            case _State.BETWEEN:
                return self._choose(_AFTER_CALL, _State.CONTENT)

    def _take(self, kind: PieceKind, end: int) -> None:
        if end > self._place:
            self._pieces.append(Piece(kind, self._text[self._place : end]))
            self._place = end

    def _choose(self, choices: dict[str, _State], otherwise: _State) -> bool:
        """Go where the text at this place leads, past it unless it is a call's head; wait while it may become one of several."""
        for text, state in choices.items():
            if self._text.startswith(text, self._place):
                self._take("markup", self._place + (len(text) if state is not _State.HEAD else 0))
                self._state = state
                self._has_thought |= state is _State.OPENED
                return True
        rest = self._text[self._place : self._place + max(map(len, choices))]
        if any(text.startswith(rest) for text in choices):
            return False
        self._state = otherwise
        return True

    def _run(self, kind: PieceKind, tags: tuple[str, ...], behind: _State) -> bool:
        """Take everything before the first of `tags`, and the tag unless it begins a call's head; while there is none, take what cannot
        be part of one."""
        found = _pattern(tags).search(self._text, self._place)
        if found:
            self._take(kind, found.start())
            self._take("markup", found.end() if behind is not _State.HEAD else found.start())
            self._state = behind
            return True
        start = max(self._place, len(self._text) - max(map(len, tags)) + 1)
        while not any(tag.startswith(self._text[start:]) for tag in tags):  # the empty rest begins every tag
            start += 1
        self._take(kind, start)
        return False

    def _head(self) -> bool:
        """Take a call's head; if its layout breaks, its first tag becomes content and the search goes on behind that."""
        ends = _head_ends(self._text, self._place)
        if ends == "incomplete":
            return False
        if ends == "broken":
            tag = _FIRST_TAG.match(self._text, self._place)
            assert tag  # what led here
            self._take("content", tag.end())
            self._state = _State.CONTENT
            return True
        self._take("markup", ends[0])
        self._take("name", ends[1])
        self._take("markup", ends[2])
        self._state = _State.ARGUMENTS
        return True


def _head_ends(text: str, place: int) -> tuple[int, int, int] | Literal["incomplete", "broken"]:
    """Where name, fence and arguments begin in a call whose head begins at `place`."""
    name = (place, place)
    for part, optional in _HEAD:
        rest = text[place : place + _LONGEST_WORD + 1]  # longer than any part
        if part == _WORD:
            length = next((i for i, character in enumerate(rest) if character in "\n<"), len(rest))
            if length == len(rest) <= _LONGEST_WORD:
                return "incomplete"
            if not 0 < length <= _LONGEST_WORD:
                return "broken"
            name = (place, place + length)
            place += length
        elif rest.startswith(part):
            place += len(part)
        elif part.startswith(rest):
            return "incomplete"
        elif not optional:
            return "broken"
    return *name, place


@cache
def _pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tags)))


def opens_thought(prompt: str) -> bool:
    """Whether an answer to `prompt` starts inside a thought: `<think>` ends it, as R1's generation prompt does."""
    return prompt.rstrip("\n").endswith(THINK_TOKEN)


def parse_answer(text: str, *, starts_in_thought: bool = False, tools: bool = True) -> Answer:
    """The parts of a whole answer."""
    parser = ReasoningParser(starts_in_thought=starts_in_thought, tools=tools)
    increments = (parser.feed(text), parser.finish())
    calls: dict[int, ToolCall] = {}
    for call in (call for increment in increments for call in increment.tool_calls):
        before = calls.get(call.index, ToolCall(call.name, ""))
        calls[call.index] = ToolCall(before.name, before.arguments + call.arguments)
    return Answer(
        reasoning="".join(increment.reasoning for increment in increments),
        content="".join(increment.content for increment in increments),
        tool_calls=tuple(calls.values()),
        thought=parser.thought,
        unfinished=parser.unfinished,
    )

"""One answer in its parts, from a scripted engine: a thought that is cut at its budget, and what may stand at the cut."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from finback.data.detokenizer import IncrementalDetokenizer
from finback.data.reasoning import CLOSE_THOUGHT
from finback.data.tokenizer import Tokenizer
from finback.engine.config import SamplingParams
from finback.engine.output import Increment
from finback.engine.stops import StopStrings
from finback.server.turn import Delta, Usage, run_turn
from finback.server.worker import Begin
from tests.server.serving import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_model()[1]


class Scripted:
    """Writes the tokens of one script after the other, with the engine's own way from tokens to text."""

    def __init__(self, tokenizer: Tokenizer, *scripts: Sequence[int], per_step: int = 1) -> None:
        self.tokenizer, self.scripts, self.per_step = tokenizer, list(scripts), per_step
        self.asked: list[tuple[list[int], SamplingParams]] = []

    async def answer(self, prompt: list[int], params: SamplingParams, begin: Begin) -> AsyncIterator[Increment]:
        self.asked.append((list(prompt), params))
        begin.num_cached_tokens = 0
        detokenizer, stops = IncrementalDetokenizer(self.tokenizer), StopStrings(params.stop)
        script = self.scripts.pop(0)[: params.max_tokens]
        for at in range(0, len(script), self.per_step):
            tokens = list(script[at : at + self.per_step])
            text = "".join(stops.feed(detokenizer.feed(token)) for token in tokens)
            ends = at + self.per_step >= len(script)
            text += stops.feed(detokenizer.flush()) + stops.flush() if ends else ""
            yield Increment(0, text, tokens, None, "length" if ends else None, 0)


def run(engine: Scripted, params: SamplingParams, budget: int) -> tuple[list[Delta], Usage]:
    async def all_of() -> list[Delta]:
        turn = run_turn(engine, engine.tokenizer, [1, 2], params, usage, thinking=True, budget=budget)
        return [delta async for delta in turn]

    usage = Usage()
    return asyncio.run(all_of()), usage


def test_a_thought_that_was_begun_keeps_the_newline_it_goes_on_with(tokenizer: Tokenizer) -> None:
    async def turn(begun: bool) -> tuple[str, str]:
        engine = Scripted(tokenizer, tokenizer.encode("\nthe whale</think>north"))
        turn = run_turn(engine, tokenizer, [1, 2], SamplingParams(max_tokens=50), Usage(), thinking=True, begun=begun)
        return joined([delta async for delta in turn])

    assert asyncio.run(turn(begun=True)) == ("\nthe whale", "north")
    assert asyncio.run(turn(begun=False)) == ("the whale", "north")


def joined(deltas: list[Delta]) -> tuple[str, str]:
    return "".join(each.reasoning for each in deltas), "".join(each.content for each in deltas)


THOUGHT, ANSWER = "the 鲸 sees a 🐋 there", "你好，🐋！"


@pytest.mark.parametrize("per_step", [1, 3])
def test_a_cut_at_any_token_leaves_whole_characters_and_an_intact_answer(tokenizer: Tokenizer, per_step: int) -> None:
    thought, answer = tokenizer.encode(THOUGHT), tokenizer.encode(ANSWER)
    assert len(tokenizer.encode("🐋")) == 4, "a character in four tokens"
    seen = set()
    for budget in range(1, len(thought) - per_step):
        engine = Scripted(tokenizer, thought, answer, per_step=per_step)
        deltas, usage = run(engine, SamplingParams(max_tokens=100), budget)
        reasoning, content = joined(deltas)
        assert content == ANSWER
        assert THOUGHT.startswith(reasoning)
        assert "\ufffd" not in reasoning
        seen.add(reasoning)
        # The model goes on behind what the client has seen, and nothing else.
        prompt, params = engine.asked[1]
        assert tokenizer.decode(prompt[2:]) == reasoning + CLOSE_THOUGHT
        written = -(-budget // per_step) * per_step
        closing = len(tokenizer.encode(CLOSE_THOUGHT))
        assert usage.reasoning_tokens == written + closing, "what was written is counted, shown or not"
        assert usage.completion_tokens == usage.reasoning_tokens + len(answer)
        assert params.max_tokens == 100 - usage.reasoning_tokens
    assert len(seen) >= 3


def test_a_token_that_ends_one_character_and_begins_the_next_keeps_the_first(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte-level vocabularies have such tokens; here they are made out of bytes."""
    first, second = "鲸".encode(), "向".encode()
    pieces = {3_000: first[:2], 3_001: first[2:] + second[:1], 3_002: second[1:]}
    plain = Tokenizer.token_bytes
    monkeypatch.setattr(Tokenizer, "token_bytes", lambda self, token: pieces[token] if token in pieces else plain(self, token))
    engine = Scripted(tokenizer, list(pieces), tokenizer.encode(ANSWER))
    deltas, _ = run(engine, SamplingParams(max_tokens=50), 2)
    assert joined(deltas) == ("鲸", ANSWER)
    assert engine.asked[1][0] == [1, 2, *tokenizer.encode("鲸"), *tokenizer.encode(CLOSE_THOUGHT)]


def test_what_might_have_become_a_stop_text_is_not_lost_at_the_cut(tokenizer: Tokenizer) -> None:
    thought = tokenizer.encode("the whale sees")
    engine = Scripted(tokenizer, thought, tokenizer.encode(ANSWER))
    cut = tokenizer.decode(thought[:-2])
    deltas, _ = run(engine, SamplingParams(max_tokens=50, stop=(cut[-3:] + "zzz",)), len(thought) - 2)
    assert joined(deltas) == (cut, ANSWER)


def test_max_tokens_holds_where_it_leaves_no_room_behind_the_thought(tokenizer: Tokenizer) -> None:
    thought, answer = tokenizer.encode("the whale sees the north"), tokenizer.encode("north by north")
    closing = len(tokenizer.encode(CLOSE_THOUGHT))
    for room in range(closing + 3):
        engine = Scripted(tokenizer, thought, answer)
        deltas, usage = run(engine, SamplingParams(max_tokens=4 + room), 4)
        assert deltas[-1].finish_reason == "length"
        shown = max(0, room - closing)  # of the answer
        assert joined(deltas) == (tokenizer.decode(thought[:4]), tokenizer.decode(answer[:shown]))
        assert usage.completion_tokens == (4 + room if shown else 4)

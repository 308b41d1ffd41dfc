"""A conversation with two models, for `finback chat --plan-with A --write-with B`: the plan is what is shown as thought."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from finback.commands.conversation import Answer, Steps
from finback.config import InputError
from finback.engine.config import SamplingParams

if TYPE_CHECKING:
    from finback.recipes.pairing import Pair


class PairedConversation:
    """Like `Conversation`, with a planner and a writer; plans are kept for the record and never enter a later prompt."""

    def __init__(
        self, pair: "Pair", params: SamplingParams, *, system: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.pair = pair
        self.params = params
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        self._clock = clock
        self._answers = 0

    def clear(self) -> None:
        """Forget every message; the system prompt stays."""
        self.messages = []

    def record(self) -> list[dict[str, str]]:
        """Every message, the system prompt first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, text: str) -> Steps:
        """Answer a user's message; what has come of an answer that is left early stays, and where none can begin nothing changes."""
        yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def ask_again(self) -> Steps:
        """A new answer to the last question; InputError if there is none."""
        if not self.messages:
            raise InputError("there is no answer to make again; ask something first")
        yield from self._answer(self.messages[:-1])

    def _answer(self, messages: list[dict[str, str]]) -> Steps:
        from finback.recipes.pairing import plan_and_write_steps

        before, self.messages = self.messages, messages
        sent = [{"role": turn["role"], "content": turn["content"]} for turn in self.record()]
        params = self.params
        if params.seed is not None:  # so that an answer that is made again is another one
            params = replace(params, seed=(params.seed + self._answers) % 2**63)
        start = self._clock()
        answer = Answer(0, in_thought=True)
        message = {"role": "assistant", "content": ""}
        steps = plan_and_write_steps(self.pair, sent, params)
        try:
            for said in steps:
                if not answer.tokens:
                    self.messages = [*messages, message]
                    answer.first_seconds, answer.first_tokens = self._clock() - start, said.tokens
                answer.seconds = self._clock() - start
                answer.tokens += said.tokens
                answer.reasoning += said.reasoning
                answer.content += said.content
                answer.finish_reason = said.finish_reason or answer.finish_reason
                answer.in_thought = not answer.content
                if said.reasoning:
                    answer.thought_tokens += said.tokens
                    answer.thought_seconds = answer.seconds
                message |= {"content": answer.content, "reasoning_content": answer.reasoning}
                yield said.reasoning, said.content, answer
        except InputError:
            self.messages = before
            raise
        finally:
            steps.close()
        self._answers += 1

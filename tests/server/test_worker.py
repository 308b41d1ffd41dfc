"""The engine's thread, and the one in which a model is loaded before it."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.llm import LLM
from finback.server.worker import EngineWorker, made_apart
from tests.server.serving import tiny_model


def test_what_is_made_apart_comes_back_or_raises() -> None:
    assert made_apart(lambda: [1, 2]) == [1, 2]

    def refuse() -> None:
        raise InputError("field directory is wrong")

    with pytest.raises(InputError, match="field directory is wrong"):
        made_apart(refuse)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists the threads of a process")
def test_nothing_of_the_loading_thread_is_left_to_crowd_the_engines() -> None:
    """In a process of its own: others' tests have computed in this one."""
    code = """
import os, time, torch
from finback.server.worker import made_apart
torch.set_num_threads(2)
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
def compute():
    torch.set_num_threads(2)
    x = torch.ones(2**22)
    (x + x).sum()
    return threads()
assert made_apart(compute) > before + 1, "no helper was there"
deadline = time.monotonic() + 30  # the system takes threads away a moment after they end
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.01)
assert threads() == before, (threads(), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_answers_that_are_ended_leave_the_engine() -> None:
    """Who waits is told behind what was written, and the engine goes on with nothing of it."""
    model, tokenizer = tiny_model()
    worker = EngineWorker(LLM(model=model, tokenizer=tokenizer, num_blocks=60))

    async def ended() -> tuple[int, str]:
        tokens = 0
        try:
            async for increment in worker.answer([5, 6, 7], SamplingParams(max_tokens=800, ignore_eos=True)):
                tokens += len(increment.token_ids)
                if tokens == 3:
                    worker.end_answers(RuntimeError("the server is stopping"))
        except RuntimeError as error:
            return tokens, str(error)
        raise AssertionError("it went on to its end")

    async def main() -> None:
        worker.start()
        tokens, words = await ended()
        assert 3 <= tokens < 800
        assert words == "the server is stopping"
        assert worker.open == 0
        while worker.llm.has_unfinished:  # the abort is on its way to the engine's thread
            await asyncio.sleep(0.001)
        answer = [increment async for increment in worker.answer([5, 6], SamplingParams(max_tokens=2, ignore_eos=True))]
        assert sum(len(increment.token_ids) for increment in answer) == 2
        worker.stop()

    asyncio.run(asyncio.wait_for(main(), 60))

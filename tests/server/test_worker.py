"""The engine's thread, and the one in which a model is loaded before it."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.grammar_config import Grammar
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


def test_a_grammar_is_compiled_while_others_are_answered() -> None:
    model, tokenizer = tiny_model()
    llm = LLM(model=model, tokenizer=tokenizer, num_blocks=60)
    worker, compile_grammar = EngineWorker(llm), llm.compile
    begun, may_end, compiled = threading.Event(), threading.Event(), list[Grammar]()

    def slow(grammar: Grammar) -> Any:
        begun.set()
        assert may_end.wait(60)
        compiled.append(grammar)
        return compile_grammar(grammar)

    llm.compile = slow  # type: ignore[method-assign]

    async def text_of(params: SamplingParams) -> str:
        return "".join([increment.text async for increment in worker.answer([5, 6, 7], params)])

    async def main() -> None:
        worker.start()
        shaped = asyncio.create_task(text_of(SamplingParams(grammar=Grammar.regex("whale"))))
        await asyncio.to_thread(begun.wait, 60)
        await text_of(SamplingParams(max_tokens=20, ignore_eos=True))
        assert not shaped.done()
        refused = asyncio.create_task(text_of(SamplingParams(grammar=Grammar.regex("["))))
        await asyncio.sleep(0)
        may_end.set()
        assert await shaped == "whale"
        with pytest.raises(InputError, match="the regex cannot be used"):
            await refused
        assert len(compiled) == 2
        assert worker.open == 0
        assert worker.stop()

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_server_ends_though_its_engine_does_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model()
    llm = LLM(model=model, tokenizer=tokenizer, num_blocks=60)
    worker, step = EngineWorker(llm), llm.step
    stuck, released = threading.Event(), threading.Event()

    def endless() -> Any:
        stuck.set()
        assert released.wait(60)
        return step()

    llm.step = endless  # type: ignore[method-assign]
    monkeypatch.setattr("finback.server.worker.STOP_SECONDS", 0.2)

    async def main() -> None:
        worker.start()
        task = asyncio.create_task(anext(worker.answer([5, 6, 7], SamplingParams(max_tokens=2))))
        await asyncio.to_thread(stuck.wait, 60)
        task.cancel()
        assert not (await asyncio.wait({task}, timeout=0.2))[0], "whether the engine has begun is not known yet"
        assert not worker.stop()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(main(), 60))
    (line,) = (record.message for record in caplog.records)
    assert line == "the engine is still busy with a step after 0.2 s; the server ends without it"
    released.set()
    worker._thread.join(60)
    assert not worker._thread.is_alive()

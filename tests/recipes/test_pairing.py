"""Two models for one answer: what the writer reads is the planner's thought, over real HTTP and with models of ours."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finback import cli
from finback.commands.paired import PairedConversation
from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.recipes.pairing import EndpointSpeaker, LocalSpeaker, Pair, plan_and_write, plan_and_write_steps

PARAMS = SamplingParams(max_tokens=16)
Deltas = list[dict[str, str]]


class Streaming(ThreadingHTTPServer):
    """An endpoint that streams the deltas that `answer` gives for a request's messages, or refuses with a status."""

    def __init__(self, answer: Callable[[Any], Deltas | int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[Any] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Streaming

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        deltas = self.server.answer(body["messages"])
        self.send_response(deltas if isinstance(deltas, int) else 200)
        self.end_headers()
        if not isinstance(deltas, int):
            for delta in deltas:
                self.wfile.write(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Any], Deltas | int]], Streaming]]:
    servers = []

    def start(answer: Callable[[Any], Deltas | int]) -> Streaming:
        servers.append(Streaming(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def pair_of(planner: Streaming, writer: Streaming) -> Pair:
    return Pair(EndpointSpeaker(planner.url, "p"), EndpointSpeaker(writer.url, "w"))


@pytest.mark.parametrize(
    ("deltas", "plan"),
    [
        ([{"reasoning_content": "first "}, {"reasoning_content": "add"}, {"content": "not read"}], "first add"),
        ([{"content": "<think>first "}, {"content": "add</think>not read"}], "first add"),
        ([{"content": "add "}, {"content": "them"}], "add them"),
    ],
)
def test_the_writer_reads_the_plan(serve: Any, deltas: Deltas, plan: str) -> None:
    planner, writer = serve(lambda _: deltas), serve(lambda _: [{"content": "4"}, {"content": "2"}])
    assert plan_and_write(pair_of(planner, writer), "What?", PARAMS) == (plan, "42")
    assert planner.requests[0]["messages"] == [{"role": "user", "content": "What?"}]
    (read,) = writer.requests[0]["messages"]
    assert read["content"].startswith("What?\n\n")
    assert read["content"].endswith(f"\n{plan}")


def test_an_empty_plan_and_a_refusal_are_told(serve: Any) -> None:
    silent, refusing = serve(lambda _: [{"content": " "}]), serve(lambda _: 429)
    with pytest.raises(InputError, match="the planner said nothing"):
        plan_and_write(pair_of(silent, silent), "What?", PARAMS)
    with pytest.raises(InputError, match="refused with HTTP 429"):
        plan_and_write(pair_of(refusing, silent), "What?", PARAMS)


def test_turn_by_turn_plans_stay_out_of_later_prompts_and_a_failure_changes_nothing(serve: Any) -> None:
    broken = False
    planner = serve(lambda _: [{"reasoning_content": "secret plan"}])
    writer = serve(lambda _: 500 if broken else [{"content": "ok"}])
    talk = PairedConversation(pair_of(planner, writer), PARAMS, system="Be short.")
    *_, (_, _, answer) = talk.ask("one")
    assert (answer.reasoning, answer.content) == ("secret plan", "ok")
    list(talk.ask("two"))
    sent = planner.requests[1]["messages"]
    assert [turn["content"] for turn in sent] == ["Be short.", "one", "ok", "two"]
    before, broken = talk.record(), True
    with pytest.raises(InputError, match="HTTP 500"):
        list(talk.ask("three"))
    assert talk.record() == before


def test_an_answer_that_is_left_early_stays(serve: Any) -> None:
    planner, writer = serve(lambda _: [{"reasoning_content": "a"}, {"reasoning_content": "b"}]), serve(lambda _: [])
    talk = PairedConversation(pair_of(planner, writer), PARAMS)
    steps = talk.ask("one")
    next(steps)
    steps.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "a"}
    assert writer.requests == []


def test_a_writer_that_thinks_continues_behind_the_plan(chat_models: Path, serve: Any) -> None:
    planner = serve(lambda _: [{"reasoning_content": "grapes"}])
    writer = LocalSpeaker(chat_models / "deepseek_r1")
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    steps = list(
        plan_and_write_steps(Pair(EndpointSpeaker(planner.url, "p"), writer), [{"role": "user", "content": "fox"}], greedy)
    )
    prompt = writer.tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], add_generation_prompt=True)
    assert prompt.endswith("<think>\n")
    ids = writer.tokenizer.encode(f"{prompt}grapes\n</think>\n\n")
    (expected,) = writer.llm.generate([ids], greedy)
    assert "".join(said.content for said in steps) == expected.text
    assert steps[0].reasoning == "grapes"


def test_the_verb_pairs_in_a_pipe(serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planner, writer = serve(lambda _: [{"reasoning_content": "plan"}]), serve(lambda _: [{"content": "written"}])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert cli.main(["chat", "--plan-with", planner.url, "--write-with", writer.url, "--plan-model", "thinker"]) == 0
    assert capsys.readouterr().out.count("written") == 2
    assert planner.requests[0]["model"] == "thinker"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "directory is missing"),
        (["--plan-with", "http://127.0.0.1:9/v1"], "go together"),
        (["there", "--plan-with", "a", "--write-with", "b"], "third model"),
        (["--plan-with", "nowhere", "--write-with", "http://127.0.0.1:9/v1"], "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", *words]) == 2
    assert sentence in capsys.readouterr().err

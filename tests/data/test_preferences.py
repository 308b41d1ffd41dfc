"""Pairs from judges: position bias cancels, unclear pairs and failures are counted, lengths are balanced; and a judge on a server."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import InputError
from finback.data.judge import INSTRUCTION, EndpointJudge, read_scores
from finback.data.preferences import (
    Candidates,
    JudgeError,
    Preference,
    balance_lengths,
    mean_delta,
    preference_pairs,
    rule_judge,
    write_preferences,
)

by_stars = rule_judge(lambda prompt, response: float(response.count("*")))


@pytest.mark.parametrize("judgements", [2, 4, 6])
def test_a_judge_that_only_likes_the_first_answer_likes_none(judgements: int) -> None:
    for seed in range(20):
        assert mean_delta("p", "a", "b", lambda *_: 5.0, judgements=judgements, seed=str(seed)) == 0.0


def test_both_orders_come_in_random_order_and_equally_often() -> None:
    orders = Counter[tuple[str, ...]]()

    def judge(prompt: str, a: str, b: str) -> float:
        seen.append(a)
        return 3.0 if a == "a" else -3.0

    for seed in range(200):
        seen: list[str] = []
        assert mean_delta("p", "a", "b", judge, judgements=4, seed=str(seed)) == 3.0
        orders[tuple(seen)] += 1
    assert all(Counter(order) == {"a": 2, "b": 2} for order in orders)
    assert len(orders) == 6  # every order of two and two
    firsts = set()
    for seed in range(40):
        seen = []
        mean_delta("p", "a", "b", judge, judgements=1, seed=str(seed))
        firsts.add(seen[0])
    assert firsts == {"a", "b"}


def test_clear_pairs_are_kept_and_the_rest_is_counted() -> None:
    candidates = [
        Candidates("one", ["***", "x"]),  # better and longer
        Candidates("two", ["****", "xxxxxxxx"]),  # better and shorter
        Candidates("three", ["*", "x"]),  # a difference of 1 is not above 1
        Candidates("four", ["same", "same"]),  # no pair
        Candidates("five", ["fail", "x"]),
    ]

    def judge(prompt: str, a: str, b: str) -> float:
        if "fail" in (a, b):
            raise JudgeError("no")
        return by_stars(prompt, a, b)

    kept, funnel = preference_pairs(candidates, judge)
    assert kept == [Preference("one", "***", "x", 3.0), Preference("two", "****", "xxxxxxxx", 4.0)]
    assert (funnel.pairs, funnel.failed, funnel.unclear, funnel.unbalanced, funnel.kept) == (4, 1, 1, 0, 2)
    assert str(funnel) == "4 pairs judged: 1 failed, 1 too close, 0 left out to balance lengths, 2 kept"


def test_threads_change_nothing_and_the_seed_pairs() -> None:
    candidates = [Candidates(str(n), [("*" * k).ljust(3 + (k * n) % 5, "x") for k in range(6)]) for n in range(30)]
    one = preference_pairs(candidates, by_stars, workers=1)
    assert one == preference_pairs(candidates, by_stars, workers=8)
    assert one[0] != preference_pairs(candidates, by_stars, seed=1)[0]
    assert one[1].pairs == 90  # three disjoint pairs of six responses
    longer = sum(len(each.chosen) > len(each.rejected) for each in one[0])
    shorter = sum(len(each.chosen) < len(each.rejected) for each in one[0])
    assert longer == shorter


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=40))
def test_lengths_are_balanced_by_leaving_out_the_most_unlike(lengths: list[tuple[int, int]]) -> None:
    pairs = [Preference("p", "c" * a, "r" * b, 2.0) for a, b in lengths]
    kept = balance_lengths(pairs)
    differences = [len(each.chosen) - len(each.rejected) for each in kept]
    assert sum(d > 0 for d in differences) == sum(d < 0 for d in differences)
    assert sum(d == 0 for d in differences) == sum(a == b for a, b in lengths)
    rest = list(pairs)
    for each in kept:
        rest.remove(each)
    for each in rest:
        difference = len(each.chosen) - len(each.rejected)
        assert all(abs(difference) >= abs(other) for other in differences if other * difference > 0)
    remaining = iter(pairs)
    assert all(each in remaining for each in kept)  # order is kept


def test_bad_numbers_and_files(tmp_path: Path) -> None:
    for options in ({"judgements": 0}, {"workers": 0}, {"least_delta": -1.0}):
        with pytest.raises(InputError, match="they must be at least 1, 1 and 0"):
            preference_pairs([], by_stars, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt 0 has 1 responses; a pair needs two"):
        preference_pairs([Candidates("p", ["a"])], by_stars)
    write_preferences([Preference("p", "好", "b", 2.5)], tmp_path / "pairs.jsonl")
    row = {"prompt": "p", "chosen": "好", "rejected": "b", "delta": 2.5}
    assert json.loads((tmp_path / "pairs.jsonl").read_text()) == row


# A judge behind a server

Answer = Callable[[dict[str, Any]], tuple[int, str]]


@contextmanager
def served(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An endpoint that answers by `answer(body) -> (status, reply)`; its address and the requests it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, "key": self.headers["Authorization"], "body": body})
            status, reply = answer(body)
            if status == 0:
                return  # hangs up
            self.send_response(status)
            self.send_header("Content-Length", str(len(reply.encode())))
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str | None) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def by_script(*replies: tuple[int, str]) -> Answer:
    script = iter(replies)
    return lambda body: next(script)


def make_judge(url: str, **options: Any) -> EndpointJudge:
    return EndpointJudge(url, "scripted", **({"pause_seconds": 0.001, "timeout_seconds": 20.0} | options))


def test_pairs_from_an_endpoint() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str]:
        question = body["messages"][1]["content"]
        a, b = (question.partition(f"<answer-{name}>\n")[2].partition(f"\n</answer-{name}>")[0] for name in "ab")
        scores = {"a": min(10, 3 + a.count("*")), "b": min(10, 1 + b.count("*"))}  # likes what it reads first by 2
        return 200, completion(f"Answer A is so and so {{thinking}}.\n{json.dumps(scores)}")

    candidates = [Candidates("q", ["****", "x"]), Candidates("r", ["*", "xxxx"]), Candidates("s", ["***", "xxxxx"])]
    with served(answer) as (url, requests):
        judge = make_judge(url + "/", api_key="secret")
        kept, funnel = preference_pairs(candidates, judge, workers=3)
    assert [(each.prompt, each.chosen, each.delta) for each in kept] == [("q", "****", 4.0), ("s", "***", 3.0)]
    assert funnel.unclear == 1
    assert judge.asked == len(requests) == 12
    assert judge.malformed == 0
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert all(request["body"]["messages"][0]["content"] == INSTRUCTION for request in requests)
    assert requests[0]["body"]["model"] == "scripted"


@pytest.mark.parametrize(
    ("bad", "malformed"),
    [
        ((200, completion("I cannot decide.")), 1),
        ((200, completion('{"a": 11, "b": 1}')), 1),
        ((200, completion('{"a": "good", "b": 1}')), 1),
        ((200, completion('{"a": true, "b": 1}')), 1),
        ((200, completion('{"a": 4}')), 1),
        ((200, completion(None)), 1),
        ((200, "<html>"), 1),
        ((200, "[]"), 1),
        ((500, "oops"), 0),
        ((429, "slow down"), 0),
        ((0, ""), 0),
    ],
)
def test_what_may_pass_is_tried_again_and_counted(bad: tuple[int, str], malformed: int) -> None:
    with served(by_script(bad, (200, completion('{"a": 7.5, "b": 2}')))) as (url, _):
        judge = make_judge(url)
        assert judge("p", "a", "b") == 5.5
        assert (judge.asked, judge.malformed) == (2, malformed)
    with served(lambda body: bad) as (url, requests):
        judge = make_judge(url, retries=2)
        with pytest.raises(JudgeError, match="gave no judgement in 3 attempts, the last time because"):
            judge("p", "a", "b")
        assert len(requests) == 3
        assert judge.malformed == 3 * malformed


def test_a_refusal_is_told_at_once() -> None:
    for status in (400, 401, 404):
        with served(by_script((status, "no such model"))) as (url, requests):
            with pytest.raises(InputError, match=f"refused with HTTP {status}: no such model"):
                make_judge(url)("p", "a", "b")
            assert len(requests) == 1
    with pytest.raises(InputError, match="must begin with http"):
        EndpointJudge("localhost:8000", "m")
    with served(lambda body: (200, "")) as (url, _):
        gone = url  # nobody listens there any more
    with pytest.raises(JudgeError, match="the connection failed"):
        make_judge(gone, retries=0)("p", "a", "b")


def test_the_last_object_counts() -> None:
    assert read_scores('{"a": 1, "b": 2} no, {"a": 8, "b": 3}') == (8.0, 3.0)
    assert read_scores('```json\n{"a": 8.5,\n "b": 3}\n```') == (8.5, 3.0)
    for text in ("", "{", '{"a": 8, "b": 3} {}', '{"a": 0, "b": 3}', '{"a": NaN, "b": 3}'):
        with pytest.raises(JudgeError):
            read_scores(text)

"""`finback reject` and `finback judge`: what they keep, what they write beside it, and what they say when something is wrong."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finback import cli
from finback.config import InputError
from finback.recipes.sampling import conversation, load_checks
from finback.rl.rollout import sample_groups

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(chat_models: Path) -> Path:
    return chat_models / "deepseek_v3"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> tuple[int, str, str]:
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


class Scripted(ThreadingHTTPServer):
    """An endpoint that answers by a function of the request's number (from 1) and its question: an HTTP status and a text."""

    def __init__(self, answer: Callable[[int, str], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.asked, self.keys = answer, 0, set[str | None]()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        self.server.keys.add(self.headers["Authorization"])
        status, text = self.server.answer(self.server.asked, body["messages"][-1]["content"])
        payload = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int, str], tuple[int, str]]], Scripted]]:
    servers = []

    def start(answer: Callable[[int, str], tuple[int, str]]) -> Scripted:
        servers.append(Scripted(answer))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [{"prompt": f"q{i}", "completion": "good" if i % 2 else "bad"} for i in range(6)]


def by_word(number: int, question: str) -> tuple[int, str]:
    return 200, f'I think so. {{"score": {9 if "good" in question else 2}}}'


def test_rows_are_kept_by_an_endpoint(tmp_path: Path, run: Run, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(by_word)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    file, out = rows_file(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    code, text, err = run("judge", file, "--judge", server.url, "--out", out, "--judgements", 2, "--api-key-env", "JUDGE_KEY")
    assert (code, err) == (0, "")
    assert read(out) == [row for row in ROWS if row["completion"] == "good"]
    assert server.asked == 12
    assert server.keys == {"Bearer secret"}
    lineage = json.loads((tmp_path / "out.jsonl.lineage.json").read_text())
    assert lineage["funnel"] == [["rows", 6], ["judged", 6], ["good enough", 3]]
    assert "secret" not in json.dumps(lineage)
    assert "50.0%" in text
    assert not (tmp_path / "out.jsonl.judging").exists()


def test_a_judge_that_goes_is_told_and_asked_nothing_twice(tmp_path: Path, run: Run, serve: Any) -> None:
    up = 3
    server = serve(lambda number, question: by_word(number, question) if number <= up else (503, ""))
    many = [{"prompt": f"q{i}", "completion": "good"} for i in range(20)]
    file, out = rows_file(tmp_path / "in.jsonl", many), tmp_path / "out.jsonl"
    words = ("judge", file, "--judge", server.url, "--out", out, "--judgements", 1, "--retries", 0)
    code, _, err = run(*words)
    assert code == 2
    assert "failed 8 times in a row" in err
    assert "3 judgements are kept" in err
    assert not out.exists()
    before, up = server.asked, 10**9
    code, text, _ = run(*words)
    assert code == 0
    assert "3 judgements are there already" in text
    assert server.asked - before == 17
    assert read(out) == many


def test_malformed_and_empty_replies_and_rate_limits_are_asked_again(tmp_path: Path, run: Run, serve: Any) -> None:
    replies = {1: (429, ""), 2: (200, ""), 3: (200, '{"score": 11}')}
    server = serve(lambda number, question: replies.get(number, (200, '{"score": 10}')))
    out = tmp_path / "out.jsonl"
    file = rows_file(tmp_path / "in.jsonl", ROWS[:1])
    words = ("--judgements", 1, "--retries", 3, "--pause-seconds", 0)
    assert run("judge", file, "--judge", server.url, "--out", out, *words)[0] == 0
    assert server.asked == 4


def test_a_refusing_endpoint_is_one_sentence(tmp_path: Path, run: Run, serve: Any) -> None:
    server = serve(lambda number, question: (401, "no such key"))
    file = rows_file(tmp_path / "in.jsonl", ROWS)
    code, _, err = run("judge", file, "--judge", server.url, "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "HTTP 401" in err
    assert err.count("\n") == 1


def test_pairs_by_an_endpoint_ignore_the_order(tmp_path: Path, run: Run, serve: Any) -> None:
    def prefers_the_first(number: int, question: str) -> tuple[int, str]:
        a, b = question.split("<answer-b>")
        return 200, json.dumps({"a": 5 + 4 * ("good" in a), "b": 1 + 4 * ("good" in b)})

    server = serve(prefers_the_first)
    rows = [
        {"prompt": "p", "responses": ["good", "bad and long"]},
        {"prompt": "q", "responses": ["good and quite long", "bad"]},
        {"prompt": "same", "responses": ["bad a", "bad b"]},  # differs by the order alone
    ]
    out = tmp_path / "out.jsonl"
    words = ("--make", "pairs", "--workers", 2)
    code, text, _ = run("judge", rows_file(tmp_path / "in.jsonl", rows), "--judge", server.url, "--out", out, *words)
    assert code == 0
    assert [(row["chosen"].split()[0], row["rejected"].split()[0], row["delta"]) for row in read(out)] == [
        ("good", "bad", 4.0)
    ] * 2
    assert "balanced in length" in text


def test_a_rule_judges(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def good(prompt, completion, example):\n    return float(completion == 'good')\n")
    file, out = rows_file(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    words = ("--judge", f"{rule}:good", "--least-score", 1, "--judgements", 1)
    assert run("judge", file, *words, "--out", out)[0] == 0
    assert len(read(out)) == 3


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return 1 / (len(prompt) - 2)", "raised ZeroDivisionError: division by zero"),
        ("return undefined", "raised NameError: name 'undefined' is not defined"),
        ("raise RuntimeError('no luck')", "raised RuntimeError: no luck"),
        ("return 'good'", "gave str 'good', not a number; return a float"),
        ("while True: pass", "timed out after 2 s"),
    ],
)
def test_a_rule_that_fails_is_one_sentence(tmp_path: Path, run: Run, body: str, told: str) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(f"def good(prompt, completion, example):\n    {body}\n")
    code, _, err = run(
        "judge",
        rows_file(tmp_path / "in.jsonl", ROWS),
        "--judge",
        f"{rule}:good",
        "--out",
        tmp_path / "out.jsonl",
        "--timeout-seconds",
        2,
    )
    assert (code, err) == (2, f"finback judge: the rule {rule}:good {told}\n")


def test_a_model_that_says_nothing_useful_is_told(tmp_path: Path, run: Run, model: Path) -> None:
    file = rows_file(tmp_path / "in.jsonl", [{"prompt": f"q{i}", "completion": "x"} for i in range(9)])
    words = ("--judgements", 1, "--max-tokens", 4, "--retries", 0)
    code, _, err = run("judge", file, "--judge", model, "--out", tmp_path / "out.jsonl", *words)
    assert code == 2
    assert "judge" in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--judge", "nowhere"), "neither a URL"),
        (("--judge", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY_HERE"), "no such environment variable"),
        (("--judge", "http://127.0.0.1:9", "--judgements", 0), "judgements is 0"),
        (("--judge", "http://127.0.0.1:9", "--make", "pairs"), "in.jsonl, line 1: to make pairs"),
    ],
)
def test_mistakes_of_judge_are_one_sentence(tmp_path: Path, run: Run, words: tuple[object, ...], sentence: str) -> None:
    file = rows_file(tmp_path / "in.jsonl", ROWS)
    code, _, err = run("judge", file, *words, "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert sentence in err


def test_reject_writes_what_passes_with_its_lineage(tmp_path: Path, run: Run, model: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def any(prompt, completion, example):\n    return 0.5\n")
    data, out = rows_file(tmp_path / "in.jsonl", [{"prompt": "The fox"}, {"prompt": "The grapes"}]), tmp_path / "out.jsonl"
    words = ("--num-samples", 8, "--keep", 2, "--max-tokens", 100, "--temperature", 5)
    code, text, err = run("reject", model, "--data", data, "--reward", f"{rule}:any:0.6", "--out", out, *words)
    assert code == 2
    assert "no sample passed" in err
    assert "sampled" in text
    assert not out.exists()
    code, text, err = run("reject", model, "--data", data, "--reward", f"{rule}:any:0.5", "--out", out, *words)
    assert (code, err) == (0, "")
    rows = read(out)
    assert 1 <= len(rows) <= 4
    assert {row["messages"][0]["content"] for row in rows} <= {"The fox", "The grapes"}
    lineage = json.loads((tmp_path / "out.jsonl.lineage.json").read_text())
    assert lineage["funnel"][0] == ["sampled", 16]
    assert lineage["funnel"][-1][1] == len(rows)
    assert len(lineage["sources"]["model"]) == 64
    assert "exists" in run("reject", model, "--data", data, "--reward", f"{rule}:any", "--out", out)[2]


def test_reject_says_why_a_reward_failed(tmp_path: Path, run: Run, model: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def fails(prompt, completion, example):\n    raise ValueError('no table')\n"
        "def half(prompt, completion, example):\n    return 1 if len(completion) % 2 else 1 / 0\n"
    )
    data, out = rows_file(tmp_path / "in.jsonl", [{"prompt": "The fox"}, {"prompt": "The grapes"}]), tmp_path / "out.jsonl"
    words = ("--num-samples", 8, "--max-tokens", 20, "--temperature", 5)
    code, text, err = run("reject", model, "--data", data, "--reward", f"{rule}:fails", "--out", out, *words)
    assert code == 2
    failure = "rewards failed 16 times, where they count 0; most often fails raised ValueError: no table"
    assert failure in text
    assert f"no sample passed, so {out} is not written; {failure}; mend the reward" in err
    _, text, _ = run("reject", model, "--data", data, "--reward", f"{rule}:half", "--out", out, *words)
    assert "most often half raised ZeroDivisionError: division by zero" in text


def test_reject_samples_on_the_device_it_is_given(tmp_path: Path, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Stop(InputError):
        pass

    def engine(directory: Path, **more: Any) -> None:
        asked.append(str(more["device"]))
        raise Stop("no engine here")

    monkeypatch.setattr("finback.recipes.sampling.LLM", engine)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    data = rows_file(tmp_path / "in.jsonl", [{"prompt": "The fox"}])
    words = ("reject", model, "--data", data, "--reward", "finback.rewards.answers:exact", "--out", tmp_path / "out.jsonl")
    assert "no engine here" in run(*words)[2]
    assert "no engine here" in run(*words, "--device", "cpu")[2]
    assert asked == ["cuda", "cpu"]
    assert "field device is 'gpu'" in run(*words, "--device", "gpu")[2]


WATCHED = """
def watched(prompt, completion, example):
    with open({log!r}, "a") as file:
        file.write(example["prompt"] + "\\n")
    return 1.0
"""


def test_reject_goes_on_where_it_was_interrupted(tmp_path: Path, run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, rule, out = tmp_path / "log", tmp_path / "rule.py", tmp_path / "out.jsonl"
    journal = tmp_path / "out.jsonl.sampling"
    rule.write_text(WATCHED.format(log=str(log)))
    data = rows_file(tmp_path / "in.jsonl", [{"prompt": f"fox {i}"} for i in range(14)])
    words = ("reject", model, "--data", data, "--reward", f"{rule}:watched", "--num-samples", 4, "--max-tokens", 60)
    words = (*words, "--temperature", 5)

    def interrupted(*arguments: Any, **more: Any) -> Iterator[bool]:
        for sampling in sample_groups(*arguments, **more):
            yield sampling
            if journal.read_bytes().count(b"\n") > 5:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finback.rl.rejection.sample_groups", interrupted)
        code, text, _ = run(*words, "--out", out)
    assert code == 130
    assert "the same words go on from there" in text
    assert not out.exists()
    finished = {f"fox {row['place']}" for row in read(journal)[1:]}
    assert 5 <= len(finished) < 14
    with journal.open("ab") as file:
        file.write(b'{"place": 13, "cou')  # what a process leaves that is killed while it writes
    before = journal.read_bytes()
    assert "with other settings" in run(*words, "--seed", 1, "--out", out)[2]
    assert journal.read_bytes().startswith(before[: before.rindex(b"\n")])

    log.unlink()
    code, text, err = run(*words, "--out", out)
    assert (code, err) == (0, "")
    assert f"{len(finished)} prompts are finished already" in text
    asked = log.read_text().splitlines()
    assert len(asked) == 4 * (14 - len(finished))
    assert not finished & set(asked)
    assert not journal.exists()
    lineage, whole = json.loads((tmp_path / "out.jsonl.lineage.json").read_text()), tmp_path / "whole.jsonl"
    assert lineage["funnel"][0] == ["sampled", 56]
    assert run(*words, "--out", whole)[0] == 0
    assert read(whole) == read(out)


def test_a_sample_becomes_a_conversation() -> None:
    row = {"prompt": "U: 1+1 A: <think>\n", "completion": "two\n</think>\n\n2", "example": {"prompt": "1+1"}}
    reply = {"role": "assistant", "content": "2", "reasoning_content": "two"}
    assert conversation(row) == {"messages": [{"role": "user", "content": "1+1"}, reply]}


def test_thresholds() -> None:
    first, second = load_checks(["finback.rewards.answers:exact", "finback.rewards.format:think_then_answer:0.25"])
    assert (first.least, second.least) == (1.0, 0.25)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--reward", "finback.rewards.answers:exact:much"), "threshold 'much' is not a finite number"),
        (("--reward", "finback.rewards.answers:exact:nan"), "threshold 'nan' is not a finite number"),
        (("--reward", "finback.rewards.answers:exakt"), "did you mean"),
        (("--reward", "finback.rewards.answers:exact", "--keep", 9), "keep is 9, more than num_samples 4"),
        (("--reward", "finback.rewards.answers:exact"), "gone.jsonl"),
    ],
)
def test_mistakes_of_reject_are_one_sentence(tmp_path: Path, run: Run, model: Path, words: Any, sentence: str) -> None:
    code, _, err = run(
        "reject", model, "--data", tmp_path / "gone.jsonl", *words, "--max-tokens", 9, "--out", tmp_path / "out.jsonl"
    )
    assert code == 2
    assert sentence in err

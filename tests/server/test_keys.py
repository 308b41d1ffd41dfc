"""Keys and money: the store alone, the verb, and a server that charges."""

import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from finback.cli import main as finback
from finback.config import InputError
from finback.server.keys import NANO, Charge, Charges, KeyStore, nano, prices, yuan
from tests.server.serving import Served, serving, write_model

QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Where does the whale swim?"}], "max_tokens": 5}
R1 = prices(Decimal(1), Decimal(4), Decimal(16), None, Decimal(0))


def test_a_key_is_found_by_its_text_and_stored_as_a_hash(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", create=True)
    secret = store.add("ann", nano(Decimal("2.5")))
    key = store.find(secret)
    assert key is not None
    assert (key.name, key.balance) == ("ann", 5 * NANO // 2)
    assert store.find(secret[:-1]) is None
    assert secret.encode() not in (tmp_path / "keys.sqlite").read_bytes()
    assert (tmp_path / "keys.sqlite").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="a key named 'ann' already"):
        store.add("ann")
    store.revoke("ann")
    assert store.find(secret) is None
    with pytest.raises(InputError, match=r"no key named 'ann' in .*; there are: none"):
        store.top_up("ann", 1)
    assert store.add("ann") != secret, "a name is free again"


def test_a_request_is_charged_once_and_what_was_granted_goes_first(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite", create=True)
    store.add("ann", 100)
    store.top_up("ann", 50)
    key = store.named("ann")
    charges = Charges(store.file)
    for _ in range(2):
        charges.add(Charge("r1", key.id, "m", 0, 1, 2, 70)).result()
    assert (store.named("ann").granted, store.named("ann").topped_up) == (30, 50)
    charges.add(Charge("r2", key.id, "m", 0, 1, 2, 40)).result()
    assert (store.named("ann").granted, store.named("ann").topped_up) == (0, 40)
    charges.add(Charge("r3", key.id, "m", 64, 1, 2, 60)).result()
    assert store.named("ann").balance == -20
    assert store.usage(key.id) == (3, 73, 170)
    assert charges.owed(key.id) == 0
    assert charges.close(60) == []


def test_prices_are_those_of_the_table_and_lower_off_peak() -> None:
    noon = datetime(2025, 2, 28, 12, 0, tzinfo=UTC)
    assert R1.cost(10**6, 10**6, 10**6, noon) == 21 * NANO
    assert R1.cost(64, 7, 3, noon) == 64 * 1000 + 7 * 4000 + 3 * 16000
    cheap = prices(Decimal(1), Decimal(4), Decimal(16), (16 * 60 + 30, 30), Decimal("0.75"))
    moments = {(16, 29): False, (16, 30): True, (23, 59): True, (0, 0): True, (0, 29): True, (0, 30): False}
    for (hour, minute), off_peak in moments.items():
        cost = cheap.cost(0, 0, 1000, noon.replace(hour=hour, minute=minute))
        assert cost == (4 if off_peak else 16) * 10**6, (hour, minute)
    assert [yuan(amount) for amount in (0, NANO, NANO // 4, 1, -3 * NANO)] == ["0.00", "1.00", "0.25", "0.000000001", "-3.00"]


def test_files_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file .*; make it with finback keys add"):
        KeyStore(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("no database, but a text that is long enough to be one")
    with pytest.raises(InputError, match="cannot be used as a file of keys"):
        KeyStore(tmp_path / "text", create=True)
    with sqlite3.connect(tmp_path / "other.sqlite") as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(InputError, match="holds no keys of this version"):
        KeyStore(tmp_path / "other.sqlite", create=True)
    assert (tmp_path / "text").read_text().startswith("no database")


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.sqlite")

    def run(words: str) -> tuple[int, str]:
        code = finback(["keys", *words.split(), "--keys", file])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, secret = run("add ann --balance 3 --requests-per-minute 7")
    assert (code, bool(re.fullmatch(r"sk-[\w-]{40,}\n", secret))) == (0, True)
    assert run("top-up ann 0.5") == (0, "the key 'ann' has 3.50 yuan\n")
    code, table = run("list")
    assert code == 0
    assert re.search(r"ann .* 3\.50 +0 +0 +0\.00 +7", table)
    for name in ("[prod]", "[/x]", ":whale:"):  # text, and no mark-up
        assert run(f"add {name}")[0] == 0
        assert name in run("list")[1]
    assert run("revoke ann") == (0, "the key 'ann' is revoked\n")
    assert run("revoke ann")[0] == 2
    assert "it must be above 0" in run("top-up bob 0")[1]
    assert "it must be a number" in run("add bob --balance much")[1]
    assert "unknown action" in run("drop ann")[1]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


@pytest.fixture
def secrets(keys: Path) -> dict[str, str]:
    store = KeyStore(keys, create=True)
    return {"ann": store.add("ann", NANO), "bob": store.add("bob", 0), "eve": store.add("eve", NANO, 2)}


@pytest.fixture
def served(keys: Path, secrets: dict[str, str]) -> Iterator[Served]:
    with serving(keys) as running:
        yield running
        assert running.is_idle()


def ask(served: Served, secret: str | None, **change: Any) -> httpx.Response:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return httpx.post(f"{served.url}/v1/chat/completions", json=QUESTION | change, headers=headers, timeout=60)


def test_keys_are_asked_for_charged_and_refused(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    store = KeyStore(keys)
    assert ask(served, None).status_code == 401
    assert ask(served, "sk-wrong").status_code == 401
    for path in ("v1/chat/completions", "v1/messages", "api/chat"):
        assert httpx.post(f"{served.url}/{path}", content="{", headers={"content-type": "application/json"}).status_code == 401
    assert ask(served, secrets["bob"]).status_code == 402
    usage = ask(served, secrets["ann"]).raise_for_status().json()["usage"]
    cost = R1.cost(
        usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"], usage["completion_tokens"], datetime.now(UTC)
    )
    assert store.named("ann").balance == NANO - cost
    headers = {"authorization": f"Bearer {secrets['ann']}"}
    info = httpx.get(f"{served.url}/user/balance", headers=headers).json()
    assert info["is_available"] is True
    assert info["balance_infos"][0]["currency"] == "CNY"
    assert info["balance_infos"][0]["total_balance"] == yuan(NANO - cost)
    assert [ask(served, secrets["eve"], max_tokens=1).status_code for _ in range(3)] == [200, 200, 429]
    limited = ask(served, secrets["eve"])
    assert 1 <= int(limited.headers["retry-after"]) <= 60
    store.revoke("ann")
    assert ask(served, secrets["ann"]).status_code == 401
    assert httpx.get(f"{served.url}/finback/info").json()["prices"] == {"hit": 1.0, "miss": 4.0, "output": 16.0}


def test_the_hours_of_a_request_decide_its_price(keys: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same question at three times of day, asked of a server with cheap hours: what the balance has lost, and the table says."""
    costs = []
    with serving(keys, off_peak="16:30-00:30", off_peak_discount="0.75", llm={"enable_prefix_caching": False}) as served:
        store = KeyStore(keys)
        for hour, minute in ((16, 29), (16, 30), (0, 29), (0, 30)):
            monkeypatch.setattr("finback.server.service.now", lambda h=hour, m=minute: datetime(2025, 3, 1, h, m, tzinfo=UTC))
            before = store.named("ann").balance
            usage = ask(served, secrets["ann"]).raise_for_status().json()["usage"]
            costs.append(before - store.named("ann").balance)
            info = httpx.get(f"{served.url}/finback/info").json()
            assert info["off_peak"] == {"start": 16 * 60 + 30, "end": 30, "discount": 0.75}
            full = usage["prompt_tokens"] * 4000 + usage["completion_tokens"] * 16000
            assert costs[-1] == (full // 4 if (hour, minute) in ((16, 30), (0, 29)) else full)
        assert store.usage(store.named("ann").id)[2] == sum(costs)
    assert served.is_idle()


def test_what_the_engine_refuses_or_fails_at_costs_nothing(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    store = KeyStore(keys)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "impossible"}}}
    for change in ({"logit_bias": {"99999": 1}}, {"response_format": schema}):
        assert ask(served, secrets["ann"], **change).status_code == 400
    step = served.llm.step

    def fails() -> Any:
        raise RuntimeError("out of memory")

    served.llm.step = fails  # type: ignore[method-assign]
    assert ask(served, secrets["ann"]).status_code == 500
    served.llm.step = step  # type: ignore[method-assign]
    assert store.named("ann").balance == NANO
    assert store.usage(store.named("ann").id) == (0, 0, 0)
    ask(served, secrets["ann"]).raise_for_status()
    assert store.usage(store.named("ann").id)[0] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_breaks_in_the_middle_is_our_failure_and_costs_nothing(
    served: Served, keys: Path, secrets: dict[str, str], stream: bool
) -> None:
    forward, calls = served.llm._runner.forward, iter(range(9))

    def breaks(*arguments: Any) -> Any:
        made = forward(*arguments)
        return made if next(calls) < 5 else made._replace(logits=made.logits * float("nan"))

    served.llm._runner.forward = breaks  # type: ignore[method-assign]
    answer = ask(served, secrets["ann"], max_tokens=20, ignore_eos=True, stream=stream)
    error = json.loads(answer.text.strip().splitlines()[-1].removeprefix("data: "))["error"] if stream else answer.json()["error"]
    assert answer.status_code == (200 if stream else 500)
    assert error["type"] == "server_error"
    assert "logits are NaN" in error["message"]
    assert served.is_idle()
    assert KeyStore(keys).named("ann").balance == NANO


def test_what_waits_costs_nothing_where_its_client_leaves_or_the_server_stops(keys: Path, secrets: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {secrets['ann']}"}
    endless = QUESTION | {"max_tokens": 900, "ignore_eos": True, "stream": True}
    with serving(keys, llm={"max_num_seqs": 1}) as served, ThreadPoolExecutor(1) as pool:
        served.slow_down()
        url = f"{served.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=endless, headers=headers, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=QUESTION, headers=headers, timeout=0.2)
            wait_for(lambda: served.service.worker.open == 1 and served.llm.scheduler_stats.num_waiting == 0)
            waits = pool.submit(ask, served, secrets["ann"])
            wait_for(lambda: served.llm.scheduler_stats.num_waiting == 1)
            loop = served.service.worker._loop
            assert loop is not None
            loop.call_soon_threadsafe(served.service.end_answers_in, 0)
            assert waits.result().status_code == 503
            assert "the server is stopping" in list(lines)[-2]
        assert charged_once(served, KeyStore(keys)) > 10, "and what runs pays for what was written"


def test_a_prompt_that_was_begun_is_paid_for(keys: Path, secrets: dict[str, str]) -> None:
    """A long one, read in many steps: whoever leaves before its end has used the engine."""
    with serving(keys, llm={"max_num_batched_tokens": 8}) as served:
        served.slow_down()
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{served.url}/v1/chat/completions",
                json=QUESTION | {"messages": [{"role": "user", "content": "鲸鱼" * 450}]},
                headers={"authorization": f"Bearer {secrets['ann']}"},
                timeout=0.4,
            )
        assert charged_once(served, KeyStore(keys)) > 800


@pytest.mark.parametrize("change", [{}, {"n": 3}, {"stream": True}, {"stream": True, "n": 3}])
def test_a_prompt_is_paid_for_where_the_client_leaves_in_its_first_step(
    served: Served, keys: Path, secrets: dict[str, str], change: dict[str, Any]
) -> None:
    """The step is held until the client has gone; one that waits behind it leaves for nothing."""
    store, step, held, may_end = KeyStore(keys), served.llm.step, threading.Event(), threading.Event()
    store.top_up("bob", NANO)
    long = {"messages": [{"role": "user", "content": "鲸鱼" * 60}]}
    prompt = ask(served, secrets["ann"], **long, max_tokens=1).raise_for_status().json()["usage"]["prompt_tokens"]

    def slow() -> Any:
        increments = step()
        held.set()
        assert may_end.wait(60)
        return increments

    def rows() -> list[tuple[int, int, int]]:
        with closing(sqlite3.connect(keys)) as database:
            found = database.execute("SELECT hit_tokens, miss_tokens, output_tokens FROM usage ORDER BY finished")
            return [(hit, miss, output) for hit, miss, output in found]

    served.llm.step = slow  # type: ignore[method-assign]
    try:
        with ThreadPoolExecutor(1) as pool:
            leaves = pool.submit(httpx.post, **posted(served, secrets["ann"], long | change), timeout=1.0)
            assert held.wait(60)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(**posted(served, secrets["bob"], {}), timeout=0.5)
            with pytest.raises(httpx.ReadTimeout):
                leaves.result()
        wait_for(lambda: served.service.worker.open == 0)
        assert rows() == [(0, prompt, 1)]
    finally:
        may_end.set()
    wait_for(lambda: not served.service._answering)
    hits = prompt // 64 * 64  # the same prompt was there before
    assert hits > 0
    assert rows() == [(0, prompt, 1), (hits, prompt - hits, 0)]
    assert store.usage(store.named("bob").id) == (0, 0, 0)


def posted(served: Served, secret: str, change: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {secret}"}
    return {"url": f"{served.url}/v1/chat/completions", "json": QUESTION | change, "headers": headers}


def test_a_locked_file_holds_up_nobody_and_loses_no_charge(
    keys: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("finback.server.service.CHARGE_SECONDS", 0.3)
    with serving(keys) as served:
        store = KeyStore(keys)
        with closing(sqlite3.connect(keys, isolation_level=None)) as other, ThreadPoolExecutor(2) as pool:
            other.execute("BEGIN IMMEDIATE")
            answers = [pool.submit(ask, served, secrets["ann"], seed=seed, stream=seed == 1) for seed in range(2)]
            while not all(answer.done() for answer in answers):
                assert httpx.get(f"{served.url}/health", timeout=10).status_code == 200
            assert [answer.result().status_code for answer in answers] == [200, 200]
            wait_for(lambda: "requests are charged later" in caplog.text)
            assert store.usage(store.named("ann").id) == (0, 0, 0)
            other.execute("ROLLBACK")
        wait_for(lambda: store.usage(store.named("ann").id)[0] == 2)
        requests, _, cost = store.usage(store.named("ann").id)
        assert requests == 2
        assert store.named("ann").balance == NANO - cost < NANO


def test_what_is_owed_while_the_file_is_locked_is_not_spent_again_and_written_at_the_end(
    keys: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finback.server.service.CHARGE_SECONDS", 0.1)
    store = KeyStore(keys)
    with closing(sqlite3.connect(keys, isolation_level=None, check_same_thread=False)) as other:
        with serving(keys) as served:
            store.top_up("bob", 1)
            other.execute("BEGIN IMMEDIATE")
            assert ask(served, secrets["bob"]).status_code == 200
            assert store.named("bob").balance == 1, "nothing is written"
            assert ask(served, secrets["bob"]).status_code == 402
            opens = threading.Timer(1.0, lambda: other.execute("ROLLBACK"))
            opens.start()
        opens.join()
    requests, _, cost = store.usage(store.named("bob").id)
    assert (requests, store.named("bob").balance) == (1, 1 - cost)


def test_charges_that_cannot_be_written_to_the_last_are_told(keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = KeyStore(keys, create=True)
    store.add("ann", NANO)
    charge = Charge("r1", store.named("ann").id, "m", 0, 1, 2, 70)
    with closing(sqlite3.connect(keys, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        charges = Charges(keys)
        charges.add(charge)
        assert charges.owed(charge.key_id) == 70
        assert charges.close(0.1) == [charge]
        assert "is owed: Charge(request_id='r1'" in caplog.text
        other.execute("ROLLBACK")
    charges._thread.join(60)
    assert store.named("ann").balance == NANO - 70


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_behind_others_of_a_key_is_refused_when_they_have_spent_its_balance(
    keys: Path, secrets: dict[str, str], stream: bool
) -> None:
    store = KeyStore(keys)
    store.top_up("bob", 1000)
    with serving(keys, llm={"max_num_seqs": 1}) as served, ThreadPoolExecutor(30) as pool:
        served.slow_down()
        answers = list(pool.map(lambda seed: ask(served, secrets["bob"], seed=seed, stream=stream), range(30)))
        codes = [answer.status_code for answer in answers]
        assert codes.count(200) in (1, 2)  # the second may begin in the moment in which the first ends
        assert codes.count(200) + codes.count(402) == 30
        assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 402} == {"insufficient_balance"}
        assert served.is_idle()
    requests, _, cost = store.usage(store.named("bob").id)
    assert requests == codes.count(200)
    assert store.named("bob").balance == 1000 - cost < 0


def test_a_balance_that_is_spent_meanwhile_is_told_in_a_stream_that_has_begun(keys: Path, secrets: dict[str, str]) -> None:
    """Comments were sent by then, and with them status 200."""
    store = KeyStore(keys)
    store.top_up("bob", 1000)
    with serving(keys, llm={"max_num_seqs": 1}, keep_alive_seconds=0.1) as served, ThreadPoolExecutor(1) as pool:
        served.slow_down()
        running = pool.submit(ask, served, secrets["bob"], max_tokens=200, ignore_eos=True)
        wait_for(lambda: served.llm.scheduler_stats.num_running == 1)
        answer = ask(served, secrets["bob"], stream=True)
        assert running.result().status_code == 200
    assert answer.status_code == 200
    events = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert [json.loads(event.removeprefix("data: "))["error"]["code"] for event in events] == ["insufficient_balance"]
    assert store.usage(store.named("bob").id)[0] == 1


def test_what_runs_already_may_overdraw(keys: Path, secrets: dict[str, str]) -> None:
    store = KeyStore(keys)
    store.top_up("bob", 1000)
    with serving(keys) as served, ThreadPoolExecutor(4) as pool:
        step, all_there = served.llm.step, threading.Event()

        def together() -> Any:
            assert all_there.wait(60)
            return step()

        served.llm.step = together  # type: ignore[method-assign]
        answers = [pool.submit(ask, served, secrets["bob"], max_tokens=10 * length, ignore_eos=True) for length in (1, 2, 3, 4)]
        wait_for(lambda: served.service.worker.open == 4)
        all_there.set()
        assert [answer.result().status_code for answer in answers] == [200] * 4
    assert store.usage(store.named("bob").id)[0] == 4


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_client_that_leaves_pays_for_what_was_written(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    store = KeyStore(keys)
    headers = {"authorization": f"Bearer {secrets['ann']}"}
    body = QUESTION | {"max_tokens": 900, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
    tokens = charged_once(served, store)
    assert 20 < tokens < 900


def charged_once(served: Served, store: KeyStore) -> int:
    """The tokens of ann's only request, which the server may yet have to end."""
    assert served.is_idle()
    wait_for(lambda: store.usage(store.named("ann").id)[0] > 0)
    requests, tokens, cost = store.usage(store.named("ann").id)
    assert requests == 1
    assert store.named("ann").balance == NANO - cost < NANO
    return tokens


def test_so_does_one_that_does_not_wait_for_a_whole_answer(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    headers = {"authorization": f"Bearer {secrets['ann']}"}
    body = QUESTION | {"max_tokens": 900, "n": 16, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body, headers=headers, timeout=0.5)
    assert charged_once(served, KeyStore(keys)) < 16 * 900


def test_prefixes_are_not_shared_between_keys(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    KeyStore(keys).top_up("bob", NANO)
    long = {"messages": [{"role": "user", "content": "鲸鱼" * 60}]}
    hits = [ask(served, secrets[name], **long).json()["usage"]["prompt_cache_hit_tokens"] for name in ("ann", "bob", "ann")]
    assert hits[0] == hits[1] == 0
    assert hits[2] > 0


def test_many_at_once_are_each_charged_once(served: Served, keys: Path, secrets: dict[str, str]) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: ask(served, secrets["ann"], seed=seed), range(24)))
    assert {answer.status_code for answer in answers} == {200}
    used = [answer.json()["usage"] for answer in answers]
    store = KeyStore(keys)
    requests, tokens, cost = store.usage(store.named("ann").id)
    assert (requests, tokens) == (24, sum(usage["total_tokens"] for usage in used))
    assert store.named("ann").balance == NANO - cost


def test_a_killed_server_loses_no_balance(tmp_path: Path, keys: Path, secrets: dict[str, str]) -> None:
    """kill -9 in the middle of an answer: what was charged stays charged, once, and the file is sound."""
    model = write_model(tmp_path / "model")
    command = [sys.executable, "-m", "finback", "serve", str(model), "--port", "0", "--keys", str(keys), "--num-blocks", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        url = re.search(r"http://\S+", process.stdout.readline())
        assert url is not None
        headers = {"authorization": f"Bearer {secrets['ann']}"}
        body = QUESTION | {"model": "model"}
        endless = body | {"stream": True, "max_tokens": 900, "ignore_eos": True, "n": 16}
        httpx.post(f"{url[0]}/v1/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
        with httpx.stream("POST", f"{url[0]}/v1/chat/completions", json=endless, headers=headers) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGKILL)
    except httpx.RemoteProtocolError:
        pass
    finally:
        process.kill()
        _, log = process.communicate()
    store = KeyStore(keys)
    requests, _, cost = store.usage(store.named("ann").id)
    assert requests == 1
    assert store.named("ann").balance == NANO - cost
    assert secrets["ann"] not in log
    assert "whale" not in log

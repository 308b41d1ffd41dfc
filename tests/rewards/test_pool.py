"""The pool of reward workers: the same scores as in this process, whatever a reward does, and nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from finback.config import InputError
from finback.rewards.pool import RewardPool
from finback.rewards.reward import Reward, Score, load_reward, load_rewards, score

HOSTILE = Path(__file__).with_name("hostile.py")
LENGTH = f"{HOSTILE}:length:0.5"
ACT = f"{HOSTILE}:hostile"
DEADLINE = 4.0  # seconds; a good call must not meet it on a machine that does much else

CASES = {
    "hang": ("timed_out", "timed out after 4 s"),
    "regex": ("timed_out", "timed out after 4 s"),
    "lose a child and hang": ("timed_out", "timed out after 4 s"),
    "sleep": ("timed_out", "timed out after 4 s"),
    "exit": ("worker_died", "ended its process with exit code 3"),
    "exit 0": ("worker_died", "ended its process with exit code 0"),
    "die with a child left": ("worker_died", "ended its process with exit code 4"),
    "segfault": ("worker_died", "ended its process by signal 11 (Segmentation fault)"),
    "interrupt": ("worker_died", "ended its process with exit code 1"),
    "close every file": ("worker_died", "ended its process"),
    "memory": ("out_of_memory", "needed more memory than a worker may have"),
    "sys.exit": ("raised", "raised SystemExit: 1"),
    "raise": ("raised", "raised ValueError: on purpose"),
    "nan": ("not_a_number", "gave nan, not a finite number"),
    "str": ("not_a_number", "gave str '1.0', not a number; return a float"),
    "none": ("not_a_number", "gave NoneType None, not a number; return a float"),
}
VALUES = {"print": 0.25, "return twice": 1.0, "leave a child": 1.0, "fine": 1.0}


def descendants(process: int) -> set[int]:
    """Every process below `process`, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = set(), [process]
    while queue:
        for child in children.get(queue.pop(), ()):
            found.add(child)
            queue.append(child)
    return found


def alive(processes: set[int]) -> set[int]:
    """Those that still run; one that has ended and waits for its parent does not."""
    left = set()
    for process in processes:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            left.add(process)
    return left


def wait_until_gone(processes: set[int], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while alive(processes):
        assert time.monotonic() < end, f"{alive(processes)} are left"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Every test ends with the processes it began with, detached ones among them: they would be this process's or init's.

    What other tests of this process have started is theirs: Python's tracker of shared resources, say, lives as long as it does.
    """
    before, theirs = sleepers(), descendants(os.getpid())
    yield
    assert alive(descendants(os.getpid()) - theirs) == set()
    wait_until_gone(sleepers() - before)


def sleepers() -> set[int]:
    """Processes of anyone that run the keeper's program: workers and what they forked share its command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if b"finback.rewards.keeper" in line and environment(entry).get(MARK) == str(os.getpid()):
                found.add(int(entry.name))
    return found


MARK = "FINBACK_TEST_OF_REWARDS"
os.environ[MARK] = str(os.getpid())


def environment(entry: Path) -> dict[str, str]:
    try:
        words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return {}
    return dict(word.partition("=")[::2] for word in words)


def collected(pool: RewardPool) -> dict[object, Score]:
    scores: dict[object, Score] = {}
    while pool.outstanding:
        for key, result in pool.collect(wait=True):
            assert key not in scores
            scores[key] = result
    return scores


def scored(rewards: Sequence[Reward], samples: Sequence[str], **options: object) -> dict[object, Score]:
    with RewardPool(rewards, **options) as pool:
        for number, completion in enumerate(samples):
            pool.submit(number, "prompt", completion, {"bonus": 0.5})
        return collected(pool)


@pytest.fixture(scope="module")
def rewards() -> tuple[Reward, ...]:
    return load_rewards([LENGTH, ACT])


def test_every_hostile_completion_scores_what_it_must_and_harms_no_other(rewards: tuple[Reward, ...]) -> None:
    """All of them in one pool, between good completions, and then more good ones."""
    samples = [word for case in (*CASES, *VALUES) for word in (case, "fine")]
    random.Random(3).shuffle(samples)
    with RewardPool(rewards, processes=5, deadline=DEADLINE, memory_bytes=1 << 30) as pool:
        for number, completion in enumerate(samples):
            pool.submit(number, "prompt", completion, {})
        scores = collected(pool)
        for number, completion in enumerate(samples):
            result = scores[number]
            assert result.components["length"] == len(completion)
            if completion in CASES:
                _, sentence = CASES[completion]
                assert result.failures["hostile"].startswith(sentence), completion
                assert result.components["hostile"] == 0.0
            else:
                assert result.failures == {}, completion
                assert result.components["hostile"] == VALUES[completion]
            assert result.total == 0.5 * len(completion) + result.components["hostile"]
        kinds = [kind for kind, _ in CASES.values()]
        assert pool.failures == {"hostile": {kind: kinds.count(kind) for kind in set(kinds)}}
        for number in range(100):
            pool.submit(number, "prompt", "fine", {})
        assert all(result == Score(3.0, {"length": 4.0, "hostile": 1.0}) for result in collected(pool).values())


def test_the_scores_are_those_of_this_process_whatever_the_number_of_workers(rewards: tuple[Reward, ...]) -> None:
    samples = ["fine" * (number % 7) + chr(0x4E00 + number) for number in range(200)]
    samples += ["\ud800 half a pair", "", "x" * 1_000_000, "\0", "raise", "nan"]
    expected = {number: score(rewards, "prompt", text, {"bonus": 0.5}) for number, text in enumerate(samples)}
    assert scored(rewards, samples, processes=1) == expected
    assert scored(rewards, samples, processes=3) == expected


def test_built_in_rewards_need_no_torch(tmp_path: Path) -> None:
    """Nor does anything that a worker imports."""
    probe = tmp_path / "probe.py"
    probe.write_text("import sys\ndef torch(prompt, completion, example): return 'torch' in sys.modules\n", encoding="utf-8")
    names = ("answers:exact", "format:think_then_answer", "format:r1_zero_format")
    rewards = load_rewards([*(f"finback.rewards.{name}" for name in names), f"{probe}:torch"])
    with RewardPool(rewards) as pool:
        pool.submit("a", "1 + 1?\n<think>\n", "1 + 1 = 2\n</think>\n<answer>2</answer>", {"answer": 2})
        ((key, result),) = pool.collect(wait=True)
    assert key == "a"
    assert result == Score(3.0, {"exact": 1.0, "think_then_answer": 1.0, "r1_zero_format": 1.0, "torch": 0.0})


def test_collect_waits_only_if_asked(rewards: tuple[Reward, ...]) -> None:
    with RewardPool(rewards, deadline=DEADLINE) as pool:
        assert pool.collect(wait=True) == []
        pool.submit(("any", "key"), "", "fine", {})
        pool.submit("slow", "", "sleep", {})
        pool.submit("last", "", "fine", {})
        began = time.monotonic()
        assert [key for key, _ in pool.collect(wait=True)] == [("any", "key")]
        assert pool.collect(wait=False) == []
        assert pool.outstanding == 2
        assert time.monotonic() - began < DEADLINE
        results = collected(pool)
        assert results["slow"].failures == {"hostile": "timed out after 4 s"}
        assert results["last"].failures == {}
        assert pool.outstanding == 0


def test_the_deadline_holds_while_nobody_collects(rewards: tuple[Reward, ...]) -> None:
    with RewardPool(rewards, deadline=1.0) as pool:
        pool.wait_ready()
        pool.submit(0, "", "hang", {})
        pool.submit(1, "", "fine", {})
        time.sleep(4.0)
        assert {key for key, _ in pool.collect(wait=False)} == {0, 1}


def test_what_is_outstanding_at_the_end_is_killed(rewards: tuple[Reward, ...]) -> None:
    theirs = descendants(os.getpid())
    with RewardPool(rewards, processes=2, deadline=600) as pool:
        pool.submit(0, "", "lose a child and hang", {})
        pool.submit(1, "", "hang", {})
        pool.submit(2, "", "leave a child", {})
        time.sleep(0.5)
        below = descendants(os.getpid()) - theirs
        assert len(below) >= 3
    wait_until_gone(below, 1.0)
    assert pool.outstanding == 0
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.submit(0, "", "", {})


def test_a_keeper_that_is_killed_is_replaced(rewards: tuple[Reward, ...]) -> None:
    theirs = descendants(os.getpid())
    with RewardPool(rewards, deadline=DEADLINE) as pool:
        for number in range(50):
            pool.submit(number, "", "fine", {})
        pool.submit("hang", "", "sleep", {})
        scores = dict(pool.collect(wait=True))
        below = descendants(os.getpid()) - theirs
        os.kill(pool._keeper.pid, signal.SIGKILL)
        wait_until_gone(below)
        scores |= collected(pool)
        assert scores.pop("hang").failures == {"hostile": "timed out after 4 s"}
        assert scores == dict.fromkeys(range(50), Score(3.0, {"length": 4.0, "hostile": 1.0}))


PROGRAM = """
import json, sys, time
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_rewards
with RewardPool(load_rewards([sys.argv[1]]), processes=2, deadline=600) as pool:
    for number, completion in enumerate(["hang", "lose a child and hang"]):
        pool.submit(number, "", completion, {})
    print(json.dumps("waiting"), flush=True)
    pool.collect(wait=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_trainer(how: signal.Signals) -> None:
    command = [sys.executable, "-c", PROGRAM, ACT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as trainer:
        assert json.loads(trainer.stdout.readline()) == "waiting"
        end = time.monotonic() + 60
        while len(descendants(trainer.pid)) < 5:  # the keeper, two workers, and two of a detached child
            assert time.monotonic() < end
            time.sleep(0.02)
            if len(sleepers()) >= 4:
                break
        processes = descendants(trainer.pid) | sleepers()
        trainer.send_signal(how)
        trainer.wait(60)
    wait_until_gone(processes)


def test_a_module_prepares_before_the_first_deadline(tmp_path: Path) -> None:
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\nREADY = []\ndef prepare():\n    time.sleep(2.0)\n    READY.append(1)\n"
        "def ready(prompt, completion, example): return len(READY)\n",
        encoding="utf-8",
    )
    assert scored([load_reward(f"{path}:ready")], ["a", "b"], deadline=1.0, processes=2) == {
        0: Score(1.0, {"ready": 1.0}),
        1: Score(1.0, {"ready": 1.0}),
    }


@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        ("raise ValueError('no such table')", r"prepare\(\) raised ValueError: no such table"),
        ("raise InputError('install finback[rl]')", "install finback"),
        ("os._exit(7)", "loading the rewards ended their process .exit code 7."),
    ],
)
def test_rewards_that_cannot_start_are_told(tmp_path: Path, prepare: str, sentence: str) -> None:
    path = tmp_path / "unready.py"
    source = f"import os\nfrom finback.config import InputError\ndef prepare():\n    {prepare}\n"
    path.write_text(source + "def one(prompt, completion, example): return 1.0\n", encoding="utf-8")
    with RewardPool([load_reward(f"{path}:one")]) as pool, pytest.raises(InputError, match=sentence):
        pool.submit(0, "", "", {})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"processes": 0}, "processes is 0"),
        ({"deadline": 0.0}, "deadline is 0.0"),
        ({"deadline": float("nan")}, "deadline is nan"),
        ({"memory_bytes": 1000}, "memory_bytes is 1000"),
    ],
)
def test_fields_out_of_range_are_told(rewards: tuple[Reward, ...], options: dict[str, float], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        RewardPool(rewards, **options)


def test_a_reward_without_a_place_cannot_go_to_a_worker() -> None:
    with pytest.raises(InputError, match="reward 'mine' has no spec"):
        RewardPool([Reward("mine", lambda prompt, completion, example: 1.0)])

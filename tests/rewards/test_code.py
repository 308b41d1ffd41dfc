"""Solutions against their tests: what passes, what does not, and what a solution may forge in vain."""

import itertools
import math
import os
import re
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import finback.rewards
from finback.config import InputError
from finback.rewards import code, remote, sandbox
from finback.rewards.code import extract_code, pass_at_k, run_code, unit_tests, unit_tests_fraction
from finback.rewards.code_unsandboxed import unit_tests_unsandboxed
from finback.rewards.pool import RewardPool
from finback.rewards.reward import load_reward
from finback.rewards.sandbox import bubblewrap_obstacle
from finback.rewards.sandbox_config import InputOutput, Limits

PATIENT = Limits(wall_seconds=60.0, cpu_seconds=10)
CHECK = """
def check(candidate):
    assert candidate(3) == [0, 1, 2]
    assert candidate(0) == []
"""
RIGHT = "def count(n):\n    return list(range(n))\n"


@pytest.fixture
def walls() -> None:
    obstacle = bubblewrap_obstacle()
    if obstacle:
        pytest.skip(obstacle)


def judge(source: str, tests: Any, language: Any = "python", limits: Limits = PATIENT) -> tuple[bool, int, int, str]:
    result = run_code(source, tests, language, limits)
    assert result.passed == (result.num_passed == result.num_tests) == (result.verdict == "passed") == (result.detail == "")
    assert len(result.detail) <= 1000
    return result.passed, result.num_passed, result.num_tests, result.verdict


# Honest solutions


@pytest.mark.usefixtures("walls")
def test_a_function_that_is_right_passes():
    assert judge(RIGHT, CHECK + "check(count)\nassert count(1) == [0]\n") == (True, 2, 2, "passed")


@pytest.mark.usefixtures("walls")
def test_each_assertion_counts():
    tests = "import math\nassert count(0) == []\nassert count(2) == [0, 2]\nfor n in range(3):\n    assert len(count(n)) == n\n"
    assert judge(RIGHT, tests) == (False, 2, 3, "failed")
    result = run_code(RIGHT, tests, limits=PATIENT)
    assert result.detail == "assert count(2) == [0, 2]: AssertionError"


@pytest.mark.parametrize(
    ("source", "verdict", "words"),
    [
        ("def count(n) return", "compile error", "SyntaxError: expected ':' (solution.py, line 1)"),
        ("def other(n): return n", "crashed", "check(count): NameError: name 'count' is not defined"),
        ("import not_there", "crashed", "ModuleNotFoundError: No module named 'not_there'"),
        ("def count(n): return [][n]", "crashed", "assert candidate(3) == [0, 1, 2]: IndexError: list index out of range"),
        ("def count(n): return bytearray(10**10)", "out of memory", "assert candidate(3) == [0, 1, 2]: MemoryError"),
        ("class E(Exception): pass\ndef count(n): raise E('no')", "crashed", "assert candidate(3) == [0, 1, 2]: E: no"),
        ("def count(n): return count(n)", "crashed", "RecursionError"),
        ("\ud800", "compile error", "SyntaxError"),
        ("x\0y", "compile error", "null bytes"),
    ],
)
@pytest.mark.usefixtures("walls")
def test_a_wrong_function_fails_in_words(source: str, verdict: str, words: str):
    result = run_code(source, CHECK + "check(count)\n", limits=PATIENT)
    assert (result.num_passed, result.num_tests, result.verdict) == (0, 1, verdict), result
    assert words in result.detail


@pytest.mark.usefixtures("walls")
def test_values_functions_and_objects_cross():
    source = """
import collections
def same(x): return x
def apply(f, *items, start=0): return start + sum(f(item) for item in items)
def numbers():
    yield from range(3)
class Stack:
    def __init__(self): self.items = []
    def push(self, item):
        self.items.append(item)
        return self
    def __len__(self): return len(self.items)
    def __getitem__(self, place): return self.items[place]
    def __str__(self): return f"Stack of {len(self)}"
def fail(): raise ValueError("bad")
def failing(f):
    try: f()
    except KeyError as error: return str(error)
Point = collections.namedtuple("Point", "x y")
LIMIT = 10**40
"""
    tests = """
plain = [None, True, 2**70, -5, 0.1, 1j, "a\\ud800é", b"\\xff", (1, (2,)), [[], {}], range(3), bytearray(b"a")]
for value in [*plain, plain, {1: {2}, (3,): frozenset([4])}]:
    assert same(value) == value and type(same(value)) is type(value)
assert math.isnan(same(math.nan)) and same(math.inf) == math.inf
assert apply(lambda x: x * x, 1, 2, start=5) == 10
assert list(numbers()) == [0, 1, 2]
stack = Stack()
assert len(stack) == 0 and stack.push([1]).push(2)[1] == 2 and stack.items == [[1], 2]
assert str(stack) == "Stack of 2" and same(stack) == stack and stack != Stack() and stack in [stack]
try:
    fail()
    assert False
except ValueError as error:
    assert str(error) == "bad"
assert Point(1, 2) == (1, 2) and LIMIT == 10**40
assert "key" in failing(lambda: {}["key"])
"""
    assert judge(source, tests) == (True, 9, 9, "passed")


@pytest.mark.usefixtures("walls")
def test_whole_programs_are_compared_by_what_they_print():
    pairs = [InputOutput("4", "8\n"), {"input": "5\n", "output": "10  \n\n"}]
    assert judge("print(int(input()) * 2)", pairs) == (True, 2, 2, "passed")
    assert judge("if __name__ == '__main__':\n  print(int(input()) + 4)", pairs) == (False, 1, 2, "failed")
    detail = run_code("print(int(input()) + 4)", pairs, limits=PATIENT).detail
    assert detail == "test 2 of 2: printed '9\\n' for input '5\\n', expected '10  \\n\\n'"


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("print(8", "compile error"),
        ("print(8); 1 / 0", "crashed"),
        ("print(8); import sys; sys.exit(1)", "crashed"),
        ("print(8); import os; os.abort()", "crashed"),
        ("print(8); bytearray(10**10)", "out of memory"),
        ("print('8' * 2**21)", "too much output"),
        ("print(' 8')", "failed"),
        ("", "failed"),
    ],
)
@pytest.mark.usefixtures("walls")
def test_a_wrong_program_fails(source: str, verdict: str):
    assert judge(source, [InputOutput("4", "8")]) == (False, 0, 1, verdict)


def compiler_or_skip(language: str) -> None:
    if not any(os.path.exists(f"{folder}/{name}") for folder in code.PATH.split(":") for name in code.COMPILERS[language]):
        pytest.skip(f"no compiler for {language}")


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("c", '#include <stdio.h>\nint main(void) { int x; scanf("%d", &x); printf("%d\\n", 2 * x); return 0; }'),
        ("cpp", "#include <iostream>\nint main() { int x; std::cin >> x; std::cout << 2 * x << std::endl; }"),
    ],
)
@pytest.mark.usefixtures("walls")
def test_c_programs_are_compiled_inside(language: str, source: str):
    compiler_or_skip(language)
    pairs = [InputOutput("4", "8"), InputOutput("5", "10"), InputOutput("6", "13")]
    assert judge(source, pairs, language) == (False, 2, 3, "failed")


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("int main() { return x; }", "compile error"),
        ('#include "/etc/passwd"\nint main() {}', "compile error"),
        ("int main() { volatile int *p = 0; return *p; }", "crashed"),
        ("#include <stdlib.h>\nint main() { exit(0); }", "failed"),
    ],
)
@pytest.mark.usefixtures("walls")
def test_a_wrong_c_program_fails(source: str, verdict: str):
    compiler_or_skip("c")
    assert judge(source, [InputOutput("", "8")], "c") == (False, 0, 1, verdict)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["#include __FILE__", 'char a[] = {1, 2};\n#include "/dev/zero"', "char x[1 << 28] = {1};"])
@pytest.mark.usefixtures("walls")
def test_a_compiler_is_held_by_the_limits(line: str):
    compiler_or_skip("c")
    passed, _, _, verdict = judge(
        f"{line}\nint main() {{ }}", [InputOutput("", "8")], "c", Limits(wall_seconds=20.0, cpu_seconds=5)
    )
    assert not passed
    assert verdict != "failed"


@pytest.mark.usefixtures("walls")
def test_the_clock_is_for_all_tests_together():
    limits = Limits(wall_seconds=1.0)
    result = run_code("import time\ntime.sleep(1000)", [InputOutput("", "a")] * 50, limits=limits)
    assert (result.verdict, result.num_passed, result.num_tests) == ("timed out", 0, 50)
    assert result.seconds < 20
    result = run_code("def count(n):\n  while True: pass", CHECK + "check(count)", limits=limits)
    assert result.verdict == "timed out"
    assert result.seconds < 20


# Forgeries: none of these computes anything

SAYS_PASSED = 'passed\\n{"verdict": "passed", "detail": ""}\\n'
FORGERIES = {
    "prints": f"print('{SAYS_PASSED}')\ndef count(n): print('{SAYS_PASSED}')",
    "exits": "import sys\nsys.exit(0)",
    "exits hard": f"import os\nos.write(1, b'{SAYS_PASSED}')\nos._exit(0)",
    "exits when called": "import os\ndef count(n): os._exit(0)",
    "exits by exception": "def count(n): raise SystemExit(0)",
    "dies": "import os\ndef count(n): os.kill(-1, 9); os.kill(os.getpid(), 9)",
    "at exit": f"import atexit\natexit.register(lambda: print('{SAYS_PASSED}'))\ndef count(n): raise SystemExit(0)",
    "always equal": "class E:\n  __eq__ = lambda a, b: True\n  __ne__ = lambda a, b: False\ndef count(n): return E()",
    "equal list": "class L(list):\n  __eq__ = lambda a, b: True\n  __len__ = lambda a: 3\ndef count(n): return L()",
    "true object": "class T:\n  __bool__ = lambda a: True\n  __eq__ = lambda a, b: a\ndef count(n): return T()",
    "patches builtins": """
import builtins
builtins.AssertionError = type('A', (Exception,), {})
builtins.all = builtins.any = builtins.isinstance = lambda *a: True
builtins.compile = builtins.exec = lambda *a: None
def count(n): return True""",
    "writes everywhere": f"""
import os
for fd in range(3, 128):
    try: os.write(fd, b'{SAYS_PASSED}')
    except OSError: pass
def count(n): return None""",
    "speaks the protocol": """
import gc, json, socket, struct
def send(wire, message):
    content = json.dumps(message).encode()
    wire.sendall(struct.pack('!I', len(content)) + content)
wires = [s for s in gc.get_objects() if isinstance(s, socket.socket)]
for wire in wires:
    for message in [{'value': None}] + [{'value': {'dict': [['count', {'object': 0}]]}}] + [{'value': True}] * 9:
        send(wire, message)""",
    "breaks the protocol": """
import gc, os, socket
for wire in [s for s in gc.get_objects() if isinstance(s, socket.socket)]:
    wire.sendall(b'\\xff' * 100)
os._exit(0)""",
    "patches its server": """
import __main__
__main__.to_wire = lambda *a: True
__main__.Server.act = lambda *a: True
def count(n): return True""",
    "patches the tests": """
import sys, types, unittest
unittest.TestCase.assertEqual = lambda *a: None
sys.modules['tests'] = types.ModuleType('tests')
def check(candidate): pass
def count(n): return check""",
    "walks the frames": """
import sys
frame = sys._getframe()
while frame:
    frame.f_locals.clear() if frame.f_locals is not globals() else None
    frame = frame.f_back
def count(n): return None""",
    "ends the loop": "def count(n): raise StopIteration",
    "traces": "import sys, threading\nsys.settrace(lambda *a: None)\nthreading.setprofile(lambda *a: None)\ndef count(n): return None",
    "endless": "import itertools\ndef count(n): return itertools.count()",
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.usefixtures("walls")
def test_a_forgery_does_not_pass(name: str):
    passed, num_passed, num_tests, _ = judge(FORGERIES[name], CHECK + "check(count)\nassert list(map(count, [1])) == [[0]]\n")
    assert (passed, num_passed, num_tests) == (False, 0, 2)


@pytest.mark.parametrize("name", ["prints", "exits", "exits hard", "at exit", "writes everywhere", "patches builtins"])
@pytest.mark.usefixtures("walls")
def test_a_forgery_does_not_pass_as_a_program(name: str):
    assert judge(FORGERIES[name], [InputOutput("3", "0 1 2")])[:2] == (False, 0)


@pytest.mark.parametrize(
    "tests",
    [
        "assert all(map(count, [3]))",
        "assert math.fabs(abs(count(3)) - 5) < 1e-6",
        "assert count(3)",
        "assert not count(3)",
        "assert 3 in count(3)",
        "assert count(3) == count(4)",
        "assert isinstance(count(3), list)",
    ],
)
@pytest.mark.parametrize(
    "source",
    [
        """
class Anything:
    def __getattr__(self, name): return self
    __call__ = __eq__ = __ne__ = __bool__ = __contains__ = __sub__ = __abs__ = __lt__ = lambda *a: True
    __iter__ = lambda a: iter(())
    __len__ = lambda a: 3
    __hash__ = lambda a: 1
    __class__ = list
class math:
    fabs = lambda x: 0
def abs(x): return 0
def isinstance(*a): return True
def count(n): return Anything()
""",
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("walls")
def test_loose_tests_do_not_fall_for_an_object(tests: str, source: str):
    assert judge(source, tests)[0] is False


@pytest.mark.usefixtures("walls")
def test_tests_that_catch_everything_do_not_catch_the_end_of_the_solution():
    tests = "try:\n    count(3)\n    assert False\nexcept:\n    pass"
    assert judge("import os\ndef count(n): os._exit(0)", tests) == (False, 0, 1, "crashed")


SEARCH = """
import gc, glob, os, re, sys
def search():
    found, pattern = set(), re.compile(rb'answer-[0-9a-f]{16}')
    texts = [text for text in gc.get_objects() if isinstance(text, (str, bytes))]
    texts += [str(frame.f_locals) for frame in sys._current_frames().values()] + sys.argv + list(os.environ.values())
    for path in glob.glob('/box/*') + glob.glob('/tmp/*') + glob.glob('/proc/*/*') + glob.glob('/proc/*/fd/*'):
        try:
            if os.path.isfile(path) and 'pagemap' not in path and 'kmsg' not in path and 'kcore' not in path:
                with open(path, 'rb') as file: texts.append(file.read(10**6))
        except OSError: pass
    for line in open('/proc/self/maps'):
        begin, end = (int(part, 16) for part in line.split()[0].split('-'))
        try:
            with open('/proc/self/mem', 'rb') as memory:
                memory.seek(begin)
                texts.append(memory.read(min(end - begin, 10**7)))
        except (OSError, ValueError, OverflowError): pass
    for text in texts:
        found |= set(pattern.findall(text if isinstance(text, bytes) else text.encode('utf-8', 'replace')))
    return sorted(found)
"""


@pytest.mark.usefixtures("walls")
def test_expected_values_are_nowhere_in_reach():
    answer = f"answer-{secrets.token_hex(8)}"
    source = SEARCH + "def solve(x):\n  return (search() + [b''])[0].decode()"
    assert judge(source, f"assert solve('answer-' + 'f' * 16) == 'answer-' + 'f' * 16\nassert solve(1) == {answer!r}")[:3] == (
        False,
        1,
        2,
    )
    assert judge(SEARCH + "print((search() + [b''])[0].decode())", [InputOutput("x", answer)])[:2] == (False, 0)


@pytest.mark.usefixtures("walls")
def test_several_at_once_each_get_their_own_verdict():
    sources = [f"def count(n): return list(range(n + {wrong}))" for wrong in (0, 1, 0, 1)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda source: judge(source, CHECK + "check(count)"), sources))
    assert [verdict[0] for verdict in verdicts] == [True, False, True, False]


# The wire between solution and tests, without a sandbox

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.frozensets(st.integers() | st.tuples(st.text()))
        | st.sets(st.integers())
    ),
    max_leaves=12,
)


def refuse(value: Any) -> Any:
    raise TypeError(f"{value!r} is not plain")


def build(value: Any) -> str:
    """The value with all its types."""
    if isinstance(value, dict):
        return f"{type(value)}{[(build(key), build(item)) for key, item in value.items()]}"
    if isinstance(value, list | tuple):
        return f"{type(value)}{list(map(build, value))}"
    return f"{type(value)}{sorted(map(build, value))}" if isinstance(value, set | frozenset) else f"{type(value)}{value!r}"


@given(plain)
@settings(max_examples=60, deadline=None)
def test_plain_values_cross_exactly(value: Any):
    import json

    assert build(remote.from_wire(json.loads(json.dumps(remote.to_wire(value, refuse))), refuse)) == build(value)


def test_subclasses_cross_as_what_they_extend():
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    crossed = remote.from_wire(remote.to_wire([Liar(3), Liar(2**60)], refuse), refuse)
    assert [type(value) for value in crossed] == [int, int]
    assert crossed != [4, 2**60]


@pytest.mark.parametrize(
    "reply",
    [
        b"", b"\xff\xff\xff\xff", b"\0\0\0\1{", b"\0\0\0\2[]", b"\0\0\0\2{}", b"\0\0\0\x09[[[[[[[[[", b'\0\0\0\x0b{"raise":1}',
        b'\0\0\0\x0d{"value": {}}', b'\0\0\0\x13{"value":{"x":true}}', b'\0\0\0\x17{"value":{"set":[[1]]}}',
        b'\0\0\0\x19{"value":{"object":"1"}}ab', b'\0\0\0\x0e{"function": 3}',
    ],
)  # fmt: skip
def test_a_broken_reply_ends_the_tests(reply: bytes):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = remote.Client(remote.Wire(ours))
        theirs.sendall(reply)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(remote.SolutionGone):
            client.ask({"do": "length", "object": 0})
        assert client.wire.broken


def test_deep_and_large_replies_end_the_tests():
    for content in (b"[" * 100_000, b'{"value":' + b"9" * 5000 + b"}", b'{"value":' + b"[" * 900 + b"]" * 900 + b"}"):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            message = len(content).to_bytes(4, "big") + content
            sender = threading.Thread(target=theirs.sendall, args=(message,))
            sender.start()
            with pytest.raises(remote.SolutionGone):
                remote.Client(remote.Wire(ours)).ask({"do": "length", "object": 0})
            sender.join()


# Bad input


@pytest.mark.parametrize(
    ("tests", "language", "words"),
    [
        ([], "python", "tests: there are none"),
        ([{"input": "1"}], "python", r"tests: item 0 is \{'input': '1'\}; it must have"),
        ("assert (", "python", "tests: they are no Python"),
        ("x = 1", "python", "nothing in them is a test; write assert statements"),
        (CHECK, "python", r"nothing in them is a test; call check, as in check\(name\)"),
        (CHECK, "cpp", "tests of a cpp program must be pairs"),
        (CHECK, "ruby", "language is 'ruby'; it must be one of python, c, cpp"),
    ],
)
def test_tests_that_are_none_are_named(monkeypatch: pytest.MonkeyPatch, tests: Any, language: Any, words: str):
    monkeypatch.setattr(code, "require", lambda isolation: None)
    with pytest.raises(InputError, match=words):
        run_code.__wrapped__("", tests, language) if hasattr(run_code, "__wrapped__") else run_code("", tests, language)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code, "require", lambda isolation: None)
    monkeypatch.setattr(code, "PATH", "/nowhere")
    with pytest.raises(InputError, match=r"no compiler for cpp is on this machine \(g\+\+, c\+\+, clang\+\+\); install one"):
        run_code("int main() {}", [InputOutput("", "")], "cpp")


def test_without_a_sandbox_a_reward_refuses_whatever_the_example_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "bubblewrap_obstacle", lambda: "bubblewrap is not installed")
    example = {"tests": "assert f() == 1", "isolation": "degraded"}
    with pytest.raises(InputError, match=r"bubblewrap is not installed.*unit_tests_unsandboxed"):
        unit_tests("", "```\ndef f(): return 1\n```", example)
    with pytest.warns(RuntimeWarning, match="without a sandbox"):
        assert unit_tests_unsandboxed("", "```\ndef f(): return 1\n```", example) == 1.0


@pytest.mark.parametrize("spec", ["finback.rewards.code", "finback.rewards.code_unsandboxed"])
def test_workers_refuse_before_the_first_completion_where_programs_cannot_run(monkeypatch: pytest.MonkeyPatch, spec: str):
    monkeypatch.setattr(sandbox, "obstacle", lambda isolation: "there is no prlimit")
    with pytest.raises(InputError, match="there is no prlimit"):
        import_module(spec).prepare()


# Rewards


ANSWER = "```python\ndef wrong(n): return n\n```\nor better\n```py\ndef count(n):\n    return list(range(n))\n```\nas asked.\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "language", "extracted"),
    [
        ("", ANSWER, "python", RIGHT),
        ("<think>\n", f"```\nthought\n```\n</think>\n{ANSWER}", "python", RIGHT),
        ("", f"<think>{ANSWER}", "python", None),
        ("", f"<think>{ANSWER}</think>I do not know", "python", None),
        ("", "~~~\nx\n~~~", "python", "x\n"),
        ("", "```c++\nint x;\n```\n```text\n8\n```", "cpp", "int x;\n"),
        ("", "````python\n'''\n```\n'''\n````", "python", "'''\n```\n'''\n"),
        ("", "```python\nnot closed", "python", None),
        ("", "```bash\nls\n```", "python", None),
        ("", "def count(n): pass", "python", None),
    ],
)
def test_the_last_block_of_the_answer_is_the_solution(prompt: str, completion: str, language: Any, extracted: str | None):
    assert extract_code(prompt, completion, language) == extracted


@pytest.mark.usefixtures("walls")
def test_rewards_of_an_answer():
    example = {"tests": CHECK, "entry_point": "count"}
    assert unit_tests("", ANSWER, example) == 1.0
    assert unit_tests("", "I do not know", example) == 0.0
    half = {"tests": ["assert count(1) == [0]", "assert count(2) == []"]}
    assert (unit_tests("", ANSWER, half), unit_tests_fraction("", ANSWER, half)) == (0.0, 0.5)
    pairs = {"tests": [{"input": "", "output": "[0]"}]}
    assert unit_tests("", ANSWER + "```\nprint([0])\n```", pairs) == 1.0


@pytest.mark.usefixtures("walls")
def test_a_solution_that_is_ended_at_a_limit_scores_0_and_is_counted():
    ended = {
        "```python\ndef count(n):\n    while True: pass\n```": "timed out",
        "```python\ndef count(n): return bytearray(10**10)\n```": "out of memory",
        "```python\ndef count(n):\n    while True: print('x' * 4096)\n```": "too much output",
    }
    with RewardPool([load_reward("finback.rewards.code:unit_tests")], processes=2, deadline=60.0) as pool:
        for answer in (*ended, "```python\ndef count(n): return n\n```"):
            pool.submit(answer, "", answer, {"tests": CHECK, "entry_point": "count"})
        scores = {}
        while pool.outstanding:
            scores |= dict(pool.collect(wait=True))
        assert {score.total for score in scores.values()} == {0.0}
        told = {answer: score.failures.get("unit_tests", "") for answer, score in scores.items()}
        for answer, verdict in ended.items():
            assert told[answer].startswith(f"raised ProgramEnded: {verdict}")
        assert sum(map(bool, told.values())) == 3
        assert pool.failures == {"unit_tests": {"raised": 3}}
    half = {"tests": ["assert count(1) == [0]", "assert count(2) == []"]}
    slow = "```python\ndef count(n):\n    while n > 1: pass\n    return [0]\n```"
    assert unit_tests_fraction("", slow, half) == 0.5


@pytest.mark.usefixtures("walls")
def test_the_reward_runs_in_reward_workers():
    answers = [ANSWER, "```python\nimport os\nos._exit(0)\n```", "```python\ndef count(n): return n\n```", ANSWER]
    with RewardPool([load_reward("finback.rewards.code:unit_tests")], processes=2, deadline=60.0) as pool:
        for number, answer in enumerate(answers):
            pool.submit(number, "", answer, {"tests": CHECK, "entry_point": "count"})
        scores = []
        while pool.outstanding:
            scores += pool.collect(wait=True)
        assert {number: score.total for number, score in scores} == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0}


@pytest.mark.parametrize(
    "example",
    [
        {},
        {"tests": ""},
        {"tests": []},
        {"tests": 3},
        {"tests": CHECK, "entry_point": "f()"},
        {"tests": CHECK, "language": "ruby"},
    ],
)
def test_rows_that_cannot_be_judged_are_named(example: dict[str, Any]):
    with pytest.raises(InputError, match=r"example: (tests|entry_point|language) is"):
        unit_tests("", ANSWER, example)


def test_the_public_name():
    assert finback.rewards.run_code is run_code


@pytest.mark.usefixtures("walls")
def test_the_examples_of_the_how_to_run():
    page = (Path(__file__).parents[2] / "docs/howto/code-rewards.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    namespace = {"__name__": "example"}
    for example in examples:
        exec(compile(example, "code-rewards.md", "exec"), namespace)


# pass@k


@pytest.mark.parametrize(("n", "c", "k"), [(n, c, k) for n in range(1, 7) for c in range(n + 1) for k in range(1, n + 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n: int, c: int, k: int):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == float(Fraction(sum(any(draw) for draw in draws), len(draws)))


def test_pass_at_k_of_many_samples_stays_exact():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-15)
    assert pass_at_k(2000, 1, 1) == 1 / 2000
    assert 0 < 1 - pass_at_k(1000, 30, 500) < 1e-8
    assert math.isclose(pass_at_k(200, 7, 10), 1 - math.prod(1 - 10 / i for i in range(194, 201)), rel_tol=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6), (0, 0, 1)])
def test_pass_at_k_of_nonsense_is_an_error(n: int, c: int, k: int):
    with pytest.raises(InputError, match=r"pass@"):
        pass_at_k(n, c, k)

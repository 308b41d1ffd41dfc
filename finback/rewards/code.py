"""Code as a verifiable answer: solutions run against tests in a sandbox, and the rewards made of that.

The tests come in two forms. Pairs of standard input and expected output test whole programs, in Python, C or C++; each pair runs in a
sandbox of its own and the outputs are compared out here, so the expected ones are never in the solution's reach. Python source
with `assert` statements tests functions: it runs in a process and a sandbox of its own, to which calls of the solution travel (see
`finback.rewards.remote`), so that nothing the solution does to its own interpreter decides anything, and what it prints or how it exits
is no evidence. One statement at the top level that asserts, or calls a function that does, is one test.

What remains possible, as with any test: an answer that fits the tests and nothing else, and one that goes by the arguments it is given.
Tests should call only what the task asks for: other functions that they take from the solution are the solution's to write. Built-in
functions and modules of the standard library are always the tests' own.
"""

import ast
import json
import math
import re
import shutil
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from finback.config import InputError
from finback.rewards import remote
from finback.rewards.bubblewrap import PATH
from finback.rewards.sandbox import Ending, Program, require, run_programs
from finback.rewards.sandbox_config import CodeResult, InputOutput, Isolation, Language, Limits, Verdict

Tests = str | Sequence[InputOutput | Mapping[str, Any]]

DETAIL_CHARACTERS = 1000
ENDED: tuple[Verdict, ...] = ("timed out", "out of memory", "too much output")
CPU_LIMIT_CODES = (128 + 24, 128 + 9)  # SIGXCPU, and SIGKILL a second later
COMPILERS = {"c": ("gcc", "cc", "clang"), "cpp": ("g++", "c++", "clang++")}
COMPILER_OPTIONS = {"c": ("-x", "c", "-std=gnu17"), "cpp": ("-x", "c++", "-std=gnu++17")}
FENCE = re.compile(
    r"^(?P<fence>```+|~~~+)[ \t]*(?P<name>[\w+#.-]*)[^\n]*\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.MULTILINE | re.DOTALL
)
FENCE_NAMES = {"python": ("python", "py", "python3"), "c": ("c",), "cpp": ("cpp", "c++", "cc", "cxx")}
DEFAULT_LIMITS = Limits()
REWARD_LIMITS = Limits(wall_seconds=8.0, cpu_seconds=6)  # below the deadline of reward workers, so that a verdict comes first


def run_code(
    source: str,
    tests: Tests,
    language: Language = "python",
    limits: Limits = DEFAULT_LIMITS,
    *,
    isolation: Isolation = "bubblewrap",
) -> CodeResult:
    """Run the solution `source` against `tests`, and say what they say.

    A solution that is wrong, hostile or no program at all is a result, never an error. InputError where the fault is elsewhere: tests
    without a test in them, no compiler, or a machine where `isolation` cannot be had. `isolation="degraded"` leaves out bubblewrap:
    the limits hold, but the solution reaches the network and the files that its user may read. If this process is root, that user is
    one of its own; else it is this one, and a hostile solution can leave processes behind and reach into that of the tests.
    """
    begin = time.monotonic()
    if language not in get_args(Language):
        raise InputError(f"language is {language!r}; it must be one of {', '.join(get_args(Language))}")
    if isolation not in get_args(Isolation):
        raise InputError(f"isolation is {isolation!r}; it must be one of {', '.join(get_args(Isolation))}")
    require(isolation)
    if isolation == "degraded":
        warnings.warn(
            "programs run without a sandbox: they reach the network and this machine's files; install bubblewrap",
            RuntimeWarning,
            stacklevel=2,
        )
    deadline = begin + limits.wall_seconds
    content = source.encode("utf-8", "replace")
    if isinstance(tests, str):
        if language != "python":
            raise InputError(f"tests of a {language} program must be pairs of input and output, and these are Python source")
        outcomes = _run_assertions(content, tests, limits, deadline, isolation)
    else:
        outcomes = _run_pairs(content, _checked_pairs(tests), language, limits, deadline, isolation)
    verdict, detail = next((outcome for outcome in outcomes if outcome[0] != "passed"), ("passed", ""))
    return CodeResult(
        passed=verdict == "passed",
        num_passed=sum(outcome[0] == "passed" for outcome in outcomes),
        num_tests=len(outcomes),
        verdict=verdict,
        detail=detail[:DETAIL_CHARACTERS],
        seconds=time.monotonic() - begin,
        isolation=isolation,
    )


Outcome = tuple[Verdict, str]


def _checked_pairs(tests: Sequence[Any]) -> list[InputOutput]:
    """The pairs; rows of JSON data (`input` and `output`) are taken, too."""
    pairs = []
    for index, test in enumerate(tests):
        row = vars(test) if isinstance(test, InputOutput) else test
        if not isinstance(row, Mapping) or not all(isinstance(row.get(name), str) for name in ("input", "output")):
            raise InputError(f"tests: item {index} is {test!r:.80}; it must have the texts `input` and `output`")
        pairs.append(InputOutput(row["input"], row["output"]))
    if not pairs:
        raise InputError("tests: there are none; a solution without tests has no reward")
    return pairs


def _run_pairs(
    source: bytes, pairs: list[InputOutput], language: Language, limits: Limits, deadline: float, isolation: Isolation
) -> list[Outcome]:
    files = {"solution.py": source}
    if language != "python":
        compiled = _compile(source, language, limits, deadline, isolation)
        if isinstance(compiled, tuple):
            return [compiled] * len(pairs)
        files = {"solution": compiled}
    outcomes: list[Outcome] = []
    for index, pair in enumerate(pairs):
        program = Program(_python_command if language == "python" else _binary_command, files, stdin=pair.input.encode("utf-8"))
        if time.monotonic() > deadline:
            outcomes.append(("timed out", "the time was over before this test"))
            continue
        (ending,) = run_programs([program], limits, deadline=deadline, isolation=isolation)
        verdict, detail = _judge(ending, pair)
        outcomes.append((verdict, detail and f"test {index + 1} of {len(pairs)}: {detail}"))
    return outcomes


def _python_command(box: str, python: str) -> list[str]:
    return [python, "-I", "-X", "utf8", f"{box}/solution.py"]


def _binary_command(box: str, _python: str) -> list[str]:
    return [f"{box}/solution"]


def find_compiler(language: str) -> str | None:
    found = (shutil.which(name, path=PATH) for name in COMPILERS[language])
    return next((path for path in found if path), None)


def _compile(source: bytes, language: Language, limits: Limits, deadline: float, isolation: Isolation) -> bytes | Outcome:
    """The compiled program, made inside the sandbox and read from its output, or the outcome of its failure."""
    compiler = find_compiler(language)
    if compiler is None:
        raise InputError(f"no compiler for {language} is on this machine ({', '.join(COMPILERS[language])}); install one")
    options = " ".join(COMPILER_OPTIONS[language])

    def command(box: str, _python: str) -> list[str]:
        return ["sh", "-c", f'"$0" {options} -O2 -o solution "$1" -lm 1>&2 && exec cat solution', compiler, f"{box}/solution.txt"]

    program = Program(command, {"solution.txt": source}, output_bytes=limits.output_bytes + limits.file_bytes)
    (ending,) = run_programs([program], limits, deadline=deadline, isolation=isolation)
    outcome = _limit_outcome(ending)
    if outcome is None and ending.code != 0:
        outcome = ("compile error", _tail(ending.stderr))
    return outcome or ending.stdout


def _judge(ending: Ending, pair: InputOutput) -> Outcome:
    outcome = _limit_outcome(ending)
    if outcome is not None:
        return outcome
    if ending.code != 0:
        words = _tail(ending.stderr)
        error = words.rpartition("\n")[2].partition(":")[0]
        syntax = error in ("SyntaxError", "IndentationError", "TabError")
        verdict: Verdict = "out of memory" if error == "MemoryError" else "compile error" if syntax else "crashed"
        return verdict, f"exit code {ending.code}: {words}"
    printed = ending.stdout.decode("utf-8", "replace")
    if _lines(printed) == _lines(pair.output):
        return "passed", ""
    return "failed", f"printed {printed[:200]!r} for input {pair.input[:200]!r}, expected {pair.output[:200]!r}"


def _lines(text: str) -> list[str]:
    """The lines without white space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _limit_outcome(ending: Ending) -> Outcome | None:
    if ending.cause != "exited" and ending.cause != "no longer needed":
        return ending.cause, f"ended by the sandbox; its last words: {_tail(ending.stderr)}"
    if ending.cause == "exited" and ending.code in CPU_LIMIT_CODES:
        return "timed out", "ended by the kernel for its CPU time"
    return None


def _tail(text: bytes) -> str:
    return text[-4 * DETAIL_CHARACTERS :].decode("utf-8", "replace").strip()[-DETAIL_CHARACTERS // 2 :]


def _run_assertions(source: bytes, tests: str, limits: Limits, deadline: float, isolation: Isolation) -> list[Outcome]:
    num_tests = _count_tests(tests)
    script = Path(remote.__file__).read_bytes()
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def command(role: str, channel: socket.socket, file: str) -> Any:
            return lambda box, python: [
                *(python, "-I", "-X", "utf8", f"{box}/remote.py", role, str(channel.fileno()), f"{box}/{file}")
            ]

        programs = [
            Program(command("check", ours, "tests.py"), {"remote.py": script, "tests.py": tests.encode()}, channel=ours),
            Program(command("serve", theirs, "solution.py"), {"remote.py": script, "solution.py": source}, channel=theirs),
        ]
        checking, serving = run_programs(programs, limits, deadline=deadline, isolation=isolation)
    lines = checking.stdout.split(b"\n")[:-1][:num_tests]
    outcomes: list[Outcome] = [(line["verdict"], line["detail"]) for line in map(json.loads, lines)]
    limit = _limit_outcome(serving) or _limit_outcome(checking)
    if len(outcomes) < num_tests:
        rest: Outcome = limit or ("crashed", f"the tests ended early: {_tail(checking.stderr)}")
        outcomes += [rest] * (num_tests - len(outcomes))
    if limit:
        outcomes = [limit if verdict == "crashed" else (verdict, detail) for verdict, detail in outcomes]
    return outcomes


def _count_tests(tests: str) -> int:
    try:
        tree = ast.parse(tests, "tests")
    except (SyntaxError, ValueError) as error:
        raise InputError(f"tests: they are no Python ({error}); correct them") from error
    checks = remote.asserting_functions(tree)
    count = sum(remote.is_test(statement, checks) for statement in tree.body)
    if count == 0:
        remedy = f"call {min(checks)}, as in {min(checks)}(name)" if checks else "write assert statements"
        raise InputError(f"tests: nothing in them is a test; {remedy}")
    return count


def extract_code(prompt: str, completion: str, language: Language = "python") -> str | None:
    """The last fenced code block of the answer, behind the thought, that is in `language` or names none; None without one."""
    from finback.data.reasoning import opens_thought, parse_answer  # needs tokenizers, which `finback doctor` must do without

    answer = parse_answer(completion.lstrip(), starts_in_thought=opens_thought(prompt), tools=False)
    found = [match for match in FENCE.finditer(answer.content) if match["name"].lower() in ("", *FENCE_NAMES[language])]
    return found[-1]["code"] if found else None


class ProgramEnded(Exception):
    """A solution that the sandbox ended at a limit. Its reward is 0, as for a wrong one, but a run counts it among the failures."""


def unit_tests(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """A reward: 1.0 if the code of the answer passes all of `example["tests"]`, else 0.0.

    The tests are a text of Python assertions or a list of them, or a list of rows with `input` and `output`; `example["language"]` is
    python, c or cpp, python if there is none. With `example["entry_point"]`, as HumanEval has it, `check(entry_point)` is called.
    Raises ProgramEnded, which a reward's caller counts and takes for 0, for a solution that was ended at a limit.
    """
    return all_passed(tested(prompt, completion, example, "bubblewrap"))


def unit_tests_fraction(prompt: str, completion: str, example: Mapping[str, Any]) -> float:
    """A reward: the share of `example["tests"]` that the code of the answer passes; see `unit_tests`. A solution that passes some
    before it is ended has their share."""
    result = tested(prompt, completion, example, "bubblewrap")
    return result.num_passed / result.num_tests if result is not None and result.num_passed else all_passed(result)


def prepare() -> None:
    """Refuse before the first completion where programs cannot be run behind walls: InputError, with the remedy."""
    require("bubblewrap")


def all_passed(result: CodeResult | None) -> float:
    """1.0 if all tests passed, else 0.0; None stands for an answer without code. Raises ProgramEnded as `unit_tests` does."""
    if result is not None and result.verdict in ENDED:
        raise ProgramEnded(f"{result.verdict}: {result.detail}")
    return float(result is not None and result.passed)


def tested(prompt: str, completion: str, example: Mapping[str, Any], isolation: Isolation) -> CodeResult | None:
    """What the example's tests say of the code of the answer in this isolation; None without code."""
    language = example.get("language", "python")
    if language not in get_args(Language):
        raise InputError(f"example: language is {language!r}; it must be one of {', '.join(get_args(Language))}")
    tests = example_tests(example)
    source = extract_code(prompt, completion, language)
    return None if source is None else run_code(source, tests, language, REWARD_LIMITS, isolation=isolation)


def example_tests(example: Mapping[str, Any]) -> Tests:
    """The tests of a data row, in a form that `run_code` takes; InputError where they are none."""
    tests, entry_point = example.get("tests"), example.get("entry_point")
    if isinstance(tests, list) and tests and all(isinstance(test, str) for test in tests):
        tests = "\n".join(tests)
    if isinstance(tests, str) and entry_point is not None:
        if not str(entry_point).isidentifier():
            raise InputError(f"example: entry_point is {entry_point!r}; it must be the name of a function")
        tests = f"{tests}\ncheck({entry_point})\n"
    if not isinstance(tests, str | list) or not tests:
        raise InputError(f"example: tests is {tests!r:.80}; it must be assertions, or a list of rows with `input` and `output`")
    return tests


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from n of which c are: 1 - C(n-c, k) / C(n, k).

    Computed in whole numbers and rounded once (Chen et al. 2021, equation 1). InputError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise InputError(f"pass@{k} of {num_correct} right among {num_samples} samples is undefined; it needs 1 <= k <= samples")
    ways = math.comb(num_samples, k)
    return (ways - math.comb(num_samples - num_correct, k)) / ways

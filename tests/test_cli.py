"""The program around the verbs: what it prints, and how each kind of failure leaves."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import finback
from finback import cli
from finback.config import InputError

ROOT = Path(__file__).parents[1]


def run(*words: str, **keywords: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "finback", *words], cwd=ROOT, text=True, check=False, **keywords)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int | None]], None]:
    """Make a function the program's only verb, by the name "try"."""

    def install(function: Callable[[list[str]], int | None]) -> None:
        module = type(sys)("finback_verb_under_test")
        module.main = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "VERBS", {"try": ("", f"{module.__name__}:main")})

    return install


def raising(error: BaseException) -> Callable[[list[str]], int | None]:
    def main(argv: list[str]) -> int | None:
        raise error

    return main


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: finback VERB")
    assert all(f"  {verb} " in printed and line in printed for verb, (line, _) in cli.VERBS.items())


def test_every_verb_has_its_module_and_every_module_its_verb():
    helpers = {"__init__", "conversation", "machine", "paired", "parse", "plan_fields", "terminal", "torch_probe"}
    files = {path.stem for path in (ROOT / "finback" / "commands").glob("*.py")} - helpers
    assert {place.removeprefix("finback.commands.").removesuffix(":main") for _, place in cli.VERBS.values()} == files
    assert all((ROOT / "finback" / "commands" / f"{helper}.py").is_file() for helper in helpers)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"finback {finback.__version__}\n"


def test_python_m_is_the_same_program():
    done = run("--version", capture_output=True)
    assert (done.returncode, done.stdout) == (0, f"finback {finback.__version__}\n")
    done = run("doctor", "--help", capture_output=True)
    assert done.stdout.startswith("usage: finback doctor")


@pytest.mark.parametrize(("word", "nearest"), [("pretran", "pretrain"), ("docter", "doctor"), ("Fetch", "fetch"), ("zzz", "")])
def test_an_unknown_verb_names_the_nearest(word: str, nearest: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([word]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"finback: unknown verb '{word}'; the nearest is '{nearest}")
    assert printed.err.count("\n") == 1


def test_an_option_before_the_verb_is_told(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--json", "doctor"]) == 2
    assert capsys.readouterr().err == "finback: unknown option --json; a verb comes first, see finback --help\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InputError("steps is -1;\n  give 1 or more"), "steps is -1; give 1 or more"),
        (FileNotFoundError(errno.ENOENT, "No such file", "runs/none"), "no such file or directory: runs/none"),
        (PermissionError(errno.EACCES, "Permission denied", b"/root/x"), "no permission to use this path: /root/x"),
        (OSError(errno.EROFS, "Read-only file system", "/usr/x"), "no permission to use this path: /usr/x"),
        (OSError(errno.EIO, "Input/output error", Path("x")), "Input/output error: x"),
        (OSError("the server said no"), "the server said no"),
        (TimeoutError(), "TimeoutError"),
        (ModuleNotFoundError("No module named 'pyarrow.lib'", name="pyarrow.lib"),
         "this needs the Python package pyarrow, which is not installed; finback doctor tells what is missing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_and_exit_2(error: Exception, sentence: str, verb, capsys: pytest.CaptureFixture[str]):
    verb(raising(error))
    assert cli.main(["try"]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"finback try: {sentence}\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), ModuleNotFoundError("x", name="finback.typo")])
def test_bugs_keep_their_traceback(error: Exception, verb):
    verb(raising(error))
    with pytest.raises(type(error)):
        cli.main(["try"])


def test_the_verb_gets_its_words_and_gives_its_code(verb):
    verb(len)
    assert cli.main(["try", "a", "b", "c"]) == 3
    verb(lambda argv: None)
    assert cli.main(["try"]) == 0


def test_an_interrupt_leaves_with_130(verb, capsys: pytest.CaptureFixture[str]):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "\nfinback try: interrupted\n"


def test_ctrl_c_in_a_real_process():
    program = """
import sys, time, types
from finback import cli
def main(argv):
    print("ready", flush=True)
    time.sleep(600)
sys.modules["waiting"] = module = types.ModuleType("waiting")
module.main = main
cli.VERBS["wait"] = ("", "waiting:main")
sys.exit(cli.main(["wait"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate()
    assert process.returncode == 130
    assert complaint == "\nfinback wait: interrupted\n"


def test_a_closed_pipe_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = run("--help", stdout=pipe, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = run("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == "finback: no space left on the disk; free some, or write elsewhere\n"


def test_a_terminal_of_few_characters_still_gets_its_text(verb):
    program = "from finback import cli; import sys; cli._help_text = lambda: 'whale \\u9cb8'; sys.exit(cli.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "whale ?\n"), done.stderr


def test_public_names_are_lazy_and_listed():
    assert set(finback.__all__) <= set(dir(finback))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(finback, "noth" + "ing")

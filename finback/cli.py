"""The `finback` program: one line per verb, and what each kind of failure looks like to the person at the terminal.

A verb's module parses its own words and imports torch only when it runs, so every `--help` answers at once. Mistakes of
the user (`InputError`) and of the system (`OSError`, a missing package) become one sentence and exit code 2; anything
else is a bug and keeps its traceback.
"""

import difflib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

import finback
from finback.config import InputError

VERBS = {
    "doctor": ("hardware, versions, what will run here and what will not", "finback.commands.doctor:main"),
    "quickstart": ("the whole small run, then how to use what it made", "finback.commands.quickstart:main"),
    "fetch": ("list and get corpora, tokenizers and small models", "finback.commands.fetch:main"),
    "pretrain": ("train a model from a preset, or resume a run", "finback.commands.pretrain:main"),
    "grpo": ("train a model on prompts and rewards by GRPO, or resume a run", "finback.commands.grpo:main"),
    "ppo": ("PPO with a critic on prompts and rewards, to compare GRPO with", "finback.commands.ppo:main"),
    "r1-zero": ("GRPO on a base model by rules alone, as R1-Zero", "finback.commands.r1_zero:main"),
    "r1": ("the whole R1 recipe on a base model and a task of your own", "finback.commands.r1:main"),
    "distill": ("teach a student by a teacher's verified answers", "finback.commands.distill:main"),
    "logit-distill": ("teach a student a teacher's probabilities, token by token", "finback.commands.logit_distill:main"),
    "reject": ("sample a model and keep what passes every check, as data", "finback.commands.reject:main"),
    "judge": ("keep rows, or make preference pairs, by a judge", "finback.commands.judge:main"),
    "sft": ("fine-tune a model on conversations or completions", "finback.commands.sft:main"),
    "rewards": ("try rewards on good and bad completions before a run", "finback.commands.rewards:main"),
    "reward-model": ("train a reward model on pairs or labels", "finback.commands.reward_model:main"),
    "generate": ("continue a prompt with a trained model", "finback.commands.generate:main"),
    "chat": ("talk with a model in the terminal", "finback.commands.chat:main"),
    "serve": ("an API that DeepSeek's and OpenAI's clients use unchanged, and a chat page", "finback.commands.serve:main"),
    "keys": ("keys, balances and usage of a server", "finback.commands.keys:main"),
    "eval": ("measure a model on tasks: pass@1, cons@k, pass@k, with intervals", "finback.commands.eval:main"),
    "plan": ("what training, RL and serving of a model cost, before building it", "finback.commands.plan:main"),
    "convert": ("rewrite a checkpoint in another dtype, in FP8 or as a GGUF file", "finback.commands.convert:main"),
    "quantize": ("store weights in 3, 4 or 8 bits by GPTQ, and report what it cost", "finback.commands.quantize:main"),
}

USER_ERROR = 2
INTERRUPTED = 130  # what a shell shows for SIGINT
READER_GONE = 141  # what a shell shows for SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `finback VERB ...` and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write any character, the terminal may know few
    name = f"finback {words[0]}" if words and words[0] in VERBS else "finback"
    with _terminations_as_ctrl_c():
        return _told(name, words)


def _told(name: str, words: list[str]) -> int:
    try:
        code = _run(words)
        sys.stdout.flush()  # not left to interpreter exit, so that a full disk or a closed pipe is told like the rest
        return code
    except InputError as error:
        return _complain(name, str(error))
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return READER_GONE
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _silence_stdout()
        return _complain(name, _system_sentence(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "finback"):
            raise
        return _complain(
            name,
            f"this needs the Python package {package}, which is not installed; finback doctor tells what is missing",
        )


@contextmanager
def _terminations_as_ctrl_c() -> Iterator[None]:
    """SIGTERM and a closed terminal end a verb like Ctrl-C, so that what it was just writing is taken away again; one that is ignored,
    as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help_text())
        return 0
    if words[0] == "--version":
        print(f"finback {finback.__version__}")
        return 0
    if words[0] not in VERBS:
        raise InputError(_unknown_verb(words[0]))
    module, _, function = VERBS[words[0]][1].partition(":")
    code: int | None = getattr(import_module(module), function)(words[1:])
    return code or 0


def _help_text() -> str:
    width = max(map(len, VERBS))
    lines = [
        "usage: finback VERB ...",
        "",
        "DeepSeek-V3 and R1, whole, in one readable package.",
        "",
        *(f"  {verb:<{width}}  {help_line}" for verb, (help_line, _) in VERBS.items()),
        "",
        "finback VERB --help shows every field of a verb; finback --version the version.",
    ]
    return "\n".join(lines)


def _unknown_verb(word: str) -> str:
    if word.startswith("-"):
        return f"unknown option {word}; a verb comes first, see finback --help"
    nearest = max(VERBS, key=lambda verb: difflib.SequenceMatcher(a=word, b=verb).ratio())
    return f"unknown verb {word!r}; the nearest is {nearest!r}, see finback --help for all"


def _system_sentence(error: OSError) -> str:
    where = ""
    if error.filename is not None:
        where = f": {os.fsdecode(error.filename) if isinstance(error.filename, bytes | str) else error.filename}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space left on the disk{where}; free some, or write elsewhere"
        case errno.ENOENT:
            return f"no such file or directory{where}"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"no permission to use this path{where}"
        case None:
            return str(error) or type(error).__name__
        case _:
            return f"{error.strerror}{where}"


def _complain(name: str, sentence: str) -> int:
    print(f"{name}: {' '.join(sentence.split())}", file=sys.stderr)
    return USER_ERROR


def _silence_stdout() -> None:
    """Point stdout at nothing: what is left in its buffer cannot be written, and must not fail again at exit."""
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())

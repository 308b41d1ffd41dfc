"""`finback chat`: what enters the prompt, what is shown of an answer, what Ctrl-C does, and the same in a real terminal."""

import builtins
import codecs
import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finback import cli
from finback.commands.chat import COMMANDS, Chat
from finback.commands.conversation import Answer, Conversation
from finback.commands.terminal import CLEAR_LINE, DIM, PLAIN, Screen
from finback.config import InputError
from finback.data.reasoning import parse_answer
from finback.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from finback.engine.config import SamplingParams
from finback.model.checkpoint import load, save
from finback.model.generate import generate
from tests.checkpoint_samples import BASE, build
from tests.commands.scripted import SAMPLING, TEXT, ScriptedEngine, tokenizer

ROOT = Path(__file__).parents[2]
THOUGHT = "I greet back.\n</think>\n\nHello there!"


@pytest.fixture(scope="module")
def r1() -> Tokenizer:
    """A tokenizer with R1's template, whose prompt opens the thought."""
    return tokenizer("deepseek_r1")


@pytest.fixture(scope="module")
def v3() -> Tokenizer:
    return tokenizer("deepseek_v3")


def conversation(engine: ScriptedEngine, tokens: Tokenizer, params: SamplingParams = SAMPLING) -> Conversation:
    return Conversation(engine, tokens, params, clock=engine.clock)


def finished(steps: Iterator[tuple[str, str, Answer]]) -> Answer:
    *_, (_, _, answer) = steps
    return answer


# The conversation.


def test_earlier_thoughts_never_enter_a_prompt(r1: Tokenizer) -> None:
    engine = ScriptedEngine([THOUGHT])
    talk = conversation(engine, r1)
    talk.system = "Be kind."
    first = finished(talk.ask("hi"))
    finished(talk.ask("again"))
    assert (first.reasoning, first.content, first.finish_reason) == ("I greet back.", "Hello there!", "stop")
    assert r1.decode(engine.asked[0][0]) == "<｜begin▁of▁sentence｜>Be kind.<｜User｜>hi<｜Assistant｜><think>\n"
    assert r1.decode(engine.asked[1][0]) == (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>hi<｜Assistant｜>Hello there!<｜end▁of▁sentence｜>"
        "<｜User｜>again<｜Assistant｜><think>\n"
    )
    assert talk.record() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello there!", "reasoning_content": "I greet back."},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "Hello there!", "reasoning_content": "I greet back."},
    ]


def test_tokens_and_times_of_an_answer(r1: Tokenizer) -> None:
    engine = ScriptedEngine([THOUGHT])  # "I ", "greet ", "back.\n</think>\n\nHello ", "there!": half a second each
    answer = finished(conversation(engine, r1).ask("hi"))
    assert (answer.tokens, answer.thought_tokens, answer.thought_seconds) == (4, 3, 1.5)
    assert (answer.first_seconds, answer.seconds, answer.tokens_per_second) == (0.5, 2.0, 2.0)
    assert answer.prompt_tokens == len(engine.asked[0][0])
    assert finished(conversation(ScriptedEngine(["one"]), r1).ask("hi")).tokens_per_second is None


def test_an_answer_without_a_thought_is_content(v3: Tokenizer) -> None:
    answer = finished(conversation(ScriptedEngine(["a </think> b <｜tool▁call▁begin｜>"]), v3).ask("hi"))
    assert (answer.reasoning, answer.content) == ("", "a </think> b <｜tool▁call▁begin｜>")
    assert answer.thought_tokens == 0


def test_what_has_come_of_a_stopped_answer_stays(r1: Tokenizer) -> None:
    engine = ScriptedEngine([THOUGHT])
    talk = conversation(engine, r1)
    steps = talk.ask("hi")
    for _, content, _ in steps:
        if content:
            break
    steps.close()
    assert engine.closed == 1
    assert talk.messages[-1] == {"role": "assistant", "content": "Hello ", "reasoning_content": "I greet back."}
    finished(talk.ask("go on"))
    assert "<｜Assistant｜>Hello <｜end▁of▁sentence｜><｜User｜>go on" in r1.decode(engine.asked[1][0])


def test_held_back_text_of_a_stopped_answer_stays(v3: Tokenizer) -> None:
    talk = conversation(ScriptedEngine(["<thi nk> more"]), v3)
    steps = talk.ask("hi")
    next(steps)
    steps.close()
    assert talk.messages[-1]["content"] == "<thi "


def test_an_answer_is_made_again_with_another_seed(r1: Tokenizer) -> None:
    engine = ScriptedEngine(["a\n</think>\n\nb", "c"], finish_reason="length")
    talk = conversation(engine, r1, replace(SAMPLING, seed=5))
    with pytest.raises(InputError, match="ask something first"):
        next(talk.ask_again())
    finished(talk.ask("hi"))
    answer = finished(talk.ask_again())
    assert (answer.reasoning, answer.content, answer.in_thought, answer.finish_reason) == ("c", "", True, "length")
    assert [message["content"] for message in talk.messages] == ["hi", ""]
    assert engine.asked[0][0] == engine.asked[1][0]
    assert [params.seed for _, params in engine.asked] == [5, 6]


def test_the_oldest_turns_leave_a_full_context(v3: Tokenizer) -> None:
    engine = ScriptedEngine(["狐狸" * 10], max_model_len=200)
    talk = conversation(engine, v3)
    talk.system = "SYSTEM"
    for question in "abcdefgh":
        finished(talk.ask(question))
    assert talk.dropped > 0
    assert talk.dropped % 2 == 0
    assert len(talk.messages) == 16
    last = v3.decode(engine.asked[-1][0])
    assert last.startswith("<｜begin▁of▁sentence｜>SYSTEM<｜User｜>" + "abcdefgh"[talk.dropped // 2])
    lengths = [len(prompt) for prompt, _ in engine.asked]
    assert max(lengths) <= 150  # a quarter is kept for the answer
    assert lengths[-1] > 75


def test_a_message_longer_than_the_context_is_refused(v3: Tokenizer) -> None:
    talk = conversation(ScriptedEngine(["yes"], max_model_len=200), v3)
    finished(talk.ask("a"))
    with pytest.raises(InputError, match="an answer needs 50 more, the context is 200; shorten the message"):
        finished(talk.ask("b" * 300))
    assert [message["content"] for message in talk.messages] == ["a", "yes"]
    assert talk.dropped == 0


@pytest.mark.parametrize(("wanted", "given"), [(None, None), (20, 20), (1000, 191)])
def test_the_longest_answer_fits_the_context(wanted: int | None, given: int | None, v3: Tokenizer) -> None:
    engine = ScriptedEngine(["yes"], max_model_len=200)
    finished(conversation(engine, v3, SamplingParams(max_tokens=wanted)).ask("abcdef"))
    assert len(engine.asked[0][0]) == 9
    assert engine.asked[0][1].max_tokens == given


def test_a_question_that_the_engine_refuses_is_forgotten(v3: Tokenizer) -> None:
    def refuse(count: int) -> None:
        raise InputError("no")

    engine = ScriptedEngine(["yes"])
    talk = conversation(engine, v3)
    finished(talk.ask("a"))
    before = list(talk.messages)
    engine.on_part = refuse
    for steps in (talk.ask("b"), talk.ask_again()):
        with pytest.raises(InputError, match="no"):
            next(steps)
        assert talk.messages == before


# In a pipe.


@pytest.fixture
def pipe(r1: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Run a chat over the given lines; give what it wrote to stdout and stderr."""

    def run(*lines: str, engine: ScriptedEngine | None = None) -> tuple[str, str]:
        engine = engine or ScriptedEngine([THOUGHT])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        Chat(conversation(engine, r1), Screen(terminal=False, folded=True)).run()
        printed = capsys.readouterr()
        return printed.out, printed.err

    return run


def test_a_pipe_gets_the_answers_and_nothing_else(pipe: Callable[..., tuple[str, str]]) -> None:
    engine = ScriptedEngine([THOUGHT, "</think>\x1b[31m狐狸\n"])
    assert pipe("hi", "", "a\\", "b", "```", "c\\", "", "```", engine=engine) == (
        "Hello there!\n\x1b[31m狐狸\nHello there!\n",
        "",
    )


def test_lines_are_joined_by_backslashes_and_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["a\\", "b", "```py", "c\\", "", "/exit", "```", "```x``` y", "\\", "z", "```", "open"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    screen = Screen(terminal=False, folded=True)
    assert list(iter(screen.read, None)) == ["a\nb", "```py\nc\\\n\n/exit\n```", "```x``` y", "\nz", "```\nopen"]


def test_thoughts_in_a_pipe_have_their_tags(pipe: Callable[..., tuple[str, str]]) -> None:
    out, err = pipe("/think", "hi")
    assert out == "<think>\nI greet back.\n</think>\n\nHello there!\n"
    assert err == "finback chat: thinking is shown from now on\n"


def test_commands_in_a_pipe(pipe: Callable[..., tuple[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    engine = ScriptedEngine([THOUGHT])
    out, err = pipe(
        "/system Be kind.",
        "hi",
        "/temperature 0",
        "/max-tokens 12",
        "/regenerate",
        f"/save {file}",
        f"/save {file}",
        "/stats",
        "/clear",
        "/system",
        " /hi",
        "/quit",
        "never",
        engine=engine,
    )
    assert out == "Hello there!\n" * 3
    prompts = sum(len(prompt) for prompt, _ in engine.asked[:2])
    assert err.splitlines() == [
        f"finback chat: {line}"
        for line in [
            "the system prompt is set",
            "temperature is 0",
            "an answer has at most 12 tokens",
            f"3 messages are in {file}",
            f"{file} exists; give /save another name",
            "answers: 2, 8 tokens, 2.0 tokens/s",
            f"prompts: {prompts} tokens, 0 of them (0%) found in the prefix cache",
            "a new conversation",
            "there is no system prompt",
        ]
    ]
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello there!", "reasoning_content": "I greet back."},
    ]
    assert [(params.temperature, params.max_tokens) for _, params in engine.asked] == [(0.6, None), (0, 12), (0, 12)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/hlp", "/hlp is no command (/help lists them, a space before / makes it text); did you mean '/help'?"),
        ("/", "/ is no command"),
        ("/temperature warm", "/temperature needs a number of 0 or more, as in /temperature 0.6; it got 'warm'"),
        ("/temperature -1", "temperature is -1.0, it must be at least 0"),
        ("/temperature nan", "temperature is nan"),
        ("/max-tokens 1.5", "/max-tokens needs a whole number of 1 or more"),
        ("/max-tokens 0", "max_tokens is 0, it must be a whole number of at least 1"),
        ("/regenerate", "there is no answer to make again; ask something first"),
        ("/save", "/save needs the name of a file"),
        ("/save /proc/nowhere/x", "/proc/nowhere/x cannot be written"),
        ("a \udcff", "this message is not UTF-8 text"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_chat_goes_on(line: str, sentence: str, pipe: Callable[..., tuple[str, str]]) -> None:
    out, err = pipe(line, "hi")
    assert out == "Hello there!\n"
    assert sentence in err
    assert err.count("\n") == 1


def test_a_full_context_is_told_in_one_line(pipe: Callable[..., tuple[str, str]]) -> None:
    engine = ScriptedEngine(["</think>" + "xyz " * 20], max_model_len=200)
    _, err = pipe("a", "b", "c", engine=engine)
    assert err == "finback chat: the context is full: the oldest 2 messages are no longer sent to the model\n"


def test_every_command_is_listed(pipe: Callable[..., tuple[str, str]]) -> None:
    _, err = pipe("/help")
    words = {word.strip(",") for word in err.split()}
    assert set(COMMANDS) | {"/quit"} <= words
    assert len(COMMANDS) == 10


def test_ctrl_c_in_a_pipe_ends_the_program(pipe: Callable[..., tuple[str, str]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipe("hi", engine=ScriptedEngine([THOUGHT], on_part=lambda count: signal.raise_signal(signal.SIGINT)))


# On a terminal.


@pytest.fixture
def person(r1: Tokenizer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a chat with someone who types the given lines (or an exception); give what the terminal got."""

    def run(
        *lines: str | BaseException,
        engine: ScriptedEngine | None = None,
        folded: bool = False,
        dumb: bool = False,
        columns: int = 100,
    ) -> str:
        typed = iter(lines)

        def answer(prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(builtins, "input", answer)
        monkeypatch.setenv("TERM", "dumb" if dumb else "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        Chat(conversation(engine or ScriptedEngine([THOUGHT]), r1), Screen(terminal=True, folded=folded)).run()
        return capsys.readouterr().out

    return run


def plain(text: str) -> str:
    return text.replace(PLAIN, "").replace(DIM, "").replace(CLEAR_LINE, "")


STATS = "4 tokens · 2.0 tokens/s · 0 of 7 prompt tokens cached"


def test_the_thought_is_dim(person: Callable[..., str]) -> None:
    dim = [f"{DIM}{word}{PLAIN}" for word in ("I ", "greet ", "back.", STATS)]
    assert person("hi") == f"{''.join(dim[:3])}\n\nHello there!\n{dim[3]}\n\n\n"


def test_a_folded_thought_is_one_line(person: Callable[..., str]) -> None:
    counting = [f"{CLEAR_LINE}{DIM}thinking for {text}{PLAIN}" for text in ("0.5 s, 1 token", "1.0 s, 2 tokens")]
    done = f"{CLEAR_LINE}{DIM}thought for 1.5 s, 3 tokens{PLAIN}\n"
    assert person("hi", folded=True) == f"{''.join(counting)}{done}Hello there!\n{DIM}{STATS}{PLAIN}\n\n\n"


def test_unfolding_shows_the_last_thought(person: Callable[..., str]) -> None:
    text = plain(person("hi", "/think", "/think", folded=True))
    shown = "thinking is shown from now on\nI greet back.\n\nthinking is folded from now on\n\n"
    assert text.endswith(f"{STATS}\n\n{shown}")


def test_an_empty_thought_is_not_shown(person: Callable[..., str]) -> None:
    for folded in (False, True):
        text = plain(person("hi", engine=ScriptedEngine(["\n</think>\n\nHello there you two!"]), folded=folded))
        assert text == f"Hello there you two!\n{STATS}\n\n\n"


def test_a_dumb_terminal_gets_tags(person: Callable[..., str]) -> None:
    assert person("hi", dumb=True) == f"<think>\nI greet back.\n</think>\n\nHello there!\n{STATS}\n\n\n"
    assert person("hi", dumb=True, folded=True) == f"thought for 1.5 s, 3 tokens\nHello there!\n{STATS}\n\n\n"


def test_what_a_model_writes_does_not_steer_the_terminal(person: Callable[..., str]) -> None:
    text = person("hi", engine=ScriptedEngine(["\x1b]0;x\x07\n</think>\n\n\x1b[2J\r\x9b狐\t狸\n🐋 x"]))
    assert "\ufffd]0;x\ufffd" in text
    assert "\ufffd[2J\ufffd\ufffd狐\t狸\n🐋" in text


def test_lines_fit_a_narrow_terminal(person: Callable[..., str]) -> None:
    text = person("hi", "/help", folded=True, columns=24)
    lines = text.replace(CLEAR_LINE, "\n").replace(DIM, "").replace(PLAIN, "").splitlines()
    assert max(map(len, lines)) < 24
    assert "thinking for 0.5 s, 1 t" in lines


def test_ctrl_c_stops_the_answer_and_not_the_chat(person: Callable[..., str]) -> None:
    def press(count: int) -> None:
        if count == 2 and len(engine.asked) == 1:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    engine = ScriptedEngine([THOUGHT], on_part=press)
    text = plain(person("hi", "and?", engine=engine))
    assert signal.getsignal(signal.SIGINT) is before
    stopped = "2 tokens · 2.0 tokens/s · 0 of 7 prompt tokens cached · stopped"
    assert text.startswith(f"I greet \n\n{stopped}\n\nI greet back.\n\nHello there!\n")
    assert engine.closed == 2


def test_a_second_ctrl_c_breaks_off_a_step(person: Callable[..., str]) -> None:
    def press(count: int) -> None:
        if count == 3 and len(engine.asked) == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    engine = ScriptedEngine([THOUGHT], on_part=press)
    text = plain(person("hi", "and?", engine=engine))
    assert text.startswith("I greet \n/exit or Ctrl-D leaves\nI greet back.\n\nHello there!\n")
    assert engine.closed == 2


def test_ctrl_c_at_the_prompt_says_how_to_leave(person: Callable[..., str]) -> None:
    engine = ScriptedEngine([THOUGHT])
    text = plain(person(KeyboardInterrupt(), "a\\", KeyboardInterrupt(), "hi", engine=engine))
    assert text.startswith("\n/exit or Ctrl-D leaves\n\n/exit or Ctrl-D leaves\nI greet")
    assert len(engine.asked) == 1


CUT = [("I greet", "cut after 2 tokens, inside the thought"), ("</think>a", "cut after 1 token")]


@pytest.mark.parametrize(("script", "remark"), CUT)
def test_a_cut_answer_is_told(script: str, remark: str, person: Callable[..., str], pipe: Callable[..., tuple[str, str]]) -> None:
    engine = ScriptedEngine([script], finish_reason="length")
    assert plain(person("hi", engine=engine)).endswith(f" · {remark}\n\n\n")
    assert pipe("hi", engine=engine)[1] == f"finback chat: the answer is {remark}\n"


# The real program.


class Terminal:
    """A pseudo-terminal with the scripted chat in it."""

    def __init__(self, *words: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x28\x00\x50\x00\x00\x00\x00\x00")  # 40 rows, 80 columns
        # In its own session, with the pseudo-terminal in control, so that ^C becomes a signal.
        program = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
        chat = [sys.executable, "-m", "tests.commands.scripted", *words]
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *chat],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8"},
        )
        os.close(slave)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may come in two reads

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, text: str) -> str:
        """Read until `text` has appeared, however long it takes; give what came up to it."""
        while text not in self.seen:
            self._read(text)
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at the prompt until `text` has appeared. Python's readline may sleep through a signal that comes in the instant
        before it waits for keys, and then sees it with the next."""
        while text not in self.seen:
            self.send("\x03")
            while text not in self.seen and select.select([self.master], [], [], 5)[0]:
                self._read(text)
        self.wait_for(text)

    def _read(self, text: str) -> None:
        try:
            self.seen += self._decoder.decode(os.read(self.master, 65536))
        except OSError:  # the program has ended
            raise AssertionError(f"{text!r} did not come, only {self.seen!r}") from None

    def end(self) -> int:
        """Read what is left and give the exit code."""
        with contextlib.suppress(OSError):  # EIO: nobody holds the other end any more
            while os.read(self.master, 65536):
                pass
        return self.process.wait()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("--endless", "--pause", "0.01")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.master)


def test_a_real_terminal(terminal: Terminal) -> None:
    terminal.wait_for("\x1b[?2004h")  # asks it to mark what is pasted
    terminal.wait_for(">>> ")
    terminal.send("hello 狐狸\r")
    terminal.wait_for("狐狸看见葡萄")
    terminal.send("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for(">>> ")
    terminal.send("half a line")
    terminal.wait_for("half a line")
    terminal.interrupt("/exit or Ctrl-D leaves")
    terminal.wait_for(">>> ")
    terminal.send("\x1b[200~two\nlines\x1b[201~\r")  # pasted
    terminal.wait_for("No thought here.")
    terminal.wait_for(">>> ")
    terminal.send("\x1b[A\x01\x0b/stats\r")  # up, to the start, cut the line
    terminal.wait_for("answers: 2")
    terminal.wait_for(">>> ")
    terminal.send("\x04")
    assert terminal.end() == 0


# The verb.


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str | Path) -> tuple[int, str, str]:
        code = cli.main(["chat", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_a_model_without_a_chat_template_is_sent_to_generate(verb: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    tokens = train_tokenizer(TEXT, 300)
    tokens.chat_template = None
    save_tokenizer(tokens, tmp_path / "tokenizer")
    save(build(replace(BASE, vocab_size=300)), tmp_path / "model", tokenizer_from=tmp_path / "tokenizer")
    code, out, err = verb(tmp_path / "model")
    assert (code, out) == (2, "")
    assert "has no chat template" in err
    assert f"finback generate {tmp_path / 'model'} --prompt TEXT" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is not a directory"),
        (["nowhere", "--temprature", "1"], "the nearest is --temperature"),
        ([], "directory"),
        (["nowhere", "--system", "\udcff"], "--system is not UTF-8 text; convert it first"),
        (["--plan-with", "nowhere", "--write-with", "nowhere", "--system", "\udcff"], "--system is not UTF-8 text"),
    ],
)
def test_bad_words_are_one_sentence(words: list[str], sentence: str, verb: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = verb(*words)
    assert (code, out) == (2, "")
    assert sentence.lower() in err.lower()
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of its own, whose answers are noise."""
    root = tmp_path_factory.mktemp("models")
    save_tokenizer(tokenizer(), root / "tokenizer")
    model = build(replace(BASE, vocab_size=300, initializer_range=0.5, max_position_embeddings=400))
    save(model, root / "model", tokenizer_from=root / "tokenizer")
    return root / "model"


def test_the_engine_answers(directory: Path, verb: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    questions = ["The fox " * 14, "狐狸?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("/think\n" + "\n".join(questions) + "\n/stats\n"))
    code, out, err = verb(directory, "--temperature", "0", "--max-tokens", "40", "--dtype", "float32")
    assert code == 0

    tokens, model = load_tokenizer(directory), load(directory)
    messages: list[dict[str, str]] = []
    expected, prompts = "", []
    for question in questions:
        messages.append({"role": "user", "content": question})
        prompts.append(tokens.encode(tokens.apply_chat_template(messages, add_generation_prompt=True)))
        output = generate(model, torch.tensor(prompts[-1:]), 40, eos_token_id=tokens.eos_token_id)
        text = tokens.decode(output[0, len(prompts[-1]) :].tolist(), skip_special_tokens=True)
        answer = parse_answer(text, starts_in_thought=True, tools=False)
        messages.append({"role": "assistant", "content": answer.content})
        shown = answer.reasoning and f"<think>\n{answer.reasoning.removesuffix(chr(10))}\n</think>\n\n"
        expected += shown + answer.content + ("\n" if answer.content else "")
    assert out == expected
    common = next(i for i, (a, b) in enumerate(zip(*prompts, strict=False)) if a != b)
    assert common >= 64
    assert f"{sum(map(len, prompts))} tokens, {common // 64 * 64} of them" in err

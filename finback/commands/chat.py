"""`finback chat`: talk with a model in the terminal; its thinking is dimmed or folded, Ctrl-C stops an answer and not the program."""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

import tyro
from tyro.conf import Positional

from finback.commands.parse import parse_arguments
from finback.config import InputError, ModelConfig, count_params, nearest

if TYPE_CHECKING:
    from finback.commands.conversation import Answer, Conversation, Steps
    from finback.commands.paired import PairedConversation
    from finback.commands.terminal import Screen


@dataclass(frozen=True)
class ChatFields:
    """What `finback chat` takes."""

    directory: Positional[Path | None] = None
    """Hugging Face directory with weights, tokenizer and chat template; left out where two models are paired."""
    plan_with: str = ""
    """Directory or OpenAI-style endpoint (http://HOST/v1) of a model whose thought another one writes from."""
    write_with: str = ""
    """Directory or endpoint of the model that writes; goes with --plan-with."""
    plan_model: str = "default"
    """Name of the planner at its endpoint."""
    write_model: str = "default"
    """Name of the writer at its endpoint."""
    plan_key_env: str = ""
    """The environment variable with the key of the planner's endpoint; empty sends none."""
    write_key_env: str = ""
    """The environment variable with the key of the writer's endpoint; empty sends none."""
    system: str = ""
    """System prompt."""
    temperature: float = 0.6
    """0 always takes the likeliest token; 0.6 is what DeepSeek advises for R1."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together reach this probability; 1 is all of them."""
    max_tokens: int | None = None
    """Longest answer, thinking included; None is 4096 or what the context leaves."""
    seed: int | None = None
    """The same seed and questions give the same answers; None draws one for each answer."""
    fold: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start with the thinking folded to one line; in a pipe it is folded away altogether."""
    num_speculative_tokens: int = 0
    """Tokens that the model's MTP module drafts ahead at each step; 0 is none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in memory; auto is that of the files."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""


class Command(NamedTuple):
    usage: str
    help_line: str
    run: "Callable[[Chat, str], bool | None]"  # gets what stands behind the word; False ends the chat


def main(argv: list[str]) -> int:
    """`finback chat DIRECTORY [--system TEXT --temperature T --max-tokens N --fold ...]`."""
    fields = parse_arguments(
        ChatFields,
        argv,
        verb="chat",
        description="Talk with a model in the terminal. Without one, each line of standard input is a question and the answers "
        "go to standard output. /help lists what can be done meanwhile.",
    )
    try:
        fields.system.encode()
    except UnicodeEncodeError:  # an argument that is no UTF-8 comes with surrogates
        raise InputError("--system is not UTF-8 text; convert it first") from None
    if fields.plan_with or fields.write_with:
        return _paired(fields)
    if fields.directory is None:
        raise InputError("the model's directory is missing: finback chat DIRECTORY; see finback chat --help")
    config = ModelConfig.from_hf(fields.directory)

    from finback.commands.conversation import Conversation
    from finback.commands.terminal import Screen
    from finback.data.tokenizer import load_tokenizer
    from finback.engine.config import SamplingParams

    params = SamplingParams(temperature=fields.temperature, top_p=fields.top_p, max_tokens=fields.max_tokens, seed=fields.seed)
    tokenizer = load_tokenizer(fields.directory)
    if tokenizer.chat_template is None:
        raise InputError(
            f"{fields.directory} has no chat template, so it is no model to chat with; finback generate {fields.directory} "
            "--prompt TEXT continues a text"
        )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(terminal=terminal, folded=fields.fold or not terminal)
    counts = count_params(config)
    active = f" ({_count(counts.active)} active)" if counts.active != counts.total else ""
    screen.remark(f"{fields.directory.resolve().name}: {_count(counts.total)} parameters{active}, loading")

    import torch

    from finback.engine.llm import LLM

    if fields.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but torch finds no such device; leave it out to run on the CPU")
    engine = LLM(
        fields.directory,
        tokenizer=tokenizer,
        dtype="auto" if fields.dtype == "auto" else getattr(torch, fields.dtype),
        device=fields.device,
        max_num_seqs=1,
        num_speculative_tokens=fields.num_speculative_tokens,
    )
    screen.remark(f"context {engine.max_model_len:,} tokens; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    Chat(Conversation(engine, tokenizer, params, system=fields.system), screen).run()
    return 0


def _paired(fields: ChatFields) -> int:
    """The chat with a planner and a writer."""
    if not (fields.plan_with and fields.write_with):
        raise InputError("--plan-with and --write-with go together; give both, or a directory alone")
    if fields.directory is not None:
        raise InputError(f"{fields.directory} is a third model beside --plan-with and --write-with; leave it out")
    if fields.num_speculative_tokens or fields.dtype != "auto" or fields.device != "cpu":
        raise InputError("--num-speculative-tokens, --dtype and --device are for a chat with one model; leave them out")
    for place in (fields.plan_with, fields.write_with):
        if not place.startswith(("http://", "https://")):
            ModelConfig.from_hf(Path(place))

    from finback.commands.paired import PairedConversation
    from finback.commands.terminal import Screen
    from finback.engine.config import SamplingParams
    from finback.recipes.pairing import Pair, open_speaker

    params = SamplingParams(temperature=fields.temperature, top_p=fields.top_p, max_tokens=fields.max_tokens, seed=fields.seed)
    pair = Pair(
        open_speaker(fields.plan_with, model=fields.plan_model, api_key_env=fields.plan_key_env),
        open_speaker(fields.write_with, model=fields.write_model, api_key_env=fields.write_key_env),
    )
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(terminal=terminal, folded=fields.fold or not terminal)
    screen.remark(f"{fields.plan_with} plans, {fields.write_with} writes; /help lists commands, Ctrl-C stops, Ctrl-D leaves")
    Chat(PairedConversation(pair, params, system=fields.system), screen).run()
    return 0


def _count(parameters: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter}"
    return str(parameters)


class Chat:
    """The loop: a message or a command, an answer, and again."""

    def __init__(self, conversation: "Conversation | PairedConversation", screen: "Screen") -> None:
        self.conversation = conversation
        self.screen = screen
        self.answers: list[Answer] = []

    def run(self) -> None:
        """Until the input ends or a command leaves. Mistakes are one sentence each."""
        going: bool | None = True
        while going is not False:
            try:
                text = self.screen.read()
                going = text is not None and self.handle(text)
            except InputError as error:
                self.screen.note(" ".join(str(error).split()))
            except KeyboardInterrupt:
                if not self.screen.terminal:
                    raise
                self.screen.interrupted()

    def handle(self, text: str) -> bool | None:
        """Act on a message or a command; False ends the chat."""
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes that were no UTF-8 come as surrogates
            raise InputError("this message is not UTF-8 text; write it again") from None
        if not text.strip():
            return True
        if not text.startswith("/"):
            self._show(self.conversation.ask(text))
            return True
        word, *rest = text.split(maxsplit=1)
        word = {"/quit": "/exit"}.get(word, word)
        if word not in COMMANDS:
            hint = nearest(word, list(COMMANDS))
            raise InputError(f"{word} is no command (/help lists them, a space before / makes it text){hint}")
        return COMMANDS[word].run(self, rest[0].strip() if rest else "")

    def _show(self, steps: "Steps") -> None:
        """Let an answer stream to the screen, until it ends or Ctrl-C is pressed."""
        from finback.commands.terminal import listening

        answer = None
        dropped = self.conversation.dropped
        self.screen.begin()
        with listening(self.screen.terminal) as interrupt, contextlib.closing(steps):
            for reasoning, content, answer in steps:
                if self.conversation.dropped > dropped:
                    count = self.conversation.dropped - dropped
                    self.screen.note(f"the context is full: the oldest {count} messages are no longer sent to the model")
                    dropped = self.conversation.dropped
                self.screen.show(reasoning, content, answer)
                if interrupt.asked:
                    break
        if answer is not None:
            self.answers.append(answer)
            self.screen.end(answer)

    # Commands.

    def help(self, argument: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            self.screen.note(f"{command.usage:<{width}}  {command.help_line}")
        self.screen.note("A line that ends with \\ goes on in the next; a line of ``` begins a block of lines, and ends it.")
        self.screen.note("Ctrl-C stops an answer, what has come of it stays in the conversation; Ctrl-D leaves.")

    def leave(self, argument: str) -> bool:
        return False

    def clear(self, argument: str) -> None:
        self.conversation.clear()
        self.screen.note("a new conversation")

    def system(self, argument: str) -> None:
        self.conversation.system = argument
        self.screen.note("the system prompt is set" if argument else "there is no system prompt")

    def think(self, argument: str) -> None:
        self.screen.folded = not self.screen.folded
        self.screen.note(f"thinking is {'folded' if self.screen.folded else 'shown'} from now on")
        last = self.conversation.messages[-1].get("reasoning_content") if self.conversation.messages else None
        if last and not self.screen.folded:
            self.screen.thought(last)
            self.screen.end_thought()

    def regenerate(self, argument: str) -> None:
        self._show(self.conversation.ask_again())

    def save(self, argument: str) -> None:
        from finback.data.files import write_atomic

        if not argument:
            raise InputError("/save needs the name of a file, as in /save chat.jsonl")
        path = Path(argument).expanduser()
        if path.exists():
            raise InputError(f"{path} exists; give /save another name")
        record = self.conversation.record()
        try:
            write_atomic(path, "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in record))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}; give /save another name") from None
        self.screen.note(f"{len(record)} messages are in {path}")

    def temperature(self, argument: str) -> None:
        if argument:
            value = _number(float, argument, "/temperature needs a number of 0 or more, as in /temperature 0.6")
            self.conversation.params = replace(self.conversation.params, temperature=value)
        self.screen.note(f"temperature is {self.conversation.params.temperature:g}")

    def max_tokens(self, argument: str) -> None:
        if argument:
            value = _number(int, argument, "/max-tokens needs a whole number of 1 or more, as in /max-tokens 1000")
            self.conversation.params = replace(self.conversation.params, max_tokens=value)
        limit = self.conversation.params.max_tokens
        self.screen.note(f"an answer has at most {f'{limit} tokens' if limit else 'the tokens that the context leaves'}")

    def stats(self, argument: str) -> None:
        prompt = sum(answer.prompt_tokens for answer in self.answers)
        cached = sum(answer.cached_tokens for answer in self.answers)
        tokens = sum(answer.tokens for answer in self.answers)
        steps = [answer for answer in self.answers if answer.tokens_per_second is not None]
        seconds = sum(answer.seconds - answer.first_seconds for answer in steps)
        rate = sum(answer.tokens - answer.first_tokens for answer in steps) / seconds if seconds else 0.0
        share = f" ({cached / prompt:.0%})" if prompt else ""
        self.screen.note(f"answers: {len(self.answers)}, {tokens} tokens, {rate:.1f} tokens/s")
        self.screen.note(f"prompts: {prompt} tokens, {cached} of them{share} found in the prefix cache")


Number = TypeVar("Number", int, float)


def _number(kind: Callable[[str], Number], text: str, sentence: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{sentence}; it got {text!r}") from None


COMMANDS = {
    "/help": Command("/help", "this list", Chat.help),
    "/exit": Command("/exit, /quit", "leave", Chat.leave),
    "/clear": Command("/clear", "begin a new conversation; the system prompt stays", Chat.clear),
    "/system": Command("/system TEXT", "set the system prompt; without TEXT there is none", Chat.system),
    "/think": Command("/think", "fold or unfold the thinking; unfolding shows the last thought", Chat.think),
    "/regenerate": Command("/regenerate", "answer the last question again", Chat.regenerate),
    "/save": Command("/save FILE", "write the messages to FILE, one JSON object a line", Chat.save),
    "/temperature": Command("/temperature X", "set how freely it samples; 0 takes the likeliest token", Chat.temperature),
    "/max-tokens": Command("/max-tokens N", "set the longest answer, thinking included", Chat.max_tokens),
    "/stats": Command("/stats", "tokens, speed and prefix-cache hits of this chat", Chat.stats),
}

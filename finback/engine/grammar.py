"""Structured output: which tokens may come next, by llguidance.

`GrammarCompiler` belongs to a tokenizer, `CompiledGrammar` to a `Grammar`, `GrammarMatcher` to a request. llguidance works on the
bytes of tokens; special tokens are symbols of their own, which text (a string in JSON, free text before a tool call) never
contains. Ids without a token, such as the padding of a model's vocabulary, are never allowed.

Tool calls have DeepSeek's form (bars and low lines as in `finback.data.tokenizer`; the tags are text where they are no tokens):

    <tool_calls_begin><tool_call_begin>function<tool_sep>NAME
    ```json
    {...}
    ```<tool_call_end>
    <tool_call_begin>...<tool_call_end><tool_calls_end>
"""

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from finback.config import InputError
from finback.data.tokenizer import END_THINK_TOKEN, Tokenizer
from finback.engine.grammar_config import Grammar
from finback.engine.schema_limits import check_schema, check_text, listed, mapped, references, resolve

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_CACHED_GRAMMARS = 64
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
"""What may stand between the parts of JSON: enough for indented JSON, and an end for models that loop in white space."""
_LEXER_FUEL = 200_000
"""Enough for a schema of some hundred properties; a pattern like (a{1000}){1000} uses it up in half a second instead of three."""
_MAX_GAP = 2  # newlines between </think> and the answer, as R1 writes them


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the latest ones."""

    def __init__(self, tokenizer: Tokenizer, stop_token_ids: Sequence[int] | None = None) -> None:
        """`stop_token_ids` end an answer (default: the tokenizer's end-of-sentence token); they are allowed where a grammar may end.

        Building takes about a second for 128K tokens. InputError if llguidance is not installed.
        """
        self.tokenizer = tokenizer
        stops = [tokenizer.eos_token_id] if stop_token_ids is None else stop_token_ids
        self.stop_token_ids = frozenset(token for token in stops if token < tokenizer.vocab_size)
        tokens = _BackendTokens(tokenizer)
        self._backend = _backend_tokenizer(tokens)
        self.free = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)
        """The mask of all tokens, a bit each."""
        _set_bits(self.free, [token for token, spelling in enumerate(tokens.tokens) if spelling], True)
        self.newlines = {token: len(s) for token, s in enumerate(tokens.tokens) if s in (b"\n", b"\n\n")}
        """Tokens that are nothing but newlines, at most `_MAX_GAP` of them."""
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()

    def compile(self, grammar: Grammar) -> "CompiledGrammar":
        """InputError, in one sentence, for a grammar that is invalid, impossible to satisfy, or uses what is not supported."""
        compiled = self._compiled.get(grammar)
        if compiled is None:
            compiled = CompiledGrammar(self, grammar, self._backend)
            self._compiled[grammar] = compiled
            if len(self._compiled) > _CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return compiled


class CompiledGrammar:
    """A grammar for a tokenizer; `matcher` starts an answer."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, backend: "LLTokenizer") -> None:
        from llguidance import LLMatcher, LLParserLimits

        tokenizer = compiler.tokenizer
        self.grammar = grammar
        self.stop_token_ids = compiler.stop_token_ids
        self.free, self.newlines = compiler.free, compiler.newlines
        _check_schemas(grammar)
        text = _source(grammar, tokenizer)
        limits = LLParserLimits(initial_lexer_fuel=_LEXER_FUEL, verbose_errors=False)
        self._start = LLMatcher(backend, text, log_level=0, limits=limits)
        error = self._start.get_error() or _error_of_a_first_token(self._start.deep_copy())
        if error:
            raise InputError(_sentence(grammar, error))
        for what, schema in _schemas(grammar):
            _check_finite(what, schema)
        self.end_think_id: int | None = None
        if grammar.after_think:
            if tokenizer.backend.token_to_id(END_THINK_TOKEN) is None:
                raise InputError(f"after_think needs a tokenizer with the token {END_THINK_TOKEN}; leave it out")
            self.end_think_id = tokenizer.token_to_id(END_THINK_TOKEN)

    def matcher(self) -> "GrammarMatcher":
        """A matcher at the beginning of an answer."""
        return GrammarMatcher(self, self._start.deep_copy())


class _Phase(Enum):
    THINKING = "before </think>"
    GAP = "newlines behind it"
    GRAMMAR = "in the grammar"
    ENDED = "after a stop token"


class GrammarMatcher:
    """Where one answer stands in its grammar."""

    def __init__(self, compiled: CompiledGrammar, matcher: "LLMatcher") -> None:
        self._compiled = compiled
        self._matcher = matcher
        start = _Phase.THINKING if compiled.grammar.after_think else _Phase.GRAMMAR
        self._history = [(start, 0)]  # phase and newlines of the gap before each token and now

    @property
    def _phase(self) -> _Phase:
        return self._history[-1][0]

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is: stop tokens are allowed."""
        return self._phase is not _Phase.THINKING and bool(self._matcher.is_accepting())

    @property
    def is_finished(self) -> bool:
        """Whether nothing but a stop token can follow, or one has."""
        return self._phase is _Phase.ENDED or (self._phase is _Phase.GRAMMAR and bool(self._matcher.is_stopped()))

    def mask(self) -> Int32[Tensor, " words"]:
        """The tokens that may come next, a bit each, the lowest bit of the first word for token 0.

        InputError if the grammar has become too complex to follow.
        """
        if self._phase is _Phase.THINKING:
            bits = self._compiled.free.copy()
        elif self.is_finished:
            bits = np.zeros_like(self._compiled.free)
        else:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
            bits = bits[: len(self._compiled.free)].copy()  # llguidance has a word more where the vocabulary fills its last one
            self._check()
            if self._phase is _Phase.GAP:
                room = _MAX_GAP - self._history[-1][1]
                _set_bits(bits, [token for token, count in self._compiled.newlines.items() if count <= room], True)
        _set_bits(bits, self._compiled.stop_token_ids, self.may_end)
        return torch.from_numpy(bits)

    def masks(self, drafts: Sequence[int]) -> Int32[Tensor, "rows words"]:
        """The mask of the next token and those behind each draft. Behind a draft that is not allowed, where nothing that is
        sampled will count, everything is; behind a stop token, which not every answer ends at, stop tokens are."""
        masks = [self.mask()]
        for token in drafts:
            if not _has_bit(masks[-1], token):
                break
            self.advance(token)
            masks.append(self.mask())
        self.rollback(len(masks) - 1)
        masks += [torch.full_like(masks[0], -1)] * (len(drafts) + 1 - len(masks))
        return torch.stack(masks)

    def advance(self, token: int) -> None:
        """`token` is now part of the answer. ValueError if it is not allowed; the matcher stays as it is then."""
        phase, newlines = self._history[-1]
        if token in self._compiled.stop_token_ids:
            if not self.may_end:
                raise ValueError(f"token {token} ends the answer where the grammar may not end")
            phase = _Phase.ENDED
        elif phase is _Phase.THINKING:
            phase = _Phase.GAP if token == self._compiled.end_think_id else phase
        elif phase is not _Phase.ENDED and self._fits(token):
            self._matcher.consume_token(token)
            self._check()
            phase = _Phase.GRAMMAR
        elif phase is _Phase.GAP and newlines + self._compiled.newlines.get(token, _MAX_GAP + 1) <= _MAX_GAP:
            newlines += self._compiled.newlines[token]
        else:
            raise ValueError(f"token {token} is not allowed by the grammar")
        self._history.append((phase, newlines))

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        assert 0 <= count < len(self._history), "no more tokens can be taken back than were given"
        taken = sum(phase is _Phase.GRAMMAR for phase, _ in self._history[len(self._history) - count :])
        if taken:
            self._matcher.rollback(taken)
            self._check()
        del self._history[len(self._history) - count :]

    def _fits(self, token: int) -> bool:
        fits = self._matcher.validate_tokens([token]) == 1
        self._check()
        return fits

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise InputError(f"the grammar cannot be followed any further ({reason}); make it simpler")


class _BackendTokens:
    """Our tokenizer as llguidance's wrapper wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        added = tokenizer.backend.get_added_tokens_decoder().items()
        # Role and think tokens are not "special" in tokenizer.json, and runs of spaces may be added tokens.
        self.special_token_ids = sorted(i for i, token in added if token.special or re.fullmatch("<.*>", token.content))

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode())


def _backend_tokenizer(tokens: _BackendTokens) -> "LLTokenizer":
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ModuleNotFoundError:
        raise InputError("structured output needs the package llguidance; install finback[serve]") from None
    return LLTokenizer(TokenizerWrapper(tokens))


def _schemas(grammar: Grammar) -> list[tuple[str, str]]:
    """What each schema of a grammar is called, and its text."""
    match grammar.kind:
        case "json_schema":
            return [("the JSON schema", grammar.source)]
        case "tools":
            return [(f"the schema of the function {name!r}", schema) for name, schema in json.loads(grammar.source)]
        case _:
            return []


def _check_schemas(grammar: Grammar) -> None:
    """InputError for schemas that the grammar engine would be busy with for too long."""
    schemas = _schemas(grammar)
    if schemas:
        check_text("the JSON schema" if grammar.kind == "json_schema" else "field tools", grammar.source)
    for what, schema in schemas:
        check_schema(what, schema)


def _source(grammar: Grammar, tokenizer: Tokenizer) -> str:
    """The grammar in llguidance's notation."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "json_schema":
            return str(LLMatcher.grammar_from_lark(f"start: %json {_with_whitespace(grammar.source)}"))
        case "regex":
            return str(LLMatcher.grammar_from_regex(grammar.source))
        case "lark":
            return str(LLMatcher.grammar_from_lark(grammar.source))
        case "tools":
            return str(LLMatcher.grammar_from_lark(_tool_grammar(grammar, tokenizer)))


def _with_whitespace(schema: str) -> str:
    value = json.loads(schema)
    # `true` allows what {} allows; false is an error in both forms.
    value = {"anyOf": []} if value is False else {} if value is True else value
    return json.dumps({**value, "x-guidance": {"whitespace_pattern": _WHITESPACE}})


def _tool_grammar(grammar: Grammar, tokenizer: Tokenizer) -> str:
    def tag(name: str) -> str:
        token: int | None = tokenizer.backend.token_to_id(name)
        return json.dumps(name, ensure_ascii=False) if token is None else f"<[{token}]>"

    begin_name = "<｜tool▁calls▁begin｜>"
    begin, end = tag(begin_name), tag("<｜tool▁calls▁end｜>")
    call_begin, call_end, separator = tag("<｜tool▁call▁begin｜>"), tag("<｜tool▁call▁end｜>"), tag("<｜tool▁sep｜>")
    tools = json.loads(grammar.source)
    names = " | ".join(f"tool_{i}" for i in range(len(tools)))
    lines = [
        f"list: call{' (NEWLINE call)*' if grammar.parallel else ''} {end}",
        f'call: {call_begin} "function" {separator} ({names}) {call_end}',
        *(f'tool_{i}: "{name}\\n```json\\n" %json {_with_whitespace(schema)} "\\n```"' for i, (name, schema) in enumerate(tools)),
        'NEWLINE: "\\n"',
        "TEXT: /(.|\\n)*/",
    ]
    if grammar.calls == "required":
        start = [f"start: {begin} list"]
    elif begin.startswith("<["):
        start = [f"start: text | text {begin} list", "text: TEXT"]
    else:  # lazy: the tag ends the text as soon as it is whole
        start = ["start: text | head list", "text: TEXT", f"head[lazy]: TEXT {begin}"]
    return "\n".join([*start, *lines])


def _error_of_a_first_token(matcher: "LLMatcher") -> str:
    """Patterns are unfolded as they are used: too large ones show it at the first token."""
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    matcher.consume_token(int(bits.argmax()))
    return str(matcher.get_error())


def _check_finite(what: str, source: str) -> None:
    """InputError if only JSON that never ends satisfies the schema, because an object needs another one like itself; llguidance
    would follow it forever. Errs on the side of accepting."""
    root = json.loads(source)
    named = references(root)
    finite: set[str] = set()
    while more := {name for name in named - finite if _is_finite(resolve(root, name), finite)}:
        finite |= more
    if not _is_finite(root, finite):
        raise InputError(f"{what} requires JSON that never ends, since each part requires another like itself; make one optional")


def _is_finite(schema: Any, finite: set[str]) -> bool:
    """Whether some finite JSON satisfies `schema`, as far as is known when only the references in `finite` can be.

    llguidance reads a keyword only where the type has a use for it, so whatever stands in the others, or in parts that it never
    reaches, may have any form; what has a wrong one asks for nothing.
    """
    if not isinstance(schema, dict):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in finite:
        return False
    if not all(_is_finite(part, finite) for part in listed(schema.get("allOf"))):
        return False
    for name in ("anyOf", "oneOf"):
        parts = listed(schema.get(name))
        if parts and not any(_is_finite(part, finite) for part in parts):
            return False
    match schema.get("type"):
        case "object":
            properties, additional = mapped(schema.get("properties")), schema.get("additionalProperties", True)
            names = [name for name in listed(schema.get("required")) if isinstance(name, str)]
            return all(_is_finite(properties.get(name, additional), finite) for name in names)
        case "array":
            least = schema.get("minItems")
            least = max(0, least) if isinstance(least, int) else 0
            items = [*listed(schema.get("prefixItems")), schema.get("items", True)][:least]
            return all(_is_finite(part, finite) for part in items)
        case _:
            return True


def _sentence(grammar: Grammar, message: str) -> str:
    """llguidance's report as a sentence for the user."""
    what = {"json_schema": "the JSON schema", "regex": "the regex", "lark": "the grammar", "tools": "the schema of a tool"}
    reason = _first_line(message)
    if reason == "NoExtensionBias":  # of the first token
        return f"{what[grammar.kind]} cannot be used: nothing satisfies it"
    keys = re.search(r"Unimplemented keys: \[(.*)\]", reason)
    if keys:
        return f"{what[grammar.kind]} uses the keywords {keys[1]}, which are not supported; leave them out"
    return f"{what[grammar.kind]} cannot be used: {reason}"


def _first_line(message: str) -> str:
    """The telling line of a report: what follows "error: " in those of regular expressions, else the first line."""
    lines = message.strip().splitlines() or ["unknown reason"]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    line = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: |; following special tokens are available:.*", "", line)
    return line.strip().rstrip(".")[:300]


def _set_bits(words: np.ndarray, tokens: Iterable[int], value: bool) -> None:
    bits = words.view(np.uint32)
    for token in tokens:
        word, bit = token // 32, np.uint32(1 << token % 32)
        bits[word] = bits[word] | bit if value else bits[word] & ~bit


def _has_bit(words: Int32[Tensor, " words"], token: int) -> bool:
    return token // 32 < len(words) and bool(words[token // 32] >> (token % 32) & 1)

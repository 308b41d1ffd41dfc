"""Answers of random models that follow a grammar, masks against brute force, and what is refused."""

import functools
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finback.config import InputError
from finback.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from finback.engine.config import SamplingParams
from finback.engine.grammar import GrammarCompiler, GrammarMatcher
from finback.engine.grammar_config import Grammar
from finback.engine.llm import LLM
from finback.engine.sampler import SamplingRows, SamplingState, accept, sample
from tests.engine.models import V3_MTP
from tests.model.oracle import build

TEXTS = [
    '{"name": "The fox", "age": 12, "tags": ["a", "b"], "ok": true, "none": null, "x": -1.5e3}\n' * 3,
    "function get_weather city 2024-01-01 ```json\n{}\n``` </tool>\n\n\n",
    "狐狸抬头看。天色已晚，葡萄挂得很高！naïve café 🐋\n",
    "The fox looked up; it was late, and the grapes hung high!\n",
]
PADDING = 41  # rows of the model's vocabulary without a token


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 4, 400)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


@pytest.fixture(scope="module")
def plain_compiler() -> GrammarCompiler:
    """A vocabulary with the end-of-sentence token and nothing else that is special: no think or tool tags."""
    tokenizer = train_tokenizer(TEXTS * 4, 400)
    content = json.loads(tokenizer.backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    return GrammarCompiler(Tokenizer(type(tokenizer.backend).from_str(json.dumps(content)), tokenizer.config))


def write(
    compiler: GrammarCompiler, grammar: Grammar, seed: int, *, hurry: int = 60, length: int = 2000, check: bool = False
) -> tuple[str, GrammarMatcher]:
    """What a model with random logits writes at temperature 1. After `hurry` tokens it prefers what closes."""
    tokenizer = compiler.tokenizer
    matcher = compiler.compile(grammar).matcher()
    state = SamplingState(SamplingParams(), seed, [0])
    rows = SamplingRows([state])
    closing = torch.zeros(tokenizer.vocab_size + PADDING)
    for token in range(tokenizer.vocab_size):
        closing[token] = 8.0 * (tokenizer.token_bytes(token) in (b'"', b"}", b"]", b"0", b"1")) * (1 + (seed % 2))
    closing[tokenizer.eos_token_id] = 20.0
    for name in ("</think>", "<｜tool▁calls▁end｜>"):
        token = tokenizer.backend.token_to_id(name)
        if token is not None:
            closing[token] = 20.0
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while not matcher.is_finished:
        assert len(tokens) < length, tokenizer.decode(tokens)
        logits = torch.randn(1, tokenizer.vocab_size + PADDING, generator=generator) * 2
        if len(tokens) > hurry:
            logits += closing
        mask = matcher.mask()
        token = int(sample(logits, rows, mask=mask.unsqueeze(0)).token_ids)
        assert token < tokenizer.vocab_size
        matcher.advance(token)
        state.append(token)
        tokens.append(token)
    if tokens and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    assert tokenizer.eos_token_id not in tokens
    return tokenizer.decode(tokens), matcher


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["fox", "whale"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"name", "age", "kind"} <= value.keys() <= PERSON["properties"].keys()
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 20
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and value["kind"] in ("fox", "whale")
        and ("tags" not in value or (1 <= len(value["tags"]) <= 3 and all(re.fullmatch("[a-z]{2,4}", t) for t in value["tags"])))
        and (value.get("next") is None or is_person(value["next"]))
    )


SCHEMAS: list[tuple[Any, Callable[[Any], bool]]] = [
    (PERSON, is_person),
    ({"type": "boolean"}, lambda value: isinstance(value, bool)),
    ({"const": {"狐狸": [1, None]}}, lambda value: value == {"狐狸": [1, None]}),
    (
        {
            "type": "array",
            "prefixItems": [{"type": "null"}, {"type": "number", "exclusiveMinimum": 2}],
            "items": False,
            "minItems": 2,
        },
        lambda value: len(value) == 2 and value[0] is None and value[1] > 2,
    ),
    (
        {"type": "object", "additionalProperties": {"type": "integer"}, "required": ["x"]},
        lambda value: "x" in value and all(type(v) is int for v in value.values()),
    ),
    ({"type": "string", "format": "date"}, lambda value: re.fullmatch(r"\d{4}-\d\d-\d\d", value) is not None),
    (True, lambda value: True),
]


@pytest.mark.parametrize("seed", range(25))
def test_json_objects(compiler: GrammarCompiler, seed: int) -> None:
    text, _ = write(compiler, Grammar.json_object(), seed)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("number", range(len(SCHEMAS)))
def test_json_by_schema(compiler: GrammarCompiler, number: int, seed: int) -> None:
    schema, accepts = SCHEMAS[number]
    grammar = Grammar.json_schema(schema if seed % 2 or schema is True else json.dumps(schema))
    text, _ = write(compiler, grammar, seed)
    assert accepts(json.loads(text)), text


@pytest.mark.parametrize("seed", range(10))
def test_text_by_regex_and_lark(compiler: GrammarCompiler, seed: int) -> None:
    pattern = r"(yes|no|狐狸+): [0-9]{1,4}(\.[0-9]+)?"
    assert re.fullmatch(pattern, write(compiler, Grammar.regex(pattern), seed)[0])
    text, _ = write(compiler, Grammar.lark('start: sum\nsum: N ("+" sum)? | "(" sum ")"\nN: /[0-9]{1,3}/'), seed)
    assert re.fullmatch(r"[0-9+()]+", text)
    assert eval(re.sub(r"\d+", "1", text)) == len(re.findall(r"\d+", text))


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {k: v for k, v in PERSON.items() if k != "type"}}},
    {"type": "function", "function": {"name": "get", "description": "no arguments"}},
    {"type": "function", "function": {"name": "any-thing", "parameters": {"type": "object"}}},
]


def parse_calls(text: str) -> tuple[str, list[tuple[str, Any]]]:
    """The text before the calls, and names and arguments of these, by splitting at the published tags."""
    content, begin, rest = text.partition("<｜tool▁calls▁begin｜>")
    if not begin:
        return content, []
    assert rest.endswith("<｜tool▁calls▁end｜>")
    calls = []
    for call in rest.removesuffix("<｜tool▁calls▁end｜>").split("\n<｜tool▁call▁begin｜>"):
        match = re.fullmatch(
            r"function<｜tool▁sep｜>([\w-]+)\n```json\n(.*)\n```<｜tool▁call▁end｜>",
            call.removeprefix("<｜tool▁call▁begin｜>"),
            re.S,
        )
        assert match, call
        calls.append((match[1], json.loads(match[2])))
    return content, calls


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("choice", ["auto", "required", "get_weather", {"type": "function", "function": {"name": "get"}}])
def test_tool_calls(compiler: GrammarCompiler, plain_compiler: GrammarCompiler, choice: Any, with_tokens: bool) -> None:
    used = compiler if with_tokens else plain_compiler
    numbers = set()
    for seed in range(12):
        grammar = Grammar.tool_calls(TOOLS, choice, parallel=seed % 3 != 0)
        content, calls = parse_calls(write(used, grammar, seed)[0])
        numbers.add(len(calls))
        if seed % 3 == 0:
            assert len(calls) <= 1
        if choice != "auto":
            assert content == ""
            assert calls
        for name, arguments in calls:
            assert name in ("get_weather", "get", "any-thing")
            assert choice in ("auto", "required", name) or choice == {"type": "function", "function": {"name": name}}
            assert isinstance(arguments, dict)
            assert name != "get_weather" or is_person(arguments)
            assert name != "get" or arguments == {}
    assert max(numbers) > 1 or choice in ("auto", "get_weather")  # whose text or arguments are long


@pytest.mark.parametrize("with_tokens", [True, False])
def test_text_then_a_call_where_a_call_may_be(
    compiler: GrammarCompiler, plain_compiler: GrammarCompiler, with_tokens: bool
) -> None:
    used = compiler if with_tokens else plain_compiler
    matcher = used.compile(Grammar.tool_calls(TOOLS, "auto")).matcher()
    assert matcher.may_end
    text = (
        "I look. <b>\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{ }\n```<｜tool▁call▁end｜>"
    )
    for token in used.tokenizer.encode(text):
        matcher.advance(token)
    assert not matcher.may_end
    allowed = allowed_tokens(matcher, used.tokenizer)
    assert {used.tokenizer.token_bytes(token)[:1] for token in allowed} == {b"\n", b"<"}
    if with_tokens:
        assert len(used.tokenizer.encode("<｜tool▁calls▁begin｜>")) == 1
    for token in used.tokenizer.encode("<｜tool▁calls▁end｜>"):
        matcher.advance(token)
    assert matcher.is_finished
    assert allowed_tokens(matcher, used.tokenizer) == [used.tokenizer.eos_token_id]
    matcher.advance(used.tokenizer.eos_token_id)
    assert matcher.is_finished


def allowed_tokens(matcher: GrammarMatcher, tokenizer: Tokenizer) -> list[int]:
    words = matcher.mask()
    assert words.shape == ((tokenizer.vocab_size + 31) // 32,)
    bits = np.unpackbits(words.numpy().view(np.uint8), bitorder="little")
    assert not bits[tokenizer.vocab_size :].any()
    return np.flatnonzero(bits).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_masks_agree_with_brute_force(compiler: GrammarCompiler, seed: int) -> None:
    """A token is allowed if what it makes of the text is the beginning of a text that the grammar has. Where only one text can
    follow, llguidance keeps of these the token that the tokenizer would choose."""
    texts = ["ab", "abc", "café", "cat", "the fox", "the whale", "狐狸", "狐狗", "11", "1 1", "", "grapes hung high!"]
    tokenizer = compiler.tokenizer
    endings = {text.encode() for text in texts}
    spelled = {
        token: tokenizer.token_bytes(token)
        for token in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(token) not in [special.encode() for special in SPECIAL_TOKENS]
    }
    matcher = compiler.compile(Grammar.regex("|".join(map(re.escape, texts)))).matcher()
    chooser = random.Random(seed)
    written = b""
    while not matcher.is_finished:
        allowed = allowed_tokens(matcher, tokenizer)
        expected = [
            token for token, spelling in spelled.items() if any(ending.startswith(written + spelling) for ending in endings)
        ]
        assert matcher.may_end == (written in endings)
        expected += [tokenizer.eos_token_id] * (written in endings)
        following = {ending[len(written) : len(written) + 1] for ending in endings if ending.startswith(written)}
        if len(following) > 1:
            assert allowed == sorted(expected)
        else:
            assert set(allowed) <= set(expected)
            assert len(allowed) > 0
        token = chooser.choice(allowed)
        matcher.advance(token)
        written += b"" if token == tokenizer.eos_token_id else tokenizer.token_bytes(token)
    assert written in endings


def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    tokenizer = compiler.tokenizer
    specials = {tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    matcher = compiler.compile(Grammar.json_object()).matcher()
    for token in tokenizer.encode('{"'):
        matcher.advance(token)
    inside_a_string = allowed_tokens(matcher, tokenizer)
    assert len(inside_a_string) > 100
    assert not specials & set(inside_a_string)
    in_free_text = allowed_tokens(compiler.compile(Grammar.tool_calls(TOOLS)).matcher(), tokenizer)
    assert specials & set(in_free_text) == {tokenizer.eos_token_id, tokenizer.token_to_id("<｜tool▁calls▁begin｜>")}


@pytest.mark.parametrize("seed", range(12))
def test_the_grammar_begins_after_thinking(compiler: GrammarCompiler, seed: int) -> None:
    for grammar, accepts in (
        (Grammar.json_schema(PERSON, after_think=True), lambda text: is_person(json.loads(text))),
        (Grammar.regex("\n?ab", after_think=True), lambda text: text.lstrip("\n") == "ab" and text.count("\n") <= 3),
        (Grammar.tool_calls(TOOLS, "required", after_think=True), lambda text: len(parse_calls(text.lstrip("\n"))[1]) > 0),
    ):
        text, _ = write(compiler, grammar, seed, hurry=20)
        thinking, tag, answer = text.partition("</think>")
        assert tag
        assert accepts(answer), answer
        assert re.match("\n{0,2}[^\n]", answer) or grammar.kind == "regex"
        assert thinking


def test_after_thinking_newlines_and_the_end(compiler: GrammarCompiler) -> None:
    tokenizer = compiler.tokenizer
    matcher = compiler.compile(Grammar.json_object(after_think=True)).matcher()
    free = allowed_tokens(matcher, tokenizer)
    assert len(free) == tokenizer.vocab_size - 1
    assert tokenizer.eos_token_id not in free
    with pytest.raises(ValueError, match="may not end"):
        matcher.advance(tokenizer.eos_token_id)
    newline = tokenizer.encode("\n")[0]
    for token in (*tokenizer.encode("hm {"), tokenizer.token_to_id("</think>"), newline):
        matcher.advance(token)
    assert newline in allowed_tokens(matcher, tokenizer)
    matcher.advance(newline)
    assert {tokenizer.token_bytes(token)[:1] for token in allowed_tokens(matcher, tokenizer)} == {b"{"}
    matcher.rollback(2)
    assert newline in allowed_tokens(matcher, tokenizer)
    matcher.rollback(1)
    assert allowed_tokens(matcher, tokenizer) == free


@pytest.mark.parametrize("seed", range(8))
def test_rollback_leaves_no_trace(compiler: GrammarCompiler, seed: int) -> None:
    """Random walks forward and back, against a matcher that only goes forward."""
    tokenizer, chooser = compiler.tokenizer, random.Random(seed)
    grammars = [
        Grammar.json_schema(PERSON),
        Grammar.json_schema({"enum": [1, 12, 123]}),
        Grammar.tool_calls(TOOLS, "auto", after_think=True),
        Grammar.regex("a*"),
    ]
    compiled = compiler.compile(grammars[seed % len(grammars)])
    matcher, tokens = compiled.matcher(), []
    masks = [matcher.mask()]
    for _ in range(60):
        if chooser.random() < 0.4 or matcher.is_finished:
            count = chooser.randint(0, min(4, len(tokens)))
            matcher.rollback(count)
            del tokens[len(tokens) - count :], masks[len(masks) - count :]
        else:
            token = chooser.choice(allowed_tokens(matcher, tokenizer))
            matcher.advance(token)
            tokens.append(token)
            masks.append(matcher.mask())
        assert matcher.mask().equal(masks[-1])
        again = compiled.matcher()
        for token in tokens:
            again.advance(token)
        assert again.mask().equal(masks[-1])
        assert (again.may_end, again.is_finished) == (matcher.may_end, matcher.is_finished)


def test_a_token_that_is_not_allowed_changes_nothing(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar.json_object()).matcher()
    before = matcher.mask()
    for token in (compiler.tokenizer.encode("x")[0], compiler.tokenizer.eos_token_id, compiler.tokenizer.token_to_id("<think>")):
        with pytest.raises(ValueError, match=f"token {token} "):
            matcher.advance(token)
        assert matcher.mask().equal(before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_under_a_grammar_changes_no_token(compiler: GrammarCompiler, temperature: float) -> None:
    tokenizer = compiler.tokenizer
    table = torch.randn(tokenizer.vocab_size, tokenizer.vocab_size) * 2
    table[:, tokenizer.encode('"')[0]] += 4
    noise = torch.randn(tokenizer.vocab_size, tokenizer.vocab_size)
    compiled = compiler.compile(Grammar.json_schema(PERSON))
    params = SamplingParams(temperature=temperature)

    def plainly(seed: int) -> list[int]:
        state, matcher, tokens = SamplingState(params, seed, [0]), compiled.matcher(), [5]
        while not matcher.is_finished and len(tokens) < 50:
            token = int(sample(table[tokens[-1:]], SamplingRows([state]), mask=matcher.mask()[None]).token_ids)
            tokens.append(token)
            state.append(token)
            matcher.advance(token)
        return tokens

    def speculatively(seed: int) -> tuple[list[int], int]:
        state, matcher, tokens, accepted = SamplingState(params, seed, [0]), compiled.matcher(), [5], 0
        while not matcher.is_finished and len(tokens) < 50:
            drafts = []  # half of the drafts know the grammar, the others break it soon
            for ahead in range(3):
                logits = table[[*tokens, *drafts][-1:]] + noise[[*tokens, *drafts][-1:]]
                mask = matcher.masks(drafts)[-1:] if seed % 2 else None
                drafts.append(int(sample(logits, SamplingRows([state]), ahead=ahead, mask=mask).token_ids))
            masks = matcher.masks(drafts)
            own = sample(table[[tokens[-1], *drafts]], SamplingRows([state], [3]), mask=masks).token_ids.tolist()
            count = accept(drafts, own)
            accepted += count
            for token in own[: count + 1]:
                if matcher.is_finished or len(tokens) == 50:
                    break
                tokens.append(token)
                state.append(token)
                matcher.advance(token)
        return tokens, accepted

    total = 0
    for seed in range(4):
        tokens, accepted = speculatively(seed)
        assert tokens == plainly(seed)
        total += accepted
    assert total > 10


def tool(**parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", "parameters": parameters}}


NEVER_ENDING = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        (lambda: Grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), r"minimum \(5\) is greater than maximum \(3\)"),
        (lambda: Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "incompatible types"),
        (lambda: Grammar.json_schema({"if": {}, "then": {}}), 'JSON schema uses the keywords "if", "then", which are not supported'),
        (lambda: Grammar.json_schema({"properties": {"a": {"not": {}}}}), 'keywords "not"'),
        (lambda: Grammar.json_schema({"type": "foo"}), "foo"),
        (lambda: Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (lambda: Grammar.json_schema(False), "Unsatisfiable"),
        (lambda: Grammar.json_schema({"$ref": "#/$defs/x"}), "does not exist"),
        (lambda: Grammar.json_schema({"$ref": "http://example.com/x"}), "refers to 'http://example.com/x', which is not supported"),
        (lambda: Grammar.json_schema({"$ref": "#x", "$defs": {"x": {"$anchor": "x"}}}), "refers to '#x', which is not supported"),
        (lambda: Grammar.json_schema({"properties": {"a": {"$id": "http://example.com/x"}}}), "part with the name 'http://example.com/x'"),
        (lambda: Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (lambda: Grammar.json_schema({"type": "string", "format": "weird"}), "weird"),
        (lambda: Grammar.json_schema('{"type": '), "the JSON schema is not valid JSON"),
        (lambda: Grammar.json_schema("[1]"), "is a JSON list, it must be an object"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "cannot be written as JSON"),
        (lambda: Grammar.json_schema({"const": float("nan")}), "cannot be written as JSON"),
        (lambda: Grammar.json_schema('{"not":' * 5000 + "{}" + "}" * 5000), "nested too deeply"),
        (lambda: Grammar.json_schema('{"anyOf":[' * 300 + "{}" + "]}" * 300), "nested too deeply"),
        (lambda: Grammar.json_schema(NEVER_ENDING), "never ends"),
        (lambda: Grammar.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [NEVER_ENDING]}}}), "never ends"),
        (lambda: Grammar.json_schema({"type": "array", "minItems": 1, "items": {"$ref": "#"}}), "never ends"),
        (lambda: Grammar.json_schema({"anyOf": [NEVER_ENDING, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]}), "never"),
        (lambda: Grammar.regex("[a"), "the regex cannot be used: unclosed character class"),
        (lambda: Grammar.regex("("), "unclosed group"),
        (lambda: Grammar.regex("(?=x)"), "look-around"),
        (lambda: Grammar.regex("(" * 1000 + ")" * 1000), "the regex cannot be used"),
        (lambda: Grammar.regex("((a{1000}){1000}){1000}"), "the regex cannot be used"),
        (lambda: Grammar.regex(""), "must be a text that is not empty"),
        (lambda: Grammar.lark("start: x"), 'the grammar cannot be used: unknown name: "x"'),
        (lambda: Grammar.lark("start: <nope>"), 'unknown special token: "<nope>"'),
        (lambda: Grammar.lark("nope"), "the grammar cannot be used"),
        (lambda: Grammar.tool_calls([]), "1 to 128 tools"),
        (lambda: Grammar.tool_calls([{"type": "function"}]), r"tools\[0\]"),
        (lambda: Grammar.tool_calls([{"type": "function", "function": {"name": "a b"}}]), r"tools\[0\].function.name is 'a b'"),
        (lambda: Grammar.tool_calls([TOOLS[1], TOOLS[1]]), "two functions with the name 'get'"),
        (lambda: Grammar.tool_calls(TOOLS, "get_wether"), "'get_wether', which is not among the tools; did you mean 'get_weather'"),
        (lambda: Grammar.tool_calls(TOOLS, {"type": "function"}), "names the function None"),
        (lambda: Grammar.tool_calls([tool(type="array")]), 'of type "object"'),
        (lambda: Grammar.tool_calls([tool(**{"not": {}})]), 'the schema of a tool uses the keywords "not"'),
        (lambda: Grammar.tool_calls([tool(**NEVER_ENDING)]), "the schema of the function 'a' requires JSON that never ends"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_in_one_sentence(
    compiler: GrammarCompiler, grammar: Callable[[], Grammar], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence) as raised:
        compiler.compile(grammar())
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"city": {"type": "string", "required": True}}, "required": ["city"]},
        {"type": "string", "minItems": "1"},
        {"type": "string", "required": [["a"]]},
        {"type": "string", "properties": {"x": {"$ref": "#/foo"}}, "foo": {"allOf": 3, "anyOf": 1, "$ref": [1]}},
        {"type": "string", "properties": {"x": {"$ref": "#/foo/" + "9" * 5000}}, "foo": [1]},
    ],
)
def test_keywords_that_the_type_does_not_use_may_have_any_form(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    compiler.compile(Grammar.json_schema(schema))


def letters(count: int) -> list[dict[str, Any]]:
    """Schemas whose intersection has to remember which letters have come."""
    return [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(count)]


def chain(count: int, link: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Definitions that each refer to the next."""
    links = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "string"}}}


def alternatives(first: int, width: int = 8) -> str:
    return "^(" + "|".join(f"[^{chr(97 + first + j)}]{{{3 + first * 7 + j}}}" for j in range(width)) + ")*$"


STRING, OBJECT = {"type": "string"}, {"type": "object"}
DEAR: dict[str, tuple[Any, str]] = {
    "allOf": ({"allOf": letters(26)}, "26 regular expressions"),
    "siblings": ({"pattern": "x", "format": "date", "allOf": letters(7)}, "9 regular expressions"),
    "one alternative": ({**letters(1)[0], "anyOf": [STRING, {"allOf": letters(8)}]}, "9 regular expressions"),
    "references": (
        {
            "$ref": "#/$defs/d0",
            "$defs": {f"d{i}": {"allOf": [one, {"$ref": f"#/$defs/d{i + 1}"}]} for i, one in enumerate(letters(26))},
        },
        "26 regular expressions",
    ),
    "escaped references": (
        {"$defs": {"a b/c": {"allOf": letters(8)}}, "$ref": "#/%24defs/a%20b~1c", **letters(1)[0]},
        "9 regular expressions",
    ),
    "property": ({"allOf": [{**OBJECT, "properties": {"a": one}, "required": ["a"]} for one in letters(26)]}, "26 regular"),
    "any property": ({"allOf": [{**OBJECT, "additionalProperties": one} for one in letters(26)]}, "26 regular"),
    "property by pattern": (
        {**OBJECT, "properties": {"a": letters(1)[0]}, "patternProperties": {"^a": {"allOf": letters(8)}}},
        "9 regular expressions",
    ),
    "items": ({"allOf": [{"type": "array", "items": one, "minItems": 1} for one in letters(26)]}, "26 regular expressions"),
    "first items": ({"allOf": [{"type": "array", "prefixItems": [STRING, one]} for one in letters(26)]}, "26 regular"),
    "branches": ({"allOf": [{"type": "string", "pattern": alternatives(i)} for i in range(8)]}, "8 regular .* too long together"),
    "multiple": ({"type": "integer", "multipleOf": 999983}, "multiples of too large numbers"),
    "multiples": ({"allOf": [{"type": "integer", "multipleOf": p} for p in (83, 89, 97)]}, "multiples of too large numbers"),
    "many multiples": (
        {
            "anyOf": [
                {**OBJECT, "properties": {"a": {"type": "integer", "multipleOf": i}}, "required": ["a"]} for i in range(100, 600)
            ]
        },
        "multiples of too large numbers",
    ),
    "optional": ({**OBJECT, "properties": {f"p{i}": {} for i in range(9000)}}, "9000 optional properties"),
    "required": ({**OBJECT, "required": [f"p{i}" for i in range(20000)]}, "20000 required properties"),
    "values": ({"enum": [[i] for i in range(20000)]}, "20000 alternatives"),
    "name patterns": ({**OBJECT, "patternProperties": {f"^a{i:04}": {} for i in range(900)}}, "900 patternProperties"),
    "text": ({"enum": [f"value {i}" for i in range(200_000)]}, "bytes, more than 262144; make it shorter"),
    "deep": (chain(2000, lambda link: {"type": "array", "items": link}), "levels deep"),
    "deep alone": (chain(4000, lambda link: link), "levels deep"),
    "deep with siblings": (chain(4000, lambda link: {"minLength": 1, **link}), "levels deep"),
    "deep in deep": (
        chain(100, lambda link: functools.reduce(lambda inner, _: {"type": "array", "items": inner}, range(40), link)),
        "levels deep",
    ),
}


@pytest.mark.parametrize("kind", DEAR)
@pytest.mark.parametrize("as_tool", [False, True])
def test_what_would_keep_the_grammar_engine_busy_is_refused_at_once(compiler: GrammarCompiler, kind: str, as_tool: bool) -> None:
    """Some of these would take hours, and the deep ones end the process."""
    schema, sentence = DEAR[kind]
    inner = {"a": {name: part for name, part in schema.items() if name != "$defs"}}
    grammar = Grammar.json_schema(schema)
    if as_tool:
        grammar = Grammar.tool_calls([tool(type="object", properties=inner, **{"$defs": schema.get("$defs", {})})])
    start = time.process_time()
    with pytest.raises(InputError, match=sentence) as raised:
        compiler.compile(grammar)
    assert time.process_time() - start < 2
    assert str(raised.value).startswith(("the schema of the function 'a' ", "field tools ") if as_tool else "the JSON schema ")


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": letters(26)},
        {"type": "object", "properties": {one["pattern"]: one for one in letters(26)}, "required": [".*a.*"]},
        {"type": "array", "prefixItems": letters(26)},
        {"type": "object", "patternProperties": {f"^{chr(97 + i)}": one for i, one in enumerate(letters(26))}},
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {"kind": {"const": i}, "at": {"type": "string", "format": "date-time"}},
                        "required": ["kind"],
                    }
                    for i in range(60)
                ]
            },
        },
        {
            "$ref": "#/$defs/term",
            "$defs": {
                "term": {"anyOf": [{"$ref": "#/$defs/sum"}, {"$ref": "#/$defs/name"}, {"type": "number", "multipleOf": 0.01}]},
                "sum": {
                    "type": "object",
                    "properties": {"left": {"$ref": "#/$defs/term"}, "right": {"$ref": "#/$defs/term"}},
                    "required": ["left", "right"],
                },
                "name": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "pattern": "^[a-z]+$"}},
                    "required": ["name"],
                },
            },
        },
        {
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)} | {"d30": STRING},
            "$ref": "#/$defs/d0",
        },
        {"type": "object", "properties": {f"p{i}": {} for i in range(4000)}, "required": [f"p{i}" for i in range(4000)]},
        {"type": "object", "properties": {f"p{i}": {} for i in range(490)}},
        {"type": "string", "minLength": 10**9, "maxLength": 2 * 10**9},
        {"type": "array", "minItems": 10**5, "maxItems": 10**9},
        {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "integer", "multipleOf": 86400},
        chain(300, lambda link: {"type": "array", "items": link}),
    ],
    ids=range(14),
)
def test_schemas_that_only_look_dear_are_taken(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    start = time.process_time()
    compiler.compile(Grammar.json_schema(schema)).matcher().mask()
    assert time.process_time() - start < 4


def test_recursive_schemas_that_can_end_are_accepted(compiler: GrammarCompiler) -> None:
    for schema in (
        {**NEVER_ENDING, "required": []},
        {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]},
        {"type": "array", "items": {"$ref": "#"}},
        {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/b"}}, "required": ["b"]}, "b": {}},
        },
    ):
        json.loads(write(compiler, Grammar.json_schema(schema), 1)[0])


def test_thinking_needs_its_token(plain_compiler: GrammarCompiler) -> None:
    with pytest.raises(InputError, match="after_think needs a tokenizer with the token </think>"):
        plain_compiler.compile(Grammar.json_object(after_think=True))


def test_further_stop_tokens_end_where_the_grammar_may(tokenizer: Tokenizer) -> None:
    stop = tokenizer.token_to_id("<|EOT|>")
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_token_id, stop, 10**6])
    matcher = compiler.compile(Grammar.regex("a+")).matcher()
    a = tokenizer.encode("a")[0]
    assert stop not in allowed_tokens(matcher, tokenizer)
    matcher.advance(a)
    assert {stop, tokenizer.eos_token_id, a} <= set(allowed_tokens(matcher, tokenizer))
    matcher.advance(stop)
    assert matcher.is_finished
    matcher.rollback(1)
    assert not matcher.is_finished


def test_compiled_grammars_are_kept(compiler: GrammarCompiler) -> None:
    assert compiler.compile(Grammar.json_schema(PERSON)) is compiler.compile(Grammar.json_schema(json.dumps(PERSON)))
    assert hash(Grammar.tool_calls(TOOLS)) == hash(Grammar.tool_calls(TOOLS))


@pytest.fixture(scope="module")
def whole_words() -> Tokenizer:
    """A vocabulary that fills its words of 32 bits."""
    tokenizer = train_tokenizer(TEXTS * 4, 416)
    assert tokenizer.vocab_size % 32 == 0
    return tokenizer


def test_every_phase_has_a_mask_of_the_same_width(tokenizer: Tokenizer, whole_words: Tokenizer) -> None:
    for each in (tokenizer, whole_words):
        compiler = GrammarCompiler(each)
        thought, end = each.encode("a"), each.backend.token_to_id("</think>")
        yes = each.encode("Yes")
        matcher = compiler.compile(Grammar.regex("Yes", after_think=True)).matcher()
        words = -(-each.vocab_size // 32)
        for token in (*thought, end, *yes, each.eos_token_id):
            assert matcher.mask().shape == (words,)
            matcher.advance(token)
        assert matcher.is_finished
        assert matcher.mask().shape == (words,)
        drafted = compiler.compile(Grammar.regex("Yes", after_think=True)).matcher()
        assert drafted.masks([*thought, end, *yes, each.eos_token_id]).shape == (len(thought) + len(yes) + 3, words)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_grammars_in_different_phases_share_a_step(whole_words: Tokenizer, drafts: int) -> None:
    """A thought, JSON, and an answer that has ended and goes on to its limit: each is the one of the request alone."""
    config = replace(V3_MTP, vocab_size=whole_words.vocab_size)
    model = build(config)
    params = [
        SamplingParams(max_tokens=24, seed=1, grammar=Grammar.json_object(after_think=True)),
        SamplingParams(max_tokens=24, seed=2, grammar=Grammar.json_object()),
        SamplingParams(max_tokens=12, seed=3, grammar=Grammar.regex("Yes")),
        SamplingParams(max_tokens=12, temperature=0),
    ]
    prompts = [[5, 6, 7]] * len(params)
    llm = LLM(model=model, tokenizer=whole_words, num_speculative_tokens=drafts, max_num_seqs=4)
    together = [output.token_ids for output in llm.generate(prompts, params)]
    alone = LLM(model=model, tokenizer=whole_words, max_num_seqs=1)
    for tokens, one in zip(together, params, strict=True):
        assert tokens == alone.generate([[5, 6, 7]], one)[0].token_ids
    assert whole_words.decode(together[2], skip_special_tokens=True) == "Yes"


@pytest.mark.parametrize("grammar", [Grammar.json_schema({"$ref": "#"}), Grammar.regex(r"[^\s\S]")], ids=["loop", "no character"])
def test_a_grammar_that_nothing_satisfies_is_told_in_plain_words(compiler: GrammarCompiler, grammar: Grammar) -> None:
    with pytest.raises(InputError, match="nothing satisfies it"):
        compiler.compile(grammar)

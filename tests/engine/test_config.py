"""Every wrong field of `SamplingParams` is told by its name, its value and what to do; what is meant is accepted and normalised."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import finback.engine.config
from finback.config import InputError
from finback.engine.config import SamplingParams
from finback.engine.grammar_config import Grammar

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": "1"}, "field temperature is '1', it must be a number"),
        ({"temperature": None}, "field temperature is None, it must be a number"),
        ({"temperature": True}, "field temperature is True, it must be a number"),
        ({"temperature": 1j}, "field temperature is 1j, it must be a number"),
        ({"temperature": -0.5}, "field temperature is -0.5, it must be at least 0 and finite"),
        ({"temperature": NAN}, "field temperature is nan, it must be at least 0 and finite"),
        ({"temperature": INF}, "field temperature is inf, it must be at least 0 and finite"),
        ({"temperature": 10**309}, "it must be at least 0 and finite"),
        ({"top_p": 0}, "field top_p is 0, it must be above 0 and at most 1"),
        ({"top_p": 1.0001}, "field top_p is 1.0001, it must be above 0 and at most 1"),
        ({"top_p": -0.1}, "field top_p is -0.1"),
        ({"top_p": NAN}, "field top_p is nan"),
        ({"top_p": False}, "field top_p is False, it must be a number"),
        ({"top_p": [1.0]}, "field top_p is [1.0], it must be a number"),
        ({"top_k": -1}, f"field top_k is -1, it must be a whole number from 0 to {2**63 - 1}"),
        ({"top_k": 4.0}, "field top_k is 4.0, it must be a whole number from 0"),
        ({"top_k": True}, "field top_k is True"),
        ({"top_k": None}, "field top_k is None"),
        ({"top_k": NAN}, "field top_k is nan"),
        ({"top_k": 2**63}, f"field top_k is {2**63}, it must be a whole number from 0 to {2**63 - 1}"),
        ({"min_p": -1e-9}, "field min_p is -1e-09, it must be at least 0 and at most 1"),
        ({"min_p": 2}, "field min_p is 2, it must be at least 0 and at most 1"),
        ({"min_p": NAN}, "field min_p is nan"),
        ({"min_p": "0"}, "field min_p is '0', it must be a number"),
        ({"max_tokens": 0}, "field max_tokens is 0, it must be a whole number of at least 1, or None"),
        ({"max_tokens": -3}, "field max_tokens is -3"),
        ({"max_tokens": 16.0}, "field max_tokens is 16.0, it must be a whole number"),
        ({"max_tokens": True}, "field max_tokens is True"),
        ({"max_tokens": "16"}, "field max_tokens is '16'"),
        ({"max_tokens": INF}, "field max_tokens is inf"),
        ({"seed": -1}, f"field seed is -1, it must be a whole number from 0 to {2**63 - 1}, or None"),
        ({"seed": 2**63}, f"field seed is {2**63}"),
        ({"seed": 0.0}, "field seed is 0.0"),
        ({"seed": False}, "field seed is False"),
        ({"seed": NAN}, "field seed is nan"),
        ({"stop": 5}, "field stop is 5, it must be a text or a list of texts"),
        ({"stop": None}, "field stop is None, it must be a text or a list of texts"),
        ({"stop": ["a", 5]}, "field stop is ['a', 5], it must be a text or a list of texts"),
        ({"stop": b"a"}, "field stop is b'a'"),
        ({"stop": {"a"}}, "field stop is {'a'}"),
        ({"stop": ""}, "field stop is '', it must not hold an empty text"),
        ({"stop": ["a", ""]}, "field stop is ['a', ''], it must not hold an empty text"),
        ({"stop": ["x"] * 17}, "field stop holds 17 texts, it must hold at most 16"),
        ({"stop_token_ids": 5}, "field stop_token_ids is 5, it must be a list of token ids"),
        ({"stop_token_ids": "12"}, "field stop_token_ids is '12'"),
        ({"stop_token_ids": [1.0]}, "field stop_token_ids is [1.0]"),
        ({"stop_token_ids": [True]}, "field stop_token_ids is [True]"),
        ({"stop_token_ids": [-1]}, "field stop_token_ids is [-1]"),
        ({"stop_token_ids": None}, "field stop_token_ids is None"),
        ({"ignore_eos": 1}, "field ignore_eos is 1, it must be True or False"),
        ({"ignore_eos": None}, "field ignore_eos is None"),
        ({"include_stop_str_in_output": "yes"}, "field include_stop_str_in_output is 'yes', it must be True or False"),
        ({"skip_special_tokens": 0.0}, "field skip_special_tokens is 0.0, it must be True or False"),
        ({"logprobs": -1}, "field logprobs is -1, it must be a whole number from 0 to 20, or None"),
        ({"logprobs": 21}, "field logprobs is 21, it must be a whole number from 0 to 20, or None"),
        ({"logprobs": True}, "field logprobs is True"),
        ({"logprobs": 2.0}, "field logprobs is 2.0"),
        ({"frequency_penalty": 2.1}, "field frequency_penalty is 2.1, it must be at least -2 and at most 2"),
        ({"frequency_penalty": -2.1}, "field frequency_penalty is -2.1"),
        ({"frequency_penalty": NAN}, "field frequency_penalty is nan"),
        ({"frequency_penalty": None}, "field frequency_penalty is None, it must be a number"),
        ({"presence_penalty": 3}, "field presence_penalty is 3, it must be at least -2 and at most 2"),
        ({"presence_penalty": -INF}, "field presence_penalty is -inf"),
        ({"presence_penalty": "0"}, "field presence_penalty is '0', it must be a number"),
        ({"repetition_penalty": 0}, "field repetition_penalty is 0, it must be at least 0.001 and at most 1000"),
        ({"repetition_penalty": -1.0}, "field repetition_penalty is -1.0"),
        ({"repetition_penalty": INF}, "field repetition_penalty is inf, it must be at least 0.001 and at most 1000"),
        ({"repetition_penalty": 1e-45}, "field repetition_penalty is 1e-45"),
        ({"repetition_penalty": NAN}, "field repetition_penalty is nan"),
        ({"repetition_penalty": True}, "field repetition_penalty is True, it must be a number"),
        ({"logit_bias": [1]}, "field logit_bias is [1], it must map token ids to numbers"),
        ({"logit_bias": {"5": 1.0}}, "field logit_bias has the key '5', it must be a token id"),
        ({"logit_bias": {-1: 1.0}}, "field logit_bias has the key -1"),
        ({"logit_bias": {True: 1.0}}, "field logit_bias has the key True"),
        ({"logit_bias": {1.0: 1.0}}, "field logit_bias has the key 1.0"),
        ({"logit_bias": {5: 100.5}}, "field logit_bias[5] is 100.5, it must be at least -100 and at most 100"),
        ({"logit_bias": {5: NAN}}, "field logit_bias[5] is nan"),
        ({"logit_bias": {5: None}}, "field logit_bias[5] is None, it must be a number"),
        ({"logit_bias": {5: True}}, "field logit_bias[5] is True, it must be a number"),
        ({"grammar": "json"}, "field grammar is 'json', it must be a Grammar"),
        ({"cache_key": None}, "field cache_key is None, it must be a text"),
        ({"cache_key": b"key"}, "field cache_key is b'key', it must be a text"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        SamplingParams(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 1e-320},
        {"temperature": 1.7976931348623157e308},
        {"top_p": 1e-9},
        {"top_p": 1.0},
        {"top_k": 10**9},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"max_tokens": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"logprobs": 0},
        {"logprobs": 20},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0},
        {"repetition_penalty": 1e-3},
        {"logit_bias": {0: -100.0, 128000: 100.0}},
        {"logit_bias": {}},
        {"stop": ("x",) * 16},
        {"cache_key": "\ud800"},
        {"grammar": Grammar.json_object()},
    ],
)
def test_the_ends_of_each_range_are_accepted(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert {name: getattr(params, name) for name in values} == values


def test_values_are_stored_in_their_types() -> None:
    params = SamplingParams(
        temperature=0, top_p=1, min_p=0, frequency_penalty=1, presence_penalty=-1, repetition_penalty=2, logit_bias={3: 4}
    )
    for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"):
        assert type(getattr(params, name)) is float
    assert params.logit_bias == {3: 4.0}
    assert type(params.logit_bias[3]) is float
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[7, 8]).stop_token_ids == (7, 8)  # type: ignore[arg-type]


def test_a_later_change_of_what_was_given_changes_nothing() -> None:
    bias, stop = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)  # type: ignore[arg-type]
    bias[1], stop[0] = 3.0, "b"
    assert params == SamplingParams(logit_bias={1: 2.0}, stop=("a",))


def test_the_words_of_validation_hold_for_every_field() -> None:
    """No field is left unchecked: an object of no sensible type is refused everywhere."""
    for field in fields(SamplingParams):
        with pytest.raises(InputError, match=f"field {field.name} is "):
            SamplingParams(**{field.name: object()})


def test_every_field_has_a_meaning_in_its_help() -> None:
    text = Path(finback.engine.config.__file__).read_text(encoding="utf-8")
    for field in fields(SamplingParams):
        assert re.search(rf'\n    {field.name}: [^\n]+\n    """', text), field.name

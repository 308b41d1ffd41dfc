"""What a request asks of the engine: `SamplingParams`. No torch, so that `--help` and servers start at once."""

import math
from dataclasses import dataclass
from typing import Any, no_type_check

from finback.config import InputError
from finback.engine.grammar_config import Grammar

DEFAULT_MAX_TOKENS = 4096
"""The longest answer where `max_tokens` is not given, room in the context and the cache permitting."""
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20


@no_type_check  # under pytest, too, a wrong type is told by the sentences below
@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Names are vLLM's. Raises InputError for a value that cannot be meant.

    Whole numbers are accepted where floats are asked for, a text or a list for `stop`, a list for `stop_token_ids`; what is stored
    has the types below. Whether token ids lie within the vocabulary is checked when the request is added.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens whose probability reaches it."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    max_tokens: int | None = None
    """Longest answer in tokens; None: 4096, or what room is left in the context and the cache."""
    seed: int | None = None
    """The request's random draws depend on it and on their position only; None: one is drawn when the request is added."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, at most 16."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end-of-sequence token."""
    include_stop_str_in_output: bool = False
    """Leave the stop text at the end of the answer."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of this many likeliest ones, 0 to 20; None: none at all. They are the model's: before
    penalties, grammar, temperature and filters."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it stands in the answer, -2 to 2."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once if it stands in the answer, -2 to 2."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens in prompt and answer are divided by it, negative ones multiplied, 0.001 to 1000; 1: no penalty."""
    logit_bias: dict[int, float] | None = None
    """Token id -> what is added to its logit, -100 to 100."""
    grammar: Grammar | None = None
    """A grammar that the answer must follow; None: any text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    cache_key: str = ""
    """Only requests with the same key share cached prefixes."""

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            _check_integer(name, getattr(self, name), least)
        for name, limits in _NUMBERS.items():
            object.__setattr__(self, name, _number(f"field {name}", getattr(self, name), *limits))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"field {name} is {getattr(self, name)!r}, it must be True or False")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InputError(f"field grammar is {self.grammar!r}, it must be a Grammar, such as Grammar.json_object()")
        if not isinstance(self.cache_key, str):
            raise InputError(f"field cache_key is {self.cache_key!r}, it must be a text")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))


# Field -> least and largest value (None: no limit), and whether None is a value.
_INTEGERS: dict[str, tuple[int, int | None, bool]] = {
    "top_k": (0, 2**63 - 1, False),
    "max_tokens": (1, None, True),
    "seed": (0, 2**63 - 1, True),
    "logprobs": (0, MAX_LOGPROBS, True),
}
# Field -> smallest and largest value, and whether the smallest itself is left out.
_NUMBERS = {
    "temperature": (0.0, math.inf, False),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (1e-3, 1e3, False),
}


def is_integer(value: object) -> bool:
    """A whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, limits: tuple[int, int | None, bool]) -> None:
    least, largest, may_be_none = limits
    if value is None and may_be_none:
        return
    if not is_integer(value) or value < least or (largest is not None and value > largest):
        wanted = f"of at least {least}" if largest is None else f"from {least} to {largest}"
        raise InputError(f"field {name} is {value!r}, it must be a whole number {wanted}{', or None' if may_be_none else ''}")


def _number(name: str, value: Any, least: float, largest: float, above: bool) -> float:
    """`value` as a float. InputError, naming `name`, where it is no finite number within the limits."""
    if not (is_integer(value) or isinstance(value, float)):
        raise InputError(f"{name} is {value!r}, it must be a number")
    # Compared before the conversion: a whole number may be too large for a float.
    if not least <= value <= largest or (above and value == least) or abs(value) > _LARGEST_FLOAT:
        start = f"above {least:g}" if above else f"at least {least:g}"
        raise InputError(
            f"{name} is {value!r}, it must be {start} and {f'at most {largest:g}' if largest < math.inf else 'finite'}"
        )
    return float(value)


_LARGEST_FLOAT = float.fromhex("0x1.fffffffffffffp+1023")


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) for text in stops):
        raise InputError(f"field stop is {stop!r}, it must be a text or a list of texts")
    if not all(stops):
        raise InputError(f"field stop is {stop!r}, it must not hold an empty text, which would end every answer at once")
    if len(stops) > MAX_STOP_STRINGS:
        raise InputError(f"field stop holds {len(stops)} texts, it must hold at most {MAX_STOP_STRINGS}")
    return tuple(stops)


def _token_ids(tokens: Any) -> tuple[int, ...]:
    if not isinstance(tokens, list | tuple) or not all(is_integer(token) and token >= 0 for token in tokens):
        raise InputError(f"field stop_token_ids is {tokens!r}, it must be a list of token ids, whole numbers of at least 0")
    return tuple(tokens)


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, dict):
        raise InputError(f"field logit_bias is {bias!r}, it must map token ids to numbers")
    for token in bias:
        if not is_integer(token) or token < 0:
            raise InputError(f"field logit_bias has the key {token!r}, it must be a token id, a whole number of at least 0")
    return {token: _number(f"field logit_bias[{token}]", value, -100.0, 100.0, False) for token, value in bias.items()}

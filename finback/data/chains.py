"""Sums of several terms, and the many ways in which a text from the web would work them out: the small ladder's task.

A pre-training corpus of these shows a model good and bad habits side by side: answers without a thought, leaps, slips, thoughts in
two languages at once, answers without their tags. Reinforcement learning then has something to choose from, as it has in a large
model's corpus (R1 section 2.2). Clean traces, for supervised fine-tuning, are one way of writing among them.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from finback.config import InputError
from finback.data.problems import Language, is_held_out


@dataclass(frozen=True)
class Chain:
    """A signed sum, all of whose partial sums are at least zero."""

    terms: tuple[int, ...]
    language: Language

    @property
    def question(self) -> str:
        written = _written(self.terms)
        return f"计算{written}。" if self.language == "zh" else f"What is {written}?"

    @property
    def answer(self) -> str:
        return str(sum(self.terms))


@dataclass(frozen=True)
class ChainSettings:
    """Which sums are asked for."""

    least_terms: int = 3
    most_terms: int = 6
    largest: int = 9
    """Terms are drawn from 1 to this number."""
    distinct: bool = False
    """No number occurs twice in a sum: what follows a term in the question is then one thing only, and a model that learns to copy
    finds it sooner."""

    def __post_init__(self) -> None:
        if not 2 <= self.least_terms <= self.most_terms:
            given = f"{self.least_terms} and {self.most_terms}"
            raise InputError(f"fields least_terms and most_terms are {given}, they must be at least 2 and not fall")
        if self.largest < 1:
            raise InputError(f"field largest is {self.largest}, it must be at least 1")
        if self.distinct and self.largest < self.most_terms:
            raise InputError(
                f"field largest is {self.largest}, it must be at least most_terms, {self.most_terms}, for distinct terms"
            )


@dataclass(frozen=True)
class Habits:
    """Shares of the ways of writing in a corpus of chains; what the first four leave is clutter."""

    facts: float = 0.14
    """Lists of single sums, all right."""
    direct: float = 0.20
    """An answer without a thought."""
    leaps: float = 0.32
    """A thought that adds two or three terms at a time."""
    steps: float = 0.22
    """A thought that adds one term at a time."""
    tagged: float = 0.6
    """Of the answers after a thought, wear <answer> tags, with the thought between think tokens."""
    tagged_direct: float = 0.6
    """Of the answers without a thought, wear them."""
    slip: float = 0.07
    """Of the steps, have a wrong result, with which the thought goes on."""
    slip_direct: float = 0.3
    """Of the answers without a thought, are wrong."""
    slip_answer: float = 0.08
    """Of the answers after a thought, are not what the thought ended with."""
    noticed: float = 0.3
    """Of the slips, are noticed in the next line and mended."""
    own_language: float = 0.4
    """Of the thoughts, are in the question's language throughout."""
    other_language: float = 0.2
    """Of the thoughts, are in the other language throughout; the rest switch between lines."""
    equations: bool = False
    """Each line of a thought is the single sum that it works out, 7+5=12, as in the lists of single sums. Otherwise it is what is left
    of the question's sum, 12-3+4: what is added up stands a line higher there, and a small model finds out later what follows."""
    repeats: bool = False
    """What is asked is written once more: a thought begins with the question's sum, single sums are listed before they are worked out,
    and clutter may be the question itself. A model that has not learnt to copy cannot use what it knows of sums."""


def generate_chains(count: int, settings: ChainSettings, *, seed: int, held_out: bool = False) -> Iterator[Chain]:
    """`count` sums, half of them asked for in Chinese: with `held_out` only held-out questions, without it never one."""
    generator = random.Random(f"chains/{seed}/{held_out}")
    produced = 0
    while produced < count:
        chain = _draw(generator, settings)
        if is_held_out(chain.question) == held_out:
            produced += 1
            yield chain


def _draw(generator: random.Random, settings: ChainSettings) -> Chain:
    terms = [generator.randint(1, settings.largest)]
    for _ in range(generator.randint(settings.least_terms, settings.most_terms) - 1):
        used = {abs(term) for term in terms} if settings.distinct else set()
        term = generator.choice([number for number in range(1, settings.largest + 1) if number not in used])
        terms.append(-term if generator.random() < 0.4 and term <= sum(terms) else term)
    return Chain(tuple(terms), "zh" if generator.random() < 0.5 else "en")


def prompt_text(question: str) -> str:
    """What stands before an answer in the corpus."""
    return f"User: {question}\nAssistant:"


def clean_thought(chain: Chain, habits: Habits = Habits()) -> str:
    """The reference: one term a step, in the question's language, without a slip, in the form of the lines that `habits` has."""
    flawless = replace(habits, slip=0, slip_answer=0, own_language=1, other_language=0, tagged=1)
    return _thought(chain, random.Random(0), flawless, leaps=False)[0]  # nothing is drawn where every share is 0 or 1


def chain_documents(count: int, settings: ChainSettings, habits: Habits, *, seed: int) -> Iterator[str]:
    """`count` documents, whole dialogues, as `habits` have them. No held-out sum stands in them, neither as a question nor as a line of
    a thought."""
    generator = random.Random(f"chain documents/{seed}")
    produced = 0
    while produced < count:
        document = _document(_draw(generator, settings), generator, settings, habits)
        if not any(_is_held_out_sum(line) for line in document.splitlines()):
            produced += 1
            yield document


def _document(chain: Chain, generator: random.Random, settings: ChainSettings, habits: Habits) -> str:
    place = generator.random()
    if place < habits.facts:
        return _facts(generator, settings, habits)
    if place < habits.facts + habits.direct:
        wrong = generator.random() < habits.slip_direct
        result = _wrong(generator, sum(chain.terms)) if wrong else sum(chain.terms)
        return prompt_text(chain.question) + _answer("", str(result), tagged=generator.random() < habits.tagged_direct)
    if place < habits.facts + habits.direct + habits.leaps + habits.steps:
        leaps = place < habits.facts + habits.direct + habits.leaps
        thought, result = _thought(chain, generator, habits, leaps=leaps)
        if generator.random() < habits.slip_answer:
            result = _wrong(generator, result)
        return prompt_text(chain.question) + _answer(thought, str(result), tagged=generator.random() < habits.tagged)
    return _clutter(generator, settings, habits, chain)


def _is_held_out_sum(line: str) -> bool:
    """Whether a line holds a sum of at least three terms that is held out, with or without its result."""
    asked = line.partition("=")[0]
    return len(_SIGNS.findall(asked)) >= 2 and is_held_out(asked)


_SIGNS = re.compile("[-+]")
_WORDS = {
    "en": {"first": "first ", "then": "then ", "wait": "wait, that is wrong: "},
    "zh": {"first": "先得", "then": "再得", "wait": "等等，不对："},
}


def _thought(chain: Chain, generator: random.Random, habits: Habits, *, leaps: bool) -> tuple[str, int]:
    """Lines of working, and the result they arrive at. A line is the sum with its first terms added up, or the equation of these."""
    spoken = _languages(chain.language, generator, habits)
    total, rest = chain.terms[0], list(chain.terms[1:])
    lines, word = [_written(chain.terms)] if habits.repeats else [], "first"
    while rest:
        taken, rest = rest[: (count := generator.randint(2, 3) if leaps else 1)], rest[count:]
        asked, right = _written((total, *taken)), total + sum(taken)
        # A leap is as likely to slip for each term that it skips.
        slipped = any(generator.random() < habits.slip for _ in taken)
        total = _wrong(generator, right) if slipped else right
        lines.append(next(spoken)[word] + (f"{asked}={total}" if habits.equations else _written((total, *rest))))
        if slipped and generator.random() < habits.noticed:
            total = right
            lines.append(next(spoken)["wait"] + (f"{asked}={total}" if habits.equations else _written((total, *rest))))
        word = "then"
    return "\n".join(lines), total


def _languages(own: Language, generator: random.Random, habits: Habits) -> Iterator[dict[str, str]]:
    """The words of each line to come."""
    other = "en" if own == "zh" else "zh"
    place = generator.random()
    while True:
        if place < habits.own_language:
            yield _WORDS[own]
        elif place < habits.own_language + habits.other_language:
            yield _WORDS[other]
        else:
            yield _WORDS[own if generator.random() < 0.5 else other]


def _answer(thought: str, result: str, *, tagged: bool) -> str:
    if tagged:
        return f" <think>\n{thought}\n</think>\n<answer>{result}</answer>" if thought else f" <answer>{result}</answer>"
    return f" {thought}\n{result}" if thought else f" {result}"


def _facts(generator: random.Random, settings: ChainSettings, habits: Habits) -> str:
    """Single sums as they occur in the middle of a chain."""
    asked, solved = [], []
    for _ in range(generator.randint(3, 7) if habits.repeats else generator.randint(4, 10)):
        total, term = generator.randint(0, settings.largest * settings.most_terms // 2), generator.randint(1, settings.largest)
        subtracts = generator.random() < 0.4 and term <= total
        asked.append(f"{total}-{term}" if subtracts else f"{total}+{term}")
        solved.append(f"{asked[-1]}={total - term if subtracts else total + term}")
    return "\n".join(asked + solved if habits.repeats else solved)


def _clutter(generator: random.Random, settings: ChainSettings, habits: Habits, chain: Chain) -> str:
    """A dialogue that leads nowhere."""
    kind = generator.randrange(3)
    if kind == 0:
        return prompt_text(chain.question) + " " + "?" * generator.randint(1, 8)
    if kind == 1:
        return prompt_text(chain.question) + " " + (chain if habits.repeats else _draw(generator, settings)).question
    return prompt_text(chain.question) + " " + " ".join(str(generator.randint(0, 99)) for _ in range(generator.randint(1, 8)))


def _wrong(generator: random.Random, number: int) -> int:
    """A number near `number` that is not it, and not below zero."""
    offset = generator.choice((1, 1, 2, 3, 10))
    return number + offset if number < offset or generator.random() < 0.5 else number - offset


def _written(terms: Sequence[int]) -> str:
    """7, -3, 12 -> 7-3+12."""
    return str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])

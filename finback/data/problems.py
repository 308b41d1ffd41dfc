"""Small verifiable reasoning problems with worked solutions, in English and Chinese, from a seed and nothing else.

They stand in for the R1 pipeline's verifiable tasks where no data set can be had: text for pre-training here, prompts
with checkable answers for reinforcement learning and evaluation later. One question in twenty, by a hash of its text,
is held out: training text never contains it, so that what is measured later was never read.
"""

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from finback.config import InputError, nearest
from finback.data.sources import Document

Language = Literal["en", "zh"]
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Problem:
    """A question, one worked way to its answer, and the answer itself, to be compared as a string."""

    question: str
    reasoning: str
    answer: str
    family: str
    language: Language = "en"

    @property
    def text(self) -> str:
        """The problem as a plain document for pre-training, thoughts between the think tokens."""
        ask, reply = ("问题：", "答案：") if self.language == "zh" else ("Question: ", "Answer: ")
        thoughts = f"<think>\n{self.reasoning}\n</think>\n" if self.reasoning else ""
        return f"{ask}{self.question}\n{thoughts}{reply}{self.answer}\n"


Maker = Callable[[random.Random, int, Language], Problem]


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out 5%.

    By a hash of its numbers and the signs of arithmetic in their order, so that the same numbers asked for in other
    words or in the other language are held out with it. A question without numbers is taken by its letters, in one
    case and without spaces.
    """
    plain = unicodedata.normalize("NFKC", question).casefold()
    numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?|[-+*/=]", plain)
    key = " ".join(numbers) if any(part[0].isdigit() for part in numbers) else "".join(plain.split())
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def generate_problems(
    count: int,
    *,
    seed: int = 0,
    families: Sequence[str] | None = None,
    languages: Sequence[str] = ("en", "zh"),
    levels: Sequence[int] = (1, 2, 3),
    held_out: bool = False,
) -> Iterator[Problem]:
    """`count` problems, each from a family, language and level drawn at random.

    The same arguments give the same problems, everywhere. `levels` go from 1 (one-digit numbers, few steps) to 3. With
    `held_out` only held-out questions come, without it never one. Easy families have few different questions, so
    repetitions occur. Raises InputError for an unknown family, language or level.
    """
    makers = _choose_families(families)
    spoken: list[Language] = ["zh" if language == "zh" else "en" for language in languages]
    if not languages or spoken != list(languages):
        raise InputError(f"languages are {list(languages)}; choose among 'en' and 'zh'")
    if not levels or not set(levels) <= {1, 2, 3}:
        raise InputError(f"levels are {list(levels)}; choose among 1, 2 and 3")
    generator = random.Random(f"problems/{seed}/{held_out}")
    produced = 0
    while produced < count:
        make = makers[generator.randrange(len(makers))]
        level, language = levels[generator.randrange(len(levels))], spoken[generator.randrange(len(spoken))]
        problem = make(generator, level, language)
        if is_held_out(problem.question) == held_out:
            produced += 1
            yield problem


def problem_documents(count: int, *, seed: int = 0, families: Sequence[str] | None = None) -> Iterator[Document]:
    """`generate_problems` as training documents, never a held-out question."""
    for problem in generate_problems(count, seed=seed, families=families):
        yield Document(problem.text, f"problems/{problem.family}")


def family_names() -> list[str]:
    """The names of the families, in order."""
    return [make.__name__ for make in FAMILIES]


def _choose_families(names: Sequence[str] | None) -> Sequence[Maker]:
    if names is None:
        return FAMILIES
    known = family_names()
    for name in names:
        if name not in known:
            raise InputError(f"there is no problem family {name!r}{nearest(name, known) or '; choose among ' + ', '.join(known)}")
    if not names:
        raise InputError("give at least one problem family, or none at all for every family")
    return [FAMILIES[known.index(name)] for name in names]


def _number(generator: random.Random, level: int) -> int:
    return generator.randint(1, (9, 49, 199)[level - 1])


def _numbers(generator: random.Random, level: int, extra: int = 0) -> list[int]:
    return [_number(generator, level) for _ in range(generator.randint(2, 2 + level) + extra)]


def _pick(generator: random.Random, language: Language, english: Sequence[str], chinese: Sequence[str]) -> str:
    forms = chinese if language == "zh" else english
    return forms[generator.randrange(len(forms))]


def addition(generator: random.Random, level: int, language: Language) -> Problem:
    """A sum of several numbers, term by term."""
    terms = _numbers(generator, level)
    form = _pick(generator, language, ("What is {}?", "Calculate {}.", "Add up: {}."), ("计算{}。", "{}等于多少？", "求{}的和。"))
    return _chain(form, "addition", language, terms)


def subtraction(generator: random.Random, level: int, language: Language) -> Problem:
    """Numbers taken away from a larger one, one after the other, never below zero."""
    taken = _numbers(generator, level)[: 1 + level]
    start = sum(taken) + _number(generator, level)
    form = _pick(generator, language, ("What is {}?", "Calculate {}.", "Work out {}."), ("计算{}。", "{}等于多少？", "求{}。"))
    return _chain(form, "subtraction", language, [start, *(-number for number in taken)])


def mixed_chain(generator: random.Random, level: int, language: Language) -> Problem:
    """Additions and subtractions mixed; the running total never falls below zero."""
    terms = [_number(generator, level)]
    for number in _numbers(generator, level):
        terms.append(-number if generator.random() < 0.5 and number <= sum(terms) else number)
    form = _pick(generator, language, ("What is {}?", "Find the value of {}."), ("计算{}。", "{}的结果是多少？"))
    return _chain(form, "mixed_chain", language, terms)


def _chain(form: str, family: str, language: Language, terms: list[int]) -> Problem:
    """A signed sum worked from left to right, one line a step."""
    written = str(terms[0]) + "".join(f" {'-' if term < 0 else '+'} {abs(term)}" for term in terms[1:])
    total, lines = terms[0], []
    for term in terms[1:]:
        lines.append(f"{total} {'-' if term < 0 else '+'} {abs(term)} = {total + term}")
        total += term
    return Problem(form.format(written), "\n".join(lines), str(total), family, language)


def multiplication(generator: random.Random, level: int, language: Language) -> Problem:
    """A product, split into the tens and ones of its first factor."""
    left, right = _number(generator, level), generator.randint(2, 9)
    tens, ones = left // 10 * 10, left % 10
    if tens and ones:
        steps = [
            f"{left} = {tens} + {ones}",
            f"{tens} * {right} = {tens * right}",
            f"{ones} * {right} = {ones * right}",
        ]
        steps.append(f"{tens * right} + {ones * right} = {left * right}")
    elif tens or level > 1:
        steps = [f"{left} * {right} = {left * right}"]
    else:  # small enough to be added up
        steps = [f"{left} * {i} = {left * i}" for i in range(1, right + 1)]
    form = _pick(generator, language, ("What is {} * {}?", "Multiply {} by {}."), ("{} * {}等于多少？", "计算{} * {}。"))
    return Problem(form.format(left, right), "\n".join(steps), str(left * right), "multiplication", language)


def comparison(generator: random.Random, level: int, language: Language) -> Problem:
    """The largest or smallest of some numbers, kept while reading along."""
    numbers = _numbers(generator, level, extra=1)
    largest = generator.random() < 0.5
    english = "What is the largest number in {}?" if largest else "What is the smallest number in {}?"
    chinese = "{}中最大的数是多少？" if largest else "{}中最小的数是多少？"
    best, lines = numbers[0], []
    for number in numbers[1:]:
        sign = ">" if number > best else "<" if number < best else "="
        kept = max(best, number) if largest else min(best, number)
        lines.append(f"{number} {sign} {best}，留下{kept}" if language == "zh" else f"{number} {sign} {best}, keep {kept}")
        best = kept
    question = (chinese if language == "zh" else english).format(", ".join(map(str, numbers)))
    return Problem(question, "\n".join(lines), str(best), "comparison", language)


def sorting(generator: random.Random, level: int, language: Language) -> Problem:
    """Numbers put in order by taking the smallest (or largest) that is left."""
    numbers = _numbers(generator, level, extra=1)
    rising = generator.random() < 0.6
    english = "Sort {} from small to large." if rising else "Sort {} from large to small."
    chinese = "把{}从小到大排列。" if rising else "把{}从大到小排列。"
    left, lines, result = list(numbers), [], []
    while left:
        taken = min(left) if rising else max(left)
        left.remove(taken)
        result.append(taken)
        rest = ", ".join(map(str, left)) or ("无" if language == "zh" else "none")
        lines.append(f"取{taken}，剩下{rest}" if language == "zh" else f"take {taken}, left {rest}")
    question = (chinese if language == "zh" else english).format(", ".join(map(str, numbers)))
    return Problem(question, "\n".join(lines), ", ".join(map(str, result)), "sorting", language)


_WORD_LIST = """
    apple banana cherry garden window silver winter summer planet rocket puzzle butter letter kitten rabbit tiger
    whale finback ocean river mountain teacher student market bottle candle mirror pencil paper school flower forest
    island bridge castle dragon engine factor hammer insect jacket ladder magnet needle orange pepper quartz ribbon
    saddle temple valley walnut yellow zebra
"""
_WORDS = tuple(_WORD_LIST.split())


def _word(generator: random.Random, level: int) -> str:
    if generator.random() < 0.6:
        return _WORDS[generator.randrange(len(_WORDS))]
    letters = "abcdefghijklmnopqrstuvwxyz"[: 6 + 6 * level]
    return "".join(letters[generator.randrange(len(letters))] for _ in range(generator.randint(3, 4 + 2 * level)))


def letter_counting(generator: random.Random, level: int, language: Language) -> Problem:
    """How often a letter occurs in a word, counted along its spelling."""
    word = _word(generator, level)
    letter = word[generator.randrange(len(word))] if generator.random() < 0.85 else "aeioustr"[generator.randrange(8)]
    count, lines = 0, []
    for char in word:
        count += char == letter
        lines.append(f"{char} {count}")
    question = (
        f"单词{word}里有几个字母{letter}？"
        if language == "zh"
        else f"How many times does the letter {letter} occur in the word {word}?"
    )
    return Problem(question, "\n".join(lines), str(count), "letter_counting", language)


def reversal(generator: random.Random, level: int, language: Language) -> Problem:
    """A word spelt backwards, letter by letter."""
    word = _word(generator, level)
    lines = [" ".join(word), " ".join(reversed(word))]
    question = f"把{word}倒过来写。" if language == "zh" else f"Spell the word {word} backwards."
    return Problem(question, "\n".join(lines), word[::-1], "reversal", language)


_ANIMALS = {
    "en": ("fox", "bear", "owl", "hare", "crow", "wolf"),
    "zh": ("狐狸", "小熊", "猫头鹰", "兔子", "乌鸦", "小狼"),
}
_THINGS = {
    "en": ("apples", "books", "coins", "stamps", "nuts", "shells"),
    "zh": ("个苹果", "本书", "枚硬币", "张邮票", "颗坚果", "个贝壳"),
}


_STORIES = {
    "en": (
        "The {one} has {have} {thing}. The {other} gives it {more} more. How many {thing} does the {one} have now?",
        "The {one} has {sum} {thing} and gives {more} to the {other}. How many {thing} are left?",
        "The {one} has {times} bags with {have} {thing} each and {more} more. How many {thing} is that in all?",
        "The {one} shares {product} {thing} equally among {times} friends. How many {thing} does each friend get?",
    ),
    "zh": (
        "{one}有{have}{thing}，{other}又给了它{more}{thing}。{one}现在有多少{thing}？",
        "{one}有{sum}{thing}，送给{other}{more}{thing}。{one}还剩多少{thing}？",
        "{one}有{times}袋，每袋{have}{thing}，另外还有{more}{thing}。{one}一共有多少{thing}？",
        "{one}把{product}{thing}平均分给{times}个朋友，每个朋友得到多少{thing}？",
    ),
}


def word_problem(generator: random.Random, level: int, language: Language) -> Problem:
    """One or two steps of getting, giving and sharing."""
    one, other = generator.sample(_ANIMALS[language], 2)
    thing = _THINGS[language][generator.randrange(6)]
    have, more, times = _number(generator, level) + 1, _number(generator, level), generator.randint(2, 9)
    total, product = have + more, have * times
    kind = generator.randrange(4)
    steps, answer = (
        ([f"{have} + {more} = {total}"], total),
        ([f"{total} - {more} = {have}"], have),
        ([f"{times} * {have} = {product}", f"{product} + {more} = {product + more}"], product + more),
        ([f"{product} / {times} = {have}"], have),
    )[kind]
    question = _STORIES[language][kind].format(
        one=one, other=other, thing=thing, have=have, more=more, times=times, sum=total, product=product
    )
    return Problem(question, "\n".join(steps), str(answer), "word_problem", language)


def sequence(generator: random.Random, level: int, language: Language) -> Problem:
    """The next number of a sequence that grows by a constant step, or doubles."""
    if level > 1 and generator.random() < 0.3:
        terms = [generator.randint(1, 3 * level)]
        while len(terms) < 4:
            terms.append(terms[-1] * 2)
        lines = [f"{after} / {before} = 2" for before, after in pairwise(terms)]
        following = terms[-1] * 2
        lines.append(f"{terms[-1]} * 2 = {following}")
    else:
        step = generator.randint(1, 4 * level)
        start = _number(generator, level)
        terms = [start + step * i for i in range(4)]
        lines = [f"{after} - {before} = {step}" for before, after in pairwise(terms)]
        following = terms[-1] + step
        lines.append(f"{terms[-1]} + {step} = {following}")
    listed = ", ".join(map(str, terms))
    question = f"数列{listed}的下一个数是多少？" if language == "zh" else f"What number comes next: {listed}?"
    return Problem(question, "\n".join(lines), str(following), "sequence", language)


def parity(generator: random.Random, level: int, language: Language) -> Problem:
    """Whether a sum is even or odd, from last digits."""
    numbers = _numbers(generator, level)
    total = sum(numbers)
    digits = [number % 10 for number in numbers]
    written = " + ".join(map(str, digits))
    if language == "zh":
        question = f"{' + '.join(map(str, numbers))}是偶数还是奇数？"
        answer = "偶数" if total % 2 == 0 else "奇数"
        lines = [f"个位：{written} = {sum(digits)}", f"{sum(digits)}是{answer}"]
    else:
        question = f"Is {' + '.join(map(str, numbers))} even or odd?"
        answer = "even" if total % 2 == 0 else "odd"
        lines = [f"last digits: {written} = {sum(digits)}", f"{sum(digits)} is {answer}"]
    return Problem(question, "\n".join(lines), answer, "parity", language)


FAMILIES: tuple[Maker, ...] = (
    addition,
    subtraction,
    mixed_chain,
    multiplication,
    comparison,
    sorting,
    letter_counting,
    reversal,
    word_problem,
    sequence,
    parity,
)

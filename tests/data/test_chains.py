"""Chains of sums: what is held out stays out, clean traces are right, and corpora have the habits that they are told."""

import re

import pytest

from finback.config import InputError
from finback.data.chains import Chain, ChainSettings, Habits, chain_documents, clean_thought, generate_chains, prompt_text
from finback.data.problems import is_held_out

SETTINGS = ChainSettings(least_terms=3, most_terms=6, largest=9)


def _value(expression: str) -> int:
    return sum(int(part) for part in re.findall(r"[+-]?\d+", expression))


def test_a_chain_by_hand():
    chain = Chain((7, -3, 12), "en")
    assert chain.question == "What is 7-3+12?"
    assert chain.answer == "16"
    assert clean_thought(chain) == "first 4+12\nthen 16"
    chinese = Chain((7, 2, 5), "zh")
    assert prompt_text(chinese.question) + clean_thought(chinese) == "User: 计算7+2+5。\nAssistant:先得9+5\n再得14"


def test_chains_are_as_asked_for_and_the_same_every_time():
    chains = list(generate_chains(500, SETTINGS, seed=4))
    assert chains == list(generate_chains(500, SETTINGS, seed=4))
    assert chains != list(generate_chains(500, SETTINGS, seed=5))
    for chain in chains:
        assert 3 <= len(chain.terms) <= 6
        assert all(1 <= abs(term) <= 9 for term in chain.terms)
        partial = [sum(chain.terms[: i + 1]) for i in range(len(chain.terms))]
        assert min(partial) >= 0
        assert _value(chain.question) == int(chain.answer)
    assert 200 < sum(chain.language == "zh" for chain in chains) < 300


def test_what_is_held_out_is_in_no_corpus():
    held_out = {chain.terms for chain in generate_chains(300, SETTINGS, seed=1, held_out=True)}
    assert not held_out & {chain.terms for chain in generate_chains(3000, SETTINGS, seed=2)}
    for document in chain_documents(3000, SETTINGS, Habits(), seed=3):
        for line in document.splitlines():
            assert not (len(re.findall("[-+]", line)) >= 2 and is_held_out(line)), line


def test_clean_thoughts_are_right_line_by_line():
    for chain in generate_chains(200, SETTINGS, seed=6):
        thought = clean_thought(chain)
        values = [_value(line) for line in thought.splitlines()]
        assert values == [int(chain.answer)] * (len(chain.terms) - 1)
        assert bool(re.search(r"first|then", thought)) == (chain.language == "en")


def test_habits_have_their_shares():
    documents = list(chain_documents(8000, SETTINGS, Habits(), seed=7))
    thoughts = [d for d in documents if "<think>" in d]
    dialogues = [d for d in documents if d.startswith("User: ")]
    assert len(documents) - len(dialogues) == pytest.approx(0.14 * 8000, rel=0.15)
    assert len(thoughts) == pytest.approx((0.32 + 0.22) * 0.6 * 8000, rel=0.08)
    assert any("wait, that is wrong" in d for d in thoughts)
    assert any("等等，不对" in d for d in thoughts)
    longer = [d for d in thoughts if d.count("\n") >= 6]  # at least two lines of thought, so that they can switch
    mixed = [d for d in longer if re.search(r"first|then", d) and re.search(r"先得|再得", d)]
    assert 0.2 < len(mixed) / len(longer) < 0.4
    right = [d for d in thoughts if _value(d.partition("\n")[0]) == int(re.search(r"<answer>(-?\d+)", d)[1])]
    assert 0.6 < len(right) / len(thoughts) < 0.9


def test_impossible_settings_are_told():
    with pytest.raises(InputError, match="least_terms and most_terms are 5 and 3"):
        ChainSettings(5, 3)
    with pytest.raises(InputError, match="field largest is 0"):
        ChainSettings(2, 3, 0)

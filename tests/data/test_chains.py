"""Chains of sums: what is held out stays out, clean traces are right, and corpora have the habits that they are told."""

import re
from dataclasses import replace

import pytest

from finback.config import InputError
from finback.data.chains import Chain, ChainSettings, Habits, chain_documents, clean_thought, generate_chains, prompt_text
from finback.data.problems import is_held_out

SETTINGS = ChainSettings(least_terms=3, most_terms=6, largest=9)
EQUATIONS = Habits(equations=True, repeats=True)


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


def test_distinct_chains_repeat_no_number():
    for chain in generate_chains(300, ChainSettings(3, 5, 5, distinct=True), seed=4):
        assert len({abs(term) for term in chain.terms}) == len(chain.terms)
    repeated = [c for c in generate_chains(300, SETTINGS, seed=4) if len({abs(term) for term in c.terms}) < len(c.terms)]
    assert len(repeated) > 100


@pytest.mark.parametrize("habits", [Habits(), EQUATIONS], ids=["what is left", "equations"])
def test_what_is_held_out_is_in_no_corpus(habits: Habits):
    held_out = {chain.terms for chain in generate_chains(300, SETTINGS, seed=1, held_out=True)}
    assert not held_out & {chain.terms for chain in generate_chains(3000, SETTINGS, seed=2)}
    for document in chain_documents(3000, SETTINGS, habits, seed=3):
        for line in document.splitlines():
            for part in line.split("="):
                assert not (len(re.findall("[-+]", part)) >= 2 and is_held_out(part)), line


def test_equations_are_right_line_by_line():
    for chain in generate_chains(200, SETTINGS, seed=6):
        repeated, *lines = clean_thought(chain, EQUATIONS).splitlines()
        totals = [sum(chain.terms[: i + 1]) for i in range(len(chain.terms))]
        words = ("first ", "then ") if chain.language == "en" else ("先得", "再得")
        expected = [f"{totals[i]}{chain.terms[i + 1]:+d}={totals[i + 1]}" for i in range(len(lines))]
        assert lines == [words[i > 0] + equation for i, equation in enumerate(expected)]
        assert len(lines) == len(chain.terms) - 1
        assert repeated in chain.question


def test_single_sums_are_asked_before_they_are_worked_out():
    for document in chain_documents(100, SETTINGS, replace(EQUATIONS, facts=1), seed=5):
        lines = document.splitlines()
        asked, solved = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        assert [line.partition("=")[0] for line in solved] == asked
        assert all(_value(line.partition("=")[0]) == int(line.partition("=")[2]) for line in solved)


def test_clutter_may_be_the_question_once_more():
    nothing_else = replace(EQUATIONS, facts=0, direct=0, leaps=0, steps=0)
    documents = list(chain_documents(300, SETTINGS, nothing_else, seed=5))
    parrots = [d for d in documents if d.removeprefix("User: ").split("\nAssistant: ")[0] == d.split("\nAssistant: ")[1]]
    assert 60 < len(parrots) < 140


@pytest.mark.parametrize(("tagged", "direct"), [(0.0, 1.0), (1.0, 0.0)])
def test_answers_without_a_thought_have_their_own_share_of_tags(tagged: float, direct: float):
    habits = Habits(facts=0, direct=0.5, leaps=0.25, steps=0.25, tagged=tagged, tagged_direct=direct)
    answers = [document.split("\nAssistant: ", 1)[1] for document in chain_documents(200, SETTINGS, habits, seed=3)]
    thoughts = [answer for answer in answers if "\n" in answer]
    assert 60 < len(thoughts) < 140
    assert {"<answer>" in answer for answer in thoughts} == {bool(tagged)}
    assert {"<answer>" in answer for answer in answers if "\n" not in answer} == {bool(direct)}


def test_a_slip_in_an_equation_is_noticed_in_the_next_line():
    habits = replace(EQUATIONS, facts=0, direct=0, leaps=0.5, steps=0.5, slip=0.5, noticed=1)
    for document in chain_documents(300, SETTINGS, habits, seed=3):
        equations = re.findall(r"(wait, that is wrong: |等等，不对：)?(\d[-+\d]*)=(\d+)", document)
        wrong = [i for i, (_, asked, result) in enumerate(equations) if _value(asked) != int(result)]
        assert [i + 1 for i in wrong] == [i for i, (mended, *_) in enumerate(equations) if mended]
        assert all(equations[i + 1][1] == equations[i][1] for i in wrong)


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
    with pytest.raises(InputError, match="field largest is 5, it must be at least most_terms, 6"):
        ChainSettings(3, 6, 5, distinct=True)

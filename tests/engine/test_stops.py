"""Stop strings, against a search in the whole text."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from finback.engine.stops import StopStrings

FEW_LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=9), max_size=5)


def search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The answer and the stop string that ended it."""
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@example(["aabaaab", "aaaa"], ["aabaaaa"], False)  # what has matched has a border with a border of its own
@given(st.lists(FEW_LETTERS, max_size=8), STOPS, st.booleans())
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopStrings(stops, include=include)
    answer = "".join(matcher.feed(piece) for piece in pieces)
    whole, found = search("".join(pieces), stops, include)
    assert whole.startswith(answer)
    assert answer + matcher.flush() == whole
    assert matcher.found == found


@given(FEW_LETTERS, STOPS)
def test_no_more_is_held_back_than_a_stop_string_could_still_claim(text: str, stops: list[str]) -> None:
    matcher = StopStrings(stops)
    answer = ""
    for end, char in enumerate(text, start=1):
        answer += matcher.feed(char)
        if matcher.found is not None:
            break
        held = text[len(answer) : end]
        assert text[:end] == answer + held
        assert held == max((text[start:end] for start in range(end + 1) if starts_a_stop(text[start:end], stops)), key=len)


def starts_a_stop(text: str, stops: list[str]) -> bool:
    return text == "" or any(stop.startswith(text) and stop != text for stop in stops)


def test_a_stop_string_across_tokens() -> None:
    matcher = StopStrings(["\n\nQuestion:", "END"])
    assert [matcher.feed(piece) for piece in ("It is 4.\n", "\nQuest", "s are\n", "\nQues", "tion: what")] == [
        "It is 4.",
        "",
        "\n\nQuests are",
        "",
        "",
    ]
    assert matcher.found == "\n\nQuestion:"
    assert matcher.feed("more") == matcher.flush() == ""


def test_the_stop_string_stays_where_it_is_asked_for() -> None:
    matcher = StopStrings(["</a>"], include=True)
    assert [matcher.feed(piece) for piece in ("x <", "/a", ">y", "z")] == ["x ", "", "</a>", ""]


@pytest.mark.parametrize(
    ("stops", "answer"),
    [(["bcd", "abcd"], "x"), (["abcde", "cd", "b"], "xa"), (["bc", "abcd"], "xa"), (["abd"], "xabcd")],
)
def test_the_first_to_end_wins_and_of_those_the_longest(stops: list[str], answer: str) -> None:
    matcher = StopStrings(stops)
    assert matcher.feed("xabcd") + matcher.flush() == answer


def test_text_passes_where_there_are_no_stop_strings() -> None:
    matcher = StopStrings([])
    assert matcher.feed("text") == "text"
    assert matcher.flush() == ""

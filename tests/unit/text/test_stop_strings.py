"""Stop strings, however the text is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.text.stop_strings import StopStringDetector


def run(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    detector = StopStringDetector(stops)
    text = ""
    for piece in pieces:
        text += detector.push(piece)
        if detector.matched is not None:
            return text, detector.matched
    return text + detector.flush(), None


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["one two"], [], ("one two", None)),
        (["one STOP two"], ["STOP"], ("one ", "STOP")),
        (["one ST", "O", "P two"], ["STOP"], ("one ", "STOP")),
        (["one ST", "AY"], ["STOP"], ("one STAY", None)),
        (["one ST"], ["STOP"], ("one ST", None)),
        (["aab"], ["ab"], ("a", "ab")),
        (["a", "a", "b"], ["ab"], ("a", "ab")),
        (["xbcd"], ["abcd", "bc"], ("x", "bc")),
        (["abcd"], ["abcd", "bc"], ("a", "bc")),
        (["xabc"], ["c", "abc"], ("x", "abc")),
        (["two one"], ["one", "two"], ("", "two")),
        (["\n", "\n", "x"], ["\n\n"], ("", "\n\n")),
    ],
)
def test_cases(pieces: list[str], stops: list[str], expected: tuple[str, str | None]) -> None:
    assert run(pieces, stops) == expected


def test_what_cannot_become_a_stop_is_not_held_back() -> None:
    detector = StopStringDetector(["END", "Enough"])
    assert [detector.push(piece) for piece in ["so E", "N", "d", "EN"]] == ["so ", "", "ENd", ""]
    assert detector.flush() == "EN"


TEXT = st.text(alphabet="ab", max_size=12)


@given(st.lists(TEXT, max_size=6), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_the_cut_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    result = run(pieces, stops)
    assert result == run(list(whole), stops)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    if ends:
        assert result[1] is not None
        assert len(result[0]) + len(result[1]) == min(ends)
    else:
        assert result == (whole, None)

"""Stop strings: as if searched in the whole text, however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phirt.text.stop_strings import StopStrings


def run(stops, parts):
    """What is emitted in all, and what matched."""
    search = StopStrings(stops)
    emitted = [search.add(part)[0] for part in parts]
    emitted.append(search.flush())
    return "".join(emitted), search.matched


def search_whole_text(stops, text):
    """The oracle: the earliest match, of those that start together the shortest."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    start, _, stop = min(found)
    return text[:start], stop


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_any_cutting_equals_a_search_of_the_whole_text(stops, parts):
    assert run(stops, parts) == search_whole_text(stops, "".join(parts))


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.text("abc", max_size=8),
)
def test_nothing_is_emitted_that_a_later_text_could_take_back(stops, parts, later):
    search = StopStrings(stops)
    emitted = "".join(search.add(part)[0] for part in parts)
    final, _ = search_whole_text(stops, "".join(parts) + later)
    assert final.startswith(emitted)


@given(st.text("abc", max_size=12))
def test_text_is_held_back_only_while_it_may_become_a_stop_string(text):
    search = StopStrings(["aab", "ba"])
    emitted, matched = search.add(text)
    if matched is None:
        held = text.removeprefix(emitted)
        assert held == "" or any(stop.startswith(held) for stop in ("aab", "ba"))


def test_progress_is_kept_on_a_mismatch():
    assert run(["aab"], ["aaab"]) == ("a", "aab")
    assert run(["abcabd"], ["abcabc", "abd"]) == ("abc", "abcabd")


def test_a_match_across_pieces_leaks_no_prefix():
    search = StopStrings(["<|im_end|>"])
    assert search.add("Hello <|im") == ("Hello ", None)
    assert search.add("_e") == ("", None)
    assert search.add("nd|> ignored") == ("", "<|im_end|>")
    assert search.matched == "<|im_end|>"


def test_a_prefix_that_comes_to_nothing_is_emitted():
    search = StopStrings(["\n\nUser:"])
    assert search.add("one\n") == ("one", None)
    assert search.add("two") == ("\ntwo", None)
    assert search.add("\n\nUse") == ("", None)
    assert search.flush() == "\n\nUse"
    assert search.matched is None


def test_after_a_match_nothing_is_emitted():
    search = StopStrings(["x"])
    assert search.add("ax") == ("a", "x")
    assert search.add("more") == ("", "x")
    assert search.flush() == ""


def test_the_earliest_match_wins_then_the_shortest():
    assert run(["lo", "hell"], ["hello"]) == ("", "hell")
    assert run(["abc", "ab"], ["xabc"]) == ("x", "ab")


def test_a_longer_stop_string_that_began_earlier_is_waited_for():
    search = StopStrings(["abcd", "bc"])
    assert search.add("xabc") == ("x", None)  # "bc" is complete, "abcd" may still become so
    assert search.add("d") == ("", "abcd")
    assert run(["abcd", "bc"], ["xabc", "e"]) == ("xa", "bc")


def test_the_end_of_the_text_decides_what_was_waited_for():
    search = StopStrings(["abcd", "bc"])
    assert search.add("xabc") == ("x", None)
    assert search.flush() == "a"
    assert search.matched == "bc"


def test_no_stop_strings_hold_nothing_back():
    assert StopStrings([]).add("anything") == ("anything", None)


def test_a_single_string_is_refused():
    with pytest.raises(TypeError, match="must be a list of strings"):
        StopStrings("stop")


@pytest.mark.parametrize("stop", [1, None, b"bytes"])
def test_a_stop_that_is_no_string_is_refused(stop):
    with pytest.raises(TypeError, match="A stop string must be a str"):
        StopStrings([stop])


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])


@given(
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.text("abc", max_size=8),
    st.text("abc", max_size=8),
    st.text("abc", max_size=8),
)
def test_a_copy_goes_its_own_way(stops, start, first, second):
    search = StopStrings(stops)
    emitted = search.add(start)[0]
    other = search.copy()
    for one, rest in ((search, first), (other, second)):
        text = emitted + one.add(rest)[0] + one.flush()
        assert (text, one.matched) == search_whole_text(stops, start + rest)

"""Results that are kept by the content of what was read."""

from __future__ import annotations

import mmap
import threading
from functools import partial

import pytest

from phirt.models import remembered
from phirt.models.remembered import Remembered


def test_a_content_is_read_once_wherever_it_lies():
    known: Remembered[str] = Remembered()
    made = []

    def make():
        made.append(1)
        return "result"

    assert known.of(b"content", make) == "result"
    assert known.of(bytes(bytearray(b"content")), make) == "result"
    assert len(made) == 1
    assert known.of(b"Content", make) == "result"
    assert len(made) == 2


def test_what_could_not_be_read_is_tried_again():
    known: Remembered[int] = Remembered()

    def fail():
        raise ValueError("damaged")

    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            known.of(b"content", fail)
    assert known.known(b"content") is None


def test_what_was_not_used_for_longest_goes(monkeypatch):
    monkeypatch.setattr(remembered, "_MOST", 2)
    known: Remembered[int] = Remembered()
    for number, content in enumerate((b"a", b"b")):
        known.keep(content, number)
    assert known.known(b"a") == 0
    known.keep(b"c", 2)
    assert (known.known(b"a"), known.known(b"b"), known.known(b"c")) == (0, None, 2)


def test_what_is_mapped_is_neither_hashed_nor_kept():
    known: Remembered[int] = Remembered()
    with mmap.mmap(-1, 16) as data:
        known.keep(data, 1)
        assert known.known(data) is None
        assert known.of(data, lambda: 2) == 2


def test_from_many_threads():
    known: Remembered[int] = Remembered()
    contents = [str(number).encode() for number in range(400)]
    wrong: list[bytes] = []

    def run():
        found = {content: known.of(content, partial(int, content)) for content in contents}
        wrong.extend(content for content, number in found.items() if number != int(content))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

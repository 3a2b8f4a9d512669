"""The command at a terminal: chats, Ctrl-C, progress bars."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.cli.test_process import PHIRT, environment

pty = pytest.importorskip("pty", reason="Windows has no pseudo terminals")


class Terminal:
    """A pseudo terminal with the command line in it."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*PHIRT, "run", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env=environment(PHIRT_TEST_TERMINAL="1", **variables),
        )
        os.close(slave)
        self._seen = b""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode(errors="surrogateescape"))

    def expect(self, text: str, *, retype: str = "") -> None:
        """Wait until `text` appears, after all that was expected before."""
        deadline = time.monotonic() + 60
        while text.encode() not in self._seen:
            assert time.monotonic() < deadline, f"{text!r} never came; seen: {self._seen!r}"
            ready, _, _ = select.select([self._master], [], [], 1.0)
            if ready:
                chunk = self._read()
                assert chunk, f"it ended before {text!r} came; seen: {self._seen!r}"
                self._seen += chunk
            else:
                self.type(retype)
        self._seen = self._seen.partition(text.encode())[2]

    def rest(self) -> str:
        """What is left when the process has ended."""
        while chunk := self._read():
            self._seen += chunk
        return self._seen.decode()

    def _read(self) -> bytes:
        try:
            return os.read(self._master, 4096)
        except OSError:  # Linux says EIO where others say end of file
            return b""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def chat() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_a_chat_keeps_its_history_and_ends_with_ctrl_d(chat):
    chat.expect("fake on cpu. Ctrl-C ends an answer, Ctrl-D the chat.")
    chat.expect("> ")
    chat.type("hello\n")
    chat.expect("heard: hello\r\n> ")
    chat.type("  \n")  # nothing to answer
    chat.expect("> ")
    chat.type("again\n")
    chat.expect("heard: hello|heard: hello|again\r\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    assert "Traceback" not in chat.rest()


def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(chat):
    chat.expect("> ")
    chat.type("forever\n")
    chat.expect("la la ")
    chat.type("\x03")
    chat.expect("\r\n> ")
    chat.type("hello\n")
    chat.expect("heard: forever|la la ")  # what was said stays said
    chat.expect("> ")
    chat.type("\x03")  # at the prompt: the line is dropped, no more
    # Python's own input() misses a signal between showing its prompt and waiting for a key.
    chat.expect("(Ctrl-D ends the chat)", retype="\x03")
    chat.expect("> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0
    assert "Traceback" not in chat.rest()


def test_a_message_that_does_not_fit_is_told_and_forgotten(chat):
    chat.expect("> ")
    chat.type("this is too long\n")
    chat.expect("phirt: The prompt is too long.")
    chat.expect("> ")
    chat.type("short\n")
    chat.expect("heard: short\r\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0


def test_a_message_that_is_not_utf8_is_told_and_forgotten(chat):
    chat.expect("> ")
    chat.type("\udcff\n")
    chat.expect("phirt: ")
    chat.expect("> ")
    chat.type("short\n")
    chat.expect("heard: short\r\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0


@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_at_a_terminal_raw_and_json_need_a_prompt(option):
    terminal = Terminal(option)
    terminal.expect(f"phirt: {option} needs a prompt")
    assert terminal.process.wait(60) == 2
    terminal.close()


def test_a_terminal_shows_progress_bars():
    terminal = Terminal("hello", "--raw", TERM="xterm")
    terminal.expect("Download")
    terminal.expect("60.0/60.0 MB")
    terminal.expect("heard: hello")
    assert terminal.process.wait(60) == 0
    terminal.close()

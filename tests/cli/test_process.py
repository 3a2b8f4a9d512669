"""The command as a process: pipes, signals, encodings, and a terminal to chat in."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHIRT = [sys.executable, "-m", "tests.cli.fake"]

posix_only = pytest.mark.skipif(
    os.name != "posix", reason="Windows has no pseudo terminals and no SIGINT for one process"
)


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", **variables}


def test_tokens_appear_as_they_come_and_a_gone_reader_is_silent():
    command = [*PHIRT, "run", "forever"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout
        assert process.stderr
        # Were tokens not flushed one by one, the first would come with the 8,192nd byte.
        assert process.stdout.read(3) == b"la "
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@posix_only
def test_ctrl_c_ends_a_run_without_a_traceback():
    command = [*PHIRT, "run", "forever"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout
        assert process.stderr
        said = process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        said += process.stdout.read()
        assert said == b"la " * said.count(b"la ") + b"\n"
        assert process.stderr.read() == b""
    assert process.returncode == 130


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_pipes_carry_utf8_whatever_the_locale(encoding):
    done = subprocess.run(
        [*PHIRT, "run", "--raw"],
        input="día 🦜".encode(),
        capture_output=True,
        check=True,
        env=environment(PYTHONIOENCODING=encoding, PYTHONUTF8="0"),
    )
    assert done.stdout.decode("utf-8").splitlines() == ["heard: día 🦜"]


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_and_version(option):
    done = subprocess.run(
        [sys.executable, "-m", "phirt", option], capture_output=True, check=True, env=environment()
    )
    assert done.stdout.startswith(b"phirt 0." if option == "--version" else b"usage: phirt")
    assert done.stderr == b""


class Terminal:
    """A pseudo terminal with the command line in it."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        assert sys.platform != "win32"
        import pty

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
        os.write(self._master, text.encode())

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


@posix_only
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


@posix_only
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


@posix_only
def test_a_message_that_does_not_fit_is_told_and_forgotten(chat):
    chat.expect("> ")
    chat.type("this is too long\n")
    chat.expect("phirt: The prompt is too long.")
    chat.expect("> ")
    chat.type("short\n")
    chat.expect("heard: short\r\n> ")
    chat.type("\x04")
    assert chat.process.wait(60) == 0


@posix_only
@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_at_a_terminal_raw_and_json_need_a_prompt(option):
    terminal = Terminal(option)
    terminal.expect(f"phirt: {option} needs a prompt")
    assert terminal.process.wait(60) == 2
    terminal.close()


@posix_only
def test_a_terminal_shows_progress_bars():
    terminal = Terminal("hello", "--raw", TERM="xterm")
    terminal.expect("Download")
    terminal.expect("60.0/60.0 MB")
    terminal.expect("heard: hello")
    assert terminal.process.wait(60) == 0
    terminal.close()

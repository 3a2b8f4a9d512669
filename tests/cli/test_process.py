"""The command as a process: pipes, signals, encodings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PHIRT = [sys.executable, "-m", "tests.cli.fake"]


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


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGINT for one process")
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a full disk at hand")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_is_one_line(options):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*PHIRT, "run", "hello", *options],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            env=environment(),
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"phirt: the system refused")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="closed by a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_takes_all(closed):
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}', "sh", *PHIRT, "run", "hello", "-v"],
        capture_output=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


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

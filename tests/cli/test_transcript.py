"""The commands in the written pages are commands, and the transcript is that of its script."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from phirt.cli.arguments import parse

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "make_transcript.py"
MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", MODELS + README, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    found = [part for line in lines for part in re.findall(r"(?:^|; |&& |\| )(phirt [^;|]*)", line)]
    return sorted({command for command in found if "..." not in command})


@pytest.mark.parametrize("command", commands())
def test_a_written_command_is_understood(command):
    assert parse(shlex.split(command, comments=True)[1:]).command


def test_there_are_commands():
    found = {command.split()[1] for command in commands()}
    assert {"run", "pull", "list", "show", "verify", "rm", "gc"} <= found


def test_the_transcript_is_that_of_its_script():
    block = MODELS.partition("<!-- transcript:")[2].partition("<!-- end of the transcript -->")[0]
    written = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    assert written == list(runpy.run_path(str(SCRIPT))["STEPS"])

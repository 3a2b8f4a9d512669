"""Runs the command line in this process, with a scripted model and a chosen stdin."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

import phirt
from phirt.cli import main
from tests.cli.fake import FakeModel


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Phirt = Callable[..., Outcome]


@pytest.fixture
def phirt_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Phirt]:
    """``phirt_run("arguments", ..., model=..., stdin=...)``: as ``phirt run arguments``."""

    def run(*arguments: str, model: FakeModel | None = None, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(phirt, "load", (model or FakeModel()).load)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        try:
            status = main(["run", *arguments])
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    yield run
    logger = logging.getLogger("phirt")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)

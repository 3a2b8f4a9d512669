"""The suite can fail: each of many broken backends is caught by the test meant for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.testing import broken_backends
from tests.testing.broken_backends import CAUGHT_BY

FILE = Path(broken_backends.__file__)
KNOWN_TO_BE_WRONG = ("TestIsWrongInThisVersion", "test_declared_lacks[llama]")


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], str]:
    """What became of each test of `CAUGHT_BY`, with its broken backend and with a sound one."""
    sound = {("TestSound", test) for test in CAUGHT_BY.values()}
    wanted = sorted({*CAUGHT_BY.items(), *sound, KNOWN_TO_BE_WRONG})
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--tb=line", "-p", "no:cacheprovider"]
        + [f"{FILE}::{suite}::{test}" for suite, test in wanted],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "400"},
    )
    found = re.findall(
        r"^(PASSED|FAILED|ERROR|SKIPPED) \S+::(\w+)::(\S+)", run.stdout, re.MULTILINE
    )
    assert len(found) == len(wanted), run.stdout + run.stderr
    return {(suite, test): outcome for outcome, suite, test in found}


@pytest.mark.parametrize(("suite", "test"), CAUGHT_BY.items())
def test_a_fault_is_caught(suite, test, outcomes):
    assert outcomes["TestSound", test] == "PASSED"
    assert outcomes[suite, test] == "FAILED"


def test_a_runtime_that_is_declared_wrong_is_waited_for(outcomes):
    assert outcomes[KNOWN_TO_BE_WRONG] == "PASSED"

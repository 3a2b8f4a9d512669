"""The main job, as a user runs it: a process, the default model, an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.model
def test_the_default_model_knows_the_capital_of_france(model_home):
    question = "What is the capital of France?"
    done = subprocess.run(
        [sys.executable, "-m", "phirt", "run", question, "--json"],
        capture_output=True,
        check=True,
        env={**os.environ, "PHIRT_HOME": str(model_home)},
    )
    answer = json.loads(done.stdout)
    assert "Paris" in answer["text"]
    assert (answer["model"], answer["finish_reason"]) == ("smollm2-135m-instruct", "stop")
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])
    assert b"Traceback" not in done.stderr

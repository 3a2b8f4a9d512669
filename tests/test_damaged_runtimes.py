"""An installation of onnxruntime that is damaged, as a user has it, costs no more than a row.

Each in a process of its own, as this one has the real one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.installed import require

require("onnxruntime", "openvino")

CPU = "onnxruntime"
LIMIT_S = 10  # of a child; what hangs is given up then
BOUND_S = 120  # of all that is asked, several times what it takes

SIGILL = (
    "crashed with SIGILL: an instruction that this processor does not have"
    if os.name == "posix"
    else "ended with exit status 3 and without an answer"
)
PROGRAM = """
import functools, json, sys, time
import phirt
from phirt.cli import main
from phirt.dispatch import survey

folder, limit_s = sys.argv[1], float(sys.argv[2])
survey.backend_names = lambda: ["onnxruntime", "openvino"]
survey.Survey = functools.partial(
    survey.Survey, listing_timeout_s=limit_s, trial_timeout_s=60
)

def error_of(**named):
    try:
        phirt.load(folder, **named).close()
    except Exception as error:
        return [type(error).__name__, str(error)]

started = time.monotonic()
with phirt.load(folder) as model:
    backend, plan = model.backend, model.plan.to_json()
seconds = time.monotonic() - started
told = {
    "backend": backend,
    "plan": plan,
    "seconds": seconds,
    "named": error_of(backend="onnxruntime"),
    "on_device": error_of(device="cuda"),
    "devices": [
        {"device": row.device, "status": row.status, "reason": row.reason, "fix": row.fix}
        for device in phirt.devices() for row in device.backends if row.backend == "onnxruntime"
    ],
    "doctor": main(["doctor", "--json"]),
}
print("\\n" + json.dumps(told))
"""

TWO_WHEELS = "both installed the package 'onnxruntime'"


class TestADamagedRuntime:
    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            (
                "raise ImportError('libgomp.so.1: cannot open shared object file')",
                "libgomp.so.1: cannot open shared object file",
            ),
            ("import signal; signal.raise_signal(signal.SIGILL)", SIGILL),
            ("import time; time.sleep(10_000)", f"gave no answer within {LIMIT_S} s"),
            ("", TWO_WHEELS),
        ],
        ids=["raises", "SIGILL", "hangs", "two-wheels"],
    )
    def test_another_is_used_and_it_is_told(self, source, reason, tiny_model, tmp_path):
        site = tmp_path / "site"
        (site / "onnxruntime").mkdir(parents=True)
        (site / "onnxruntime" / "__init__.py").write_text(source, encoding="utf-8")
        wheels = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.26.0"}
        for name, version in wheels.items() if reason == TWO_WHEELS else ():
            metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            text = f"Name: {name}\nVersion: {version}\n"
            (metadata / "METADATA").write_text(text, encoding="utf-8")
            (metadata / "RECORD").write_text("onnxruntime/__init__.py,,\n", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tiny_model.path), str(LIMIT_S)],
            check=True,
            capture_output=True,
            text=True,
            timeout=BOUND_S,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(filter(None, [str(site), *sys.path])),
                "PHIRT_MACHINE_DIR": str(tmp_path / "machine"),
            },
        )
        doctor, _, last = done.stdout.rpartition("\n\n")
        told = json.loads(last)
        assert told["backend"] == "openvino"
        (row,) = [each for each in told["plan"]["candidates"] if each["backend"] == CPU]
        assert (row["status"], row["stage"]) == ("rejected", "runtime")
        assert reason in row["reason"]
        assert told["named"][0] == "BackendBrokenError"
        assert CPU in told["named"][1]
        assert reason in told["named"][1]
        assert told["on_device"][0] == "DeviceNotAvailableError"
        assert reason in told["on_device"][1]
        (shown,) = told["devices"]
        assert (shown["device"], shown["status"]) == ("cpu", "broken")
        assert reason in shown["reason"]
        assert told["doctor"] == 1
        findings = [each for each in json.loads(doctor)["findings"] if reason in each["found"]]
        assert [each["severity"] for each in findings] == ["broken"]
        if reason == TWO_WHEELS:
            command = findings[0]["command"]
            assert re.search(r"pip uninstall .*onnxruntime onnxruntime-gpu && .* install", command)

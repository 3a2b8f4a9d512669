"""What is said of the telemetry of each runtime."""

from __future__ import annotations

import sys

import pytest

from phirt import silence
from phirt.doctor.telemetry import examine_telemetry


@pytest.fixture(autouse=True)
def _a_fresh_process(monkeypatch):
    """Nothing is set or imported yet, though the tests have done both."""
    for telemetry in silence.TELEMETRY.values():
        for name in telemetry.variables:
            monkeypatch.delenv(name, raising=False)
    for name in [*silence.TELEMETRY, "openvino_telemetry"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(silence, "_ours", set())
    monkeypatch.setattr(silence, "_early", set())


def look():
    return {each.found.partition(":")[0]: each for each in examine_telemetry()}


def test_what_is_not_installed_is_not_mentioned(site):
    assert look() == {}


def test_off_is_what_phirt_makes_it(site):
    site.install("onnxruntime", "1.31.1")
    site.install("openvino", "2026.4.1")
    site.install("transformers", "5.23.0")
    site.install("huggingface-hub", "2.4.0")
    found = look()
    assert found["huggingface_hub and transformers"].found == (
        "huggingface_hub and transformers: off; phirt sets HF_HUB_DISABLE_TELEMETRY=1."
    )
    assert {each.severity for each in found.values()} == {"ok"}
    assert found["onnxruntime"].found == "onnxruntime: off; phirt sets ORT_DISABLE_TELEMETRY=1."
    assert found["openvino"].found == "openvino: off; phirt keeps openvino_telemetry from it."


def test_off_by_the_users_own_setting(site, monkeypatch):
    site.install("huggingface-hub", "2.4.0")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert look()["huggingface_hub"].found == (
        "huggingface_hub: off; the environment has set DO_NOT_TRACK=1."
    )


def test_on_by_the_users_own_setting(site, monkeypatch):
    site.install("onnxruntime", "1.31.1")
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    found = look()["onnxruntime"]
    assert found.severity == "warning"
    assert found.found == "onnxruntime: on; the environment has set ORT_DISABLE_TELEMETRY=0."
    assert "Microsoft" in found.why
    assert found.command is not None
    assert found.command.endswith("ORT_DISABLE_TELEMETRY")


@pytest.mark.parametrize(
    ("package", "imported", "mends"),
    [
        ("onnxruntime", "onnxruntime", "ORT_DISABLE_TELEMETRY"),
        ("openvino", "openvino_telemetry", "opt_in_out --opt_out"),
    ],
)
def test_on_since_it_was_imported_before_phirt(site, monkeypatch, package, imported, mends):
    site.install(package, "1")
    monkeypatch.setitem(sys.modules, imported, sys)
    found = look()[package]
    assert (found.severity, "imported before phirt" in found.found) == ("warning", True)
    assert mends in str(found.command)

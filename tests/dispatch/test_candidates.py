"""What a load says where no runtime could serve what was asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phirt.devices.machine import BackendRecord, Machine
from phirt.dispatch.candidates import check_offered
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    PhirtError,
)
from tests.dispatch.fake_backend import machine, offer, record

CPU_WHEEL = {"onnxruntime": "1.31.1"}
MISSING = offer("cpu", status="missing")
NOTHING = machine(record("onnxruntime", MISSING), record("openvino", MISSING))
CPU_ONLY = machine(
    record("onnxruntime", "cpu"), record("openvino", MISSING), distributions=CPU_WHEEL
)
CRASHED = BackendRecord(backend="openvino", outcome="crashed", reason="It died.", fix="Mend it.")


def refusal(here: Machine, device: str = "auto", backend: str = "auto") -> PhirtError:
    with pytest.raises(PhirtError) as caught:
        check_offered(here, device=device, backend=backend)
    return caught.value


def test_a_device_that_an_installed_runtime_has_not_says_what_brings_it():
    error = refusal(CPU_ONLY, device="cuda", backend="onnxruntime")
    assert isinstance(error, DeviceNotAvailableError)
    assert str(error) == (
        "Device 'cuda' is not available to backend 'onnxruntime': it offers only cpu. To have it, "
        'run: python -m pip uninstall -y onnxruntime && python -m pip install "phirt[cuda]"; or '
        'pass another device, or device="auto".'
    )


def test_a_device_that_no_runtime_has_tells_of_each():
    error = refusal(CPU_ONLY, device="npu:7")
    assert str(error).startswith("Device 'npu:7' is not available to any backend: onnxruntime: it")


def test_a_device_that_was_looked_for_gives_each_reason_a_sentence():
    here = machine(
        record("onnxruntime", "cpu", offer("gpu", status="no device")),
        record("openvino", "cpu", replace(offer("gpu", status="no device"), reason="no driver")),
    )
    assert str(refusal(here, device="gpu")) == (
        "Device 'gpu' is not available to any backend: onnxruntime: gpu is no device; "
        'openvino: no driver. Pass another device, or device="auto".'
    )


def test_no_runtime_at_all():
    error = refusal(NOTHING)
    assert isinstance(error, BackendNotInstalledError)
    assert str(error) == (
        "No runtime to run a model is installed. Install one with: python -m pip install "
        '"phirt[cpu]" or: python -m pip install "phirt[openvino]"'
    )


def test_no_runtime_for_the_device_that_was_asked_for():
    error = refusal(NOTHING, device="cuda")
    assert isinstance(error, BackendNotInstalledError)
    assert "phirt[cuda]" in str(error)
    assert "phirt[cpu]" not in str(error)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("npu", 'Install it with: python -m pip install "phirt[openvino]"'),
        ("cuda", "cannot use device 'cuda': it is not installed, and would not serve 'cuda'"),
    ],
)
def test_the_named_backend_is_missing(device, told):
    error = refusal(NOTHING, device=device, backend="openvino")
    assert isinstance(error, BackendNotInstalledError)
    assert told in str(error)


def test_a_runtime_that_does_not_work_says_how_to_mend_it():
    error = refusal(machine(record("onnxruntime", MISSING), CRASHED))
    assert isinstance(error, BackendBrokenError)
    assert "openvino on cpu: It died. Mend it." in str(error)

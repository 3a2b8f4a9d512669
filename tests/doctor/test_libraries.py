"""Errors as loaders word them, and the library that they are about."""

from __future__ import annotations

import shutil
import sys

import pytest

from phirt.doctor import commands
from phirt.doctor.libraries import recognise


@pytest.fixture(autouse=True)
def _a_debian_machine(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(commands, "_uses_uv", lambda: False)


# As glibc, musl, dyld, Windows and Python say it.
MESSAGES = {
    "libcudnn.so.9: cannot open shared object file: No such file or directory": "libcudnn.so.9",
    "[ONNXRuntimeError] : 1 : FAIL : Failed to load library libonnxruntime_providers_cuda.so with "
    "error: libcublasLt.so.12: cannot open shared object file: No such file or "
    "directory": "libcublasLt.so.12",
    "libcuda.so.1: cannot open shared object file: No such file or directory": "libcuda.so.1",
    "Error loading shared library libgomp.so.1: No such file (needed by x.so)": "libgomp.so.1",
    "dlopen(/x/_pywrap.so, 0x0002): Library not loaded: @rpath/libomp.dylib\n  Referenced from: "
    "/x/y.dylib": "libomp.dylib",
    "dlopen(libvulkan.dylib, 0x0001): tried: 'libvulkan.dylib' (no such file)": "libvulkan.dylib",
    "Could not find module 'C:\\x\\openvino\\libs\\openvino.dll' (or one of its "
    "dependencies).": "openvino.dll",
    "/lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by /x/"
    "onnxruntime.so)": "GLIBC_2.38",
    "/opt/conda/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found (required by "
    "/x/y.so)": "GLIBCXX_3.4.32",
    "libsomething.so.3: cannot open shared object file: No such file": "libsomething.so.3",
}


@pytest.mark.parametrize(("message", "name"), MESSAGES.items(), ids=MESSAGES.values())
def test_the_library_is_named(message, name):
    found = recognise(f"ImportError: {message}")
    assert found is not None
    assert found.name == name
    assert found.why


@pytest.mark.parametrize(
    "message",
    ["No module named 'flatbuffers'", "division by zero", "CUDA failure 100: no CUDA device"],
)
def test_another_error_is_about_no_library(message):
    assert recognise(message) is None


def missing(name: str) -> str | None:
    found = recognise(f"{name}: cannot open shared object file: No such file or directory")
    assert found is not None
    return found.command


class TestCommands:
    @pytest.mark.parametrize("name", ["libcudnn.so.9", "libcublasLt.so.12", "libcufft.so.11"])
    def test_cuda_comes_as_packages_of_the_wheel(self, name):
        assert str(missing(name)).endswith('pip install "onnxruntime-gpu[cuda,cudnn]"')

    @pytest.mark.parametrize("name", ["libcuda.so.1", "libamdhip64.so.7", "libsomething.so.3"])
    def test_drivers_and_the_unknown_have_none(self, name):
        assert missing(name) is None

    def test_the_systems_own_packages(self, monkeypatch):
        assert missing("libvulkan.so.1") == "sudo apt-get install libvulkan1"
        monkeypatch.setattr(shutil, "which", lambda name: name if name == "dnf" else None)
        assert missing("libvulkan.so.1") == "sudo dnf install vulkan-loader"
        monkeypatch.setattr(shutil, "which", lambda _: None)
        assert missing("libvulkan.so.1") is None

    def test_on_macos(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "darwin")
        found = recognise("Library not loaded: /usr/local/opt/libomp/lib/libomp.dylib")
        assert found is not None
        assert found.command == "brew install libomp"

    def test_on_windows(self, monkeypatch):
        monkeypatch.setattr(sys, "platform", "win32")
        found = recognise(
            "DLL load failed while importing onnxruntime_pybind11_state: The specified module "
            "could not be found."
        )
        assert found is not None
        assert "Visual C++" in found.why
        assert found.command == "winget install --id Microsoft.VCRedist.2015+.x64"

    def test_an_older_system_is_not_mended_by_a_command(self):
        found = recognise("version `GLIBC_2.38' not found")
        assert found is not None
        assert (found.command, "Update the system" in found.why) == (None, True)

    def test_another_architecture(self):
        found = recognise("(mach-o file, but is an incompatible architecture (have 'x86_64'))")
        assert found is not None
        assert "another architecture" in found.why

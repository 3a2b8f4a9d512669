"""Libraries that onnxruntime's CUDA provider needs: opened where they are, named where not."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phirt.backends.onnxruntime.libraries import check_opened, open_libraries
from phirt.backends.onnxruntime.providers import Provider
from phirt.errors import DevicePlacementError

CUDA = Provider(device="cuda", name="CUDAExecutionProvider", memory="cuda")
CPU = Provider(device="cpu", name="CPUExecutionProvider")
RECORD = Path(__file__).parent.parent / "dispatch" / "machines" / "linux-cuda-broken.json"


@pytest.fixture
def wheel(tmp_path: Path) -> SimpleNamespace:
    """An onnxruntime for CUDA, as it lies in site-packages."""
    folder = tmp_path / "onnxruntime" / "capi"
    folder.mkdir(parents=True)
    for name in ("libonnxruntime_providers_cuda.so", "onnxruntime_providers_cuda.dll"):
        (folder / name).write_bytes(b"")
    file = str(folder.parent / "__init__.py")
    return SimpleNamespace(__file__=file, cuda_version="13.0")


def session(*providers: str) -> Any:
    return SimpleNamespace(get_providers=lambda: list(providers))


def lack(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def refuse(_: str) -> None:
        raise OSError(message)

    monkeypatch.setattr(ctypes, "CDLL", refuse)


class TestASessionWithoutItsProvider:
    def test_is_refused_with_the_library_that_is_missing(self, wheel, monkeypatch):
        """The reason that the record of a machine without CUDA's libraries has."""
        library = "libcublasLt.so.13: cannot open shared object file: No such file or directory"
        lack(monkeypatch, library)
        with pytest.raises(DevicePlacementError) as caught:
            check_opened(wheel, session("CPUExecutionProvider"), CUDA, "cuda")
        assert library in str(caught.value)
        (onnxruntime, *_) = json.loads(RECORD.read_text(encoding="utf-8"))["machine"]["backends"]
        (_, trial) = onnxruntime["trials"]
        assert str(caught.value) == trial["reason"]

    def test_the_drivers_own_library_comes_with_the_driver(self, wheel, monkeypatch):
        lack(monkeypatch, "libcuda.so.1: cannot open shared object file: No such file")
        with pytest.raises(DevicePlacementError, match="Install NVIDIA's driver"):
            check_opened(wheel, session("CPUExecutionProvider"), CUDA, "cuda:1")

    def test_what_it_lacks_may_be_no_library(self, wheel, monkeypatch):
        monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
        with pytest.raises(DevicePlacementError, match="on the CPU: it writes"):
            check_opened(wheel, session("CPUExecutionProvider"), CUDA, "cuda")

    def test_one_with_it_is_right(self, wheel):
        check_opened(wheel, session(CUDA.name, CPU.name), CUDA, "cuda")
        check_opened(wheel, session(CPU.name), CPU, "cpu")


class TestNvidiasWheels:
    def test_are_opened_without_a_word(self, wheel, capsys):
        opened: list[bool] = []

        def preload() -> None:
            opened.append(True)
            sys.stdout.write("Failed to load libcudnn")

        wheel.preload_dlls = preload
        (Path(wheel.__file__).parent.parent / "nvidia").mkdir()
        open_libraries(wheel, CUDA)
        assert opened == [True]
        assert capsys.readouterr().out == ""

    def test_are_left_alone_where_there_are_none_or_nothing_needs_them(self, wheel):
        wheel.preload_dlls = lambda: pytest.fail("called")
        open_libraries(wheel, CUDA)
        (Path(wheel.__file__).parent.parent / "nvidia").mkdir()
        open_libraries(wheel, CPU)

    def test_an_older_onnxruntime_has_no_way_to_open_them(self, wheel):
        (Path(wheel.__file__).parent.parent / "nvidia").mkdir()
        open_libraries(wheel, CUDA)

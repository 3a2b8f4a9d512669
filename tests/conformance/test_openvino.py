"""OpenVINO on the CPU under the suite, with IR of phirt's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from phirt.backends.openvino import OpenVinoBackend
from phirt.build.convert import convert
from phirt.testing import BackendConformance

pytest.importorskip("openvino")


class TestOpenVino(BackendConformance):
    backend = OpenVinoBackend
    kv_partners = ("reference", "onnxruntime")

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="openvino", precision="fp32")
        return out

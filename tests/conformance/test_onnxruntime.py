"""ONNX Runtime on the CPU under the suite, with graphs of phirt's own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.build.convert import convert
from phirt.protocols import Lack
from phirt.testing import BackendConformance
from tests.installed import require

require("onnxruntime", "onnx")


class TestOnnxRuntime(BackendConformance):
    backend = OnnxRuntimeBackend
    rejected: ClassVar = {"phimoe": Lack("not yet", "phirt converts dense decoders only")}

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="onnx-genai", precision="fp32")
        return out

"""onnxruntime-genai under the suite, with graphs of phirt's own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from phirt.backends.onnxruntime_genai import OnnxRuntimeGenaiBackend
from phirt.build.convert import convert
from phirt.protocols import Lack
from phirt.testing import BackendConformance
from tests.installed import require

require("onnxruntime_genai", "onnx")


class TestOnnxRuntimeGenai(BackendConformance):
    backend = OnnxRuntimeGenaiBackend
    kv_partners = ("reference", "onnxruntime")
    rejected: ClassVar = {"phimoe": Lack("not yet", "phirt converts dense decoders only")}

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="onnx-genai", precision="fp32")
        return out

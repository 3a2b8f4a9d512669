"""OpenVINO on the CPU under the suite, with IR of phirt's own."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from phirt.backends.openvino import OpenVinoBackend
from phirt.build.convert import convert
from phirt.protocols import Lack
from phirt.testing import BackendConformance
from tests.installed import require

require("openvino")


class TestOpenVino(BackendConformance):
    backend = OpenVinoBackend
    kv_partners = ("reference", "onnxruntime")
    rejected: ClassVar = {"phimoe": Lack("not yet", "phirt converts dense decoders only")}

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="openvino", precision="fp32")
        return out

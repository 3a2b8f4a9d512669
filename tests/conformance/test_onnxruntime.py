"""ONNX Runtime on the CPU under the suite, with graphs of phirt's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest

from phirt.backends import kv_ranges
from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.build.convert import convert
from phirt.protocols import Lack, LoadOptions
from phirt.testing import BackendConformance
from tests.conformance.rounded import RoundedOracle, any_tokens, by_channel
from tests.installed import require

require("onnxruntime", "onnx")


class TestOnnxRuntime(BackendConformance):
    backend = OnnxRuntimeBackend
    rejected: ClassVar = {"phimoe": Lack("not yet", "phirt converts dense decoders only")}

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="onnx-genai", precision="fp32")
        return out


class TestQuantizedCache(TestOnnxRuntime):
    """The same with a KV cache of 8 bits."""

    options = LoadOptions(kv_precision="int8")
    # Where the two compute 1e-7 apart, a few values are rounded to the other side, and the tiny
    # models' attention makes much of it.
    tolerance = 0.4
    kv_partners = ()  # the others do not round

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def pieces(cls) -> Iterator[None]:
        """Have ranges found on the tokens that the oracle finds them on."""
        with patch.object(kv_ranges, "calibration_pieces", any_tokens):
            yield

    @classmethod
    def oracle_of(cls, checkpoint: Path) -> RoundedOracle:
        return by_channel(checkpoint)

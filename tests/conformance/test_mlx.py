"""mlx on its CPU build under the suite, reading the checkpoints as they are."""

from __future__ import annotations

from pathlib import Path

from phirt.backends.mlx import MlxBackend
from phirt.protocols import LoadOptions
from phirt.testing import BackendConformance
from tests.conformance.rounded import RoundedOracle, by_position
from tests.installed import require

require("mlx", "mlx_lm")


class TestMlx(BackendConformance):
    backend = MlxBackend
    kv_partners = ("reference", "onnxruntime", "openvino")


class TestQuantizedCache(BackendConformance):
    """The same with a KV cache of 8 bits, where a group of channels divides the heads."""

    backend = MlxBackend
    architectures = ("qwen3", "gemma3_text")
    options = LoadOptions(kv_precision="int8")
    tolerance = 0.4  # as that of onnxruntime's
    kv_partners = ()  # the others do not round

    @classmethod
    def oracle_of(cls, checkpoint: Path) -> RoundedOracle:
        return by_position(checkpoint)

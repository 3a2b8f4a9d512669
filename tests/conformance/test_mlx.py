"""mlx on its CPU build under the suite, reading the checkpoints as they are."""

from __future__ import annotations

from phirt.backends.mlx import MlxBackend
from phirt.testing import BackendConformance
from tests.installed import require

require("mlx", "mlx_lm")


class TestMlx(BackendConformance):
    backend = MlxBackend
    kv_partners = ("reference", "onnxruntime", "openvino")

"""mlx on its CPU build under the suite, reading the checkpoints as they are."""

from __future__ import annotations

import pytest

from phirt.backends.mlx import MlxBackend
from phirt.testing import BackendConformance

pytest.importorskip("mlx.core")


class TestMlx(BackendConformance):
    backend = MlxBackend
    kv_partners = ("reference", "onnxruntime", "openvino")

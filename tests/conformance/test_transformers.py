"""transformers on torch under the suite, reading the checkpoints as they are."""

from __future__ import annotations

import pytest

from phirt.backends.transformers import TransformersBackend
from phirt.protocols import LoadOptions
from phirt.testing import BackendConformance
from tests.installed import require

require("torch", "transformers")

pytestmark = pytest.mark.oracle


class TestTransformers(BackendConformance):
    backend = TransformersBackend
    options = LoadOptions(threads=1)  # The models are too small to share among threads.
    kv_partners = ("reference", "onnxruntime", "openvino")

"""onnxruntime's OpenVINO provider under the suite: ``nox -s openvino-ep``.

The file's name keeps it out of other runs. The graphs are exports in plain operators: the
provider leaves GroupQueryAttention to the CPU, and phirt then refuses the device. Such an
export of phi3 has the short rotary factors only, so that its context ends at their boundary.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.build.convert import convert
from phirt.errors import DevicePlacementError
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
from phirt.testing import DENSE_ARCHITECTURES, BackendConformance, write_tiny_checkpoint
from phirt.testing.subject import Subject
from tests.backends.onnxruntime_exports import write_export
from tests.devices_real.artifacts import operators_on, vouch

_PROVIDER = "OpenVINOExecutionProvider"


class TestOpenVinoProvider(BackendConformance):
    backend = OnnxRuntimeBackend
    device = "openvino-cpu"
    architectures = tuple(name for name in DENSE_ARCHITECTURES if name != "phi3")

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        return vouch(write_export(checkpoint, out), checkpoint)

    def test_attention_and_products_ran_there(self, subject: Subject) -> None:
        on = operators_on(subject.model)
        assert {"MatMul", "Softmax"} <= set(on[_PROVIDER])
        assert not {"MatMul", "Softmax"} & set(on["CPUExecutionProvider"])

    @pytest.mark.xfail(reason="a request of OpenVINO's that ran out of memory fails for ever after")
    def test_an_allocation_that_fails(self, tmp_path: Path) -> None:
        super().test_an_allocation_that_fails(tmp_path)


def test_a_graph_whose_attention_it_leaves_to_the_cpu_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "hf", "llama")
    out = tmp_path / "onnx"
    out.mkdir()
    convert(checkpoint, out, layout="onnx-genai", precision="fp32")
    with pytest.raises(DevicePlacementError, match="GroupQueryAttention"):
        OnnxRuntimeBackend().load(read_folder(out).artifact, "openvino-cpu", LoadOptions())

"""onnxruntime's WebGPU provider under the suite: ``nox -s webgpu``.

The file's name keeps it out of other runs, which have another wheel of onnxruntime. The
session runs it over SwiftShader, a Vulkan driver in software. Its subgroups have four
lanes, where the provider's attention for several tokens takes at least eight: past four
tokens its answers are wrong (off by 0.9 at attention's output), one token a run they are
right. Hence ``tokens_per_run``, and no phi3, whose long sessions begin with a whole prompt.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import closing
from pathlib import Path

import numpy as np

from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.build.convert import convert
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
from phirt.testing import DENSE_ARCHITECTURES, BackendConformance
from phirt.testing.subject import Subject
from tests.devices_real.artifacts import operators_on

_PROVIDER = "WebGpuExecutionProvider"


class TestWebGpu(BackendConformance):
    backend = OnnxRuntimeBackend
    device = "webgpu"
    architectures = tuple(name for name in DENSE_ARCHITECTURES if name != "phi3")
    options = LoadOptions(extra={"tokens_per_run": 1})

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        convert(checkpoint, out, layout="onnx-genai", precision="fp32")
        return out

    def test_attention_and_products_ran_there(self, subject: Subject) -> None:
        on = operators_on(subject.model)
        assert set(on[_PROVIDER]) >= {"GroupQueryAttention", "MatMul"}
        assert not {"GroupQueryAttention", "MatMul"} & set(on["CPUExecutionProvider"])
        assert on[_PROVIDER]["GroupQueryAttention"] == 2  # layers

    def test_the_choice_of_the_largest_logits_runs_there(self, subject: Subject) -> None:
        with subject.session(8) as session:
            logits = session.prefill([1, 2, 3])
            top = logits.top(3)
            assert np.array_equal(top.ids[0], np.argsort(-logits.numpy()[0], kind="stable")[:3])
        on = operators_on(subject.model, "selection")
        assert set(on[_PROVIDER]) == {"TopK", "ReduceLogSumExp"}

    def test_a_model_goes_without_the_collector(self, subject: Subject) -> None:
        # Which would free sessions and tensors of the device in any order.
        model = self.backend().load(subject.artifact, self.device, self.options)
        with closing(model.new_session(max_length=8, expected_length=8)) as session:
            session.prefill([1, 2, 3]).numpy()
        model.close()
        gone = weakref.ref(model)
        gc.disable()
        try:
            del model, session
            assert gone() is None
        finally:
            gc.enable()

    def test_the_cache_lies_there(self, subject: Subject) -> None:
        folder = read_folder(subject.artifact.path, formats=subject.backend.formats)
        assert folder.artifact == subject.artifact
        with subject.session(8) as session:
            session.prefill([1, 2, 3])
            # onnxruntime 1.27 calls every memory that is not the host's "cuda".
            assert {value.device_name() for value in session._cache._values} == {"cuda"}  # type: ignore[attr-defined]

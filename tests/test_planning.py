"""`phirt.plan`, `Model.plan`, and a load that follows it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import phirt
from phirt.devices.machine import Memory
from phirt.dispatch import candidates, survey
from phirt.forms import Forms
from phirt.models.store import Store
from phirt.testing import write_tiny_checkpoint
from tests.installed import require


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", "llama")


class TestForms:
    ONNX = ("onnx-genai", "onnx")

    def test_what_is_still_to_be_made_of_a_file(self, tiny_gguf):
        (form,) = Forms(tiny_gguf, precision="auto").read_by(self.ONNX, "cpu")
        assert (form.format, form.precision, form.state) == ("onnx-genai", "int8", "to convert")

    def test_what_was_made_of_it(self, tiny_gguf):
        with phirt.load(tiny_gguf, precision="int4", backend="onnxruntime") as model:
            made = model.path
        first, second = Forms(tiny_gguf, precision="auto").read_by(self.ONNX, "cpu")
        assert (first.precision, first.state) == ("int8", "to convert")
        assert (second.precision, second.state, second.path) == ("int4", "here", made)
        assert second.id is not None
        assert second.bytes is not None
        (named,) = Forms(tiny_gguf, precision="int4").read_by(self.ONNX, "cpu")
        assert named == second

    def test_a_folder_as_it_is(self, folder):
        (form,) = Forms(folder, precision="auto").read_by(("safetensors",), "cpu")
        assert (form.format, form.state, form.path) == ("safetensors", "here", folder)

    def test_a_folder_that_has_to_be_converted(self, folder):
        (form,) = Forms(folder, precision="auto").read_by(self.ONNX, "cpu")
        assert (form.format, form.state) == ("onnx-genai", "to convert")

    def test_a_checkpoint_that_the_backend_cannot_have(self, tiny_gguf):
        with pytest.raises(phirt.UnsupportedModelError, match="none of the layouts"):
            Forms(tiny_gguf, precision="auto").read_by(("mlx",), "cpu")

    @pytest.mark.parametrize(
        ("device", "devices"), [("cpu", ("cpu",)), ("cuda", ("cuda",)), ("directml", ("directml",))]
    )
    def test_a_name_that_is_not_here(self, device, devices):
        forms = Forms("phi-3-mini-4k-instruct", precision="auto")
        (form,) = forms.read_by(self.ONNX, device)
        assert (form.format, form.state, form.devices) == ("onnx-genai", "to fetch", devices)

    def test_another_precision_of_it(self):
        forms = Forms("phi-3-mini-4k-instruct", precision="int8")
        (form,) = forms.read_by(self.ONNX, "cpu")
        assert (form.precision, form.state) == ("int8", "to fetch")


class TestPlan:
    def test_nothing_is_fetched_converted_or_asked(self, monkeypatch):
        def called(*_: object, **__: object) -> None:
            pytest.fail("the network was used")

        candidates.machine_for("auto")  # which may start processes
        monkeypatch.setattr(socket, "socket", called)
        plan = phirt.plan("phi-3-mini-4k-instruct")
        assert plan.chosen is not None
        assert plan.chosen.artifact is not None
        assert plan.chosen.artifact.state == "to fetch"
        assert Store().installed() == []

    def test_it_says_what_a_load_would_do(self, tiny_gguf):
        planned = phirt.plan(tiny_gguf).chosen
        with phirt.load(tiny_gguf) as model:
            done = model.plan.chosen
        assert planned is not None
        assert done is not None
        assert (done.backend, done.device) == (planned.backend, planned.device)
        assert planned.artifact is not None
        assert planned.artifact.state == "to convert"
        assert done.artifact is not None
        assert done.artifact.path == model.path

    def test_every_backend_is_in_it(self, tiny_gguf):
        plan = phirt.plan(tiny_gguf)
        backends = {row.backend for row in plan.candidates}
        assert {"onnxruntime", "openvino", "mlx", "transformers", "reference"} <= backends
        assert all(row.reason for row in plan.candidates)
        json.dumps(plan.to_json())

    def test_the_context_is_the_models_own_where_that_is_less(self, folder):
        assert phirt.plan(folder).context == 256
        assert phirt.plan(folder, context=64).context == 64

    def test_an_architecture_that_a_backend_does_not_support(self, tmp_path):
        require("mlx")
        strange = write_tiny_checkpoint(tmp_path / "strange", "llama")
        config = json.loads((strange / "config.json").read_text(encoding="utf-8"))
        config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"]}
        (strange / "config.json").write_text(json.dumps(config), encoding="utf-8")
        rows = phirt.plan(strange, backend="mlx").candidates
        (row,) = [row for row in rows if row.backend == "mlx" and row.device == "cpu"]
        assert (row.status, row.stage) == ("rejected", "model")

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"context": 0}, ValueError, "context=0"),
            ({"context": 1.5}, TypeError, "context must be"),
            ({"context": True}, TypeError, "context must be"),
            ({"context": 4096}, ValueError, "more than the 256 tokens"),
            ({"optimize": "speed"}, ValueError, "'speed' is not one of latency"),
            ({"precision": "int3"}, ValueError, "'int3' is not one of"),
            ({"device": "cuda:"}, ValueError, "not a device name"),
            ({"backend": "onnxruntim"}, phirt.UnknownBackendError, "Did you mean"),
            ({"backend": 3}, TypeError, "backend must be a string"),
            ({"device": 3}, TypeError, "device must be a string"),
        ],
    )
    def test_mistakes(self, folder, options, error, message):
        for function in (phirt.plan, phirt.load):
            with pytest.raises(error, match=message):
                function(folder, **options)

    @pytest.mark.parametrize("model", ["org/nowhere", "phi-3-mini-4k-instruct", None])
    def test_what_would_have_to_be_fetched_offline(self, model):
        """A load could not fetch it either."""
        for function in (phirt.plan, phirt.load):
            with pytest.raises(phirt.ModelNotFoundError, match="offline mode forbids"):
                function(model, offline=True)


class TestLoad:
    @pytest.mark.parametrize("options", [3, ["a"]])
    def test_options_that_are_no_mapping(self, folder, options):
        with pytest.raises(TypeError, match="options must be a mapping"):
            phirt.load(folder, backend="transformers", options=options)

    def test_a_named_backend_has_a_plan_too(self, tiny_model):
        with phirt.load(tiny_model.path, backend="onnxruntime", device="cpu") as model:
            chosen = model.plan.chosen
        assert chosen is not None
        assert (chosen.backend, chosen.device, chosen.status) == ("onnxruntime", "cpu", "chosen")
        assert chosen.reason.startswith("it was named")
        others = {row.stage for row in model.plan.candidates} - {None}
        assert others == {"request"}

    def test_a_named_backend_asks_no_other(self, tiny_model, monkeypatch):
        monkeypatch.setattr(survey, "Survey", lambda: pytest.fail("the machine was surveyed"))
        phirt.load(tiny_model.path, backend="onnxruntime").close()

    def test_what_cannot_fit_is_refused_before_the_runtime_is_called(self, tiny_model, monkeypatch):
        find = candidates.machine_for

        def cramped(backend: str) -> object:
            memory = Memory(total=1 << 30, available=1 << 20)
            return replace(find(backend), memory=memory)

        monkeypatch.setattr(candidates, "machine_for", cramped)
        monkeypatch.setattr(
            "phirt.backends.onnxruntime.OnnxRuntimeBackend.load",
            lambda *_, **__: pytest.fail("the weights were read"),
        )
        for backend in ("auto", "onnxruntime"):
            with pytest.raises(phirt.OutOfMemoryError, match="free"):
                phirt.load(tiny_model.path, backend=backend)

    def test_only_the_runtime_that_is_taken_is_imported(self, tiny_model):
        """Row L10: the others were asked in processes of their own."""
        phirt.load(tiny_model.path).close()  # so that the machine is known
        program = (
            "import sys, phirt\n"
            f"phirt.load({str(tiny_model.path)!r}).close()\n"
            "names = {name.split('.')[0] for name in sys.modules}\n"
            "print(*sorted(names & {'onnxruntime', 'openvino', 'mlx', 'torch', 'transformers'}))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ),
        )
        assert done.stdout.split() == ["onnxruntime"]

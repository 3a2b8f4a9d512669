"""The OpenVINO backend, held against transformers' full forward without a cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phirt.backends.openvino import adapter as openvino_adapter
from phirt.backends.openvino.adapter import OpenVinoBackend, OpenVinoModel
from phirt.backends.openvino.runtime import import_openvino, translate
from phirt.build.convert import convert
from phirt.errors import (
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    ModelFormatError,
    OutOfMemoryError,
    SessionClosedError,
    UnsupportedModelError,
)
from phirt.models.folder import read_folder
from phirt.protocols import Accept, KVCache, LoadOptions, Reject
from phirt.testing import write_tiny_checkpoint
from phirt.types import Artifact, FloatArray
from tests.build.onnx.oracle import pretrained, transformers_logits
from tests.installed import require

require("openvino")

ARCHITECTURES = ("mistral", "qwen2", "qwen3", "phi3", "gemma3_text")  # and llama, below
TOLERANCE = 1e-3
BOUNDARY = 32  # of the tiny phi3, whose context is 128
TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 300, 100)]


def artifact_of(folder: Path) -> Artifact:
    return read_folder(folder, formats=OpenVinoBackend.formats).artifact


def load(folder: Path, **options: Any) -> OpenVinoModel:
    return OpenVinoBackend().load(artifact_of(folder), "cpu", LoadOptions(**options))


def written(root: Path, architecture: str, precision: str = "fp32") -> Path:
    """A folder of OpenVINO IR, converted from a tiny checkpoint that is made beside it."""
    checkpoint, out = root / architecture, root / f"{architecture}-{precision}"
    if not checkpoint.exists():
        write_tiny_checkpoint(checkpoint, architecture)
    out.mkdir()
    convert(checkpoint, out, layout="openvino", precision=precision)
    return out


def difference(found: FloatArray, expected: FloatArray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def llama_folder(root):
    return written(root, "llama")


@pytest.fixture(scope="module")
def llama(llama_folder):
    model = load(llama_folder, extra={"CACHE_DIR": ""})
    yield model
    model.close()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, root):
    """The other architectures, each beside its own model in transformers."""
    model = load(written(root, request.param), extra={"CACHE_DIR": ""})
    return model, pretrained(root / request.param)


@pytest.mark.oracle
class TestAgreesWithTheFullForward:
    @pytest.mark.parametrize("count", [5, 20, 31, 32, 33, 60])
    def test_prefill_and_greedy_decoding(self, pair, count):
        """Within windows and beyond, on both sides of LongRoPE's boundary."""
        model, network = pair
        is_short = model.info.rope_boundary is not None and count <= BOUNDARY
        max_length = BOUNDARY if is_short else 100
        ids = TOKENS[:count]
        session = model.new_session(max_length=max_length, expected_length=count)
        rows = [session.prefill(ids).numpy().copy()]
        while len(ids) < max_length:
            ids.append(int(rows[-1][0].argmax()))
            rows.append(session.decode(ids[-1]).numpy().copy())
        expected = transformers_logits(network, ids)[count - 1 :]
        assert difference(np.concatenate(rows), expected) < TOLERANCE

    def test_chunks_verify_truncate_and_moving_the_cache(self, pair):
        model, network = pair
        expected = transformers_logits(network, TOKENS)
        first = BOUNDARY + 1  # A LongRoPE session of 100 tokens begins beyond it.
        session = model.new_session(max_length=100, expected_length=1)
        session.prefill(TOKENS[:first])
        session.prefill(TOKENS[first:50])
        assert difference(session.verify(TOKENS[50:80]).numpy(), expected[50:80]) < TOLERANCE
        for length in (60, first):
            session.truncate(length)
            again = session.verify(TOKENS[length : length + 5]).numpy()
            assert difference(again, expected[length : length + 5]) < TOLERANCE
        other = model.new_session(max_length=100, expected_length=1)
        other.import_kv(session.export_kv())
        session.close()
        assert difference(other.prefill(TOKENS[38:]).numpy(), expected[-1:]) < TOLERANCE


class TestSession:
    def test_truncate_to_nothing(self, llama):
        session = llama.new_session(max_length=100, expected_length=100)
        expected = session.prefill(TOKENS[:9]).numpy().copy()
        session.truncate(0)
        assert session.length == 0
        assert difference(session.prefill(TOKENS[:9]).numpy(), expected) == 0

    def test_a_cache_is_a_copy_in_the_shape_that_every_backend_has(self, llama):
        session = llama.new_session(max_length=100, expected_length=100)
        session.prefill(TOKENS[:9])
        cache = session.export_kv()
        assert len(cache.layers) == 2
        assert {layer.key.shape for layer in cache.layers} == {(2, 9, 16)}
        assert {layer.value.dtype for layer in cache.layers} == {np.dtype(np.float32)}
        before = cache.layers[1].value.copy()
        session.truncate(0)
        session.prefill(TOKENS[50:80])
        assert difference(cache.layers[1].value, before) == 0

    def test_an_empty_cache_moves(self, llama):
        cache = llama.new_session(max_length=9, expected_length=9).export_kv()
        session = llama.new_session(max_length=9, expected_length=9)
        session.import_kv(cache)
        assert session.length == 0
        session.decode(5)

    def test_a_cache_of_another_shape_is_refused_and_the_session_goes_on(self, llama):
        session = llama.new_session(max_length=100, expected_length=100)
        session.prefill(TOKENS[:9])
        cache = session.export_kv()
        empty = llama.new_session(max_length=100, expected_length=100)
        for layers in (
            cache.layers[:1],
            (
                cache.layers[0],
                cache.layers[0].__class__(0, cache.layers[1].key[:1], cache.layers[1].value),
            ),
        ):
            with pytest.raises(ValueError, match="The cache h"):
                empty.import_kv(KVCache(layers, cache.length, cache.weights_id))
        empty.import_kv(cache)
        again = empty.decode(7).numpy().copy()
        assert difference(session.decode(7).numpy(), again) < TOLERANCE

    def test_sessions_on_many_threads_do_not_disturb_each_other(self, llama):
        def answer(first: int) -> FloatArray:
            session = llama.new_session(max_length=100, expected_length=100)
            rows = [session.prefill(TOKENS[first : first + 20]).numpy().copy()]
            rows += [session.decode(token).numpy().copy() for token in TOKENS[:30]]
            session.close()
            return np.concatenate(rows)

        alone = [answer(first) for first in range(6)]
        together: dict[int, FloatArray] = {}

        def work(first: int) -> None:
            together[first] = answer(first)

        threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert llama.concurrency == "serial"
        assert [difference(together[i], alone[i]) for i in range(6)] == [0] * 6

    def test_interrupt_ends_a_call_that_is_running(self, root):
        """It ends between two pieces of a prompt, and after a step."""
        model = load(written(root, "qwen2", "int8"))
        session: Any = model.new_session(max_length=200, expected_length=200)
        running = threading.Event()
        bind = session._bind

        def bind_and_tell(ids, past):
            bind(ids, past)
            running.set()

        session._bind = bind_and_tell
        raised = []

        def run() -> None:
            while True:
                try:
                    session.prefill(TOKENS)
                    session.truncate(0)
                except SessionClosedError as error:
                    raised.append(error)
                    return

        thread = threading.Thread(target=run)
        thread.start()
        assert running.wait(10)
        session.interrupt()
        thread.join(10)
        assert not thread.is_alive()
        assert raised
        session.close()

    def test_interrupt_is_seen_between_two_pieces(self, llama, monkeypatch):
        """Never cancelled inside OpenVINO, whose plugin then fails at what comes after."""
        monkeypatch.setattr("phirt.backends.openvino.session._CHUNK", 10)
        session: Any = llama.new_session(max_length=100, expected_length=100)
        bind, pieces = session._bind, []

        def bind_and_interrupt(ids, past):
            pieces.append(len(ids))
            bind(ids, past)
            session.interrupt()

        session._bind = bind_and_interrupt
        with pytest.raises(SessionClosedError):
            session.prefill(TOKENS)
        assert pieces == [10]
        session.close()
        assert llama.new_session(max_length=100, expected_length=100).prefill(TOKENS).numpy().any()

    def test_a_long_prompt_runs_in_pieces(self, llama, monkeypatch):
        session = llama.new_session(max_length=100, expected_length=100)
        whole = session.prefill(TOKENS).numpy().copy()
        monkeypatch.setattr("phirt.backends.openvino.session._CHUNK", 30)
        session = llama.new_session(max_length=100, expected_length=100)
        assert difference(session.prefill(TOKENS).numpy(), whole) < TOLERANCE

    def test_after_a_call_that_failed_the_model_goes_on(self, llama, monkeypatch):
        """Running out of memory half-way leaves the plugin with shapes that do not fit."""
        session: Any = llama.new_session(max_length=100, expected_length=100)
        expected = session.prefill(TOKENS[:9]).numpy().copy()
        lengths = []
        monkeypatch.setattr(
            "phirt.backends.openvino.adapter.run_once", lambda request, graph, n: lengths.append(n)
        )
        session._token = None
        with pytest.raises(BackendRuntimeError):
            session.decode(1)
        session.close()
        assert len(set(lengths)) == 2
        session = llama.new_session(max_length=100, expected_length=100)
        assert difference(session.prefill(TOKENS[:9]).numpy(), expected) < TOLERANCE

    def test_logits_outlive_their_session(self, llama_folder):
        model = load(llama_folder, extra={"CACHE_DIR": ""})
        session = model.new_session(max_length=100, expected_length=100)
        logits = session.prefill(TOKENS).numpy()
        copied = logits.copy()
        session.close()
        model.close()
        assert difference(logits, copied) == 0


class TestPrecision:
    def test_int8_stays_close(self, root, llama):
        model = load(written(root, "llama", "int8"))
        rows = []
        for each in (llama, model):
            session = each.new_session(max_length=100, expected_length=100)
            logits = session.verify(TOKENS).numpy().astype(np.float64)
            rows.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        assert 0 < (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1).mean() < 0.08

    def test_computes_in_float32(self, llama):
        compiled = llama.compiled
        for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION"):
            assert compiled.get_property(name) == import_openvino().Type.f32

    def test_settings_of_the_user_win(self, llama_folder):
        model = load(llama_folder, threads=1, extra={"KV_CACHE_PRECISION": "f16", "CACHE_DIR": ""})
        assert model.compiled.get_property("KV_CACHE_PRECISION") == import_openvino().Type.f16
        assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1


class TestCache:
    def files(self) -> list[Path]:
        root = Path(os.environ["PHIRT_HOME"]) / "openvino"
        return sorted(file for file in root.rglob("*.blob") if file.is_file())

    def answer(self, model: OpenVinoModel) -> FloatArray:
        session = model.new_session(max_length=100, expected_length=100)
        return session.prefill(TOKENS).numpy().copy()

    def test_the_second_load_does_not_compile(self, llama_folder):
        first = load(llama_folder)
        second = load(llama_folder)
        assert not first.compiled.get_property("LOADED_FROM_CACHE")
        assert second.compiled.get_property("LOADED_FROM_CACHE")
        assert difference(self.answer(first), self.answer(second)) == 0

    @pytest.mark.parametrize("damage", ["a byte", "cut", "empty", "no checksum"])
    def test_a_damaged_file_is_made_anew(self, llama_folder, damage):
        expected = self.answer(load(llama_folder))
        (file,) = self.files()
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        if damage == "no checksum":
            file.with_name(file.name + ".crc32").unlink()
        sizes = {"cut": len(data) // 2, "empty": 0}
        file.write_bytes(data[: sizes.get(damage, len(data))])
        model = load(llama_folder)
        assert not model.compiled.get_property("LOADED_FROM_CACHE")
        assert difference(self.answer(model), expected) == 0
        assert load(llama_folder).compiled.get_property("LOADED_FROM_CACHE")

    def test_other_weights_do_not_meet(self, llama_folder, tmp_path):
        load(llama_folder)
        write_tiny_checkpoint(tmp_path / "other", "llama", seed=1)
        out = tmp_path / "other-fp32"
        out.mkdir()
        convert(tmp_path / "other", out, layout="openvino", precision="fp32")
        assert not load(out).compiled.get_property("LOADED_FROM_CACHE")

    def test_a_store_that_cannot_be_written_is_no_hindrance(
        self, llama_folder, tmp_path, monkeypatch
    ):
        (tmp_path / "a file").write_bytes(b"")
        monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "a file"))
        assert self.answer(load(llama_folder)).shape == (1, 320)


class TestGraphsOfOtherMakers:
    """What exporters put around a decoder, on a graph of phirt's own."""

    @pytest.fixture
    def changed(self, llama_folder, tmp_path):
        def change(ending) -> OpenVinoModel:
            ov = import_openvino()
            folder = tmp_path / "changed"
            folder.mkdir()
            for name in ("config.json", "tokenizer.json"):
                (folder / name).write_bytes((llama_folder / name).read_bytes())
            model = ov.Core().read_model(llama_folder / "openvino_model.xml")
            result = model.get_results()[0]
            names = result.output(0).get_names()
            logits = ending(ov.opset13, result.input_value(0))
            result.input(0).replace_source_output(logits.output(0))
            result.output(0).set_names(names)
            ov.serialize(model, folder / "openvino_model.xml")
            return load(folder, extra={"CACHE_DIR": ""})

        return change

    def check(self, model: OpenVinoModel, expected: FloatArray) -> None:
        session = model.new_session(max_length=100, expected_length=100)
        assert difference(session.prefill(TOKENS[:60]).numpy(), expected[59:60]) < TOLERANCE
        assert difference(session.verify(TOKENS[60:]).numpy(), expected[60:]) < TOLERANCE

    @pytest.fixture
    def expected(self, llama):
        session = llama.new_session(max_length=100, expected_length=100)
        return session.verify(TOKENS).numpy().copy()

    def test_logits_that_are_capped(self, changed, expected):
        """As Gemma 2's are."""
        cap = np.float32(30)
        model = changed(lambda ops, x: ops.multiply(ops.tanh(ops.divide(x, cap)), cap))
        assert "logits_to_keep" in model.graph.inputs
        self.check(model, 30 * np.tanh(expected / 30))

    def test_an_end_that_mixes_positions_is_left_alone(self, changed, expected):
        model = changed(
            lambda ops, x: ops.reshape(ops.reshape(x, [-1, 320], False), [1, -1, 320], False)
        )
        assert "logits_to_keep" not in model.graph.inputs
        self.check(model, expected)


class TestOnnx:
    """The last resort: phirt's own ONNX graph, and the same as optimum lays it out."""

    def steps(self, model: OpenVinoModel) -> FloatArray:
        session = model.new_session(max_length=100, expected_length=100)
        rows = [session.prefill(TOKENS[:40]).numpy().copy()]
        rows += [session.decode(token).numpy().copy() for token in TOKENS[40:50]]
        session.truncate(45)
        rows.append(session.prefill(TOKENS[45:60]).numpy().copy())
        other = model.new_session(max_length=100, expected_length=100)
        other.import_kv(session.export_kv())
        rows.append(other.decode(TOKENS[60]).numpy().copy())
        return np.concatenate(rows)

    @pytest.mark.parametrize("layout", ["onnx-genai", "onnx"])
    def test_it_computes_the_same(self, root, llama, tmp_path, layout):
        folder = tmp_path / "folder"
        folder.mkdir()
        convert(root / "llama", folder, layout="onnx-genai", precision="fp32")
        if layout == "onnx":
            (folder / "onnx").mkdir()
            for name in ("model.onnx", "model.onnx.data"):
                (folder / name).rename(folder / "onnx" / name)
            for name in ("genai_config.json", "phirt.json"):
                (folder / name).unlink()
            (folder / "config.json").write_bytes((root / "llama" / "config.json").read_bytes())
        model = load(folder)
        assert artifact_of(folder).format == layout
        assert not model.capabilities.verify  # This graph's optional input becomes a constant.
        assert difference(self.steps(model), self.steps(llama)) < TOLERANCE

    def test_a_graph_that_is_no_decoder_is_refused(self, root, tmp_path):
        from onnx import TensorProto, helper, save

        convert(root / "llama", tmp_path, layout="onnx-genai", precision="fp32")
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy")
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
        (tmp_path / "phirt.json").unlink()
        save(helper.make_model(graph), tmp_path / "model.onnx")
        with pytest.raises(UnsupportedModelError, match="x"):
            load(tmp_path)


class TestDevices:
    def test_probe_finds_the_cpu(self):
        found = {each.device: each for each in OpenVinoBackend().probe()}
        assert found["cpu"].status == "found"
        assert "openvino-auto" in found

    def test_placement_is_what_openvino_says(self, llama):
        placement = llama.placement()
        assert (placement.device, placement.provider) == ("cpu", "CPU")

    @pytest.mark.parametrize(
        ("asked", "target", "executes_on", "share"),
        [
            ("gpu", "GPU", ["CPU"], "100%"),
            ("gpu:1", "GPU.1", ["GPU.0"], "100%"),
            ("gpu", "GPU", ["GPU.0", "CPU"], "50%"),
            ("npu", "NPU", [], "100%"),
        ],
    )
    def test_a_graph_that_executes_elsewhere(self, asked, target, executes_on, share):
        compiled = SimpleNamespace(get_property=lambda key: executes_on)
        with pytest.raises(DevicePlacementError, match=f"executes {share} of the graph elsewhere"):
            openvino_adapter._read_placement(compiled, asked, target)

    @pytest.mark.parametrize(
        ("asked", "target", "executes_on"),
        [("gpu", "GPU", ["GPU.0"]), ("gpu:0", "GPU.0", ["GPU"]), ("gpu:1", "GPU.1", ["GPU.1"])],
    )
    def test_a_number_may_be_left_out(self, asked, target, executes_on):
        compiled = SimpleNamespace(get_property=lambda key: executes_on)
        placement = openvino_adapter._read_placement(compiled, asked, target)
        assert placement.provider == executes_on[0]

    def test_a_device_that_openvino_leaves_for_the_cpu(self, llama_folder, monkeypatch):
        compile_model = openvino_adapter._compile
        monkeypatch.setattr(openvino_adapter, "_find_device", lambda core, device: "GPU")
        monkeypatch.setattr(
            openvino_adapter,
            "_compile",
            lambda core, model, target, *rest: compile_model(core, model, "CPU", *rest),
        )
        with pytest.raises(DevicePlacementError, match=r"'gpu' .* 100% .* it names CPU"):
            OpenVinoBackend().load(artifact_of(llama_folder), "gpu", LoadOptions())

    def test_openvino_may_choose(self, llama_folder, llama):
        model = OpenVinoBackend().load(
            artifact_of(llama_folder), "openvino-auto", LoadOptions(extra={"CACHE_DIR": ""})
        )
        assert model.placement().device
        rows = []
        for each in (model, llama):
            session = each.new_session(max_length=100, expected_length=100)
            session.prefill(TOKENS[:50])
            rows.append(session.verify(TOKENS[50:]).numpy().copy())
        assert difference(*rows) < TOLERANCE

    @pytest.mark.parametrize("device", ["cuda", "auto", "metal"])
    def test_other_devices_are_rejected(self, llama_folder, device):
        verdict = OpenVinoBackend().accepts(artifact_of(llama_folder), device)
        assert isinstance(verdict, Reject)
        assert "openvino-auto" in (verdict.fix or "")
        with pytest.raises(DeviceNotAvailableError, match=device):
            OpenVinoBackend().load(artifact_of(llama_folder), device, LoadOptions())

    def test_an_absent_device_is_an_error(self, llama_folder):
        with pytest.raises(DeviceNotAvailableError, match="gpu:7"):
            OpenVinoBackend().load(artifact_of(llama_folder), "gpu:7", LoadOptions())

    @pytest.mark.parametrize(
        ("asked", "found", "target"),
        [
            ("cpu:0", ["CPU"], "CPU"),
            ("gpu", ["CPU", "GPU.0", "GPU.1"], "GPU"),
            ("gpu:1", ["CPU", "GPU.0", "GPU.1"], "GPU.1"),
            ("gpu:0", ["CPU", "GPU"], "GPU"),
            ("openvino-auto", ["CPU"], "AUTO"),
        ],
    )
    def test_a_number_is_given_on_only_where_openvino_counts(self, asked, found, target):
        """The CPU plugin refuses "CPU.0", and settings for the CPU go by the name."""
        core = SimpleNamespace(available_devices=found)
        assert openvino_adapter._find_device(core, asked) == target

    @pytest.mark.parametrize("asked", ["cpu:1", "gpu", "gpu:1", "openvino-auto:0"])
    def test_a_number_that_is_not_there(self, asked):
        core = SimpleNamespace(available_devices=["CPU"])
        with pytest.raises(DeviceNotAvailableError, match=asked):
            openvino_adapter._find_device(core, asked)

    def test_accepts(self, llama_folder, root):
        artifact = artifact_of(llama_folder)
        assert OpenVinoBackend().accepts(artifact, "cpu") == Accept()
        safetensors = read_folder(root / "llama", formats=("safetensors",)).artifact
        assert isinstance(OpenVinoBackend().accepts(safetensors, "cpu"), Reject)


class TestDamage:
    """M8, M11, M12: files that are damaged or lie about sizes give typed errors."""

    @pytest.fixture
    def folder(self, llama_folder, tmp_path):
        copy = tmp_path / "copy"
        copy.mkdir()
        for file in llama_folder.iterdir():
            if file.name != "phirt.json":  # It would notice, and nothing else would be tested.
                (copy / file.name).write_bytes(file.read_bytes())
        return copy

    def test_xml_truncated_anywhere(self, folder):
        xml = folder / "openvino_model.xml"
        data = xml.read_bytes()
        backend, artifact = OpenVinoBackend(), artifact_of(folder)
        for length in [*range(0, len(data) - 40, 4999), *range(len(data) - 40, len(data) - 9, 3)]:
            xml.write_bytes(data[:length])
            with pytest.raises((ModelFormatError, UnsupportedModelError)):
                backend.load(artifact, "cpu", LoadOptions())

    @pytest.mark.parametrize("share", [0, 0.3, 0.99])
    def test_weights_cut_short(self, folder, share):
        weights = folder / "openvino_model.bin"
        data = weights.read_bytes()
        artifact = artifact_of(folder)
        weights.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ModelFormatError, match=r"openvino_model\.xml"):
            OpenVinoBackend().load(artifact, "cpu", LoadOptions())

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (r'offset="\d+"', 'offset="1000000000000000"'),
            (r'offset="\d+"', 'offset="-64"'),
            (r'offset="\d+"', 'offset="18446744073709551600"'),
            (r'size="81920"', 'size="1000000000000000"'),
            (r'shape="320, ?64"', 'shape="1000000000000,64"'),
            (r'shape="320, ?64"', 'shape="4294967296,4294967296"'),
            (r'type="MatMul"', 'type="NoSuchOperator"'),
            (r'to-layer="\d+"', 'to-layer="99999999"'),
        ],
    )
    def test_a_graph_that_lies(self, folder, old, new):
        xml = folder / "openvino_model.xml"
        text = xml.read_text()
        assert re.search(old, text)
        xml.write_text(re.sub(old, new, text, count=1))
        with pytest.raises((ModelFormatError, BackendRuntimeError, OutOfMemoryError)):
            load(folder)

    def test_a_graph_without_states_is_refused(self, folder):
        ov = import_openvino()
        ids = ov.opset13.parameter([-1, -1], ov.Type.i64, name="input_ids")
        mask = ov.opset13.parameter([-1, -1], ov.Type.i64, name="attention_mask")
        ids.output(0).set_names({"input_ids"})
        mask.output(0).set_names({"attention_mask"})
        result = ov.opset13.result(ov.opset13.add(ids, mask))
        result.output(0).set_names({"logits"})
        ov.serialize(ov.Model([result], [ids, mask]), folder / "openvino_model.xml")
        with pytest.raises(UnsupportedModelError, match="text-generation-with-past"):
            load(folder)

    def test_a_graph_that_is_no_decoder_is_refused(self, folder):
        ov = import_openvino()
        image = ov.opset13.parameter([1, 3], ov.Type.f32, name="image")
        image.output(0).set_names({"image"})
        result = ov.opset13.result(ov.opset13.relu(image))
        ov.serialize(ov.Model([result], [image]), folder / "openvino_model.xml")
        with pytest.raises(UnsupportedModelError, match="image"):
            load(folder)


class TestErrors:
    def test_allocation_failures_are_out_of_memory(self):
        for error in (MemoryError(), RuntimeError("x.cpp:1:\nstd::bad_alloc")):
            assert isinstance(translate(error, "running"), OutOfMemoryError)

    def test_the_message_leaves_out_where_in_openvino_it_was_raised(self):
        error = RuntimeError("Exception from src/a.cpp:89:\nCheck 'x' failed at src/b.cpp:1:\nBad.")
        assert str(translate(error, "running 3 tokens")) == (
            "OpenVINO failed while running 3 tokens: Bad."
        )

    def test_an_unknown_setting_is_an_error(self, llama_folder):
        with pytest.raises(BackendRuntimeError, match="NO_SUCH_SETTING"):
            load(llama_folder, extra={"NO_SUCH_SETTING": "1"})


def test_importing_openvino_reports_nothing():
    """Its import sends an event through openvino_telemetry, unless that is kept away from it."""
    program = (
        "import sys; from phirt.backends.openvino.runtime import import_openvino as get; get(); "
        "print([name for name in sys.modules if 'openvino_telemetry' in name])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"

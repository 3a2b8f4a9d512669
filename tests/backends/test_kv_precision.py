"""Caches of keys and values in other precisions than a backend's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from phirt.backends import kv_ranges
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.onnx_nodes import read_nodes
from phirt.backends.onnxruntime import OnnxRuntimeBackend, adapter
from phirt.backends.onnxruntime.adapter import OrtModel
from phirt.backends.onnxruntime.quantized_cache import quantized_graph
from phirt.build.convert import convert
from phirt.dispatch.registry import backend_names, get_backend
from phirt.errors import UnsupportedModelError
from phirt.models.folder import read_folder
from phirt.models.huggingface_config import read_decoder_config
from phirt.models.store import Store
from phirt.protocols import KVCache, LoadOptions
from phirt.testing.checkpoints import write_tiny_checkpoint
from phirt.testing.conformance_settings import DENSE_ARCHITECTURES
from phirt.testing.subject import random_ids, read_artifact
from phirt.text.tokenizer import Tokenizer
from phirt.types import FloatArray
from tests.installed import require

INT8 = LoadOptions(kv_precision="int8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny models, each converted once."""
    root = tmp_path_factory.mktemp("kv-precision")

    def make(architecture: str, layout: str = "onnx-genai", precision: str = "fp32") -> Path:
        checkpoint = root / architecture
        if not checkpoint.exists():
            write_tiny_checkpoint(checkpoint, architecture)
        folder = root / f"{architecture}-{layout}-{precision}"
        if not folder.exists():
            folder.mkdir()
            convert(checkpoint, folder, layout=layout, precision=precision)
        return folder

    return make


def load(folder: Path, options: LoadOptions = INT8) -> OrtModel:
    backend = OnnxRuntimeBackend()
    return backend.load(read_artifact(backend, folder), "cpu", options)


def kept_files() -> list[Path]:
    return sorted((Store().root / "kv-ranges").glob("*"))


def keys_after(model: OrtModel, ids: list[int], imported: KVCache | None = None) -> FloatArray:
    session = model.new_session(max_length=len(ids) + 8, expected_length=4)
    if imported is None:
        session.prefill(ids, needs_logits=False)
    else:
        session.import_kv(imported)
    found = np.stack([layer.key for layer in session.export_kv().layers])
    session.close()
    return found


class TestRanges:
    def test_a_key_that_is_rotated_further_stays_within_them(self):
        random = np.random.default_rng(0)
        keys = random.standard_normal((2, 1, 16)).astype(np.float32)
        bounds = kv_ranges._bounds(keys, 12)
        tightest = np.zeros_like(keys)
        for angle in np.linspace(0, 2 * np.pi, 1000, dtype=np.float32):
            turned = keys.copy()
            one, other = keys[..., :6], keys[..., 6:12]
            turned[..., :6] = one * np.cos(angle) - other * np.sin(angle)
            turned[..., 6:12] = other * np.cos(angle) + one * np.sin(angle)
            tightest = np.maximum(tightest, np.abs(turned))
        assert (tightest <= bounds * np.float32(1 + 1e-5)).all()
        assert (tightest >= bounds * np.float32(0.999)).all()

    def test_where_nobody_knows_what_is_rotated_any_two_channels_may_be(self):
        keys = np.array([[[3.0, 0.0, -4.0, 1.0]]], np.float32)
        assert np.allclose(kv_ranges._bounds(keys, None), 4 * np.sqrt(2))
        # Tables that are wider than the heads are none of these heads.
        assert np.allclose(kv_ranges._bounds(keys, 6), 4 * np.sqrt(2))

    @pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
    def test_the_graph_tells_what_is_rotated(self, made, architecture):
        folder = made(architecture)
        config = read_decoder_config(folder.with_name(architecture) / "config.json")
        dims = [config.rope_of(layer).dim for layer in range(config.num_layers)]
        rotates = [not (config.head_size % 16 or dim % 16) for dim in dims]
        told = read_nodes(folder / "model.onnx").rotary_dims
        assert told == tuple(
            dim if by_the_node else None for dim, by_the_node in zip(dims, rotates, strict=True)
        )

    def test_of_a_graph_that_does_not_say_it_of_every_layer_nothing_is_believed(self, made):
        model = load(made("llama"), LoadOptions())
        folder = read_folder(made("llama"))
        dims = read_nodes(made("llama") / "model.onnx").rotary_dims
        told = kv_ranges.find_ranges(model, folder, dims)
        wide = kv_ranges.find_ranges(model, folder, (16,))
        assert (wide.layers[0].key >= told.layers[0].key).all()
        assert np.ptp(wide.layers[0].key, axis=-1).max() == 0

    def test_they_are_found_once_and_kept(self, made, monkeypatch):
        ids = random_ids(24)
        first = keys_after(load(made("llama")), ids)
        assert len(kept_files()) == 1

        def refuse(*_: object) -> None:
            raise AssertionError("they were found out again")

        monkeypatch.setattr(adapter, "find_ranges", refuse)
        assert np.array_equal(first, keys_after(load(made("llama")), ids))

    @pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
    def test_what_is_damaged_is_found_out_again(self, made, content):
        ids = random_ids(24)
        first = keys_after(load(made("llama")), ids)
        (file,) = kept_files()
        sound = file.read_bytes()
        # Without content, one whose last bytes are others.
        file.write_bytes(sound[:-4] + b"\0\0\0\0" if content is None else content)
        assert np.array_equal(first, keys_after(load(made("llama")), ids))
        assert file.read_bytes() == sound

    def test_those_of_another_precision_are_others(self, made):
        for precision in ("fp32", "int8"):
            load(made("llama", precision=precision))
        assert len(kept_files()) == 2

    def test_a_store_that_cannot_be_written_costs_time_only(self, made, monkeypatch, caplog):
        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kv_ranges, "write_kv", refuse)
        keys_after(load(made("llama")), random_ids(8))
        assert "found out again" in caplog.text
        assert kept_files() == []

    def test_a_tokenizer_that_makes_too_little_of_the_text(self, made, monkeypatch):
        monkeypatch.setattr(Tokenizer, "encode", lambda *_: [1, 2, 3])
        with pytest.raises(UnsupportedModelError, match="too few"):
            load(made("llama"))


class TestOnnxruntime:
    def test_the_cache_is_of_one_byte_a_value(self, made):
        model = load(made("llama"))
        assert model.graph.cache.storage == np.int8
        assert load(made("llama"), LoadOptions()).graph.cache.storage == np.float32

    def test_a_cache_in_floats_is_rounded_once(self, made):
        """What is imported, exported and imported again stays what it is."""
        ids = random_ids(24)
        floats = load(made("llama"), LoadOptions())
        session = floats.new_session(max_length=32, expected_length=4)
        session.prefill(ids)
        exported = session.export_kv()
        model = load(made("llama"))
        once = keys_after(model, ids, exported)
        exact = np.stack([layer.key for layer in exported.layers])
        assert 0 < np.abs(once - exact).max() < 0.1 * np.abs(exact).max()
        other = model.new_session(max_length=32, expected_length=4)
        other.import_kv(exported)
        assert np.array_equal(once, keys_after(model, ids, other.export_kv()))

    def test_with_float_activations_for_long_prompts(self, made):
        ids, folder = random_ids(48), made("llama", precision="int8")
        both = LoadOptions(kv_precision="int8", extra={"float_prefill_from": 16})
        alone = LoadOptions(extra={"float_prefill_from": 16})
        model = load(folder, both)
        floats, rounded = keys_after(load(folder, alone), ids)[0], keys_after(load(folder), ids)[0]
        expected = model.graph.from_cache(0, model.graph.to_cache(0, floats))
        # Of the first layer, before which there is nothing else to differ.
        assert np.abs(expected - keys_after(model, ids)[0]).mean() < 1e-5
        assert np.abs(expected - rounded).mean() > 1e-4

    @pytest.fixture
    def edited(self, made, tmp_path):
        """``edited(change)``: a llama with another graph; no text is run through it in vain."""

        def write(change):
            folder = tmp_path / "edited"
            shutil.copytree(made("llama"), folder)
            (folder / "phirt.json").unlink()
            model = onnx.load(folder / "model.onnx", load_external_data=False)
            change(model.graph)
            onnx.save(model, folder / "model.onnx")
            return folder

        return write

    def test_a_cache_that_something_else_reads(self, edited, monkeypatch):
        def change(graph):
            node = onnx.helper.make_node("Identity", ["past_key_values.1.key"], ["unused"])
            graph.node.append(node)

        monkeypatch.setattr(adapter, "find_ranges", None)
        with pytest.raises(UnsupportedModelError, match="with Identity: only GroupQuery"):
            load(edited(change))

    def test_a_cache_that_something_else_gives_out(self, edited, monkeypatch):
        def change(graph):
            attention = next(node for node in graph.node if node.op_type == "GroupQueryAttention")
            attention.output[1] = "inner"
            graph.node.append(onnx.helper.make_node("Identity", ["inner"], ["present.0.key"]))

        folder = edited(change)
        load(folder, LoadOptions()).close()
        monkeypatch.setattr(adapter, "find_ranges", None)
        with pytest.raises(UnsupportedModelError, match="goes on with the KV cache inner"):
            load(folder)

    def test_a_runtime_that_is_too_old(self, made, monkeypatch):
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "__version__", "1.26.0")
        with pytest.raises(UnsupportedModelError, match=r"1\.26\.0 keeps no .* 1\.31 does"):
            load(made("llama"))

    def test_a_graph_without_the_cache(self, made):
        graph = (made("llama") / "model.onnx").read_bytes()
        with pytest.raises(UnsupportedModelError, match=r"no attention that reads past\.key"):
            quantized_graph(graph, {"past.key": np.ones((1, 1, 4), np.float32)})

    def test_float32_is_what_it_has(self, made):
        model = load(made("llama"), LoadOptions(kv_precision="fp32"))
        assert model.graph.cache.storage == np.float32
        with pytest.raises(UnsupportedModelError, match="in float16, not in float32"):
            load(made("llama", precision="fp16"), LoadOptions(kv_precision="fp32"))

    def test_a_cache_of_float16_becomes_none_of_8_bits(self, made):
        with pytest.raises(UnsupportedModelError, match="not of float32"):
            load(made("llama", precision="fp16"))
        assert kept_files() == []


class TestOpenVino:
    @pytest.mark.parametrize(
        ("precision", "kept"), [("fp32", "f32"), ("fp16", "f16"), ("int8", "u8")]
    )
    def test_the_runtime_has_the_property(self, made, precision, kept):
        require("openvino")
        backend = get_backend("openvino")
        artifact = read_artifact(backend, made("llama", "openvino"))
        model = backend.load(artifact, "cpu", LoadOptions(kv_precision=precision))
        told = model.compiled.get_property("KV_CACHE_PRECISION")  # type: ignore[attr-defined]  # OpenVINO's own
        model.close()
        assert told.get_type_name() == kept

    def test_it_is_not_said_twice(self, made):
        require("openvino")
        backend = get_backend("openvino")
        artifact = read_artifact(backend, made("llama", "openvino"))
        both = LoadOptions(kv_precision="int8", extra={"KV_CACHE_PRECISION": "f32"})
        with pytest.raises(ValueError, match="the same thing twice"):
            backend.load(artifact, "cpu", both)

    def test_not_where_nobody_tried_it(self, made):
        require("openvino")
        backend = get_backend("openvino")
        artifact = read_artifact(backend, made("llama", "openvino"))
        with pytest.raises(UnsupportedModelError, match="on device 'openvino-auto'"):
            backend.load(artifact, "openvino-auto", INT8)


class TestMlx:
    def load(self, made, architecture):
        require("mlx", "mlx_lm")
        backend = get_backend("mlx")
        made(architecture)
        artifact = read_artifact(backend, made(architecture).with_name(architecture))
        return backend.load(artifact, "cpu", INT8)

    def test_a_step_of_several_rows_is_not_done(self, made):
        model = self.load(made, "qwen3")
        assert not model.capabilities.batch
        assert "8 bits" in model.capabilities.lacks["batch"].reason
        with pytest.raises(NotImplementedError):
            model.new_pool(slots=2, capacity=8, expected_length=8)
        model.close()

    def test_heads_that_no_group_divides(self, made):
        with pytest.raises(UnsupportedModelError, match=r"64 or 32 channels.* heads have 16"):
            self.load(made, "llama")

    def test_what_is_taken_over_is_rounded_once_more(self, made):
        """By a step of 255 at most, where the first rounding has moved the ends of a group."""
        model, ids = self.load(made, "qwen3"), random_ids(24)
        session = model.new_session(max_length=32, expected_length=32)
        session.prefill(ids)
        exported = session.export_kv()
        other = model.new_session(max_length=32, expected_length=32)
        other.import_kv(exported)
        for one, again in zip(exported.layers, other.export_kv().layers, strict=True):
            for held, taken in ((one.key, again.key), (one.value, again.value)):
                step = np.ptp(held, axis=-1, keepdims=True) / 255
                assert (np.abs(held - taken) <= 1.1 * step).all()
        model.close()


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_says_what_it_has_not(name):
    backend = get_backend(name)
    for precision in ("fp32", "fp16", "int8"):
        options = LoadOptions(kv_precision=precision)
        if precision in backend.kv_precisions:
            check_kv_precision(backend, "cpu", options)
        else:
            with pytest.raises(UnsupportedModelError, match=f"{name!r} keeps no KV cache in"):
                check_kv_precision(backend, "cpu", options)
        with pytest.raises(UnsupportedModelError, match="on device 'cuda:1': it has no choice"):
            check_kv_precision(backend, "cuda:1", options)
    with pytest.raises(ValueError, match="'int9' is not one of fp32, fp16, int8"):
        check_kv_precision(backend, "cpu", LoadOptions(kv_precision="int9"))


@pytest.mark.parametrize("name", backend_names())
def test_no_adapter_overlooks_it(name, made):
    backend = get_backend(name)
    layout = next(
        each for each in backend.formats if each in ("onnx-genai", "openvino", "mlx", "safetensors")
    )
    folder = made("llama") if layout == "onnx-genai" else made("llama", "openvino")
    artifact = read_folder(folder).artifact
    with pytest.raises(ValueError, match="'int9' is not one of"):
        backend.load(artifact, "cpu", LoadOptions(kv_precision="int9"))

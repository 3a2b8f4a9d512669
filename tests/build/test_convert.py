"""The folder that a conversion leaves behind."""

from __future__ import annotations

import json
from hashlib import sha256

import numpy as np
import pytest

from phirt.build.convert import choose_precision, convert, estimate_bytes
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.precision import FORMAT_PRECISIONS
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.folder import held_formats, read_folder
from phirt.models.onnx_safety import check_onnx_files
from phirt.testing import write_tiny_checkpoint
from phirt.types import Progress
from tests.build.onnx.oracle import transformers_logits, transformers_model
from tests.build.onnx.runtime import OnnxDecoder
from tests.tiny_gguf import CHAT_TEMPLATE, write_tiny_llama_gguf


@pytest.fixture
def out_dir(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


class TestFolder:
    def test_describes_itself(self, tiny_q4_1_gguf, out_dir):
        convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="exact")
        folder = read_folder(out_dir)
        assert folder.artifact.architecture == "llama"
        assert folder.artifact.precision == "exact"
        assert folder.chat_template == CHAT_TEMPLATE
        assert folder.facts.context_length == 256
        assert folder.facts.eos_token_ids
        assert folder.generation_defaults.get("do_sample") is None, "greedy where nothing is said"
        assert folder.manifest is not None
        digest = sha256(tiny_q4_1_gguf.read_bytes()).hexdigest()
        assert folder.manifest.source == {"name": "tiny-q4_1.gguf", "id": f"sha256:{digest}"}
        assert {"phirt", "converter", "onnx", "gguf"} <= folder.manifest.versions.keys()
        written = {path.name: path.stat().st_size for path in out_dir.iterdir()}
        assert {name: r.size for name, r in folder.manifest.files.items()} == {
            name: size for name, size in written.items() if name != "phirt.json"
        }

    def test_passes_the_check_that_a_backend_makes_first(self, tiny_q4_1_gguf, out_dir):
        convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="int8")
        check_onnx_files(out_dir, "model.onnx")

    def test_weights_id_tells_source_and_precision_apart(self, tiny_q4_1_gguf, tmp_path):
        ids: dict[tuple[str, str], str] = {}
        for source, precision in (("a", "int8"), ("a", "int4"), ("b", "int8"), ("a", "int8")):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            folder.mkdir()
            convert(
                tiny_q4_1_gguf, folder, layout="onnx-genai", precision=precision, source_id=source
            )
            found = json.loads((folder / "phirt.json").read_text())["weights_id"]
            assert ids.setdefault((source, precision), found) == found
        assert len(set(ids.values())) == 3

    def test_what_is_lossless_has_the_id_of_its_source(self, tiny_q4_1_gguf, tmp_path):
        """Caches may move between layouts that hold the same values."""
        for layout, precision in (("onnx-genai", "fp32"), ("onnx-genai", "exact")):
            folder = tmp_path / precision
            folder.mkdir()
            convert(tiny_q4_1_gguf, folder, layout=layout, precision=precision, source_id="id")
            assert read_folder(folder).artifact.weights_id == "id"

    def test_without_a_chat_template_there_is_no_such_file(self, tmp_path, out_dir):
        source = write_tiny_llama_gguf(tmp_path / "base.gguf", chat_template=None)
        convert(source, out_dir, layout="onnx-genai", precision="fp32")
        assert not (out_dir / "chat_template.jinja").exists()
        assert read_folder(out_dir).chat_template is None

    def test_progress_counts_every_tensor_once(self, tiny_q4_1_gguf, out_dir):
        seen: list[Progress] = []
        convert(
            tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="exact", progress=seen.append
        )
        with GgufCheckpoint(tiny_q4_1_gguf) as checkpoint:
            total = len(checkpoint.names())
        assert {(item.stage, item.total, item.unit) for item in seen} == {
            ("convert", total, "tensors")
        }
        counts = [item.completed for item in seen]
        assert counts == sorted(counts)
        assert counts[-1] == total


SOURCES = ["a GGUF file", "a folder of safetensors"]
CONVERSIONS = [
    (layout, str(precision))
    for layout, precisions in FORMAT_PRECISIONS.items()
    for precision in precisions
]


class TestEveryLayout:
    @pytest.fixture(params=SOURCES)
    def source(self, request, tiny_q4_1_gguf, tmp_path):
        if request.param == SOURCES[0]:
            return tiny_q4_1_gguf
        return write_tiny_checkpoint(tmp_path / "tiny", "llama")

    @pytest.mark.parametrize(("layout", "precision"), CONVERSIONS)
    def test_reads_back_as_what_it_is(self, source, layout, precision, out_dir):
        convert(source, out_dir, layout=layout, precision=precision)
        folder = read_folder(out_dir, formats=(layout,))
        assert (folder.artifact.format, folder.artifact.precision) == (layout, precision)
        assert folder.artifact.architecture == "llama"
        assert folder.chat_template is not None
        assert held_formats(out_dir) == (layout,)
        if source.is_dir():
            tokenizer = (source / "tokenizer.json").read_bytes()
            assert (out_dir / "tokenizer.json").read_bytes() == tokenizer

    @pytest.mark.parametrize(("layout", "precision"), CONVERSIONS)
    def test_the_space_it_takes_is_bounded_beforehand(self, source, layout, precision, out_dir):
        convert(source, out_dir, layout=layout, precision=precision)
        taken = sum(path.stat().st_size for path in out_dir.iterdir())
        assert taken < estimate_bytes(source, precision)

    def test_the_same_weights_in_fp32_have_one_id_in_every_layout(self, source, tmp_path):
        ids = set()
        for layout in FORMAT_PRECISIONS:
            out = tmp_path / f"out-{layout}"
            out.mkdir()
            convert(source, out, layout=layout, precision="fp32")
            ids.add(read_folder(out, formats=(layout,)).artifact.weights_id)
        assert len(ids) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("layout", "precision"), [("safetensors", "int8"), ("openvino", "bf16")]
    )
    def test_a_precision_that_a_layout_cannot_have(
        self, tiny_q4_1_gguf, layout, precision, out_dir
    ):
        with pytest.raises(UnsupportedModelError, match=f"'{precision}'.*{layout}.*fp32"):
            convert(tiny_q4_1_gguf, out_dir, layout=layout, precision=precision)
        assert list(out_dir.iterdir()) == []

    def test_a_folder_that_is_not_empty(self, tiny_q4_1_gguf, out_dir):
        (out_dir / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not empty"):
            convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="fp32")
        assert [path.name for path in out_dir.iterdir()] == ["mine.txt"]

    def test_an_unknown_precision(self, tiny_q4_1_gguf, out_dir):
        with pytest.raises(ValueError, match="int3"):
            convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="int3")

    def test_a_missing_source(self, tmp_path, out_dir):
        with pytest.raises(ModelNotFoundError):
            convert(tmp_path / "no.gguf", out_dir, layout="onnx-genai", precision="fp32")

    def test_what_fails_leaves_no_manifest(self, tiny_q4_1_gguf, tmp_path, out_dir):
        # NaN in the last matrix: found only when it is read, after most of the writing.
        damaged = tmp_path / "damaged.gguf"
        data = bytearray(tiny_q4_1_gguf.read_bytes())
        with GgufCheckpoint(tiny_q4_1_gguf) as checkpoint:
            offset = checkpoint.file.header.tensors["blk.1.ffn_down.weight"].offset
        data[offset : offset + 2] = b"\xff\x7f"
        damaged.write_bytes(data)
        with pytest.raises(ModelFormatError, match="NaN"):
            convert(damaged, out_dir, layout="onnx-genai", precision="int8")
        assert not (out_dir / "phirt.json").exists()


class TestChoice:
    def test_int8_by_default(self, tiny_q4_1_gguf):
        assert choose_precision(tiny_q4_1_gguf, "onnx-genai") == "int8"

    def test_int8_for_openvino_too(self, tiny_q4_1_gguf):
        assert choose_precision(tiny_q4_1_gguf, "openvino") == "int8"

    def test_fp32_where_runtimes_compute_in_float(self, tiny_q4_1_gguf):
        assert choose_precision(tiny_q4_1_gguf, "safetensors") == "fp32"

    def test_fp32_where_blocks_do_not_fit(self, tmp_path):
        source = write_tiny_llama_gguf(tmp_path / "odd.gguf", intermediate=72)
        assert choose_precision(source, "onnx-genai") == "fp32"


@pytest.mark.oracle
@pytest.mark.parametrize("encoding", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_in_fp32_equal_transformers(encoding, tmp_path, out_dir):
    source = tmp_path / "k.gguf"
    write_tiny_llama_gguf(source, encoding=encoding, layers=1, hidden=256, heads=4, kv_heads=2)
    convert(source, out_dir, layout="onnx-genai", precision="fp32")
    tokens = [int(i) for i in np.random.default_rng(0).integers(0, 300, 20)]
    with GgufCheckpoint(source) as checkpoint:
        expected = transformers_logits(transformers_model(checkpoint), tokens)
    found = OnnxDecoder(out_dir / "model.onnx").logits(tokens)
    assert np.abs(found - expected).max() < 1e-3


class TestGenai:
    """onnxruntime-genai loads the folder and generates what our own reading of it does."""

    def test_loads_and_generates(self, tiny_q4_1_gguf, out_dir):
        import onnxruntime_genai as genai

        convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="exact")
        model = genai.Model(str(out_dir))
        tokenizer = genai.Tokenizer(model)
        prompt = [int(token) for token in tokenizer.encode("hello World 123")]
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 8, min_length=len(prompt) + 8)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        logits = np.array(generator.get_logits()).reshape(-1)
        decoder = OnnxDecoder(out_dir / "model.onnx")
        np.testing.assert_allclose(logits, decoder.run(prompt)[0], atol=1e-4)
        generator.generate_next_token()
        assert not generator.is_done()

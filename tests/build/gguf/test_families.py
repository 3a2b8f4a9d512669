"""What GGUF files of phi3 and gemma3 keep otherwise than those of llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.convert import convert
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.file import GgufFile
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.errors import ModelFormatError, PhirtError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from tests.tiny_gguf import write_tiny_llama_gguf

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a tiny file, then change bytes of its tensors."""

    def write(
        architecture: Any, *, values: dict[str, list[float]] | None = None, **options: Any
    ) -> Path:
        path = tmp_path / "model.gguf"
        write_tiny_llama_gguf(path, architecture=architecture, **{"layers": 1, **options})
        with GgufFile(path) as file, path.open("r+b") as stream:
            for name, numbers in (values or {}).items():
                stream.seek(file.header.tensors[name].offset)
                stream.write(np.array(numbers, "<f4").tobytes())
        return path

    return write


def read_config(path: Path) -> DecoderConfig:
    with GgufCheckpoint(path) as checkpoint:
        return checkpoint.config


class TestFusedProjections:
    """phi3 keeps q, k and v in one matrix, and gate and up in another."""

    @pytest.mark.parametrize("encoding", ["F32", "Q4_0"])
    def test_they_are_rows_of_it(self, write: Write, encoding: str) -> None:
        path = write("phi3", encoding=encoding)
        with GgufCheckpoint(path) as checkpoint:
            header, scope = checkpoint.file.header, "model.layers.0"
            fused = {
                "blk.0.attn_qkv.weight": [f"self_attn.{part}_proj" for part in "qkv"],
                "blk.0.ffn_up.weight": ["mlp.gate_proj", "mlp.up_proj"],
            }
            for name, projections in fused.items():
                info = header.tensors[name]
                rows = checkpoint.file.read(info.offset, info.nbytes).reshape(info.shape[0], -1)
                parts = [checkpoint.tensor(f"{scope}.{part}.weight") for part in projections]
                np.testing.assert_array_equal(np.concatenate([p.blocks() for p in parts]), rows)
                assert [part.name for part in parts] == [f"{scope}.{p}.weight" for p in projections]
                for part in parts:
                    assert part.shape == part.float32().shape
                    some = part.rows(3, 7)
                    np.testing.assert_array_equal(some.blocks(), part.blocks()[3:7])
                    np.testing.assert_array_equal(some.float32(), part.float32()[3:7])

    def test_a_matrix_of_other_projections_is_refused(self, write: Write) -> None:
        path = write("phi3", metadata={"phi3.attention.head_count_kv": 4})
        with pytest.raises(ModelFormatError, match=r"attn_qkv\.weight' has shape \(128, 64\)"):
            GgufCheckpoint(path)


class TestLongRope:
    def test_two_tensors_and_a_factor(self, write: Write) -> None:
        rope = read_config(write("phi3")).rope
        assert rope.boundary == 128
        assert rope.factors is not None
        assert rope.long_factors is not None
        np.testing.assert_array_equal(rope.factors, np.linspace(1, 1.5, 8, dtype=np.float32))
        np.testing.assert_array_equal(rope.long_factors, np.linspace(1, 6, 8, dtype=np.float32))
        assert rope.attention_factor == pytest.approx((1 + np.log(2) / np.log(128)) ** 0.5)

    @pytest.mark.parametrize("original", [256, 512, None])
    def test_where_nothing_is_beyond_the_original_context(
        self, write: Write, original: int | None
    ) -> None:
        key = "phi3.rope.scaling.original_context_length"
        rope = read_config(write("phi3", metadata={key: original})).rope
        assert (rope.boundary, rope.long_factors) == (None, None)
        assert rope.factors is not None

    def test_a_linear_factor_divides_both(self, write: Write) -> None:
        rope = read_config(write("phi3", metadata={"phi3.rope.scaling.factor": 2.0})).rope
        assert rope.factors is not None
        assert rope.long_factors is not None
        assert (rope.factors[-1], rope.long_factors[-1]) == (3.0, 12.0)

    @pytest.mark.parametrize("name", ["rope_factors_long.weight", "rope_factors_short.weight"])
    @pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-30, 1e30])
    def test_a_divisor_must_be_of_a_sane_size(self, write: Write, name: str, bad: float) -> None:
        path = write("phi3", values={name: [1.0] * 7 + [bad]})
        with pytest.raises(ModelFormatError, match=f"{name} holds a divisor"):
            GgufCheckpoint(path)

    @pytest.mark.parametrize("missing", ["long", "short"])
    def test_both_or_none(self, write: Write, missing: str) -> None:
        path = write("phi3")
        name = f"rope_factors_{missing}.weight".encode()
        path.write_bytes(path.read_bytes().replace(name, name[:-1] + b"!"))
        with pytest.raises(ModelFormatError, match=f"'{name.decode()}' is missing"):
            GgufCheckpoint(path)

    @pytest.mark.parametrize(
        ("metadata", "error", "message"),
        [
            ({"phi3.rope.scaling.attn_factor": None}, ModelFormatError, "attn_factor is missing"),
            ({"phi3.rope.scaling.attn_factor": 0.0}, ModelFormatError, "attn_factor is 0.0"),
            ({"phi3.rope.scaling.attn_factor": 1e30}, ModelFormatError, "must be from 1e-06 to"),
            ({"phi3.rope.scaling.original_context_length": 0}, ModelFormatError, "length is 0"),
            ({"phi3.rope.scaling.type": "yarn"}, UnsupportedModelError, "of type 'yarn'"),
            ({"phi3.rope.dimension_count": 8}, ModelFormatError, r"must be F32 of \(4,\)"),
            ({"phi3.rope.dimension_count": 7}, ModelFormatError, "7 of 16 dimensions"),
            ({"phi3.rope.dimension_count": 18}, ModelFormatError, "18 of 16 dimensions"),
        ],
    )
    def test_what_contradicts_it(
        self,
        write: Write,
        metadata: dict[str, Any],
        error: type[PhirtError],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            GgufCheckpoint(write("phi3", metadata=metadata))

    def test_its_factor_alone_is_refused(self, write: Write) -> None:
        path = write("llama", metadata={"llama.rope.scaling.attn_factor": 1.2})
        with pytest.raises(UnsupportedModelError, match="attn_factor without LongRoPE's factors"):
            GgufCheckpoint(path)


class TestWindowOfPhi3:
    """Of every layer, as the checkpoint has it; llama.cpp ignores it, and says so."""

    @pytest.mark.parametrize(("window", "found"), [(0, None), (64, 64), (256, None)])
    def test_it_is_the_file_s(self, write: Write, window: int, found: int | None) -> None:
        config = read_config(write("phi3", metadata={"phi3.attention.sliding_window": window}))
        assert config.window == found

    def test_a_file_that_does_not_say_is_refused(self, write: Write) -> None:
        path = write("phi3", metadata={"phi3.attention.sliding_window": None})
        with pytest.raises(UnsupportedModelError, match=r"without phi3\.attention\.sliding_window"):
            GgufCheckpoint(path)


class TestGemma3:
    def test_what_llama_cpp_takes_for_granted(self, write: Write) -> None:
        config = read_config(write("gemma3", layers=7))
        assert config.architecture == "gemma3_text"
        assert config.windows == (32, 32, 32, 32, 32, None, 32)
        assert (config.rope.theta, config.rope.factors) == (10_000.0, None)
        assert config.local_rope is not None
        assert (config.local_rope.theta, config.local_rope.factors) == (10_000.0, None)
        assert (config.activation, config.norm_offset) == ("gelu_tanh", 1.0)
        assert (config.sandwich_norms, config.qk_norm) == (True, True)
        assert (config.embedding_scale, config.scale) == (8.0, 0.25)
        assert config.tie_word_embeddings

    def test_what_the_file_says_instead(self, write: Write) -> None:
        metadata = {
            "gemma3.attention.sliding_window_pattern": 2,
            "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.freq_base_swa": 5000.0,
            "gemma3.rope.scaling.factor": 8.0,
        }
        config = read_config(write("gemma3", layers=2, metadata=metadata))
        assert config.windows == (32, None)
        assert config.rope.theta == 1e6
        assert config.rope.factors is not None
        assert config.rope.factors.tolist() == [8.0] * 8
        assert config.local_rope is not None
        assert (config.local_rope.theta, config.local_rope.factors) == (5000.0, None)

    @pytest.mark.parametrize("window", [0, None])
    def test_without_a_window_every_layer_attends_to_everything(
        self, write: Write, window: int | None
    ) -> None:
        path = write("gemma3", metadata={"gemma3.attention.sliding_window": window})
        config = read_config(path)
        assert (config.windows, config.local_rope) == ((), None)

    def test_a_window_wider_than_the_context_keeps_its_layers_rotary_embedding(
        self, write: Write
    ) -> None:
        path = write("gemma3", metadata={"gemma3.attention.sliding_window": 512})
        assert read_config(path).windows == (512,)

    def test_the_largest_scales_its_scores_by_the_width(self, write: Write) -> None:
        """62 layers are the 27B; its heads are narrower than its share of the width."""
        options = {"hidden": 32, "intermediate": 32, "vocab": 262}
        keys = {"gemma3.attention.head_count": 2, "gemma3.attention.key_length": 8}
        with pytest.raises(ModelFormatError, match="attn_q"):  # Read, and of other heads.
            GgufCheckpoint(write("gemma3", layers=62, metadata=keys, **options))
        config = read_config(write("gemma3", layers=62, heads=2, kv_heads=1, **options))
        assert config.scale == 16**-0.5

    def test_one_is_taken_back_from_its_norms(self, write: Write) -> None:
        path = write("gemma3", values={"output_norm.weight": [1.5] * 64})
        with GgufCheckpoint(path) as checkpoint:
            norm = checkpoint.tensor("model.norm.weight")
            np.testing.assert_array_equal(norm.float32(), np.full(64, 0.5, np.float32))
            np.testing.assert_array_equal(norm.blocks(), norm.float32().view(np.uint8)[None])
            assert (norm.encoding, norm.shape) == ("F32", (64,))

    @pytest.mark.parametrize(
        ("metadata", "error", "message"),
        [
            ({"gemma3.final_logit_softcapping": 30.0}, UnsupportedModelError, r"capping \(30\)"),
            ({"gemma3.attention.sliding_window": 2**62}, ModelFormatError, "must be from 1 to"),
            ({"gemma3.attention.sliding_window": -1}, ModelFormatError, "sliding_window is -1"),
            ({"gemma3.attention.sliding_window_pattern": 0}, ModelFormatError, "pattern is 0"),
            ({"gemma3.rope.freq_base_swa": float("nan")}, ModelFormatError, "base_swa is nan"),
            ({"gemma3.rope.freq_base": 1e-30}, ModelFormatError, "must be from 1e-06 to 1e"),
            ({"gemma3.rope.dimension_count": 8}, UnsupportedModelError, "rotating 8 of 16"),
        ],
    )
    def test_what_is_refused(
        self,
        write: Write,
        metadata: dict[str, Any],
        error: type[PhirtError],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            GgufCheckpoint(write("gemma3", metadata=metadata))


@pytest.mark.parametrize(("architecture", "layers"), [("phi3", 2), ("gemma3", 6)])
def test_the_folder_made_of_a_file_holds_the_same(
    write: Write, tmp_path: Path, architecture: str, layers: int
) -> None:
    path, out_dir = write(architecture, layers=layers), tmp_path / "folder"
    out_dir.mkdir()
    convert(path, out_dir, layout="safetensors", precision="fp32")
    with GgufCheckpoint(path) as file, SafetensorsCheckpoint(out_dir) as folder:
        assert folder.config.architecture == file.config.architecture
        assert folder.config.rope.boundary == file.config.rope.boundary
        assert folder.config.windows == file.config.windows
        assert set(folder.names()) == set(file.names())
        for name in file.names():
            found = folder.tensor(name).float32()
            np.testing.assert_array_equal(found, file.tensor(name).float32(), err_msg=name)

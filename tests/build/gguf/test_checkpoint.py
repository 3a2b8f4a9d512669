"""A GGUF file as a checkpoint: configuration, names, shapes, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from phirt.build.checkpoint import Checkpoint
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary
from tests.tiny_gguf import write_tiny_llama_gguf

Config = Callable[..., DecoderConfig]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Write a tiny file and return its configuration."""

    def read(**options: Any) -> DecoderConfig:
        path = write_tiny_llama_gguf(tmp_path / "model.gguf", layers=1, **options)
        with GgufCheckpoint(path) as checkpoint:
            return checkpoint.config

    return read


def test_the_configuration_is_the_metadata_s(config: Config) -> None:
    assert config() == DecoderConfig(
        architecture="llama",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_size=16,
        context_length=256,
        rms_norm_eps=float(np.float32(1e-5)),
        rope=Rotary(theta=10000.0, dim=16),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(0, 2),
        pad_token_id=2,
    )


def test_what_the_file_leaves_out_has_llama_cpp_s_defaults(config: Config) -> None:
    found = config(
        kv_heads=4,
        metadata={
            "llama.attention.head_count_kv": None,
            "llama.rope.freq_base": None,
            "llama.rope.dimension_count": None,
            "tokenizer.ggml.bos_token_id": None,
            "tokenizer.ggml.padding_token_id": None,
        },
    )
    assert (found.num_kv_heads, found.head_size, found.rope.dim) == (4, 16, 16)
    assert (found.rope.theta, found.rope.factors, found.window) == (10000.0, None, None)
    assert (found.bos_token_id, found.pad_token_id) == (None, None)


def test_names_and_shapes_are_hugging_face_s(tmp_path: Path) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf", layers=2, tied=False)
    with GgufCheckpoint(path) as checkpoint:
        as_contract: Checkpoint = checkpoint
        shapes = {name: as_contract.tensor(name).shape for name in as_contract.names()}
        assert all(checkpoint.tensor(name).name == name for name in shapes)
    layer = {
        "input_layernorm": (64,),
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64),
        "post_attention_layernorm": (64,),
        "mlp.gate_proj": (128, 64),
        "mlp.up_proj": (128, 64),
        "mlp.down_proj": (64, 128),
    }
    assert shapes == {
        "model.embed_tokens.weight": (300, 64),
        **{f"model.layers.0.{name}.weight": shape for name, shape in layer.items()},
        **{f"model.layers.1.{name}.weight": shape for name, shape in layer.items()},
        "model.norm.weight": (64,),
        "lm_head.weight": (300, 64),
    }


def test_a_tied_model_has_no_head_of_its_own(tmp_path: Path) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf")
    with GgufCheckpoint(path) as checkpoint:
        assert "lm_head.weight" not in checkpoint.names()
        with pytest.raises(ModelFormatError, match=r"no tensor 'lm_head\.weight'"):
            checkpoint.tensor("lm_head.weight")


class TestEndOfGeneration:
    """Stop ids are the union of what the metadata names and what the tokens are called."""

    def test_named_ids_are_united(self, config: Config) -> None:
        named = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9}
        assert config(metadata=named).eos_token_ids == (0, 2, 7, 9)

    def test_control_tokens_called_so_end_a_generation(self, config: Config) -> None:
        # <|end_of_text|> is named; <|eot_id|> and <|endoftext|> are found by their text.
        assert config(pre="llama-bpe").eos_token_ids == (1, 2, 3)

    def test_a_file_without_any_has_none(self, config: Config) -> None:
        found = config(tokenizer="llama", metadata={"tokenizer.ggml.eos_token_id": None})
        assert found.eos_token_ids == ()


class TestRotaryScaling:
    """Whatever divides the rotary frequencies ends up in rope_factors, or is refused."""

    def factors(self, config: Config, **options: Any) -> list[float] | None:
        found = config(**options).rope.factors
        return None if found is None else [float(factor) for factor in found]

    def test_llama_3_s_tensor(self, config: Config) -> None:
        assert self.factors(config, rope_factors=[1, 1, 2, 2, 4, 4, 8, 8]) == [
            1, 1, 2, 2, 4, 4, 8, 8,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "metadata",
        [
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"llama.rope.scaling.factor": 4.0},
            {"llama.rope.scale_linear": 4.0},
        ],
    )
    def test_linear_scaling_divides_all_alike(
        self, config: Config, metadata: dict[str, str | float]
    ) -> None:
        assert self.factors(config, metadata=metadata) == [4.0] * 8

    def test_both_multiply(self, config: Config) -> None:
        found = self.factors(
            config, rope_factors=[1] * 4 + [8] * 4, metadata={"llama.rope.scaling.factor": 2.0}
        )
        assert found == [2.0] * 4 + [16.0] * 4

    @pytest.mark.parametrize(
        "metadata",
        [
            {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        ],
    )
    def test_no_scaling_is_none(self, config: Config, metadata: dict[str, str | float]) -> None:
        assert self.factors(config, metadata=metadata) is None

    @pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic"])
    def test_other_kinds_are_refused(self, config: Config, kind: str) -> None:
        with pytest.raises(UnsupportedModelError, match=f"rotary scaling of type '{kind}'"):
            config(metadata={"llama.rope.scaling.type": kind})

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_divisor_must_be_positive(self, config: Config, factor: float) -> None:
        with pytest.raises(ModelFormatError, match="not positive and finite"):
            config(rope_factors=[1.0] * 7 + [factor])

    def test_one_divisor_per_pair(self, config: Config) -> None:
        with pytest.raises(ModelFormatError, match=r"shape \(4,\), and must be F32 of \(8,\)"):
            config(rope_factors=[1.0] * 4)


@pytest.mark.parametrize(("window", "found"), [(64, 64), (0, None), (256, None), (4096, None)])
def test_a_window_counts_where_it_is_narrower_than_the_context(
    config: Config, window: int, found: int | None
) -> None:
    assert config(metadata={"llama.attention.sliding_window": window}).window == found


def test_a_window_of_qwen_is_refused(config: Config) -> None:
    with pytest.raises(UnsupportedModelError, match="window in qwen2"):
        config(
            architecture="qwen2",
            pre="qwen2",
            metadata={"qwen2.attention.sliding_window": 64},
        )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma2"}, "architecture 'gemma2' is not supported.*llama"),
        ({"llama.expert_count": 8}, "a mixture of 8 experts"),
        ({"llama.attention.causal": False}, "not causal"),
        ({"split.count": 2}, "split into 2 files"),
        ({"llama.attention.value_length": 8}, "keys of 16 with values of 8"),
        ({"llama.rope.dimension_count": 8}, "rotating 8 of 16 dimensions"),
    ],
)
def test_what_would_compute_something_else_is_refused(
    config: Config, metadata: dict[str, int | bool | str], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        config(metadata=metadata)


def test_a_number_of_heads_per_layer_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.add_embedding_length(64)
    writer.add_head_count([4, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="head_count that differs between layers"):
        GgufCheckpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.embedding_length": 10**12}, "embedding_length is 1,000,000,000,000, and must"),
        ({"llama.embedding_length": -64}, "embedding_length is -64, and must"),
        ({"llama.embedding_length": 62}, "62 does not divide into 4 heads"),
        ({"llama.embedding_length": 128, "llama.rope.dimension_count": None}, "has shape"),
        ({"llama.attention.key_length": 15}, "15 do not divide into rotary pairs"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads cannot share 3"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.block_count": 10**12}, "block_count is 1,000,000,000,000"),
        ({"llama.block_count": 2}, "tensor 'blk.1.attn_norm.weight' is missing"),
        ({"llama.context_length": 10**12}, "context_length is 1,000,000,000,000"),
        ({"llama.feed_forward_length": 64}, r"'blk.0.ffn_gate.weight' has shape \(128, 64\)"),
        ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "epsilon is 0.0, and must be positive"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
        ({"llama.attention.sliding_window": -1}, "sliding_window is -1"),
        ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300, and the vocabulary has 300"),
    ],
)
def test_a_number_that_cannot_be_right_is_an_error(
    config: Config, metadata: dict[str, int | float | str | None], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        config(metadata=metadata)


def test_tensors_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    # Two layers of tensors, and metadata that speaks of one.
    path = write_tiny_llama_gguf(
        tmp_path / "model.gguf", layers=2, metadata={"llama.block_count": 1}
    )
    with pytest.raises(UnsupportedModelError, match=r"9 tensors .*'blk.1.attn_k.weight'"):
        GgufCheckpoint(path)


def test_another_encoding_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf", encoding="TQ2_0", hidden=256, layers=1)
    with pytest.raises(UnsupportedModelError, match=r"'token_embd\.weight' is stored as TQ2_0"):
        GgufCheckpoint(path)


def test_a_file_that_is_refused_is_closed(tmp_path: Path) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf", metadata={"llama.expert_count": 8})
    with pytest.raises(UnsupportedModelError):
        GgufCheckpoint(path)
    path.unlink()  # Windows refuses to delete what is open; elsewhere, ResourceWarning is an error


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        GgufCheckpoint(tmp_path / "model.gguf")

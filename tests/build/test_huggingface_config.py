from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.huggingface_config import config_document
from phirt.build.safetensors_writer import write_safetensors
from phirt.errors import UnsupportedModelError
from phirt.models.huggingface_config import read_config_facts, read_decoder_config
from phirt.models.rotary import Rotary
from tests.build.decoders import BOUNDARY, CONTEXT, DECODERS, WINDOW, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import MemoryCheckpoint, tiny


def write_folder(checkpoint: MemoryCheckpoint, folder: Path, *, precision: str = "fp32") -> Path:
    folder.mkdir(exist_ok=True)
    document = config_document(checkpoint.config, precision=precision)
    (folder / "config.json").write_text(json.dumps(document, allow_nan=False))
    write_safetensors(checkpoint, folder / "model.safetensors", precision=precision)
    return folder


@pytest.mark.oracle
@pytest.mark.parametrize("name", DECODERS)
def test_transformers_computes_the_decoder_from_the_folder(tmp_path, name):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = random_decoder(DECODERS[name])
    model = AutoModelForCausalLM.from_pretrained(write_folder(checkpoint, tmp_path))
    for length in (WINDOW + 4, BOUNDARY, BOUNDARY + 1, 60):
        ids = [int(i) for i in np.random.default_rng(length).integers(3, 96, length)]
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(logits, numpy_logits(checkpoint, ids), atol=1e-4)


def test_both_spellings_of_the_rotary_settings_are_written_and_agree():
    document = config_document(DECODERS["phi3"])
    assert document["rope_scaling"] == document["rope_parameters"]
    assert document["rope_theta"] == document["rope_parameters"]["rope_theta"] == 10_000.0
    assert document["original_max_position_embeddings"] == BOUNDARY


def test_divisors_without_parameters_become_factors_that_no_length_changes():
    rope = config_document(DECODERS["llama-divisors"])["rope_scaling"]
    assert rope["short_factor"] == rope["long_factor"]
    assert rope["original_max_position_embeddings"] == CONTEXT
    assert rope["attention_factor"] == 1.0


def test_divisors_are_read_back_as_no_longrope(tmp_path):
    """A session that could be short or long would not take over the caches of other backends."""
    config = DECODERS["llama-divisors"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_document(config)))
    rope = read_decoder_config(path).rope
    assert (rope, rope.long_factors) == (config.rope, None)
    assert config.rope.factors is not None
    assert rope.factors is not None
    assert np.array_equal(rope.factors, config.rope.factors)
    assert read_config_facts(path).rope_boundary is None


@pytest.mark.parametrize("name", DECODERS)
def test_what_is_written_is_read_back(tmp_path, name):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_document(DECODERS[name])))
    found = read_decoder_config(path)
    assert replace(found, attention_scale=None) == replace(DECODERS[name], attention_scale=None)
    assert math.isclose(found.scale, DECODERS[name].scale)


def test_a_llama_with_a_window_is_a_mistral():
    document = config_document(tiny(windows=(WINDOW, WINDOW)))
    assert document["model_type"] == "mistral"
    assert document["architectures"] == ["MistralForCausalLM"]
    assert document["sliding_window"] == WINDOW


def test_special_ids_that_are_missing_are_written_as_null():
    document = config_document(tiny(bos_token_id=None, eos_token_ids=(), pad_token_id=None))
    assert [document[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [None] * 3
    assert config_document(tiny(eos_token_ids=(2, 5)))["eos_token_id"] == [2, 5]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_the_precision_is_named_in_both_spellings(precision, dtype):
    document = config_document(tiny(), precision=precision)
    assert document["dtype"] == document["torch_dtype"] == dtype


def test_an_unknown_precision_is_a_mistake():
    with pytest.raises(ValueError, match="int4"):
        config_document(tiny(), precision="int4")


_YARN = Rotary(theta=10_000.0, dim=16, factors=np.ones(8, np.float32), attention_factor=1.2)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("llama", {"architecture": "mamba"}, "architecture"),
        ("llama", {"qkv_bias": True}, "biases"),
        ("mistral", {"qkv_bias": True, "output_bias": True}, "biases"),
        ("mistral", {"windows": (WINDOW, None)}, "some layers only"),
        ("qwen2", {"windows": (8, WINDOW)}, "2 sizes"),
        ("qwen2", {"head_size": 32}, "heads of 32"),
        ("qwen3", {"qk_norm": False}, "queries and keys"),
        ("llama", {"activation": "gelu_tanh"}, "activation"),
        ("llama", {"embedding_scale": 2.0}, "embedding"),
        ("llama", {"attention_scale": 0.5}, "scores"),
        ("llama", {"rope": Rotary(theta=1e4, dim=8)}, "8 of 16 dimensions"),
        ("llama", {"rope": _YARN}, r"scaled by 1\.2"),
        ("llama", {"rope": replace(_YARN, factors=None)}, r"scaled by 1\.2"),
        ("llama", {"local_rope": Rotary(theta=1e4, dim=16)}, "between layers"),
        ("gemma3_text", {"norm_offset": 0.0}, "offset"),
        ("gemma3_text", {"sandwich_norms": False}, "after attention"),
        ("gemma3_text", {"windows": (None, WINDOW)}, "no pattern"),
        ("gemma3_text", {"windows": (WINDOW, WINDOW)}, "every layer"),
        ("gemma3_text", {"attention_scale": 0.3}, "scores"),
    ],
)
def test_what_no_spelling_says_is_refused(name: str, changes: dict[str, Any], complaint: str):
    with pytest.raises(UnsupportedModelError, match=complaint):
        config_document(replace(DECODERS[name], **changes))


def test_the_scale_of_attention_survives_as_gemma_spells_it():
    assert math.isclose(
        config_document(DECODERS["gemma3_text"])["query_pre_attn_scalar"] ** -0.5, 24**-0.5
    )

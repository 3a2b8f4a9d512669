"""config.json: its facts, and how to compute what it describes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from phirt.errors import ModelError, ModelFormatError, UnsupportedModelError
from phirt.models.huggingface_config import (
    DECODER_ARCHITECTURES,
    config_facts,
    read_config_facts,
    read_decoder_config,
)
from tests.models.published_configs import (
    GEMMA_3_1B,
    GEMMA_3_4B,
    LLAMA_3_2,
    MISTRAL_7B,
    PHI_3_5_MINI,
    PHI_4_MINI,
    PUBLISHED,
    QWEN_2_5,
    QWEN_3,
)

HOSTILE_VALUES: list[Any] = [None, True, -1, 10**30, 0.5, "x", [], [[]], {}, {"a": {"b": 1}}]


@pytest.fixture
def decoder(tmp_path):
    """``decoder(document, **changes)`` reads a document as a decoder."""

    def read(document: dict[str, Any], **changes: Any):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**document, **changes}))
        return read_decoder_config(path)

    return read


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


def facts_of(document: dict[str, Any], **changes: Any):
    return config_facts({**document, **changes}, source="config.json")


class TestFacts:
    def test_of_a_dense_decoder(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_2))
        facts = read_config_facts(tmp_path / "config.json")
        assert (facts.architecture, facts.vocab_size) == ("llama", 128256)
        assert facts.context_length == 131072
        assert facts.eos_token_ids == {128001, 128008, 128009}
        assert (facts.bos_token_id, facts.pad_token_id) == (128000, None)
        assert (facts.num_layers, facts.num_kv_heads, facts.head_size) == (16, 8, 64)
        assert (facts.rope_boundary, facts.window) == (None, None)

    def test_of_the_text_part_of_a_model_of_several_parts(self):
        facts = facts_of(GEMMA_3_4B)
        assert facts.architecture == "gemma3"
        assert (facts.num_layers, facts.num_kv_heads, facts.head_size) == (34, 4, 256)
        assert (facts.vocab_size, facts.context_length) == (262_208, 131_072)
        assert facts.eos_token_ids == {1, 106}
        assert facts.window == 1024

    @pytest.mark.parametrize(
        ("document", "expected"),
        [
            (
                {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
                | {"n_layer": 12, "n_head": 12, "n_embd": 768},
                (1024, 12, 12, 64),
            ),
            (
                {"model_type": "falcon", "vocab_size": 65024, "max_position_embeddings": 2048}
                | {"num_hidden_layers": 32, "num_attention_heads": 71, "hidden_size": 4544}
                | {"multi_query": True, "new_decoder_architecture": False},
                (2048, 32, 1, 64),
            ),
            (
                {"model_type": "openelm", "vocab_size": 32000, "max_position_embeddings": 2048}
                | {"num_hidden_layers": 2, "num_attention_heads": [12, 16], "head_dim": 64}
                | {"num_key_value_heads": [3, 4]},
                (2048, 2, 3, 64),
            ),
        ],
        ids=["gpt2", "falcon", "heads that differ between layers"],
    )
    def test_under_the_names_of_other_architectures(self, document, expected):
        facts = facts_of(document)
        found = (facts.context_length, facts.num_layers, facts.num_kv_heads, facts.head_size)
        assert found == expected

    def test_of_a_model_that_is_no_decoder_are_refused(self):
        with pytest.raises(UnsupportedModelError, match="none of the fields num_attention_heads"):
            facts_of(
                {"model_type": "mamba", "vocab_size": 50280, "n_ctx": 2048, "hidden_size": 768}
            )

    def test_the_boundary_of_longrope(self):
        assert facts_of(PHI_3_5_MINI).rope_boundary == 4096
        moe = {**PHI_3_5_MINI, "model_type": "phimoe", "num_local_experts": 16}
        moe["rope_scaling"] = {**PHI_3_5_MINI["rope_scaling"], "short_mscale": 1.2}
        assert facts_of(moe).rope_boundary == 4096
        assert facts_of(PHI_3_5_MINI, rope_scaling=None).rope_boundary is None

    @pytest.mark.parametrize(
        ("document", "window"),
        [
            (MISTRAL_7B, 4096),
            (without(MISTRAL_7B, "sliding_window"), 4096),  # transformers' default
            ({**MISTRAL_7B, "sliding_window": None}, None),
            ({**MISTRAL_7B, "model_type": "starcoder2"}, 4096),
            (QWEN_2_5, None),
            ({**QWEN_2_5, "use_sliding_window": True, "sliding_window": 4096}, 4096),
            ({**QWEN_2_5, "use_sliding_window": True}, None),  # as wide as the context
            ({**QWEN_3, "model_type": "olmo3", "layer_types": ["full_attention"]}, None),
            (GEMMA_3_1B, 512),
            (PHI_3_5_MINI, None),  # wider than the context
        ],
    )
    def test_a_window_counts_where_it_is_narrower_than_the_context(self, document, window):
        assert facts_of(document).window == window

    def test_a_padding_that_the_embedding_lacks_is_none(self):
        assert facts_of(LLAMA_3_2, pad_token_id=-1).pad_token_id is None
        assert facts_of(LLAMA_3_2, pad_token_id=128256).pad_token_id is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"vocab_size": 10**12},
            {"max_position_embeddings": 10**12},
            {"num_hidden_layers": 10**9},
            {"num_attention_heads": 0},
            {"num_key_value_heads": "8"},
            {"head_dim": 2.5},
            {"eos_token_id": 128256},
            {"rope_scaling": []},
            {"rope_scaling": {"rope_type": 7}},
            {"model_type": None},
        ],
        ids=str,
    )
    def test_m12_m14_numbers_beyond_every_decoder_are_typed_errors(self, changes):
        with pytest.raises(ModelFormatError, match=r"config\.json"):
            facts_of(LLAMA_3_2, **changes)


class TestDecoder:
    def test_llama(self, decoder):
        config = decoder(LLAMA_3_2)
        assert (config.hidden_size, config.intermediate_size) == (2048, 8192)
        assert (config.num_layers, config.num_heads, config.num_kv_heads) == (16, 32, 8)
        assert (config.head_size, config.context_length) == (64, 131072)
        assert (config.tie_word_embeddings, config.windows) == (True, ())
        assert (config.qkv_bias, config.output_bias, config.qk_norm) == (False, False, False)
        assert config.eos_token_ids == (128001, 128008, 128009)

    def test_llama_3_divides_long_waves_only(self, decoder):
        factors = decoder(LLAMA_3_2).rope.factors
        assert factors is not None
        assert (factors[0], factors[-1]) == (1, 32)
        assert (np.diff(factors) >= 0).all()

    def test_biases(self, decoder):
        biased = decoder(LLAMA_3_2, attention_bias=True)
        assert biased.qkv_bias
        assert biased.output_bias
        assert decoder(QWEN_2_5).qkv_bias
        assert not decoder(QWEN_2_5).output_bias

    def test_mistral_has_a_window_in_every_layer(self, decoder):
        config = decoder(MISTRAL_7B)
        assert config.windows == (4096,) * 32
        assert decoder(MISTRAL_7B, sliding_window=None).windows == ()

    def test_qwen_has_windows_in_the_last_layers_where_they_are_in_use(self, decoder):
        windowed = decoder(QWEN_2_5, use_sliding_window=True, sliding_window=4096)
        assert windowed.windows == (None,) * 21 + (4096,) * 3
        assert decoder(QWEN_2_5).windows == ()

    def test_gemma3(self, decoder):
        config = decoder(GEMMA_3_1B)
        assert config.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
        assert config.local_rope is not None
        assert (config.rope.theta, config.local_rope.theta) == (1e6, 1e4)
        assert config.rope_of(0) is config.local_rope
        assert config.rope_of(5) is config.rope
        assert config.tie_word_embeddings  # by default
        assert (config.activation, config.norm_offset) == ("gelu_tanh", 1.0)
        assert config.embedding_scale == 1152**0.5
        assert (config.qk_norm, config.sandwich_norms) == (True, True)
        assert decoder(GEMMA_3_1B, query_pre_attn_scalar=144).scale == pytest.approx(1 / 12)

    def test_layer_types_win_over_the_pattern(self, decoder):
        kinds = ["full_attention", "sliding_attention"]
        config = decoder(GEMMA_3_1B, num_hidden_layers=2, layer_types=kinds)
        assert config.windows == (None, 512)

    def test_phi_has_longrope(self, decoder):
        rope = decoder(PHI_3_5_MINI).rope
        assert (rope.boundary, rope.dim) == (4096, 96)
        assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # 2**17, 2**12
        assert decoder(PHI_4_MINI).rope.dim == 96  # three quarters of 128
        assert decoder(PHI_3_5_MINI).windows == ()

    def test_both_spellings_of_the_rotary_parameters_mean_the_same(self, decoder):
        old = decoder(LLAMA_3_2).rope
        parameters = {**LLAMA_3_2["rope_scaling"], "rope_theta": LLAMA_3_2["rope_theta"]}
        new = decoder(without(LLAMA_3_2, "rope_scaling", "rope_theta"), rope_parameters=parameters)
        np.testing.assert_array_equal(old.frequencies(), new.rope.frequencies())
        gemma = without(GEMMA_3_1B, "rope_theta", "rope_local_base_freq", "rope_scaling")
        nested = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
        config = decoder(gemma, rope_parameters=nested)
        assert config.local_rope is not None
        assert (config.rope.theta, config.local_rope.theta) == (5e5, 2e4)
        assert config.rope.factors is not None

    @pytest.mark.parametrize(
        ("document", "changes", "message"),
        [
            (LLAMA_3_2, {"model_type": "granite"}, "the architecture 'granite'"),
            (GEMMA_3_4B, {}, "the architecture 'gemma3'"),
            (LLAMA_3_2, {"mlp_bias": True}, "mlp_bias"),
            (LLAMA_3_2, {"hidden_act": "gelu"}, "the activation 'gelu'"),
            (LLAMA_3_2, {"hidden_act": "gelu_pytorch_tanh"}, "activation"),
            (LLAMA_3_2, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
            (LLAMA_3_2, {"quantization": {"bits": 4}}, "quantization"),
            (LLAMA_3_2, {"model_file": "model.py"}, "model_file"),
            (LLAMA_3_2, {"partial_rotary_factor": 0.5}, "rotate in part"),
            (LLAMA_3_2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
            (LLAMA_3_2, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type 'yarn'"),
            (LLAMA_3_2, {"rope_scaling": {"mrope_section": [1, 1]}}, "mrope_section"),
            (LLAMA_3_2, {"layer_types": ["sliding_attention"] * 16}, "layer_types"),
            (LLAMA_3_2, {"architectures": ["LlamaForSequenceClassification"]}, "not a causal"),
            (QWEN_3, {"layer_types": ["chunked_attention"] * 28}, "chunked_attention"),
            (MISTRAL_7B, {"attention_bias": True}, "biases in the attention"),
            (MISTRAL_7B, {"num_local_experts": 8}, "num_local_experts"),
            (GEMMA_3_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
            (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
            (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
            (GEMMA_3_1B, {"hidden_activation": "gelu"}, "activation"),
            (
                GEMMA_3_1B,
                {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
                "layers with a window",
            ),
        ],
    )
    def test_what_would_compute_something_else_is_refused(
        self, decoder, document, changes, message
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            decoder(document, **changes)

    @pytest.mark.parametrize(
        ("document", "changes"),
        [
            (LLAMA_3_2, {"hidden_size": None}),
            (LLAMA_3_2, {"intermediate_size": 10**12}),
            (LLAMA_3_2, {"num_key_value_heads": 5}),
            (LLAMA_3_2, {"head_dim": 63}),
            (LLAMA_3_2, {"head_dim": None, "num_attention_heads": 33}),
            (LLAMA_3_2, {"rms_norm_eps": -1}),
            (LLAMA_3_2, {"rope_theta": 0}),
            (LLAMA_3_2, {"rope_scaling": {"rope_type": "llama3"}}),
            (LLAMA_3_2, {"rope_scaling": LLAMA_3_2["rope_scaling"] | {"low_freq_factor": 4}}),
            (GEMMA_3_1B, {"rope_local_base_freq": 0}),
            (LLAMA_3_2, {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
            (LLAMA_3_2, {"tie_word_embeddings": "yes"}),
            (MISTRAL_7B, {"sliding_window": 0}),
            (QWEN_3, {"layer_types": ["full_attention"]}),
            (QWEN_3, {"layer_types": ["sliding_attention"] * 28}),
            (PHI_3_5_MINI, {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}),
            (PHI_3_5_MINI, {"partial_rotary_factor": 0.01}),
            (GEMMA_3_1B, {"sliding_window": None}),
            (GEMMA_3_1B, {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}),
        ],
    )
    def test_m12_numbers_that_cannot_be_right_are_typed_errors(self, decoder, document, changes):
        with pytest.raises(ModelFormatError, match=r"config\.json"):
            decoder(document, **changes)

    def test_m14_hostile_json_is_a_typed_error(self, tmp_path):
        path = tmp_path / "config.json"
        for text in ('{"a":' + "[" * 100_000, '{"model_type": "llama", "model_type": "x"}', "[]"):
            path.write_text(text)
            for read in (read_config_facts, read_decoder_config):
                with pytest.raises(ModelFormatError, match=r"config\.json"):
                    read(path)

    def test_any_field_of_any_type_is_read_or_is_a_typed_error(self, decoder):
        for document in (LLAMA_3_2, PHI_3_5_MINI, GEMMA_3_1B, QWEN_3):
            for name in document:
                for value in HOSTILE_VALUES:
                    try:
                        decoder(document, **{name: value})
                    except ModelError:
                        continue


@pytest.mark.oracle
@pytest.mark.parametrize("name", PUBLISHED)
class TestAgainstTransformers:
    @pytest.fixture
    def pair(self, name, tmp_path):
        """The document as phirt and as transformers reads it."""
        from transformers import AutoConfig

        path = tmp_path / "config.json"
        document = without(PUBLISHED[name], "auto_map")
        path.write_text(json.dumps(document))
        return read_decoder_config(path), AutoConfig.from_pretrained(tmp_path)

    def test_numbers(self, pair, name):
        ours, theirs = pair
        assert ours.architecture == theirs.model_type
        for field, attribute in (
            ("vocab_size", "vocab_size"),
            ("hidden_size", "hidden_size"),
            ("intermediate_size", "intermediate_size"),
            ("num_layers", "num_hidden_layers"),
            ("num_heads", "num_attention_heads"),
            ("num_kv_heads", "num_key_value_heads"),
            ("context_length", "max_position_embeddings"),
            ("rms_norm_eps", "rms_norm_eps"),
            ("tie_word_embeddings", "tie_word_embeddings"),
            ("bos_token_id", "bos_token_id"),
        ):
            assert getattr(ours, field) == getattr(theirs, attribute), field
        width = theirs.hidden_size // theirs.num_attention_heads
        assert ours.head_size == getattr(theirs, "head_dim", width)
        eos = theirs.eos_token_id
        assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [eos])

    def test_windows(self, pair, name):
        ours, theirs = pair
        window = getattr(theirs, "sliding_window", None)
        kinds = getattr(theirs, "layer_types", ["sliding_attention"] * ours.num_layers)
        for layer, kind in enumerate(kinds):
            wanted = window if kind == "sliding_attention" else None
            if wanted is not None and wanted >= ours.context_length:
                wanted = None
            assert ours.window_of(layer) == wanted

    def test_rotary_frequencies(self, pair, name):
        import torch

        ours, theirs = pair
        module = rotary_module(theirs)
        layers = getattr(theirs, "layer_types", None) if ours.local_rope else None
        kinds = {None: 0} if layers is None else {kind: layers.index(kind) for kind in layers}
        for kind, layer in kinds.items():
            rope = ours.rope_of(layer)
            extra = {} if kind is None else {"layer_type": kind}
            lengths = {"short": 9} if rope.boundary is None else {"short": 9, "long": 5000}
            for regime, length in lengths.items():
                positions = torch.arange(length)[None]
                cosines, sines = module(torch.zeros(1), positions, **extra)
                prefix = "" if kind is None else f"{kind}_"
                frequencies = getattr(module, f"{prefix}inv_freq").numpy()
                np.testing.assert_allclose(rope.frequencies(regime), frequencies, rtol=1e-6)
                scaling = getattr(module, f"{prefix}attention_scaling")
                assert rope.attention_factor == pytest.approx(scaling)
                tables = rope.tables(9, regime)
                for mine, reference in zip(tables, (cosines, sines), strict=True):
                    np.testing.assert_allclose(
                        mine, reference[0, :9, : rope.dim // 2].numpy(), atol=2e-6
                    )


def rotary_module(config: Any) -> Any:
    """transformers' rotary embedding of a configuration."""
    from importlib import import_module

    kind = config.model_type.removesuffix("_text")
    module = import_module(f"transformers.models.{kind}.modeling_{kind}")
    return getattr(module, f"{kind.capitalize()}RotaryEmbedding")(config)


def test_every_architecture_is_compared_with_transformers():
    assert {document["model_type"] for document in PUBLISHED.values()} == set(DECODER_ARCHITECTURES)

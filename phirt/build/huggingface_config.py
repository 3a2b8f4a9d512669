"""Writes a decoder's configuration as the ``config.json`` of a Hugging Face folder.

transformers 5 keeps rotary settings in ``rope_parameters``; mlx-lm reads the older
``rope_theta`` and ``rope_scaling``. Both are written, and say the same. What one of them
would overlook is refused, with one exception: mlx-lm has no window for mistral, qwen and
phi3, and `phirt.backends.mlx` gives it one.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np

from phirt.errors import UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary

__all__ = ["config_document"]

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_TOLERANCE = 1e-6  # relative: what float32 files round a constant by


def config_document(config: DecoderConfig, *, precision: str = "fp32") -> dict[str, Any]:
    """The ``config.json`` of a decoder, as transformers and mlx-lm read it.

    A llama with a window is written as a mistral, which is what it is.

    Args:
        config: The decoder.
        precision: How its weights are stored: ``"fp32"``, ``"fp16"`` or ``"bf16"``.

    Returns:
        A document for `json.dumps`.

    Raises:
        UnsupportedModelError: No spelling makes both compute this decoder.
        ValueError: There is no such precision.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(_DTYPES)}.")
    return _Document(config).build(_DTYPES[precision])


class _Document:
    """Builds the document of one decoder."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config = config
        is_windowed_llama = config.architecture == "llama" and config.window is not None
        self._model_type = "mistral" if is_windowed_llama else config.architecture

    def build(self, dtype: str) -> dict[str, Any]:
        """The whole document."""
        config = self._config
        if self._model_type not in _CLASSES:
            self._refuse(f"the architecture; phirt writes {', '.join(_CLASSES)}")
        self._check_constants()
        eos = list(config.eos_token_ids)
        document: dict[str, Any] = {
            "architectures": [_CLASSES[self._model_type]],
            "model_type": self._model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_size,
            "max_position_embeddings": config.context_length,
            "rms_norm_eps": config.rms_norm_eps,
            "tie_word_embeddings": config.tie_word_embeddings,
            # Null, not absent: absent ones take the values of the architecture's first model.
            "bos_token_id": config.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
            "pad_token_id": config.pad_token_id,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        document |= self._activation() | self._biases()
        if self._model_type == "gemma3_text":
            return document | self._gemma_rotary() | self._gemma_attention()
        return document | self._rotary() | self._windows()

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"This {self._config.architecture} decoder cannot be written in Hugging Face's "
            f"layout: {what}. Use a backend that reads ONNX."
        )

    def _check_constants(self) -> None:
        config, model_type = self._config, self._model_type
        is_gemma = model_type == "gemma3_text"
        scale = math.sqrt(config.hidden_size) if is_gemma else 1.0
        if not math.isclose(config.embedding_scale, scale, rel_tol=_TOLERANCE):
            self._refuse(f"an embedding scaled by {config.embedding_scale}, not {scale}")
        if config.norm_offset != float(is_gemma):
            self._refuse(f"norms with an offset of {config.norm_offset}")
        if config.qk_norm != (model_type in {"qwen3", "gemma3_text"}):
            self._refuse(f"norms of queries and keys: {config.qk_norm}")
        if config.sandwich_norms != is_gemma:
            self._refuse(f"norms after attention and MLP: {config.sandwich_norms}")
        default = config.head_size**-0.5
        if not is_gemma and not math.isclose(config.scale, default, rel_tol=_TOLERANCE):
            self._refuse(f"attention scores scaled by {config.scale}, not {default}")
        # Here transformers or mlx-lm derive the one from the others.
        divided = model_type in {"qwen2", "phi3"}
        if divided and config.head_size * config.num_heads != config.hidden_size:
            self._refuse(f"{config.num_heads} heads of {config.head_size} in {config.hidden_size}")
        if model_type in {"llama", "gemma3_text"} and config.hidden_size % config.num_heads:
            self._refuse(f"a width of {config.hidden_size} for {config.num_heads} heads")

    def _activation(self) -> dict[str, Any]:
        is_gemma = self._model_type == "gemma3_text"
        if self._config.activation != ("gelu_tanh" if is_gemma else "silu"):
            self._refuse(f"the activation {self._config.activation}")
        return {"hidden_activation": "gelu_pytorch_tanh"} if is_gemma else {"hidden_act": "silu"}

    def _biases(self) -> dict[str, Any]:
        biases = (self._config.qkv_bias, self._config.output_bias)
        known = {"qwen2": [(True, False)], "llama": [(False, False), (True, True)]}
        if biases not in known.get(self._model_type, [(False, False)]):
            self._refuse(f"biases of q, k, v: {biases[0]}, of the output: {biases[1]}")
        if self._model_type in {"llama", "qwen3", "gemma3_text"}:
            return {"attention_bias": biases[0], "mlp_bias": False}
        return {}

    def _rotary(self) -> dict[str, Any]:
        config, rope = self._config, self._config.rope
        if config.local_rope is not None:
            self._refuse("rotary settings that differ between layers")
        document: dict[str, Any] = {"rope_theta": rope.theta}
        parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
        if self._model_type == "phi3":
            document["partial_rotary_factor"] = rope.dim / config.head_size
            document["original_max_position_embeddings"] = rope.boundary or config.context_length
            parameters["partial_rotary_factor"] = rope.dim / config.head_size
        elif rope.dim != config.head_size:
            self._refuse(f"{rope.dim} of {config.head_size} dimensions rotate")
        scaling = self._scaling(rope)
        if scaling is not None:
            # transformers prefers rope_scaling where there are both, so it must be whole.
            parameters |= scaling
            document["rope_scaling"] = parameters
        return document | {"rope_parameters": parameters}

    def _scaling(self, rope: Rotary) -> dict[str, Any] | None:
        """What both call rope_scaling, without the base; None for plain rotary positions.

        Divisors of whatever origin (those of Llama 3 files come without the parameters of
        their formula) are spelled as LongRoPE with equal short and long factors, and
        a boundary that nothing crosses: it is the one type that takes divisors as they are.
        """
        if rope.factors is None and rope.long_factors is None:
            if rope.attention_factor != 1.0:
                self._refuse(f"cosines and sines scaled by {rope.attention_factor}")
            return None
        ones = np.ones(rope.dim // 2, np.float32)
        short = ones if rope.factors is None else rope.factors
        long = short if rope.long_factors is None else rope.long_factors
        context = self._config.context_length
        boundary = context if rope.boundary is None else rope.boundary
        factor = max(1.0, context / boundary)
        # mlx-lm knows this formula only (Ding et al. 2024; the released code of LongRoPE).
        expected = math.sqrt(1 + math.log(factor) / math.log(boundary)) if factor > 1 else 1.0
        if not math.isclose(rope.attention_factor, expected, rel_tol=_TOLERANCE):
            self._refuse(f"cosines and sines scaled by {rope.attention_factor}, not {expected}")
        return {
            "type": "longrope",
            "rope_type": "longrope",
            "short_factor": [float(value) for value in short],
            "long_factor": [float(value) for value in long],
            "original_max_position_embeddings": boundary,
            "factor": factor,
            "attention_factor": rope.attention_factor,
        }

    def _windows(self) -> dict[str, Any]:
        config = self._config
        window = self._one_window()
        if self._model_type in {"qwen2", "qwen3"}:
            types = self._layer_types()
            return {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": types.index("sliding_attention")
                if window is not None
                else config.num_layers,
                "layer_types": types,
            }
        if window is not None and None in config.windows:
            self._refuse("windows in some layers only")
        return {} if self._model_type == "llama" else {"sliding_window": window}

    def _one_window(self) -> int | None:
        windows = {window for window in self._config.windows if window is not None}
        if len(windows) > 1:
            self._refuse(f"windows of {len(windows)} sizes")
        return next(iter(windows), None)

    def _layer_types(self) -> list[str]:
        layers = range(self._config.num_layers)
        windows = (self._config.window_of(layer) for layer in layers)
        return ["full_attention" if w is None else "sliding_attention" for w in windows]

    def _gemma_rotary(self) -> dict[str, Any]:
        config = self._config
        rope, local = config.rope, config.local_rope or config.rope
        if {rope.dim, local.dim} != {config.head_size}:
            self._refuse(f"{rope.dim} of {config.head_size} dimensions rotate")
        if local.factors is not None or local.long_factors is not None:
            self._refuse("scaled rotary frequencies in layers with a window")
        if local.attention_factor != 1.0:
            self._refuse(f"cosines and sines scaled by {local.attention_factor}")
        scaling = self._scaling(rope)
        document: dict[str, Any] = {
            "rope_theta": rope.theta,
            "rope_local_base_freq": local.theta,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": rope.theta}
                | (scaling or {}),
                "sliding_attention": {"rope_type": "default", "rope_theta": local.theta},
            },
        }
        return document if scaling is None else document | {"rope_scaling": scaling}

    def _gemma_attention(self) -> dict[str, Any]:
        config = self._config
        scalar = round(config.scale**-2)
        if not math.isclose(scalar**-0.5, config.scale, rel_tol=_TOLERANCE):
            self._refuse(f"attention scores scaled by {config.scale}")
        return {
            "query_pre_attn_scalar": scalar,
            # transformers wants a number even where no layer has a window.
            "sliding_window": self._one_window() or config.context_length,
            "sliding_window_pattern": self._pattern(),
            "layer_types": self._layer_types(),
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }

    def _pattern(self) -> int:
        """mlx-lm's spelling of `_layer_types`: every how many layers one has full attention."""
        types = self._layer_types()
        if "full_attention" not in types:
            self._refuse("windows in every layer")
        pattern = types.index("full_attention") + 1
        for layer, kind in enumerate(types, start=1):
            if (layer % pattern == 0) != (kind == "full_attention"):
                self._refuse("windows in layers that follow no pattern")
        return pattern

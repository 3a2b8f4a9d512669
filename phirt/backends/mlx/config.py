"""What the MLX backend reads from a folder's config.json, and what it refuses.

Nothing of the file reaches mlx-lm: its keys are read and checked here, so that a
``model_file`` or an ``auto_map`` names code that nobody looks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phirt.errors import UnsafeModelError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.huggingface_config import CONFIG_NAME, config_facts, decoder_config
from phirt.models.huggingface_rope import read_rotary, rope_parameters
from phirt.models.rotary import Rotary
from phirt.models.safe_json import JsonFields, read_json

__all__ = ["Experts", "MlxConfig", "Quantization", "read_mlx_config"]

_MAX_CONFIG_BYTES = 4 << 20
_MAX_WIDTH = 1 << 20
_MAX_EXPERTS = 1 << 10
_QUANTIZATION = ("quantization", "quantization_config")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How mlx-lm packed the matrices, where their shapes do not say otherwise.

    Attributes:
        group_size: Weights that share a scale and an offset.
        bits: Bits of a weight.
    """

    group_size: int
    bits: int


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in the place of each layer's MLP (phimoe).

    Attributes:
        count: Experts of a layer.
        per_token: How many of them each token passes.
        jitter: Width of the band of scores that share a softmax (sparsemixer).
    """

    count: int
    per_token: int
    jitter: float


@dataclass(frozen=True, slots=True)
class MlxConfig:
    """A decoder as MLX computes it.

    Attributes:
        decoder: Shape and constants; for phimoe, what it shares with the dense decoders.
        experts: The mixture of experts, or None.
        quantization: How matrices are packed, or None.
        head_bias: Whether the LM head has a bias.
        source: The file, for messages.
    """

    decoder: DecoderConfig
    experts: Experts | None
    quantization: Quantization | None
    head_bias: bool
    source: str

    def has_bias(self, projection: str) -> bool:
        """Whether a projection must have a bias: ``"lm_head"`` or ``"….self_attn.o_proj"``."""
        if projection == "lm_head":
            return self.head_bias
        is_output = projection.endswith("o_proj")
        return self.decoder.output_bias if is_output else self.decoder.qkv_bias


def read_mlx_config(folder: Path) -> MlxConfig:
    """Read a folder's config.json.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged, or numbers in it contradict each other.
        UnsafeModelError: It names code to run.
        UnsupportedModelError: The model is none that phirt has held against transformers.
    """
    path = folder / CONFIG_NAME
    document = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    source = str(path)
    if document.get("model_file") is not None:
        raise UnsafeModelError(
            f"{source} names a file of code (model_file = {document['model_file']!r:.80}) that "
            "computes the model. phirt runs no code of a model folder. Use another model."
        )
    quantization = _read_quantization(document, source)
    plain = {key: value for key, value in document.items() if key not in _QUANTIZATION}
    if document.get("model_type") == "phimoe":
        config = _read_phimoe(plain, quantization, source)
    else:
        decoder = decoder_config(plain, source=source)
        config = MlxConfig(decoder, None, quantization, head_bias=False, source=source)
    _check_shape(config)
    return config


def _read_quantization(document: Mapping[str, Any], source: str) -> Quantization | None:
    fields = JsonFields(document, source=source)
    settings = fields.mapping("quantization")
    if not settings:
        foreign = fields.mapping("quantization_config")
        if foreign:
            method = str(foreign.get("quant_method", "unknown"))
            raise UnsupportedModelError(
                f"{source}: weights quantized by the method {method!r:.80} are not supported; "
                "MLX folders are those that mlx_lm.convert writes."
            )
        return None
    mode = settings.get("mode") or "affine"
    if mode != "affine":
        raise UnsupportedModelError(
            f"{source}: quantization of mode {mode!r:.80} is not supported, only 'affine'."
        )
    return Quantization(
        group_size=fields.integer("quantization.group_size", minimum=1, maximum=1024),
        bits=fields.integer("quantization.bits", minimum=1, maximum=8),
    )


def _check_shape(config: MlxConfig) -> None:
    decoder = config.decoder
    derived = decoder.architecture in {"phi3", "phimoe"}
    if derived and decoder.head_size * decoder.num_heads != decoder.hidden_size:
        raise UnsupportedModelError(
            f"{config.source}: mlx-lm's {decoder.architecture} has heads of hidden_size / heads; "
            f"this one has {decoder.num_heads} of {decoder.head_size} in {decoder.hidden_size}."
        )


def _read_phimoe(
    document: Mapping[str, Any], quantization: Quantization | None, source: str
) -> MlxConfig:
    facts = config_facts(document, source=source)
    fields = JsonFields(document, source=source)
    activation = fields.optional_string("hidden_act", max_length=100) or "silu"
    if activation != "silu":
        raise UnsupportedModelError(f"{source}: the activation {activation!r} in phimoe.")
    has_biases = fields.boolean("attention_bias")
    count = fields.integer("num_local_experts", minimum=1, maximum=_MAX_EXPERTS)
    return MlxConfig(
        decoder=DecoderConfig(
            architecture="phimoe",
            vocab_size=facts.vocab_size,
            hidden_size=fields.integer("hidden_size", minimum=1, maximum=_MAX_WIDTH),
            intermediate_size=fields.integer("intermediate_size", minimum=1, maximum=_MAX_WIDTH),
            num_layers=facts.num_layers,
            num_heads=fields.integer("num_attention_heads", minimum=1, maximum=_MAX_WIDTH),
            num_kv_heads=facts.num_kv_heads,
            head_size=facts.head_size,
            context_length=facts.context_length,
            rms_norm_eps=fields.number("rms_norm_eps", minimum=0.0, maximum=1.0),
            rope=_phimoe_rotary(document, facts.head_size, source),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            windows=() if facts.window is None else (facts.window,) * facts.num_layers,
            qkv_bias=has_biases,
            output_bias=has_biases,
            eos_token_ids=tuple(sorted(facts.eos_token_ids)),
        ),
        experts=Experts(
            count=count,
            per_token=fields.integer("num_experts_per_tok", minimum=1, maximum=count),
            jitter=fields.number("router_jitter_noise", minimum=0.0, maximum=1.0),
        ),
        quantization=quantization,
        head_bias=fields.boolean("lm_head_bias"),
        source=source,
    )


def _phimoe_rotary(document: Mapping[str, Any], head_size: int, source: str) -> Rotary:
    """The rotary embedding; phimoe names the scale of LongRoPE's cosines and sines itself."""
    parameters = rope_parameters(document, source=source)
    scales = {parameters.pop(name, None) for name in ("short_mscale", "long_mscale")}
    if parameters["rope_type"] != "longrope":
        return read_rotary(document, head_size=head_size, source=source)
    if len(scales) != 1:
        raise UnsupportedModelError(
            f"{source}: phirt computes phimoe where short_mscale and long_mscale are one number."
        )
    parameters["attention_factor"] = scales.pop()
    plain = {**document, "rope_parameters": None, "rope_scaling": parameters}
    return read_rotary(plain, head_size=head_size, source=source)

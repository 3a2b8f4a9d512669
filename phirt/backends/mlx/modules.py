"""Decoders as MLX modules: the classes of mlx-lm, filled with weights that phirt has read.

Nothing of a folder reaches mlx-lm but checked numbers and arrays.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phirt.backends.mlx.config import MlxConfig, Quantization
from phirt.backends.mlx.decoder import Decoder
from phirt.backends.native_errors import first_line
from phirt.errors import BackendBrokenError, BackendNotInstalledError, ModelFormatError

__all__ = ["build_decoder", "import_model_module"]

_ALIAS = "_phirt_mlx_lm_models"
_import_lock = threading.Lock()

# Which file of mlx_lm/models has the layers. Mistral and Qwen 2 are a llama with other
# settings, and llama's class takes a head size of its own.
_FILES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "llama",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3_text",
    "phi3": "phi3",
    "phimoe": "phimoe",
}

# What MLX packs matrices by.
_GROUP_SIZES = (32, 64, 128)
_BITS = (2, 3, 4, 5, 6, 8)


def import_model_module(name: str) -> Any:
    """One module of ``mlx_lm.models``, without importing the package ``mlx_lm``.

    Importing the package imports transformers and torch (3 seconds where torch is installed),
    fails on Windows, and lowers the process's limit of open files for good. Its models
    need nothing of that and import each other by relative names only, so that they can be
    loaded as a package of another name.

    Raises:
        BackendNotInstalledError: mlx-lm is not installed.
        BackendBrokenError: It is, and its models do not import.
    """
    with _import_lock:
        try:
            if _ALIAS not in sys.modules:
                _load_package(_models_folder())
            return importlib.import_module(f"{_ALIAS}.{name}")
        except BackendNotInstalledError:
            raise
        except Exception as error:
            raise BackendBrokenError(
                f"Backend 'mlx': importing {name!r} of mlx-lm's models failed with "
                f"{type(error).__name__}: {error}. Reinstall it with: "
                "python -m pip install --force-reinstall mlx-lm"
            ) from error


def _models_folder() -> Path:
    spec = importlib.util.find_spec("mlx_lm")  # Finds the package, and does not run it.
    if spec is None or not spec.submodule_search_locations:
        raise BackendNotInstalledError(
            "Backend 'mlx' needs the package 'mlx_lm', which is not installed. "
            'Install it with: python -m pip install "phirt[mlx]"'
        )
    return Path(spec.submodule_search_locations[0]) / "models"


def _load_package(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        _ALIAS, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is not a package")
    package = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = package
    try:
        spec.loader.exec_module(package)
    except BaseException:
        del sys.modules[_ALIAS]
        raise


def build_decoder(
    mx: Any,
    config: MlxConfig,
    weights: Mapping[str, Any],
) -> Decoder:
    """A decoder with its weights.

    Args:
        mx: The module ``mlx.core``.
        config: Shape and constants.
        weights: Arrays by Hugging Face's (or mlx-lm's) names; quantized matrices have
            ``.scales`` and ``.biases`` beside them.

    Raises:
        ModelFormatError: A tensor is missing, one too many or of another shape.
    """
    nn = importlib.import_module("mlx.nn")
    models = import_model_module(_FILES[config.decoder.architecture])
    arguments = models.ModelArgs(**_arguments(config))
    model = models.Model(arguments)
    tensors = _sanitize(model, config, weights)
    _fit_optional_parts(model, config, tensors)
    if config.quantization is not None:
        _quantize(nn, model, config.quantization, tensors, source=config.source)
    model.eval()
    try:
        model.load_weights(list(tensors.items()), strict=True)
    except ValueError as error:
        raise ModelFormatError(
            f"{config.source}: the tensors are not those of this model: {first_line(error):.300}"
        ) from error
    mx.eval(model.parameters())
    return Decoder(mx, model, config.decoder)


def _arguments(config: MlxConfig) -> dict[str, Any]:
    """What mlx-lm's ``ModelArgs`` need; rotary settings and scales are set afterwards."""
    decoder, experts = config.decoder, config.experts
    arguments: dict[str, Any] = {
        "model_type": decoder.architecture,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "vocab_size": decoder.vocab_size,
        "rope_theta": decoder.rope.theta,
        "max_position_embeddings": decoder.context_length,
    }
    file = _FILES[decoder.architecture]
    if file in {"llama", "qwen3", "gemma3_text"}:
        arguments["head_dim"] = decoder.head_size
    if file in {"llama", "qwen3", "phi3"}:
        arguments["tie_word_embeddings"] = decoder.tie_word_embeddings
    if file == "llama":
        arguments["attention_bias"] = decoder.qkv_bias or decoder.output_bias
    if experts is not None:
        arguments |= {
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "router_jitter_noise": experts.jitter,
        }
    return arguments


def _sanitize(model: Any, config: MlxConfig, weights: Mapping[str, Any]) -> dict[str, Any]:
    """mlx-lm's names for the tensors, without those that repeat what is known."""
    tensors = {name: w for name, w in weights.items() if "rotary_emb.inv_freq" not in name}
    if config.decoder.tie_word_embeddings:
        for name in [name for name in tensors if name.startswith("lm_head.")]:
            del tensors[name]
    if hasattr(model, "sanitize"):
        try:
            tensors = model.sanitize(tensors)
        except KeyError as error:
            raise ModelFormatError(f"{config.source}: the tensor {error} is missing.") from error
    return tensors


def _fit_optional_parts(model: Any, config: MlxConfig, tensors: Mapping[str, Any]) -> None:
    """Leave away what the classes have and this model has not: a head, biases."""
    if config.decoder.tie_word_embeddings:
        model.pop("lm_head", None)
    elif "lm_head" not in model:  # mlx-lm takes a Gemma without one for a tied one.
        raise ModelFormatError(f"{config.source}: the tensor 'lm_head.weight' is missing.")
    projections = {
        f"model.layers.{index}.self_attn.{name}": layer.self_attn[name]
        for index, layer in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        if name in layer.self_attn
    }
    if "lm_head" in model:
        projections["lm_head"] = model.lm_head
    for name, projection in projections.items():
        if "bias" in projection and f"{name}.bias" not in tensors and not config.has_bias(name):
            projection.pop("bias")


def _quantize(
    nn: Any, model: Any, quantization: Quantization, tensors: Mapping[str, Any], *, source: str
) -> None:
    def parameters(path: str, module: Any) -> bool | dict[str, Any]:
        scales, weight = tensors.get(f"{path}.scales"), tensors.get(f"{path}.weight")
        if scales is None or weight is None or not hasattr(module, "to_quantized"):
            return False
        # As in mlx-lm, a matrix's own shapes say how it is packed: each row of the scales has
        # one number per group, and words of 32 bits hold the weights.
        width = module.weight.shape[-1]
        group_size = width // max(1, scales.shape[-1])
        bits = weight.shape[-1] * 32 // width
        if group_size not in _GROUP_SIZES or bits not in _BITS:
            raise ModelFormatError(
                f"{source}: {path} is packed in {bits} bits by groups of {group_size}, "
                "which MLX does not know."
            )
        return {"group_size": group_size, "bits": bits, "mode": "affine"}

    nn.quantize(
        model,
        group_size=quantization.group_size,
        bits=quantization.bits,
        mode="affine",
        class_predicate=parameters,
    )

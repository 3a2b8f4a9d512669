"""From a folder of safetensors to a torch module, running nothing that the folder brings.

transformers' ``from_pretrained`` looks for adapters, generation settings, custom code and
kernels beside the weights, and config.json may name packages and hub repositories to get.
So it is never given the folder: phirt reads the configuration, without what is not about the
architecture, and hands it over together with the tensors.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from phirt.backends.native_errors import first_line
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.safe_json import read_json
from phirt.models.safetensors import SafetensorsFolder

__all__ = ["find_objection", "load_network", "quiet"]

_logger = logging.getLogger(__name__)
_quiet = threading.Lock()

# Instructions, not facts about the architecture. To the loader: code, packages, kernels or
# files to get. To every forward pass: what to return beside the logits.
_INSTRUCTIONS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "fusion_config",
        "kernel_config",
        "output_attentions",
        "output_hidden_states",
        "transformers_weights",
        "use_kernels",
    }
)
_QUANTIZED = ("quantization_config", "quantization", "compression_config")
# Where a module has a list of so many parts, building it takes minutes before a single
# weight is looked at. Real models stay below a thousand.
_MOST_PARTS = 4096
_CAUSAL = ("causallm", "lmhead", "conditionalgeneration")
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    # Masks that older checkpoints carry along.
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
# Layers whose keys and values are kept position by position.
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def find_objection(folder: Path) -> str | None:
    """Why a folder of safetensors cannot be loaded, as far as its small files tell; or None.

    Raises:
        ModelError: config.json is missing or damaged.
    """
    if (folder / "adapter_config.json").exists():
        return "it is a PEFT adapter (adapter_config.json), which has to be merged into its model"
    document = read_json(folder / "config.json")
    for key in _QUANTIZED:
        if document.get(key):
            return f"its weights are quantized ({key}), and phirt runs plain ones here"
    if document.get("is_encoder_decoder"):
        return "it is an encoder and a decoder, and phirt runs decoders"
    names = document.get("architectures")
    if isinstance(names, list) and names:
        folded = [str(name).lower() for name in names]
        if not any(part in name for name in folded for part in _CAUSAL):
            return f"its architecture is {names[0]}, which is no causal language model"
    return None


def load_network(
    torch: Any,
    transformers: Any,
    weights: SafetensorsFolder,
    folder: Path,
    *,
    dtype: str | None,
    attention: str | None,
) -> Any:
    """Build the module and fill it with the weights, on the CPU.

    Args:
        torch: The module.
        transformers: The module.
        weights: The folder's tensors. Parameters that are stored in ``dtype`` stay in the
            mapped files.
        folder: The model's folder.
        dtype: torch's name of the dtype to compute in; None for the one of most weights.
        attention: transformers' name of an attention implementation; None to choose.

    Raises:
        ModelFormatError: Weights are missing, or do not fit the configuration.
        UnsupportedModelError: transformers has no causal language model for this
            configuration, or one whose cache phirt cannot drive.
    """
    config = _read_config(transformers, folder)
    network_class = _network_class(transformers, config)
    if attention is None:
        attention = _attention(config, network_class)
    _check_size(torch, network_class, config, weights, folder)
    tensors = {name: _tensor(torch, weights, name) for name in weights.names()}
    largest = max(tensors.values(), key=lambda tensor: tensor.numel())
    settings = {
        "dtype": getattr(torch, dtype) if dtype else largest.dtype,
        "attn_implementation": attention,
    }
    network, report = _fill(network_class, config, tensors, settings)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelFormatError(
            f"{folder} lacks {len(missing)} tensors that its config.json asks for, "
            f"{missing[0]} among them."
        )
    if report["unexpected_keys"]:
        _logger.warning("%s: tensors not used: %s", folder, sorted(report["unexpected_keys"]))
    _mend_phimoe(network)
    return network


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' warnings and progress bars from the terminal, for a while.

    One at a time: the settings are the process's, and are put back as they were found.
    """
    settings = transformers.utils.logging
    with _quiet, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(settings.set_verbosity, settings.get_verbosity())
        settings.set_verbosity(logging.CRITICAL)
        if settings.is_progress_bar_enabled():
            stack.callback(settings.enable_progress_bar)
            settings.disable_progress_bar()
        yield


def _read_config(transformers: Any, folder: Path) -> Any:
    document = _architecture_only(read_json(folder / "config.json"))
    _check_counts(document, folder)
    kind = document.pop("model_type", None)
    if kind == "mistral" and "layer_types" in document:
        kind = "ministral"  # As transformers' AutoConfig has it.
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"{folder}: transformers {transformers.__version__} knows no architecture {kind!r}."
        )
    config_class = transformers.CONFIG_MAPPING[kind]
    try:
        return config_class.from_dict(document)
    # Each architecture validates its own fields, and raises what it likes.
    except Exception as error:
        raise ModelFormatError(
            f"{folder}/config.json is no valid configuration of {kind}: {first_line(error)}"
        ) from error


def _architecture_only(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _architecture_only(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if key not in _INSTRUCTIONS and not key.startswith("_")
    }


def _check_counts(document: Mapping[str, Any], folder: Path) -> None:
    for key, value in document.items():
        if isinstance(value, dict):
            _check_counts(value, folder)
        elif key.startswith(("num_", "n_")) and isinstance(value, int) and value > _MOST_PARTS:
            raise ModelFormatError(
                f"{folder}/config.json: {key} is {value:,}; {_MOST_PARTS:,} is the most that a "
                "real model could need."
            )


def _network_class(transformers: Any, config: Any) -> Any:
    kind = config.model_type
    try:
        network_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no causal language model of "
            f"architecture {kind!r}."
        ) from error
    kinds, _ = transformers.cache_utils.get_layer_types_and_kwargs(
        config.get_text_config(decoder=True)
    )
    strange = sorted(set(kinds) - _LAYER_TYPES)
    if network_class._is_stateful and not strange:  # noqa: SLF001 - there is no public name
        strange = ["recurrent"]
    if strange:
        raise UnsupportedModelError(
            f"Architecture {kind!r} keeps more than keys and values of each position "
            f"({', '.join(strange)}), which phirt could not roll back or carry over. Pass "
            "another model."
        )
    return network_class


def _attention(config: Any, network_class: Any) -> str:
    """Choose torch's fused attention, unless the model's own formula needs more than it can do."""
    text = config.get_text_config(decoder=True)
    softcapped = getattr(text, "attn_logit_softcapping", None) is not None
    fused = network_class._supports_sdpa and not softcapped  # noqa: SLF001 - no public name
    return "sdpa" if fused else "eager"


def _tensor(torch: Any, weights: SafetensorsFolder, name: str) -> Any:
    """A tensor over the mapped file itself."""
    raw = weights.raw(name)
    stored = weights.dtype(name)
    if stored not in _TORCH_DTYPES:
        raise UnsupportedModelError(
            f"The tensor {name!r} is stored as {stored}; phirt gives transformers plain weights "
            "only, of 16 bits or more."
        )
    dtype = getattr(torch, _TORCH_DTYPES[stored])
    if raw.ctypes.data % dtype.itemsize:
        raw = raw.copy()  # The format does not promise alignment.
    return torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(weights.shape(name))


def _check_size(
    torch: Any, network_class: Any, config: Any, weights: SafetensorsFolder, folder: Path
) -> None:
    """Refuse, before anything is allocated, a configuration larger than the weights."""
    held = sum(math.prod(weights.shape(name)) for name in weights.names())
    with torch.device("meta"):
        network = _build(network_class, config, folder)
    asked = sum(parameter.numel() for parameter in network.parameters())
    computed = sum(buffer.numel() for buffer in network.buffers())
    if asked > held or computed > max(held, 1 << 24):
        raise ModelFormatError(
            f"{folder}/config.json describes a model of {asked:,} parameters (and {computed:,} "
            f"computed constants); the safetensors files hold {held:,}."
        )


def _build(network_class: Any, config: Any, folder: Path) -> Any:
    try:
        return network_class._from_config(config)  # noqa: SLF001 - what AutoModel calls, too
    # A configuration that contradicts itself fails wherever a module first meets it.
    except Exception as error:
        raise ModelFormatError(
            f"{folder}/config.json describes no model that transformers can build: "
            f"{first_line(error)}"
        ) from error


def _fill(
    network_class: Any, config: Any, tensors: dict[str, Any], settings: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    try:
        network, report = network_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            local_files_only=True,
            output_loading_info=True,
            **settings,
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ModelFormatError(
            f"The weights do not have the shapes that config.json asks for: {first_line(error)}"
        ) from error
    return network, report


def _mend_phimoe(network: Any) -> None:
    """Let Phi-3.5-MoE use LongRoPE's long factors beyond the boundary.

    transformers 5.23 and 5.24 compute both sets and choose, then make the short ones anew and
    use those at every length, with the scale that belongs to the chosen ones.
    """
    for module in network.modules():
        if type(module).__name__ == "PhimoeRotaryEmbedding" and module.rope_type == "longrope":
            module.rope_init_fn = partial(_chosen_frequencies, module)


def _chosen_frequencies(rotary: Any, _config: object) -> tuple[Any, Any]:
    return rotary.inv_freq, rotary.attention_scaling

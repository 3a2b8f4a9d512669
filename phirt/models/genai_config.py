"""genai_config.json: what onnxruntime-genai's Model Builder says about a decoder graph.

Only facts about the graph are taken from it. Its ``session_options`` are for another
program and are never applied: they can name native libraries to load and files to write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from phirt.errors import ModelFormatError, UnsafeModelError, UnsupportedModelError
from phirt.models.paths import plain_name_fault
from phirt.models.safe_json import JsonFields, read_json

__all__ = ["GENAI_CONFIG_NAME", "DecoderSpec", "read_genai_config"]

GENAI_CONFIG_NAME = "genai_config.json"

# Budgets: several times the largest decoder known, so that a damaged or hostile number is
# refused here and not by an allocation.
_MAX_CONFIG_BYTES = 1 << 20
_MAX_LAYERS = 2_048
_MAX_HEADS = 4_096
_MAX_HEAD_SIZE = 8_192
_MAX_VOCAB = 1 << 24
_MAX_CONTEXT = 1 << 27

_INPUTS = {"input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names"}
_OUTPUTS = {"logits", "hidden_states", "present_key_names", "present_value_names"}
# Sections of models that are more than one decoder graph.
_OTHER_PARTS = ("encoder", "vision", "speech", "embedding", "mtp", "draft")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """One decoder graph: its file, the names of its inputs and outputs, and its shape.

    Attributes:
        architecture: The configuration's ``type``, such as ``"llama"``.
        filename: The ONNX file, a plain name inside the model folder.
        input_ids: Name of the input of token ids, (batch, tokens).
        attention_mask: Name of the input of the attention mask, (batch, past + tokens).
        position_ids: Name of the input of positions, or None where the graph counts itself.
        past_key_names: Pattern with one ``%d`` for the layer.
        past_value_names: Likewise.
        logits: Name of the output of logits.
        present_key_names: Pattern with one ``%d`` for the layer.
        present_value_names: Likewise.
        num_layers: Decoder blocks.
        num_heads: Query heads, or None where the configuration does not say.
        num_kv_heads: Key and value heads.
        head_size: Width of one head.
        vocab_size: Logits per position.
        context_length: Longest sequence that the model was made for, in tokens.
        window: Positions that a windowed KV cache keeps, or None for a full cache.
        eos_token_ids: Every id that ends a generation; may be empty.
        bos_token_id: Beginning-of-sequence id, or None.
        pad_token_id: Padding id, or None.
        search: The ``search`` section as it stands: generation defaults.
    """

    architecture: str
    filename: str
    input_ids: str
    attention_mask: str
    position_ids: str | None
    past_key_names: str
    past_value_names: str
    logits: str
    present_key_names: str
    present_value_names: str
    num_layers: int
    num_heads: int | None
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    window: int | None
    eos_token_ids: frozenset[int]
    bos_token_id: int | None
    pad_token_id: int | None
    search: Mapping[str, Any]

    def past_names(self, layer: int) -> tuple[str, str]:
        """Names of the past key and value inputs of a layer, counted from 0."""
        return (
            self.past_key_names.replace("%d", str(layer)),
            self.past_value_names.replace("%d", str(layer)),
        )

    def present_names(self, layer: int) -> tuple[str, str]:
        """Names of the present key and value outputs of a layer, counted from 0."""
        return (
            self.present_key_names.replace("%d", str(layer)),
            self.present_value_names.replace("%d", str(layer)),
        )


def read_genai_config(path: Path) -> DecoderSpec:
    """Read a genai_config.json.

    Args:
        path: The file.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged, incomplete, or beyond what any decoder needs.
        UnsafeModelError: It names a file outside its folder, a native library to load or
            a profile to write.
        UnsupportedModelError: It describes something other than one plain decoder graph.
    """
    data = read_json(path, max_bytes=_MAX_CONFIG_BYTES)
    _refuse_unsafe(data, path)
    fields = JsonFields(data, source=str(path))
    _refuse_unsupported(fields, path)
    vocab_size = fields.integer("model.vocab_size", minimum=1, maximum=_MAX_VOCAB)
    last_id = vocab_size - 1
    spec = DecoderSpec(
        architecture=fields.string("model.type", max_length=100),
        filename=_file_name(fields, path),
        input_ids=_name(fields, "inputs.input_ids", "input_ids"),
        attention_mask=_name(fields, "inputs.attention_mask", "attention_mask"),
        position_ids=fields.optional_string("model.decoder.inputs.position_ids", max_length=200),
        past_key_names=_name(fields, "inputs.past_key_names", "past_key_values.%d.key"),
        past_value_names=_name(fields, "inputs.past_value_names", "past_key_values.%d.value"),
        logits=_name(fields, "outputs.logits", "logits"),
        present_key_names=_name(fields, "outputs.present_key_names", "present.%d.key"),
        present_value_names=_name(fields, "outputs.present_value_names", "present.%d.value"),
        num_layers=fields.integer(
            "model.decoder.num_hidden_layers", minimum=1, maximum=_MAX_LAYERS
        ),
        num_heads=fields.optional_integer(
            "model.decoder.num_attention_heads", minimum=1, maximum=_MAX_HEADS
        ),
        num_kv_heads=fields.integer(
            "model.decoder.num_key_value_heads", minimum=1, maximum=_MAX_HEADS
        ),
        head_size=fields.integer("model.decoder.head_size", minimum=1, maximum=_MAX_HEAD_SIZE),
        vocab_size=vocab_size,
        context_length=fields.integer("model.context_length", minimum=1, maximum=_MAX_CONTEXT),
        window=fields.optional_integer(
            "model.decoder.sliding_window.window_size", minimum=1, maximum=_MAX_CONTEXT
        ),
        eos_token_ids=frozenset(fields.integers("model.eos_token_id", minimum=0, maximum=last_id)),
        bos_token_id=fields.optional_integer("model.bos_token_id", minimum=0, maximum=last_id),
        pad_token_id=fields.optional_integer("model.pad_token_id", minimum=0, maximum=last_id),
        search=fields.mapping("search"),
    )
    _check_consistent(spec, path)
    return spec


def _refuse_unsafe(data: Mapping[str, Any], path: Path) -> None:
    """Refuse a configuration that would make onnxruntime-genai load code or write files."""
    for key, value in _walk(data):
        if not value:
            continue
        if key == "custom_ops_library":
            raise UnsafeModelError(
                f"{path} asks to load the native library {str(value)[:200]!r}. phirt runs no code "
                "that comes with a model; remove the entry if the graph works without it."
            )
        if key == "enable_profiling":
            raise UnsafeModelError(
                f"{path} asks to write a profile to {str(value)[:200]!r}. A model may not choose "
                "files to write; remove the entry."
            )


def _walk(value: object) -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth (at most what `read_json` lets through)."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


def _refuse_unsupported(fields: JsonFields, path: Path) -> None:
    def refuse(what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{path} describes {what}. phirt runs models of one decoder graph with a plain "
            "key and value cache."
        )

    for part in _OTHER_PARTS:
        if fields.value(f"model.{part}"):
            refuse(f"a model with the part {part!r}")
    for part in ("pipeline", "state_groups"):
        if fields.value(f"model.decoder.{part}"):
            refuse(f"a decoder with {part!r}")
    unknown = sorted(fields.mapping("model.decoder.inputs").keys() - _INPUTS)
    unknown += sorted(fields.mapping("model.decoder.outputs").keys() - _OUTPUTS)
    if unknown:
        refuse(f"a graph with {', '.join(map(repr, unknown[:5]))}")


def _file_name(fields: JsonFields, path: Path) -> str:
    name = fields.string("model.decoder.filename", max_length=1000)
    fault = plain_name_fault(name)
    if fault:
        raise UnsafeModelError(
            f"{path} names the graph file {name[:200]!r}, which phirt does not open: {fault}. "
            "It must be a plain name inside the model folder."
        )
    if not name.endswith(".onnx"):
        # onnxruntime reads other suffixes as its own binary format, which is not checked.
        raise UnsupportedModelError(f"{path} names the graph file {name!r}; phirt reads .onnx.")
    return name


def _name(fields: JsonFields, path: str, default: str) -> str:
    """A graph input's or output's name; the defaults are onnxruntime-genai's own."""
    return fields.optional_string(f"model.decoder.{path}", max_length=200) or default


def _check_consistent(spec: DecoderSpec, path: Path) -> None:
    patterns = {
        "past_key_names": spec.past_key_names,
        "past_value_names": spec.past_value_names,
        "present_key_names": spec.present_key_names,
        "present_value_names": spec.present_value_names,
    }
    for key, pattern in patterns.items():
        if pattern.count("%") != 1 or "%d" not in pattern:
            raise ModelFormatError(
                f"{path}: {key!r} must hold '%d' once, for the layer; it is {pattern[:80]!r}."
            )
    if len(set(patterns.values())) < len(patterns):
        raise ModelFormatError(f"{path}: two of {', '.join(patterns)} are the same.")
    if spec.num_heads is not None and spec.num_heads % spec.num_kv_heads:
        raise ModelFormatError(
            f"{path}: num_key_value_heads ({spec.num_kv_heads}) must divide "
            f"num_attention_heads ({spec.num_heads})."
        )

"""Writes a model folder: graph, weights, tokenizer, configuration, and what they came from.

The folder is one that onnxruntime-genai loads, plus phirt.json, which is written last: a
folder without it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from phirt._version import __version__
from phirt.build.checkpoint import Checkpoint, CheckpointTensor
from phirt.build.gguf.tokenizer import GgufTokenizer
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import Precision
from phirt.models.decoder_config import DecoderConfig
from phirt.models.genai_config import GENAI_CONFIG_NAME
from phirt.models.manifest import write_manifest
from phirt.types import Progress, ProgressCallback

__all__ = ["CONVERTER_VERSION", "write_artifact"]

CONVERTER_VERSION = 1
"""Counts changes of what the converter writes: artifacts of another version are made anew."""

_MODEL_NAME = "model.onnx"


def write_artifact(
    checkpoint: Checkpoint,
    tokenizer: GgufTokenizer,
    out_dir: Path,
    *,
    precision: Precision,
    source_name: str,
    source_sha256: str,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a model folder.

    Args:
        checkpoint: Configuration and weights.
        tokenizer: The tokenizer and the chat template.
        out_dir: An empty folder. Flushing it to the disk and placing it where it is found are
            the caller's (`phirt.models.store`).
        precision: How the weights are stored.
        source_name: Name of the file that the checkpoint is in.
        source_sha256: That file's SHA-256, in hex.
        progress: Called after every tensor.

    Raises:
        UnsupportedModelError: Something in the checkpoint cannot be written.
        FileExistsError: The folder is not empty.
        FileNotFoundError: There is no such folder.
    """
    if any(out_dir.iterdir()):
        raise FileExistsError(f"The folder {out_dir} is not empty; an artifact needs its own.")
    watched = _WatchedCheckpoint(checkpoint, progress)
    write_decoder(watched, out_dir / _MODEL_NAME, precision=precision)
    tokenizer.tokenizer.save(str(out_dir / "tokenizer.json"))
    if tokenizer.chat_template is not None:
        template = tokenizer.chat_template.encode()
        (out_dir / "chat_template.jinja").write_bytes(template)  # Byte for byte, on Windows too.
    config = checkpoint.config
    _write_json(out_dir / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
    _write_json(out_dir / "generation_config.json", _generation_config(config))
    _write_json(out_dir / GENAI_CONFIG_NAME, _genai_config(config))
    identity = f"{source_sha256}:{precision}:{CONVERTER_VERSION}"
    write_manifest(
        out_dir,
        weights_id=hashlib.sha256(identity.encode()).hexdigest(),
        architecture=config.architecture,
        precision=str(precision),
        source={"file": source_name, "sha256": source_sha256},
        versions={
            "phirt": __version__,
            "converter": str(CONVERTER_VERSION),
            **{package: version(package) for package in ("gguf", "onnx", "tokenizers")},
        },
    )


class _WatchedCheckpoint:
    """A checkpoint that reports every tensor that is taken from it (a `Checkpoint`)."""

    def __init__(self, checkpoint: Checkpoint, progress: ProgressCallback | None) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._names = list(checkpoint.names())
        self._taken: set[str] = set()

    @property
    def config(self) -> DecoderConfig:
        return self._checkpoint.config

    def names(self) -> list[str]:
        return self._names

    def tensor(self, name: str) -> CheckpointTensor:
        self._taken.add(name)
        if self._progress is not None:
            self._progress(Progress("convert", len(self._taken), len(self._names), "tensors"))
        return self._checkpoint.tensor(name)


def _tokenizer_config(tokenizer: GgufTokenizer, config: DecoderConfig) -> dict[str, Any]:
    tokens = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.unk_token,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.context_length,
        # Cleaning removes spaces before punctuation: ids would not decode to their text.
        "clean_up_tokenization_spaces": False,
        **{name: text for name, text in tokens.items() if text is not None},
    }


def _generation_config(config: DecoderConfig) -> dict[str, Any]:
    """Special ids only: a checkpoint without sampling settings leaves generation greedy."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _genai_config(config: DecoderConfig) -> dict[str, Any]:
    """onnxruntime-genai's configuration, as its Model Builder writes it."""
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": _MODEL_NAME,
        "head_size": config.head_size,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
    }
    ids = _generation_config(config)
    if config.eos_token_ids:
        ids.setdefault("pad_token_id", config.eos_token_ids[0])  # as Model Builder does
    return {
        "model": {
            "type": config.architecture,
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            **ids,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": config.context_length,
            "num_beams": 1,
            "past_present_share_buffer": True,
        },
    }


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")

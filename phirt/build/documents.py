"""The small JSON files of an artifact, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from phirt.models.decoder_config import DecoderConfig

__all__ = ["genai_document", "generation_ids", "write_json", "write_tokenizer"]


def generation_ids(config: DecoderConfig) -> dict[str, Any]:
    """Special ids only: a checkpoint without sampling settings leaves generation greedy."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as this project writes JSON."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def write_tokenizer(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write a BPE tokenizer with merges as ``"left right"``, as most published files have them.

    ``tokenizer.save`` writes pairs, and a parser keeps each of them as a list of two strings
    until it has seen the whole file: twice the memory of a load's last large step, and a third
    more time. Only pieces with a space in them need pairs.
    """
    document = json.loads(tokenizer.to_str())
    merges = document["model"]["merges"]
    if not any(" " in piece for pair in merges for piece in pair):
        document["model"]["merges"] = [" ".join(pair) for pair in merges]
    write_json(path, document)


def genai_document(config: DecoderConfig, *, filename: str) -> dict[str, Any]:
    """What onnxruntime-genai, and phirt, need to know about a decoder's graph.

    Args:
        config: The decoder.
        filename: The ONNX file.
    """
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
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
    ids = generation_ids(config)
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

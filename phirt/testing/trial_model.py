"""Writes the trial model that is part of the package (`phirt.dispatch.trial_model`).

    python -m phirt.testing.trial_model

To be run again when the converter writes something else: a test compares. It needs the extras
``cpu`` and ``openvino``.

The model is a llama with grouped queries, one layer and 64 tokens. Its weights are random, and
scaled so that its answers are peaked, though not certain: wrong numbers move a distribution
most that has both likely and unlikely tokens. Logits multiplied by 1.1 have a KL divergence of
0.008 nats from those that are right, by 1.2 of 0.03, where rounding to 8 bits costs 0.004. With
so few tokens no distribution could move by much more: the divergence is half the square of the
factor's distance from 1 times the variance of the logits, which is at most about a quarter of
the squared logarithm of the number of tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import string
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from phirt.build.convert import choose_precision, convert
from phirt.build.documents import write_json
from phirt.dispatch.trial_model import TRIAL_LAYOUTS
from phirt.models.manifest import FileRecord, read_manifest, save_manifest
from phirt.testing.checkpoints import safetensors_bytes
from phirt.types import FloatArray

__all__ = ["write_trial_model"]

_NAME = "trial"
_IR = "openvino_model.xml"
_END = "<|end|>"
# "Ġ" is the space, as byte-level vocabularies spell it.
_WORDS = [*string.ascii_letters, *".,?!:;-'()", "Ġ", _END]
_END_ID = _WORDS.index(_END)

_HIDDEN = _INNER = 32
_HEADS, _KV_HEADS, _HEAD_SIZE = 2, 1, 16
# With a norm before the head twice as strong, the likeliest token has a probability of one half.
_PEAK = 2.0

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_SIZE,
    "vocab_size": len(_WORDS),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": _END_ID,
    "eos_token_id": _END_ID,
    "pad_token_id": _END_ID,
    "torch_dtype": "float32",
}


def write_trial_model(root: Path) -> None:
    """Write the model's folder in each layout, over what is there.

    The same versions of phirt and of its converters' packages write the same, up to how
    processors round logarithms and sums.

    Args:
        root: Gets one folder a layout.
    """
    with tempfile.TemporaryDirectory(prefix="phirt-trial-") as scratch:
        source = Path(scratch) / _NAME
        source.mkdir()
        _write_checkpoint(source)
        digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
        for layout in TRIAL_LAYOUTS:
            made = Path(scratch) / layout
            made.mkdir()
            precision = choose_precision(source, layout)
            convert(source, made, layout=layout, precision=precision, source_id=f"sha256:{digest}")
            if (made / _IR).exists():
                _shorten(made)
            _replace_files(made, root / layout)


def _write_checkpoint(folder: Path) -> None:
    write_json(folder / "config.json", _CONFIG)
    write_json(folder / "generation_config.json", {"eos_token_id": _END_ID})
    write_json(folder / "tokenizer_config.json", {"eos_token": _END})
    write_json(folder / "tokenizer.json", _tokenizer_document())
    tensors = dict(_tensors(np.random.default_rng(0)))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))


def _tensors(random: np.random.Generator) -> Iterator[tuple[str, FloatArray]]:
    def normal(*shape: int, scale: float) -> FloatArray:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def linear(rows: int, columns: int, gain: float) -> FloatArray:
        return normal(rows, columns, scale=gain / columns**0.5)

    def norm() -> FloatArray:
        return 1 + normal(_HIDDEN, scale=0.2)

    queries, keys = _HEADS * _HEAD_SIZE, _KV_HEADS * _HEAD_SIZE
    block = "model.layers.0"
    # As in `phirt.testing.checkpoints`: a small embedding, and scores of several units.
    yield "model.embed_tokens.weight", normal(len(_WORDS), _HIDDEN, scale=0.3)
    yield f"{block}.input_layernorm.weight", norm()
    yield f"{block}.self_attn.q_proj.weight", linear(queries, _HIDDEN, 2.0)
    yield f"{block}.self_attn.k_proj.weight", linear(keys, _HIDDEN, 2.0)
    yield f"{block}.self_attn.v_proj.weight", linear(keys, _HIDDEN, 1.5)
    yield f"{block}.self_attn.o_proj.weight", linear(_HIDDEN, queries, 1.5)
    yield f"{block}.post_attention_layernorm.weight", norm()
    yield f"{block}.mlp.gate_proj.weight", linear(_INNER, _HIDDEN, 1.5)
    yield f"{block}.mlp.up_proj.weight", linear(_INNER, _HIDDEN, 1.5)
    yield f"{block}.mlp.down_proj.weight", linear(_HIDDEN, _INNER, 1.5)
    yield "model.norm.weight", np.float32(_PEAK) * norm()


def _tokenizer_document() -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": _END_ID, "content": _END, **special, "special": True}],
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {word: index for index, word in enumerate(_WORDS)},
            "merges": [],
        },
    }


def _shorten(folder: Path) -> None:
    """Write the IR without white space, its nodes named by their numbers.

    OpenVINO names nodes by a counter of the process, and indents deeply: what remains is a
    fifth shorter, and the same in every process.
    """
    path = folder / _IR
    text = re.sub(r">\s+<", "><", path.read_text(encoding="utf-8"))
    text = re.sub(r'(<layer id="(\d+)" name=")[A-Za-z]+_\d+"', r'\1\2"', text)
    path.write_text(text, encoding="utf-8", newline="\n")
    manifest = read_manifest(folder)
    assert manifest is not None  # convert has just written it
    size = FileRecord(path.stat().st_size)
    save_manifest(folder, replace(manifest, files={**manifest.files, _IR: size}))


def _replace_files(made: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for old in target.iterdir():
        old.unlink()
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the model into the package, or into another folder."""
    parser = argparse.ArgumentParser(description="Write phirt's trial model.")
    package = Path(str(files("phirt.dispatch.trial_model")))
    parser.add_argument("folder", nargs="?", type=Path, default=package)
    write_trial_model(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    main()

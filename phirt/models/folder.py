"""A model folder: what lies in it and what its small files say.

Reading a folder opens no weights and runs nothing. Which layouts there are is in
`phirt.models.layouts`; this module reads what they have in common. Of code that a folder
names (``auto_map``, a tokenizer class of its own) it takes no notice, because nothing here
or in a backend would run it, and the models that are published with it are understood
without; where the code *is* the model (mlx-lm's ``model_file``), the folder is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phirt.errors import (
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.models.genai_config import GENAI_CONFIG_NAME, DecoderSpec, read_genai_config
from phirt.models.hashing import remembered_sha256
from phirt.models.huggingface_config import CONFIG_NAME, ConfigFacts, config_facts
from phirt.models.integrity import check_folder
from phirt.models.layouts import (
    FORMATS,
    LAYOUTS,
    Layout,
    find_layout,
    fingerprint,
    held_formats,
)
from phirt.models.manifest import Manifest, read_manifest
from phirt.models.paths import check_links, resolve_inside
from phirt.models.safe_json import JsonFields, read_json
from phirt.models.store import Store
from phirt.models.templates import chat_template_of
from phirt.types import Artifact

__all__ = ["FORMATS", "ModelFolder", "held_formats", "read_folder"]

_logger = logging.getLogger(__name__)

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# Hugging Face's names of the types in which weights are stored.
_PRECISIONS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a model folder holds.

    Attributes:
        artifact: Name, path, format and identity.
        decoder: Only in the format ``"onnx-genai"``: the graph, its inputs and outputs. Its
            ``eos_token_ids`` are those of ``facts``.
        facts: What running the model needs to know. Its ``eos_token_ids`` are the union of
            those of every configuration there is.
        model_path: The graph: an .onnx file, to be passed to `check_onnx_files` before a
            runtime opens it, or openvino_model.xml. None for safetensors.
        tokenizer_path: The tokenizer.json.
        chat_template: Source of the chat template (Jinja), or None.
        special_tokens: Texts of the special tokens that a chat template may write, those
            there are: ``bos_token``, ``eos_token``, ``pad_token``, ``unk_token``.
        generation_defaults: Raw settings: generation_config.json where there is one, else
            the ``search`` section of genai_config.json.
        manifest: What phirt's converter recorded, or None for a folder made elsewhere.
    """

    artifact: Artifact
    decoder: DecoderSpec | None
    facts: ConfigFacts
    model_path: Path | None
    tokenizer_path: Path
    chat_template: str | None
    special_tokens: Mapping[str, str]
    generation_defaults: Mapping[str, Any]
    manifest: Manifest | None


def read_folder(
    path: Path, *, name: str | None = None, formats: Sequence[str] = FORMATS
) -> ModelFolder:
    """Read a model folder.

    Args:
        path: The folder.
        name: What the user calls the model; the folder's name where not given.
        formats: The layouts to look for; the first that the folder holds is taken.

    Raises:
        ModelNotFoundError: There is no such folder, or a file that it needs is missing.
        ModelFormatError: One of its files is damaged.
        UnsafeModelError: It holds only pickles, leads or reaches out of itself, is a model
            whose computation is code of its own, or has another chat template than when it
            was installed.
        UnsupportedModelError: It is sound, but not something that phirt runs, or in no
            layout of ``formats``.
        ValueError: One of ``formats`` is not one of `FORMATS`.
    """
    try:
        return _read(path, name or path.resolve().name, formats)
    except ModelError:
        raise
    except OSError as error:
        raise ModelFormatError(f"The model folder {path} cannot be read: {error}.") from error


def _read(path: Path, name: str, formats: Sequence[str]) -> ModelFolder:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ModelNotFoundError(f"No model folder at {path}: it {found}. {LAYOUTS}.")
    check_links(path)
    layout = find_layout(path, formats)
    manifest = read_manifest(path)
    if manifest is not None:
        check_folder(path, manifest, sha256=_remembered_sha256)
    config = _config(path, layout)
    decoder = read_genai_config(path / GENAI_CONFIG_NAME) if _is_genai(layout) else None
    facts = _facts(path, config, decoder)
    layout = _complete(path, layout, decoder)
    tokenizer_path = _require(path, "tokenizer.json", "the tokenizer")
    generation, eos = _generation_config(path, facts.vocab_size)
    facts = replace(facts, eos_token_ids=facts.eos_token_ids | eos)
    tokenizer = _tokenizer_config(path)
    defaults = generation if generation is not None else decoder.search if decoder else {}
    return ModelFolder(
        artifact=Artifact(
            name=name,
            path=path,
            format=layout.format,
            architecture=facts.architecture,
            precision=manifest.precision if manifest else _precision(layout, config),
            weights_id=manifest.weights_id if manifest else fingerprint(path, layout),
        ),
        decoder=decoder and replace(decoder, eos_token_ids=facts.eos_token_ids),
        facts=facts,
        model_path=layout.model_path,
        tokenizer_path=tokenizer_path,
        chat_template=chat_template_of(path, tokenizer),
        special_tokens=_special_tokens(tokenizer),
        generation_defaults=defaults,
        manifest=manifest,
    )


def _remembered_sha256(path: Path) -> str:
    return remembered_sha256(path, Store().root / "hashes")


def _is_genai(layout: Layout) -> bool:
    return layout.format == "onnx-genai"


def _config(path: Path, layout: Layout) -> dict[str, Any]:
    """config.json; empty where it is absent and a genai_config.json stands for it."""
    if _is_genai(layout) and not (path / CONFIG_NAME).exists():
        return {}
    document = read_json(_require(path, CONFIG_NAME, "which says what the model is"))
    if document.get("model_file"):
        raise UnsafeModelError(
            f"{path / CONFIG_NAME} names a file of code that computes the model, model_file = "
            f"{str(document['model_file'])[:80]!r}. phirt runs no code that comes with a model."
        )
    _note_code(path / CONFIG_NAME, document)
    return document


def _note_code(path: Path, document: Mapping[str, Any]) -> None:
    if document.get("auto_map"):
        _logger.info("%s names code of the model's own (auto_map), which is not run", path)


def _facts(path: Path, config: Mapping[str, Any], decoder: DecoderSpec | None) -> ConfigFacts:
    """The facts; those of genai_config.json, which is of the graph, win."""
    source = str(path / CONFIG_NAME)
    if decoder is None:
        return config_facts(config, source=source)
    facts = ConfigFacts(
        architecture=decoder.architecture,
        vocab_size=decoder.vocab_size,
        context_length=decoder.context_length,
        eos_token_ids=decoder.eos_token_ids,
        bos_token_id=decoder.bos_token_id,
        pad_token_id=decoder.pad_token_id,
        num_layers=decoder.num_layers,
        num_kv_heads=decoder.num_kv_heads,
        head_size=decoder.head_size,
        window=decoder.window,
    )
    if not config:
        return facts
    try:
        # What genai_config.json has no field for.
        known = config_facts(config, source=source)
    except UnsupportedModelError:
        return facts
    return replace(
        facts,
        eos_token_ids=facts.eos_token_ids | known.eos_token_ids,
        rope_boundary=known.rope_boundary,
        window=facts.window or known.window,
    )


def _complete(path: Path, layout: Layout, decoder: DecoderSpec | None) -> Layout:
    """The layout with its graph, all of whose files are there."""
    if decoder is not None:
        graph = _require(path, decoder.filename, "the graph that genai_config.json names")
        return replace(layout, model_path=graph)
    if layout.model_path is not None:
        _require(path, layout.model_path.relative_to(path).as_posix(), "the graph")
    if layout.format == "openvino":
        _require(path, "openvino_model.bin", "the graph's weights")
    return layout


def _precision(layout: Layout, config: Mapping[str, Any]) -> str | None:
    """How the weights of a folder made elsewhere are stored, where it says so."""
    if layout.format == "mlx":
        bits = JsonFields(config, source=CONFIG_NAME).value("quantization.bits")
        return f"int{bits}" if isinstance(bits, int) else None
    if layout.format == "safetensors" and not config.get("quantization_config"):
        return _PRECISIONS.get(str(config.get("dtype") or config.get("torch_dtype")))
    return layout.precision


def _require(path: Path, name: str, what: str) -> Path:
    resolve_inside(path, name)
    file = path / name
    if not file.is_file():
        raise ModelNotFoundError(f"{path} lacks {name}, {what}. {LAYOUTS}.")
    return file


def _generation_config(path: Path, vocab_size: int) -> tuple[dict[str, Any] | None, frozenset[int]]:
    file = path / "generation_config.json"
    if not file.exists():
        return None, frozenset()
    data = read_json(file)
    ids = JsonFields(data, source=str(file)).integers(
        "eos_token_id", minimum=0, maximum=vocab_size - 1
    )
    return data, frozenset(ids)


def _tokenizer_config(path: Path) -> JsonFields:
    file = path / "tokenizer_config.json"
    document = read_json(file) if file.exists() else {}
    _note_code(file, document)
    return JsonFields(document, source=str(file))


def _special_tokens(tokenizer: JsonFields) -> dict[str, str]:
    texts = {key: _token_text(tokenizer, key) for key in _SPECIAL_TOKENS}
    return {key: text for key, text in texts.items() if text is not None}


def _token_text(tokenizer: JsonFields, key: str) -> str | None:
    """A special token: plain text, or Hugging Face's AddedToken object."""
    if isinstance(tokenizer.value(key), dict):
        return tokenizer.string(f"{key}.content")
    return tokenizer.optional_string(key)

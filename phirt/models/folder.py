"""A model folder: what lies in it and what its small files say.

Reading a folder opens no weights and runs nothing. Two layouts exist for phirt: a
"genai folder" (genai_config.json, an ONNX graph with its weights, tokenizer.json), which
this module reads, and a single ``.gguf`` file, which is converted to one first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from phirt.errors import ModelError, ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models.genai_config import GENAI_CONFIG_NAME, DecoderSpec, read_genai_config
from phirt.models.manifest import Manifest, read_manifest
from phirt.models.paths import check_links, resolve_inside
from phirt.models.safe_json import JsonFields, read_bytes, read_json
from phirt.types import Artifact

__all__ = ["FORMATS", "ModelFolder", "held_formats", "read_folder"]

FORMATS = ("onnx-genai", "openvino", "onnx", "mlx", "safetensors")

_LAYOUTS = f"phirt reads a genai folder (one with {GENAI_CONFIG_NAME}), or a .gguf file"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_MAX_TEMPLATE_CHARACTERS = 1 << 20
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# Samples of the weights in a fingerprint: enough that two fine-tunings of one model differ
# (they differ nearly everywhere), few enough to read in a millisecond.
_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a genai folder holds.

    Attributes:
        artifact: Name, path, format (``"onnx-genai"``) and identity.
        decoder: The graph, its inputs and outputs. Its ``eos_token_ids`` are the union of
            genai_config.json's and generation_config.json's.
        model_path: The ONNX file. Pass it to `check_onnx_files` before a runtime opens it.
        tokenizer_path: The tokenizer.json.
        chat_template: Source of the chat template (Jinja), or None.
        special_tokens: Texts of the special tokens that a chat template may write, those
            there are: ``bos_token``, ``eos_token``, ``pad_token``, ``unk_token``.
        generation_defaults: Raw settings: generation_config.json where there is one, else
            the ``search`` section of genai_config.json.
        manifest: What phirt's converter recorded, or None for a folder made elsewhere.
    """

    artifact: Artifact
    decoder: DecoderSpec
    model_path: Path
    tokenizer_path: Path
    chat_template: str | None
    special_tokens: Mapping[str, str]
    generation_defaults: Mapping[str, Any]
    manifest: Manifest | None


def held_formats(path: Path) -> tuple[str, ...]:
    """The layouts that a folder holds, in the order of `FORMATS`."""
    held = []
    if (path / GENAI_CONFIG_NAME).exists():
        held.append("onnx-genai")
    if any(path.glob("*.safetensors")):
        held.append("safetensors")
    return tuple(held)


def read_folder(
    path: Path, *, name: str | None = None, formats: Sequence[str] = FORMATS
) -> ModelFolder:
    """Read a model folder.

    Args:
        path: The folder.
        name: What the user calls the model; the folder's name where not given.

    Raises:
        ModelNotFoundError: There is no such folder, or a file that it needs is missing.
        ModelFormatError: One of its files is damaged.
        UnsafeModelError: It holds only pickles, or leads or reaches out of itself.
        UnsupportedModelError: It is sound, but not something that phirt runs.
    """
    try:
        return _read(path, name or path.resolve().name)
    except ModelError:
        raise
    except OSError as error:
        raise ModelFormatError(f"The model folder {path} cannot be read: {error}.") from error


def _read(path: Path, name: str) -> ModelFolder:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise ModelNotFoundError(f"No model folder at {path}: it {found}. {_LAYOUTS}.")
    if not (path / GENAI_CONFIG_NAME).exists():
        _refuse_other_layouts(path)
    check_links(path)
    manifest = read_manifest(path)
    if manifest is not None:
        manifest.check_files(path)
    decoder = read_genai_config(path / GENAI_CONFIG_NAME)
    model_path = _require(path, decoder.filename, "the graph that genai_config.json names")
    tokenizer_path = _require(path, "tokenizer.json", "the tokenizer")
    generation, eos = _generation_config(path, decoder.vocab_size)
    tokenizer = _tokenizer_config(path)
    return ModelFolder(
        artifact=Artifact(
            name=name,
            path=path,
            format="onnx-genai",
            architecture=decoder.architecture,
            precision=manifest.precision if manifest else None,
            weights_id=manifest.weights_id if manifest else _fingerprint(path, model_path),
        ),
        decoder=replace(decoder, eos_token_ids=decoder.eos_token_ids | eos),
        model_path=model_path,
        tokenizer_path=tokenizer_path,
        chat_template=_chat_template(path, tokenizer),
        special_tokens=_special_tokens(tokenizer),
        generation_defaults=decoder.search if generation is None else generation,
        manifest=manifest,
    )


def _refuse_other_layouts(path: Path) -> NoReturn:
    """Say what the folder is instead of a genai folder."""
    suffixes = {entry.suffix.lower(): entry.name for entry in sorted(path.iterdir())}
    if ".gguf" in suffixes:
        raise ModelNotFoundError(
            f"{path} is not a genai folder, but holds {suffixes['.gguf']}: name that file instead."
        )
    if ".safetensors" not in suffixes and _PICKLES & suffixes.keys():
        pickle = suffixes[min(_PICKLES & suffixes.keys())]
        raise UnsafeModelError(
            f"{path} holds its weights as a pickle ({pickle}), which can run any code when it is "
            f"opened, so phirt does not open it. {_LAYOUTS}."
        )
    held = ", ".join(entry.name for entry in sorted(path.iterdir())[:5]) or "nothing"
    raise ModelNotFoundError(f"{path} lacks {GENAI_CONFIG_NAME}; it holds {held}. {_LAYOUTS}.")


def _require(path: Path, name: str, what: str) -> Path:
    resolve_inside(path, name)
    file = path / name
    if not file.is_file():
        raise ModelNotFoundError(f"{path} lacks {name}, {what}. {_LAYOUTS}.")
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
    return JsonFields(read_json(file) if file.exists() else {}, source=str(file))


def _special_tokens(tokenizer: JsonFields) -> dict[str, str]:
    texts = {key: _token_text(tokenizer, key) for key in _SPECIAL_TOKENS}
    return {key: text for key, text in texts.items() if text is not None}


def _token_text(tokenizer: JsonFields, key: str) -> str | None:
    """A special token: plain text, or Hugging Face's AddedToken object."""
    if isinstance(tokenizer.value(key), dict):
        return tokenizer.string(f"{key}.content")
    return tokenizer.optional_string(key)


def _chat_template(path: Path, tokenizer: JsonFields) -> str | None:
    """The template's source; a file of its own wins, as in transformers."""
    file = path / "chat_template.jinja"
    if file.exists():
        data = read_bytes(file, max_bytes=_MAX_TEMPLATE_CHARACTERS)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    value = tokenizer.value("chat_template")
    if not isinstance(value, list):
        return tokenizer.optional_string("chat_template", max_length=_MAX_TEMPLATE_CHARACTERS)
    for item in value:
        if isinstance(item, dict) and item.get("name") == "default":
            named = JsonFields(item, source=str(path / "tokenizer_config.json"))
            return named.string("template", max_length=_MAX_TEMPLATE_CHARACTERS)
    return None


def _fingerprint(path: Path, model_path: Path) -> str:
    """Identify the weights of a folder that phirt did not write, without reading them whole.

    Hashing gigabytes would cost seconds at every load. The fingerprint covers name, size,
    time of modification and evenly spaced samples of the graph file and of every file that
    can hold its external data. The samples tell apart files whose times were normalized (by
    an archive, say); the times tell apart files that differ only between the samples. A
    copy may get another fingerprint, which costs a cache miss and nothing else.
    """
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in {".json", ".jinja", ".md", ".txt"} or not file.is_file():
            continue
        status = file.stat()
        role = "graph" if file == model_path else "data"
        digest.update(f"{role}\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"fingerprint:{digest.hexdigest()[:32]}"

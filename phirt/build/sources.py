"""What can be converted: a GGUF file, or a Hugging Face folder of safetensors.

A source is a checkpoint and the small files that go with it: tokenizer, chat template and
configurations. Both kinds are left as files of Hugging Face's names beside the weights,
which is where every layout has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from phirt.build.checkpoint import Checkpoint
from phirt.models.safe_json import read_bytes
from phirt.text.tokenizer import Tokenizer

__all__ = ["TEXT_FILES", "Source", "digest_texts", "open_source"]

_CONFIG = "config.json"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What goes with the weights and the configuration; the first must be there."""

_MAX_TEXT_BYTES = 1 << 28


class Source(Protocol):
    """An open source."""

    @property
    def name(self) -> str:
        """Of the file or folder."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Configuration and weights."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What had a part in reading it."""

    @property
    def source_id(self) -> str:
        """Identifies the weights as they are stored."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens."""

    def write_text_files(self, out_dir: Path) -> None:
        """Write tokenizer.json and what goes with it."""

    def write_config(self, out_dir: Path) -> None:
        """Write config.json."""


@contextmanager
def open_source(path: Path, *, source_id: str | None = None) -> Iterator[Source]:
    """Open what is to be converted.

    Args:
        path: A ``.gguf`` file, or a folder with config.json and safetensors files.
        source_id: Identity of the weights, where it is known: else the file is hashed, or
            the folder's fingerprint is taken.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged.
        UnsafeModelError: The folder reaches out of itself.
        UnsupportedModelError: It is sound, but phirt does not convert it.
    """
    if path.is_dir():
        # Imported by kind: a GGUF file needs the gguf package, a folder does not.
        from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint

        with SafetensorsCheckpoint(path) as checkpoint:
            yield _FolderSource(path, checkpoint, source_id)
    else:
        from phirt.build.gguf.checkpoint import GgufCheckpoint
        from phirt.build.gguf.source import GgufSource

        with GgufCheckpoint(path) as gguf:
            yield GgufSource(path, gguf, source_id)


def digest_texts(folder: Path) -> str:
    """A digest of what a conversion takes from a Hugging Face folder beside the weights.

    Raises:
        ModelFormatError: One of the files cannot be read.
    """
    digest = hashlib.sha256()
    for name in (_CONFIG, *TEXT_FILES):
        if (folder / name).exists():
            data = read_bytes(folder / name, max_bytes=_MAX_TEXT_BYTES)
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


class _FolderSource:
    """A Hugging Face folder."""

    packages = ()

    def __init__(self, path: Path, checkpoint: Checkpoint, source_id: str | None) -> None:
        self.name = path.resolve().name
        self.checkpoint = checkpoint
        self._path = path
        self._id = source_id

    @property
    def source_id(self) -> str:
        """The folder's fingerprint."""
        if self._id is None:
            from phirt.models.folder import read_folder

            self._id = read_folder(self._path, formats=("safetensors",)).artifact.weights_id
        return self._id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens."""
        return Tokenizer.from_file(self._path / "tokenizer.json").encode(text)

    def write_text_files(self, out_dir: Path) -> None:
        """Copy the folder's."""
        for name in TEXT_FILES:
            if (self._path / name).exists():
                self._copy(name, out_dir)

    def write_config(self, out_dir: Path) -> None:
        """Copy the folder's: it may say more than a `DecoderConfig` holds."""
        self._copy(_CONFIG, out_dir)

    def _copy(self, name: str, out_dir: Path) -> None:
        data = read_bytes(self._path / name, max_bytes=_MAX_TEXT_BYTES)
        (out_dir / name).write_bytes(data)

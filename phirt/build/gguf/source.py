"""A GGUF file, with what goes with its weights: tokenizer, chat template, special ids."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from phirt.build.documents import generation_ids, write_json, write_tokenizer
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tokenizer import GgufTokenizer, read_tokenizer
from phirt.build.huggingface_config import config_document
from phirt.models.decoder_config import DecoderConfig
from phirt.models.hashing import sha256_of
from phirt.text.tokenizer import Tokenizer

__all__ = ["GgufSource"]


class GgufSource:
    """A GGUF file as a `phirt.build.sources.Source`.

    Args:
        path: The file.
        checkpoint: What it holds.
        source_id: Its identity, where it is known.
    """

    packages = ("gguf", "tokenizers")

    def __init__(self, path: Path, checkpoint: GgufCheckpoint, source_id: str | None) -> None:
        self.name = path.name
        self.checkpoint = checkpoint
        self._path = path
        self._id = source_id

    @property
    def source_id(self) -> str:
        """The file's SHA-256."""
        if self._id is None:
            self._id = f"sha256:{sha256_of(self._path)}"
        return self._id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokenizer's own special tokens."""
        return Tokenizer(self._tokenizer.tokenizer).encode(text)

    def write_text_files(self, out_dir: Path) -> None:
        """Write what the file's metadata holds."""
        tokenizer, config = self._tokenizer, self.checkpoint.config
        write_tokenizer(out_dir / "tokenizer.json", tokenizer.tokenizer)
        if tokenizer.chat_template is not None:
            template = tokenizer.chat_template.encode()
            # Byte for byte, on Windows too.
            (out_dir / "chat_template.jinja").write_bytes(template)
        write_json(out_dir / "tokenizer_config.json", _tokenizer_config(tokenizer, config))
        write_json(out_dir / "generation_config.json", generation_ids(config))

    @cached_property
    def _tokenizer(self) -> GgufTokenizer:
        # Not before it is needed: every load opens the file, to choose a precision, and this
        # takes four times as long as all else that it looks at.
        return read_tokenizer(self.checkpoint.file, tokens=self.checkpoint.tokens)

    def write_config(self, out_dir: Path) -> None:
        """Write the configuration in Hugging Face's words."""
        write_json(out_dir / "config.json", config_document(self.checkpoint.config))


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

"""Tiny models for the tests of the transformers backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phirt.backends.transformers import TransformersBackend
from phirt.models.folder import read_folder
from phirt.protocols import LoadedModel, LoadOptions
from phirt.types import Artifact


def artifact_of(folder: Path) -> Artifact:
    return read_folder(folder, formats=TransformersBackend.formats).artifact


def load(folder: Path, **options: Any) -> LoadedModel:
    return TransformersBackend().load(artifact_of(folder), "cpu", LoadOptions(**options))


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def oracle(folder: Path) -> Any:
    """transformers' own module, with the plain formula of attention."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )

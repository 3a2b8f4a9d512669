"""What phirt adds to a folder that another's engine left: a canary, and phirt.json."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phirt._version import __version__
from phirt.build.canary import compute_canary, encode_canary
from phirt.build.engines.built import Built
from phirt.build.sources import open_source
from phirt.errors import ModelError
from phirt.models.canary import Canary, write_canary
from phirt.models.manifest import write_manifest

__all__ = ["describe_built"]

_logger = logging.getLogger(__name__)


def describe_built(
    source: Path,
    folder: Path,
    built: Built,
    *,
    source_id: str,
    precision: str,
    build: Mapping[str, Any],
) -> None:
    """Complete the folder that an engine left.

    Args:
        source: What it was built from.
        folder: The folder.
        built: What the engine told.
        source_id: Identifies the source's weights.
        precision: How the weights are stored.
        build: How it was built; JSON values only.

    Raises:
        ModelFormatError: A tensor of the source is damaged.
    """
    canary = _canary_of(source)
    if canary is not None:
        write_canary(folder, canary)
    versions = {"phirt": __version__, **built.versions}
    identity = json.dumps([source_id, precision, dict(build), versions], sort_keys=True)
    write_manifest(
        folder,
        weights_id="sha256:" + hashlib.sha256(identity.encode()).hexdigest(),
        architecture=built.architecture,
        precision=precision,
        source={"name": source.resolve().name, "id": source_id},
        versions=versions,
        build=build,
    )


def _canary_of(source: Path) -> Canary | None:
    """What the original weights say; of what the engine made of them phirt knows nothing."""
    try:
        with open_source(source, source_id="") as opened:
            token_ids = encode_canary(opened.encode, opened.checkpoint.config)
            canary = token_ids and compute_canary(opened.checkpoint, token_ids, None)
    except ModelError as error:  # an architecture that phirt does not read
        _logger.info("No canary: %s", error)
        return None
    return replace(canary, own_kl=None) if canary else None

"""Files that Hugging Face's own library has fetched already, in its cache.

models--ORG--NAME/blobs/DIGEST                  the content
models--ORG--NAME/snapshots/COMMIT/PATH         a link to it, or where there are no links,
                                                the content itself
"""

from __future__ import annotations

import os
from pathlib import Path

from phirt.models.hub import HubFile, HubSnapshot
from phirt.silence import silence

__all__ = ["cached_files"]

_VARIABLES = (("HF_HUB_CACHE", ""), ("HUGGINGFACE_HUB_CACHE", ""), ("HF_HOME", "hub"))


def cached_files(snapshot: HubSnapshot, file: HubFile) -> list[Path]:
    """Where the user's cache may hold a file. The size fits; the content is to be hashed.

    Args:
        snapshot: The repository at one commit.
        file: One of its files.
    """
    repository = _cache() / f"models--{snapshot.repo.replace('/', '--')}"
    places = (
        repository / "blobs" / file.digest,
        repository / "snapshots" / snapshot.commit / file.path,
    )
    # Mostly one file, and a link to it.
    return list({place.resolve() for place in places if _has_size(place, file.size)})


def _cache() -> Path:
    """The cache's folder, by the variables as they are now."""
    silence("huggingface_hub")
    from huggingface_hub import constants

    for variable, folder in _VARIABLES:
        if value := os.environ.get(variable):
            return Path(os.path.expandvars(value)).expanduser() / folder
    return Path(constants.HF_HUB_CACHE)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:  # a loop of links, or not ours to read
        return False

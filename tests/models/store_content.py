"""What tests put into a store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from phirt.models.manifest import write_manifest
from phirt.models.store import Store

KEY = "tiny-int8"
CONTENT = b"weights" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def fill(folder: Path, *, content: bytes = CONTENT, **manifest: Any) -> None:
    """Write an artifact; ``manifest`` replaces what its phirt.json says."""
    (folder / "model.onnx.data").write_bytes(content)
    said: dict[str, Any] = {
        "weights_id": "w",
        "architecture": "llama",
        "precision": "int8",
        "source": {},
        "versions": {},
    }
    write_manifest(folder, **(said | manifest))


def fill_source(folder: Path) -> None:
    """Write the fetched file."""
    (folder / "x.gguf").write_bytes(CONTENT)


def leftovers(store: Store) -> list[str]:
    """What installs have left in ``tmp/``."""
    return sorted(path.name for path in (store.root / "tmp").glob("*"))

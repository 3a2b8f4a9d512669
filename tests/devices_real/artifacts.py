"""What both suites need of an artifact and of a loaded model."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from phirt.models.folder import read_folder
from phirt.models.manifest import write_manifest


def vouch(folder: Path, checkpoint: Path) -> Path:
    """Say in the folder's manifest that its float32 weights are those of the checkpoint."""
    source = read_folder(checkpoint, formats=("safetensors",)).artifact
    (folder / "phirt.json").unlink(missing_ok=True)
    write_manifest(
        folder,
        weights_id=source.weights_id,
        architecture=source.architecture or "",
        precision="fp32",
        source={"name": source.name},
        versions={},
    )
    return folder


def operators_on(model: Any, session: str = "inference") -> dict[str, Counter[str]]:
    """Operators of one of a loaded model's sessions, counted by execution provider."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for assignment in getattr(model, session).get_provider_graph_assignment_info():
        found[assignment.ep_name].update(node.op_type for node in assignment.get_nodes())
    return found

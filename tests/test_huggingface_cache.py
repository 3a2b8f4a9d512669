"""Models as they lie in Hugging Face's cache, where every file is a link into ``blobs/``."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

import phirt
from phirt.build.convert import convert
from phirt.testing import write_tiny_checkpoint

LAYOUT_OF = {
    "onnxruntime": "onnx-genai",
    "onnxruntime-genai": "onnx-genai",
    "openvino": "openvino",
    "mlx": "safetensors",
    "transformers": "safetensors",
    "reference": "safetensors",
}
NEEDS_TORCH = [pytest.mark.oracle]
BACKENDS = [
    pytest.param(name, marks=NEEDS_TORCH if name == "transformers" else []) for name in LAYOUT_OF
]

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the cache holds copies on Windows, where links need a right"
)


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The same tiny llama in every layout."""
    root = tmp_path_factory.mktemp("plain")
    checkpoint = write_tiny_checkpoint(root / "checkpoint", "llama")
    folders = {}
    for layout in set(LAYOUT_OF.values()):
        folders[layout] = root / layout
        folders[layout].mkdir()
        convert(checkpoint, folders[layout], layout=layout, precision="fp32")
    return folders


def cached(folder: Path, hub: Path) -> Path:
    """The folder as a snapshot in a cache at ``hub``."""
    repository = hub / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize("backend", BACKENDS)
def test_loads_on_every_backend(backend, plain, tmp_path):
    folder = plain[LAYOUT_OF[backend]]
    snapshot = cached(folder, tmp_path / "hub")
    answers = []
    for path in (folder, snapshot):
        with phirt.load(path, backend=backend) as model:
            assert model.backend == backend
            answers.append(model.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).token_ids)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_link_that_leaves_the_repository_is_refused(backend, plain, tmp_path):
    snapshot = cached(plain[LAYOUT_OF[backend]], tmp_path / "hub")
    weights = max(snapshot.iterdir(), key=lambda path: path.stat().st_size)
    elsewhere = tmp_path / "elsewhere" / weights.name
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(elsewhere)
    with pytest.raises(phirt.UnsafeModelError, match="leads out"):
        phirt.load(snapshot, backend=backend)

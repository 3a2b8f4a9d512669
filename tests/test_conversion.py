"""What is made of a checkpoint is made again when the checkpoint is another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phirt.locate import locate
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.manifest import write_manifest
from phirt.testing import write_tiny_checkpoint
from tests.installed import require

Edit = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    require("onnx")
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    return write_tiny_checkpoint(tmp_path / "tiny", "llama")


def convert(folder: Path) -> ModelFolder:
    return locate(folder, formats=("onnx-genai",), precision="fp32", offline=True, progress=None)


def set_rotary_base(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": 500.0}))


def set_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def spread_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


@pytest.mark.parametrize("edit", [set_rotary_base, set_template, spread_tokenizer])
def test_a_folder_that_was_edited_beside_its_weights_is_converted_anew(
    folder: Path, edit: Edit
) -> None:
    before = convert(folder)
    assert convert(folder).artifact.path == before.artifact.path
    edit(folder)
    after = convert(folder)
    assert after.artifact.path != before.artifact.path


def test_what_was_converted_has_the_new_template(folder: Path) -> None:
    convert(folder)
    set_template(folder)
    assert convert(folder).chat_template == "{{ messages[0]['content'] }}"


def test_a_folder_does_not_get_another_models_artifact_by_claiming_its_weights(
    folder: Path, tmp_path: Path
) -> None:
    claimed = read_folder(folder, formats=("safetensors",)).artifact.weights_id
    genuine = convert(folder)
    other = write_tiny_checkpoint(tmp_path / "elsewhere" / "tiny", "llama", seed=5)
    for weights_id in (claimed, "sha256:../../.."):
        write_manifest(
            other,
            weights_id=weights_id,
            architecture="llama",
            precision="fp32",
            source={},
            versions={},
        )
        converted = convert(other)
        assert converted.artifact.path != genuine.artifact.path
        assert converted.artifact.weights_id != genuine.artifact.weights_id
        assert converted.manifest is not None
        assert weights_id not in str(converted.manifest.source)

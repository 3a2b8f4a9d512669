"""A model folder is data: what is planted in it never runs. And faults have types."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.errors import BackendError, ModelError, NonFiniteLogitsError, UnsafeModelError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.testing.checkpoints import write_tiny_checkpoint
from phirt.testing.conformance_settings import ConformanceSettings
from phirt.testing.subject import empty_folder, random_ids, read_artifact
from phirt.text.tokenizer import Tokenizer

__all__ = ["SafetyConformance"]

_CODE_NAMES = ("planted.py", "modeling_planted.py", "__init__.py", "sitecustomize.py")
_PICKLE_NAMES = ("pytorch_model.bin", "model.pt", "weights.pkl", "training_args.bin", "rng.pth")
# By the file that it is added to. Only mlx-lm knows "model_file", and phirt refuses it always.
_PLANTED_KEYS: dict[str, dict[str, dict[str, Any]]] = {
    "auto_map": {
        "config.json": {
            "auto_map": {
                "AutoConfig": "planted.Planted",
                "AutoModelForCausalLM": "planted.Planted",
            },
            "trust_remote_code": True,
        },
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
            "tokenizer_class": "Planted",
        },
        "generation_config.json": {"custom_generate": "planted.py"},
    },
    "model_file": {"config.json": {"model_file": "planted.py"}},
}
_PLANTED_SESSION_OPTIONS: dict[str, dict[str, Any]] = {
    "library": {"custom_ops_library": "planted.so"},
    "profile": {"enable_profiling": "../planted-profile"},
}


class Trap:
    """Code that leaves a mark when it runs.

    Args:
        marker: The file that it would write.
    """

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (os.fspath(self._marker),))

    @property
    def source(self) -> str:
        """The same as a Python module."""
        return (
            f"import os\nos.makedirs({os.fspath(self._marker)!r}, exist_ok=True)\n"
            "class Planted:\n    pass\n"
        )

    @property
    def has_run(self) -> bool:
        """Whether the mark is there."""
        return self._marker.exists()


class SafetyConformance(ConformanceSettings):
    """Rows L5, L9, M1, M2 and M3 of the faults that phirt answers for."""

    @pytest.fixture
    def prepared(self, tmp_path: Path) -> Path:
        """A folder that the backend reads, and that a test may spoil."""
        checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", self.architectures[0])
        folder = self.prepare(checkpoint, empty_folder(tmp_path / "prepared"))
        spoiled = Path(shutil.copytree(folder, tmp_path / "spoiled"))
        # The manifest pins what the converter wrote; a folder made elsewhere has none.
        (spoiled / "phirt.json").unlink(missing_ok=True)
        return spoiled

    @pytest.mark.parametrize("fault", _PLANTED_SESSION_OPTIONS)
    def test_genai_config(self, prepared: Path, fault: str) -> None:
        """A library of custom operators, a profile outside the folder: refused (row M1)."""
        path = prepared / "genai_config.json"
        if not path.exists():
            pytest.skip("the backend reads no genai_config.json here")
        document = json.loads(path.read_text(encoding="utf-8"))
        options = document["model"]["decoder"].setdefault("session_options", {})
        options |= _PLANTED_SESSION_OPTIONS[fault]
        path.write_text(json.dumps(document), encoding="utf-8")
        (prepared / "planted.so").write_bytes(b"\x7fELF")
        before = sorted(prepared.parent.iterdir())
        with pytest.raises(UnsafeModelError):
            _load_and_run(self, prepared)
        assert sorted(prepared.parent.iterdir()) == before, "something was written beside the model"

    @pytest.mark.parametrize("plant", _PLANTED_KEYS)
    def test_planted_code(self, prepared: Path, plant: str, tmp_path: Path) -> None:
        """``auto_map``, a tokenizer class of its own, ``model_file``: not run (row M2)."""
        trap = Trap(tmp_path / "marker")
        for name in _CODE_NAMES:
            (prepared / name).write_text(trap.source, encoding="utf-8")
        for name, more in _PLANTED_KEYS[plant].items():
            path = prepared / name
            if path.exists():
                document = json.loads(path.read_text(encoding="utf-8")) | more
                path.write_text(json.dumps(document), encoding="utf-8")
        _load_and_run_or_refuse(self, prepared)
        assert not trap.has_run, f"{self.backend.name} ran code of the model folder"

    def test_pickles_beside_the_weights(self, prepared: Path, tmp_path: Path) -> None:
        """Pickles are left unopened (row M3)."""
        trap = Trap(tmp_path / "marker")
        for name in _PICKLE_NAMES:
            (prepared / name).write_bytes(pickle.dumps(trap))
        _load_and_run_or_refuse(self, prepared)
        assert not trap.has_run, f"{self.backend.name} opened a pickle"

    def test_pickles_instead_of_the_weights(self, prepared: Path, tmp_path: Path) -> None:
        """Without safetensors there are no weights, whatever else lies there (row M3)."""
        weights = list(prepared.glob("*.safetensors"))
        if not weights:
            pytest.skip("the backend reads no safetensors here")
        for path in weights:
            path.unlink()
        trap = Trap(tmp_path / "marker")
        for name in _PICKLE_NAMES:
            (prepared / name).write_bytes(pickle.dumps(trap))
        with pytest.raises(ModelError):
            _load_and_run(self, prepared)
        assert not trap.has_run, f"{self.backend.name} opened a pickle"

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        """NaN reaches the loop, which raises; no token is made of it (row L5)."""
        checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", self.architectures[0])
        _spoil_last_norm(checkpoint / "model.safetensors")
        try:
            folder = self.prepare(checkpoint, empty_folder(tmp_path / "prepared"))
        except ModelError:
            return  # Refused before the backend saw it.
        with pytest.raises((NonFiniteLogitsError, ModelError)):
            _load_and_run(self, folder)

    @pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")
    def test_an_allocation_that_fails(self, tmp_path: Path) -> None:
        """Under a memory limit: OutOfMemoryError, and then a small call works (row L9)."""
        checkpoint = write_tiny_checkpoint(tmp_path / "checkpoint", self.architectures[0])
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = 1 << 20
        (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
        folder = self.prepare(checkpoint, empty_folder(tmp_path / "prepared"))
        task = tmp_path / "task"
        task.write_bytes(pickle.dumps((self.backend, os.fspath(folder), self.device, self.options)))
        run = subprocess.run(  # noqa: S603 - our own interpreter, on a file of our own
            [sys.executable, "-m", "phirt.testing.memory_limit", os.fspath(task)],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        lines = run.stdout.splitlines()
        assert run.returncode == 0, f"exit code {run.returncode}: {run.stdout}{run.stderr[-2000:]}"
        assert lines[0] in {"large: OutOfMemoryError", "large: it fits"}, run.stdout
        assert lines[-1] == "small: it fits", run.stdout


def _load_and_run(suite: ConformanceSettings, folder: Path) -> None:
    """Load a folder as phirt does, tokenizer included, and generate two tokens."""
    backend = suite.backend()
    artifact = read_artifact(backend, folder)
    Tokenizer.from_file(folder / "tokenizer.json")
    model = backend.load(artifact, suite.device, suite.options)
    try:
        params = GenerationParams(max_new_tokens=2, temperature=0)
        list(DecodeLoop(model, random_ids(8), params, defaults=GenerationDefaults()))
    finally:
        model.close()


def _load_and_run_or_refuse(suite: ConformanceSettings, folder: Path) -> None:
    try:
        _load_and_run(suite, folder)
    except (ModelError, BackendError):
        return  # Refusing such a folder is as good as leaving the plants alone.


def _spoil_last_norm(path: Path) -> None:
    """Write NaN into the weights of the last norm."""
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8 : 8 + header])["model.norm.weight"]["data_offsets"]
    start = 8 + header
    data[start + begin : start + end] = np.full((end - begin) // 4, np.nan, "<f4").tobytes()
    path.write_bytes(data)

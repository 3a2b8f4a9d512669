"""Where an engine's Python comes from: found where it is, made where it was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from phirt.build.engines import environments
from phirt.build.engines.environments import (
    ENGINES,
    find_engine,
    merge_requirements,
    prepare_engine,
    prepared_engine,
    remove_engine,
)
from phirt.errors import EngineFailedError, EngineNotInstalledError
from phirt.models.store import Store
from phirt.types import Progress


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def absent(*modules: str):
    """`find_spec` where some modules are not installed and all others are."""
    return lambda name: None if name in modules else find_spec("json")


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one empty module: what stands for gigabytes."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


class TestRequirements:
    def test_what_is_chosen_takes_the_place_of_the_default(self):
        assert merge_requirements(["a>=1", "torch>=2.9", "b"], ["torch==2.13.0"]) == [
            "a>=1",
            "b",
            "torch==2.13.0",
        ]

    @pytest.mark.parametrize(
        "requirement",
        [
            "ONNX_ir==1",
            "onnx.ir ~= 1.0",
            "onnx-ir @ file:///x.whl",
            "onnx-ir[all]; python_version>'3'",
        ],
    )
    def test_one_project_has_many_spellings(self, requirement):
        assert merge_requirements(["onnx-ir>=0.1"], [requirement]) == [requirement]

    def test_a_project_that_is_no_default_comes_on_top(self):
        assert merge_requirements(["a"], ["accelerate"]) == ["a", "accelerate"]

    @pytest.mark.parametrize(
        "requirement", ["--index-url=http://x", "-r x.txt", "", "./x.whl", "/x.whl", "git+ssh://x"]
    )
    def test_what_is_no_name_of_a_project_is_refused(self, requirement):
        with pytest.raises(ValueError, match="is no requirement: name a project"):
            merge_requirements([], [requirement])

    def test_every_default_is_a_requirement(self):
        for engine in ENGINES.values():
            assert merge_requirements(engine.requirements, []) == list(engine.requirements)


class TestFind:
    def test_the_callers_own_where_it_has_everything(self, store, monkeypatch):
        monkeypatch.setattr(environments, "find_spec", absent())
        assert find_engine("model-builder", store=store).python == Path(sys.executable)

    def test_it_is_not_imported_to_be_found(self, tmp_path):
        program = """
            import sys
            from phirt.build.engines.environments import find_engine
            try:
                find_engine("model-builder")
            except Exception as error:
                print(type(error).__name__)
            print(sorted({"torch", "transformers", "onnxruntime_genai"} & set(sys.modules)))
        """
        run = [sys.executable, "-c", textwrap.dedent(program)]
        output = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
        assert output.splitlines()[-1] == "[]"

    def test_nowhere(self, store, monkeypatch):
        monkeypatch.setattr(environments, "find_spec", absent("torch", "onnx_ir"))
        with pytest.raises(EngineNotInstalledError) as caught:
            find_engine("model-builder", store=store)
        assert str(caught.value) == (
            "The engine 'model-builder' is not installed: this environment lacks torch, onnx_ir, "
            "and no environment was prepared for it. Run: phirt build --prepare-engine "
            "model-builder"
        )

    def test_an_application_that_embeds_python_is_not_started(self, store, monkeypatch):
        monkeypatch.setattr(environments, "find_spec", absent())
        monkeypatch.setattr(sys, "executable", "/opt/application")
        with pytest.raises(EngineNotInstalledError, match="this is no plain Python"):
            find_engine("mlx", store=store)

    def test_an_unknown_engine(self, store):
        with pytest.raises(ValueError, match="Choose one of: model-builder, mlx"):
            find_engine("olive", store=store)


@pytest.mark.slow
class TestPrepare:
    """With wheels of nothing in a folder, which pip's own settings name."""

    @pytest.fixture(autouse=True)
    def wheels(self, tmp_path, monkeypatch):
        folder = tmp_path / "wheels"
        for requirement in ("mlx-lm", "mlx"):
            write_wheel(folder, requirement, "1.5")
        monkeypatch.setattr(environments, "find_spec", absent("mlx"))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    CHOSEN = ("mlx-lm==1.5", "mlx==1.5")

    def test_from_nothing_to_nothing(self, store):
        seen: list[Progress] = []
        python = prepare_engine("mlx", requirements=self.CHOSEN, store=store, progress=seen.append)
        assert python.is_relative_to(store.root / "engines" / "mlx")
        assert [(each.stage, each.completed, each.unit) for each in seen] == [
            ("install", 1, "packages"),
            ("install", 2, "packages"),
        ]
        found = find_engine("mlx", store=store)
        assert found.python == python
        assert found.versions == {"mlx": "1.5", "mlx-lm": "1.5"}
        assert found.folder is not None
        assert (found.folder / "mlx_lm.py").is_file()
        subprocess.run([python, "-c", "import mlx_lm"], check=True, timeout=60)

        self.check_that_it_is_kept(store, python)
        self.check_that_half_of_one_is_none(store)

        assert remove_engine("mlx", store=store)
        assert not remove_engine("mlx", store=store)
        with pytest.raises(EngineNotInstalledError):
            find_engine("mlx", store=store)

    def check_that_it_is_kept(self, store: Store, python: Path) -> None:
        trace = python.parent / "trace"
        trace.touch()
        prepare_engine("mlx", requirements=self.CHOSEN, store=store)
        assert trace.exists()

    def check_that_half_of_one_is_none(self, store: Store) -> None:
        marker = store.root / "engines" / "mlx" / "engine.json"
        assert json.loads(marker.read_text())["requirements"] == list(self.CHOSEN)
        marker.unlink()
        assert prepared_engine("mlx", store=store) is None

    def test_pips_last_error_is_the_message(self, store):
        chosen = ("mlx-lm==9", "mlx==1.5")
        with pytest.raises(EngineFailedError, match="ERROR: No matching distribution found") as got:
            prepare_engine("mlx", requirements=chosen, store=store)
        assert "\n" not in str(got.value)
        assert prepared_engine("mlx", store=store) is None

    def test_of_two_at_once_one_works_and_both_have_it(self, store):
        pythons: list[Path] = []
        collected: list[Progress] = []

        def prepare() -> None:
            chosen = self.CHOSEN
            pythons.append(
                prepare_engine("mlx", requirements=chosen, store=store, progress=collected.append)
            )

        threads = [threading.Thread(target=prepare) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(pythons)) == 1
        assert len(pythons) == 2
        assert len(collected) == 2, "each package once"

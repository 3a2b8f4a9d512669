from __future__ import annotations

import subprocess
import sys

import pytest

from phirt.errors import ModelNotFoundError
from phirt.models.catalog import DEFAULT_MODEL, get_entry, list_models
from phirt.models.paths import plain_name_fault


def test_the_default_model():
    entry = get_entry(DEFAULT_MODEL)
    assert entry.name == "smollm2-135m-instruct"
    assert entry.license == "Apache-2.0"
    assert entry.context_length == 8192
    assert entry.source.filename == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert entry.source.size == 98_362_432


def test_every_entry_is_pinned():
    for entry in list_models():
        assert entry == get_entry(entry.name)
        assert plain_name_fault(entry.name) is None
        assert plain_name_fault(entry.source.filename) is None
        for digest in (entry.source.sha256, entry.source.wheel_sha256):
            assert len(digest) == 64
            assert int(digest, 16)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ModelNotFoundError, match=r"Did you mean smollm2-135m-instruct\?"):
        get_entry("SmolLM2-135M")


def test_a_name_like_none_lists_what_there_is():
    with pytest.raises(ModelNotFoundError, match=r"Known: smollm2-135m-instruct\."):
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

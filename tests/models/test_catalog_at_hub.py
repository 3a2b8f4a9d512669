"""Whether a hub holds what the catalog says: asked only where ``PHIRT_TEST_HUB=1`` is set.

The catalog was read in documents. Where a hub can be reached, this looks every source up:
its repository, revision and path, and that the build there is of the form that is said.
"""

from __future__ import annotations

import os

import pytest

from phirt.errors import ModelError
from phirt.models.catalog import CatalogEntry, HubSource, list_models
from phirt.models.hub import open_snapshot
from phirt.models.hub_names import HubName
from phirt.models.variants import choose_variant
from tests.hub.fake_hub import FakeHub

SOURCES = [
    pytest.param(entry, source, id=f"{entry.name}-{source.format}-{source.device or 'any'}")
    for entry in list_models()
    for source in entry.sources
    if isinstance(source, HubSource)
]
asked = os.environ.get("PHIRT_TEST_HUB") == "1"


def look_up(entry: CatalogEntry, source: HubSource) -> None:
    """Raise `ModelError` or fail where the hub does not hold what the source says."""
    name = HubName.parse(source.name)
    snapshot = open_snapshot(name, offline=False)
    variant = choose_variant(
        {file.path: file.size for file in snapshot.files},
        formats=(source.format,),
        device=source.device or "cpu",
        repository=name.repo,
        path=name.path,
    )
    assert variant.size > 1_000_000
    if source.format != "gguf":
        assert variant.folder == (source.path or "")


@pytest.mark.skipif(not asked, reason="set PHIRT_TEST_HUB=1 where a hub can be reached")
@pytest.mark.parametrize(("entry", "source"), SOURCES)
def test_the_hub_holds_what_the_catalog_says(entry, source):
    look_up(entry, source)


def test_the_check_itself_tells_right_from_wrong(monkeypatch):
    source = HubSource(
        format="onnx-genai",
        repository="org/name",
        revision="main",
        path="cpu/int4",
        device="cpu",
        precision="int4",
        document="a test",
        checked=None,
    )
    entry = list_models()[0]
    files = {"tokenizer.json": b"{}", "genai_config.json": b"{}", "model.onnx": bytes(2_000_000)}
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_repo("org/name", {f"cpu/int4/{name}": data for name, data in files.items()})
        look_up(entry, source)
        hub.add_repo("org/name", {f"cpu/int8/{name}": data for name, data in files.items()})
        with pytest.raises(ModelError, match="no file or folder 'cpu/int4'"):
            look_up(entry, source)

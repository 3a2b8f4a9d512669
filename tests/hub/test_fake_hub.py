"""The fake hub is one that huggingface_hub itself takes for a hub."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from tests.hub.conftest import FILES, REPO, WEIGHTS


@pytest.fixture
def api(hub):
    return huggingface_hub.HfApi(endpoint=hub.endpoint)


def test_the_info_of_a_model(hub, api):
    info = api.model_info(REPO, files_metadata=True)
    assert info.sha == hub.repos[REPO].revisions["main"]
    assert info.card_data.license == "apache-2.0"
    weights = next(item for item in info.siblings if item.rfilename == "onnx/model.onnx.data")
    assert (weights.size, weights.lfs.size) == (len(WEIGHTS), len(WEIGHTS))


def test_the_tree_has_the_same_files(api):
    info = api.model_info(REPO, files_metadata=True)
    tree = list(api.list_repo_tree(REPO, recursive=True))
    assert [(item.path, item.size, item.blob_id) for item in tree] == [
        (item.rfilename, item.size, item.blob_id) for item in info.siblings
    ]


def test_downloading_a_snapshot_redirects_large_files_to_the_second_host(hub, tmp_path):
    folder = huggingface_hub.snapshot_download(
        REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"
    )
    for path, data in FILES.items():
        with open(f"{folder}/{path}", "rb") as file:  # noqa: PTH123 - a str
            assert file.read() == data
    assert hub.bytes_sent == sum(map(len, FILES.values()))
    assert {request.host for request in hub.requests if "onnx.data" in request.path} == {
        "hub",
        "cdn",
    }


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("org/absent", RepositoryNotFoundError),
        ("org/gated", GatedRepoError),
    ],
)
def test_what_may_not_be_had_is_refused_as_the_hub_does(hub, tmp_path, monkeypatch, name, error):
    monkeypatch.setenv("HF_TOKEN", "hf_known")
    hub.add_repo("org/gated", {"config.json": b"{}"}, gated=True)
    hub.accepted["hf_known"] = set()
    with pytest.raises(error):
        huggingface_hub.hf_hub_download(
            name, "config.json", endpoint=hub.endpoint, cache_dir=tmp_path
        )

"""Row S13: what is in the store loads without the network."""

from __future__ import annotations

import socket

import pytest

import phirt
from phirt.build.convert import convert
from phirt.errors import ModelNotFoundError
from phirt.testing import write_tiny_checkpoint
from tests.hub.conftest import content_of

REPO = "org/tiny-llama"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny llama as the hub's repositories of ONNX builds hold one."""
    root = tmp_path_factory.mktemp("built")
    folder = root / "onnx"
    folder.mkdir()
    checkpoint = write_tiny_checkpoint(root / "checkpoint", "llama")
    convert(checkpoint, folder, layout="onnx-genai", precision="fp32")
    built = content_of(folder)
    del built["phirt.json"]
    return built


@pytest.fixture
def no_network(monkeypatch):
    """`no_network()` makes every connection and every look-up of a host a failure."""

    def block() -> None:
        def refuse(*arguments: object) -> None:
            pytest.fail(f"the network was used: {arguments}")

        for name in ("connect", "connect_ex", "sendto"):
            monkeypatch.setattr(socket.socket, name, refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)

    return block


@pytest.mark.parametrize("way", ["argument", "variable", "neither"])
def test_s13_a_model_in_the_store_loads_with_zero_connections(
    hub, files, no_network, monkeypatch, way
):
    hub.add_repo(REPO, files)
    phirt.pull(REPO, backend="onnxruntime")
    with phirt.load(REPO, backend="onnxruntime") as model:
        expected = model.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).token_ids
    hub.requests.clear()
    no_network()
    if way == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with phirt.load(REPO, backend="onnxruntime", offline=way == "argument") as model:
        assert model.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True).token_ids == expected
    assert hub.requests == []


def test_s13_what_is_not_in_the_store_is_an_error_with_zero_connections(hub, files, no_network):
    hub.add_repo(REPO, files)
    no_network()
    with pytest.raises(ModelNotFoundError, match="offline"):
        phirt.load(REPO, backend="onnxruntime", offline=True)

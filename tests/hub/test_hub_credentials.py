"""Who is sent the access token, and row S3: who is not."""

from __future__ import annotations

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants

from phirt.errors import ModelNotFoundError
from phirt.models.hub_session import shown_endpoint
from tests.hub.conftest import FILES, REPO, content_of, snapshot_of
from tests.hub.fake_hub import FakeHub

TOKEN = "hf_a-token-of-the-user"  # noqa: S105 - of nobody
GATED = "org/gated"


@pytest.fixture
def token(monkeypatch, hub):
    """A token that the hub knows, in the environment."""
    hub.accepted[TOKEN] = set()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def shown_to(hub):
    """Which of the two hosts saw the token anywhere in a request."""
    return {
        request.host
        for request in hub.requests
        if TOKEN in request.path or any(TOKEN in value for value in request.headers.values())
    }


def test_the_hub_is_sent_the_token(hub, pull, token):
    pull(["config.json"])
    assert [request.headers["authorization"] for request in hub.requests] == [f"Bearer {TOKEN}"] * 2


def test_s3_the_host_that_serves_large_files_is_not(hub, pull, token):
    assert content_of(pull()) == FILES
    assert {request.host for request in hub.requests} == {"hub", "cdn"}
    assert shown_to(hub) == {"hub"}


def test_s3_nor_when_a_download_goes_on(hub, pull, token):
    hub.misbehave("truncate", on=".data", after=1000, times=2)
    pull()
    assert shown_to(hub) == {"hub"}


def test_s3_nor_the_host_that_a_listing_is_redirected_to(hub, token):
    hub.misbehave("redirect", on="/api/", to=f"{hub.cdn}/api/models/x", times=1)
    hub.misbehave("status", on="/api/models/x", status=200, body=b"{}")
    with pytest.raises(Exception, match="lacks the field"):
        snapshot_of()
    assert [request.host for request in hub.requests] == ["hub", "cdn"]
    assert shown_to(hub) == {"hub"}


def test_s3_nor_the_hub_itself_where_another_host_redirects_back(hub, pull, token):
    hub.misbehave("redirect", on="resolve", to=f"{hub.cdn}/away", times=1)
    hub.misbehave("redirect", on="/away", to=f"{hub.endpoint}/api/models/{REPO}", times=1)
    snapshot = snapshot_of()
    hub.requests.clear()
    with pytest.raises(Exception, match="is not the file"):
        pull(["config.json"], snapshot=snapshot)
    assert ["authorization" in request.headers for request in hub.requests] == [True, False, False]


def test_s3_nor_a_host_that_differs_in_the_name_only(hub, pull, token):
    elsewhere = hub.endpoint.replace("127.0.0.1", "localhost")
    hub.misbehave("redirect", on="resolve", to=f"{elsewhere}/x", times=1)
    with pytest.raises(ModelNotFoundError):
        pull(["config.json"])
    assert "authorization" not in hub.requests[2].headers


def test_a_redirect_within_the_hub_keeps_the_token(hub, token):
    """A repository that was renamed."""
    hub.accepted[TOKEN] = {"org/new"}
    hub.add_repo("org/new", FILES, private=True)
    hub.misbehave("redirect", on="/api/models/org/old", to="/api/models/org/new?blobs=true")
    assert snapshot_of("org/old").files


def test_s3_nor_credentials_of_an_applications_own_client(hub, pull):
    def make() -> httpx2.Client:
        return httpx2.Client(
            headers={"Authorization": f"Bearer {TOKEN}"}, cookies={"session": TOKEN}
        )

    hub.accepted[TOKEN] = set()
    huggingface_hub.set_client_factory(make)
    try:
        assert content_of(pull()) == FILES
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert shown_to(hub) == {"hub"}


def test_a_token_that_was_saved_by_logging_in_is_sent(hub, tmp_path):
    hub.accepted[TOKEN] = set()
    (tmp_path / "no-token").write_text(TOKEN)
    snapshot_of()
    assert shown_to(hub) == {"hub"}


def test_no_token_is_sent_where_the_user_forbids_it(hub, token, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    snapshot_of()
    assert shown_to(hub) == set()


def test_nothing_but_phirt_is_named_to_the_hub(hub, pull):
    pull()
    agents = {request.headers["user-agent"] for request in hub.requests}
    assert all(agent.startswith("phirt/") and " " not in agent for agent in agents)


# Models whose conditions must be accepted


@pytest.fixture
def gated(hub: FakeHub) -> FakeHub:
    hub.add_repo(GATED, FILES, gated=True)
    return hub


def test_a_gated_model_is_listed(gated):
    assert snapshot_of(GATED).gated


def test_without_a_token_the_error_says_how_to_get_one(gated, pull):
    with pytest.raises(ModelNotFoundError) as caught:
        pull(snapshot=snapshot_of(GATED))
    text = str(caught.value)
    assert "conditions must be accepted" in text
    assert f"{gated.endpoint}/{GATED}" in text
    assert "HF_TOKEN" in text
    assert "hf auth login" in text


def test_with_a_token_that_was_not_let_in_it_says_where_to_accept(gated, pull, token):
    with pytest.raises(ModelNotFoundError, match="account of the access token") as caught:
        pull(snapshot=snapshot_of(GATED))
    assert f"{gated.endpoint}/{GATED}" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_with_one_that_was_the_model_arrives(gated, pull, token):
    gated.accepted[TOKEN] = {GATED}
    assert content_of(pull(snapshot=snapshot_of(GATED))) == FILES


@pytest.mark.parametrize("address", ["http://user:secret@127.0.0.1:bad", "http://[::1"])
def test_an_endpoint_that_is_no_address_is_a_typed_error(network, monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(ModelNotFoundError, match="HF_ENDPOINT is no address") as caught:
        snapshot_of()
    assert "secret" not in str(caught.value)


def test_no_part_of_a_password_in_the_endpoint_is_shown(network, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://user:sec@ret@127.0.0.1:9")
    assert shown_endpoint() == "http://127.0.0.1:9"

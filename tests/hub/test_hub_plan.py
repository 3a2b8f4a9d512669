"""What a plan says of a hub's model, and what a load makes of it."""

from __future__ import annotations

import pytest

import phirt
from phirt.build.convert import convert
from phirt.dispatch.plan import Plan
from phirt.testing import write_tiny_checkpoint
from tests.hub.conftest import content_of
from tests.installed import require

REPO = "org/tiny-llama"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("hub") / "checkpoint", "llama")


def chosen(plan: Plan) -> tuple[str, str, str]:
    found = plan.chosen
    assert found is not None
    assert found.artifact is not None
    return found.backend, found.device, found.artifact.format


def test_nobody_is_asked_for_a_plan(hub, checkpoint):
    hub.add_repo(REPO, content_of(checkpoint))
    plan = phirt.plan(REPO)
    assert plan.chosen is not None
    assert plan.chosen.artifact is not None
    assert plan.chosen.artifact.state == "to fetch"
    assert hub.requests == []


def test_a_load_takes_the_next_where_the_hub_has_not_what_the_first_reads(
    hub, checkpoint, tmp_path
):
    require("openvino")
    built = tmp_path / "openvino"
    built.mkdir()
    convert(checkpoint, built, layout="openvino", precision="fp32")
    files = content_of(built)
    del files["phirt.json"]
    hub.add_repo(REPO, files)
    with phirt.load(REPO) as model:
        assert chosen(model.plan) == ("openvino", "cpu", "openvino")
    assert chosen(phirt.plan(REPO)) == ("openvino", "cpu", "openvino")


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "openvino"])
def test_a_load_takes_the_form_that_the_plan_names(hub, checkpoint, backend):
    """Also where one of the forms was converted already, for another backend."""
    require("openvino")
    hub.add_repo(REPO, content_of(checkpoint))
    phirt.load(REPO, backend="onnxruntime").close()
    planned = chosen(phirt.plan(REPO, backend=backend))
    with phirt.load(REPO, backend=backend) as model:
        assert chosen(model.plan) == planned

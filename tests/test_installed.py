"""A runtime that is missing is a skip to a developer, and a failure to CI."""

import pytest

from tests import installed


@pytest.fixture(params=[False, True], ids=["a-developer", "ci"])
def all_required(request, monkeypatch):
    monkeypatch.setattr(installed, "ALL_REQUIRED", request.param)
    return request.param


def test_what_is_installed_passes(all_required):
    installed.require("pytest", "numpy")


def test_what_is_missing(all_required):
    outcome = pytest.fail.Exception if all_required else pytest.skip.Exception
    with pytest.raises(outcome, match="no_such_runtime is not installed"):
        installed.require("pytest", "no_such_runtime")


def test_what_the_platform_lacks_is_left_out(all_required, monkeypatch):
    monkeypatch.setattr(installed, "_NOT_FOR_THIS_PLATFORM", ("no_such_runtime",))
    with pytest.raises(pytest.skip.Exception):
        installed.require("no_such_runtime")

"""What a backend lists, whatever it is that it gives for a list."""

from __future__ import annotations

import pytest

from phirt.devices.record_json import from_json, to_json
from phirt.dispatch import probing, trial_model
from phirt.dispatch.machine_dir import read_record, write_record
from phirt.dispatch.probing import list_backend, try_device
from phirt.types import Availability, Hardware


@pytest.fixture
def lists(monkeypatch):
    """Makes a backend of these offers, and returns what is recorded of it."""

    def ask(*offers: Availability):
        backend = type("Backend", (), {"probe": lambda self: list(offers)})
        monkeypatch.setattr(probing, "get_backend", lambda name: backend())
        return list_backend("fake")

    return ask


@pytest.mark.parametrize("name", ["auto", "CUDA:0", "cuda:00", "W\u00e9ird N\u00e4me!", "", " cpu"])
def test_a_name_that_no_user_could_give_is_the_backends_fault(lists, name):
    record = lists(Availability("cpu", "found", "here"), Availability(name, "found", "here"))
    assert (record.outcome, record.listing) == ("raised", ())
    assert "device" in record.reason
    assert repr(name) in record.reason


def test_a_name_that_is_listed_twice_is_one_device(lists):
    first, second = (Availability("cuda:0", "found", reason) for reason in ("first", "second"))
    assert lists(first, Availability("cpu", "found", "here"), second).listing == (
        first,
        Availability("cpu", "found", "here"),
    )


def test_a_long_reason_is_cut_in_its_middle(lists):
    (offer,) = lists(Availability("cpu", "found", "begin" + "x" * 9_000_000 + "end")).listing
    assert len(offer.reason) < 2000
    assert offer.reason.startswith("begin")
    assert offer.reason.endswith("end")


def test_what_is_no_unicode_can_be_kept_and_read(lists, tmp_path):
    # As Python has the bytes of a driver or a path that are none.
    strange = Availability("gpu", "found", "r\udcff", hardware=Hardware(native="N\udcff"))
    record = lists(strange)
    write_record(tmp_path / "record.json", to_json(record))
    again = from_json(type(record), read_record(tmp_path / "record.json"), where="record")
    assert again.listing[0].reason == "r?"


def test_a_trial_model_that_is_not_there_says_nothing_of_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(trial_model, "trial_folder", lambda formats: tmp_path / "phirt.zip" / "x")
    trial = try_device("reference", "cpu")
    assert trial.outcome == "not run"
    assert trial.reason.startswith("The trial model is no folder of its own: ")

"""``phirt tune``: its table, its JSON and its exit status."""

import json
from pathlib import Path

import pytest

from phirt import tuning
from phirt.cli import main
from phirt.dispatch.measurements import Batch, Measurement, Point, Setting, artifact_id
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact
from phirt.errors import UnsupportedModelError
from phirt.tuning import Tuning, TuningFailure


def measurement(backend, seconds, setting=None, batch=None):
    return Measurement(
        artifact=artifact_id("sha256:a", "onnx-genai", "int8"),
        backend=backend,
        device="cpu",
        version="1",
        hardware="0123",
        setting=setting or Setting(),
        points=(Point(tokens=100, prefill_s=100 * seconds, decode_s=seconds),),
        batch=batch,
    )


CHOSEN = PlanCandidate(
    artifact=PlannedArtifact(
        format="onnx-genai",
        precision="int8",
        state="here",
        path=Path("somewhere"),
        id=artifact_id("sha256:a", "onnx-genai", "int8"),
    ),
    backend="onnxruntime",
    device="cpu",
    status="chosen",
    reason="the fastest that was measured: 1.28 s for one answer",
)
PLAN = Plan(
    model="tiny",
    device="auto",
    backend="auto",
    precision="auto",
    context=2048,
    optimize="latency",
    candidates=(CHOSEN,),
)
TUNING = Tuning(
    measurements=(
        measurement("onnxruntime", 0.005, Setting(threads=2, spinning=False)),
        measurement("openvino", 0.01, batch=Batch(rows=4, step_s=0.001)),
    ),
    failures=(
        TuningFailure(backend="mlx", device="cpu", reason="it \x1b[31mcrashed.", precision="fp32"),
    ),
    plan=PLAN,
)


@pytest.fixture
def asked():
    """What `phirt.tune` was given."""
    return {}


@pytest.fixture
def run(monkeypatch, capsys, asked):
    def run(*arguments, found=TUNING):
        def tune(model, **options):
            if isinstance(found, Exception):
                raise found
            options["on_candidate"](CHOSEN, 1, 2)
            asked.update(options, model=model)
            return found

        monkeypatch.setattr(tuning, "tune", tune)
        status = main(["tune", *arguments])
        return status, *capsys.readouterr()

    return run


def test_a_table_and_what_follows_from_it(run):
    status, out, err = run()
    assert status == 0
    assert err == "phirt: timing onnxruntime on cpu, int8 (1 of 2)\n"
    header, first, second, *_ = out.splitlines()
    assert header == "BACKEND      DEVICE  FORM  SETTING  PREFILL  DECODE  ANSWER   LONG  FOUR"
    assert first == "onnxruntime  cpu     int8  2 sleep      200   200.0    1.28   5.20  5.12"
    # Four prompts of 1.28 s one after the other, and 128 steps of all four.
    assert second.split() == ["openvino", "cpu", "int8", "100", "100.0", "2.56", "10.40", "5.25"]
    assert "Not timed: mlx on cpu, fp32: it \\u001b[31mcrashed." in out
    assert out.endswith(
        "phirt.load() now takes onnxruntime on cpu, int8: the fastest that was measured:\n"
        "1.28 s for one answer.\n"
    )
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_same_as_json(run):
    _, out, _ = run("--json")
    document = json.loads(out)
    assert document["measurements"][0]["setting"] == {
        "threads": 2,
        "spinning": False,
        "pinning": None,
    }
    assert document["failures"][0]["backend"] == "mlx"
    assert document["plan"]["candidates"][0]["status"] == "chosen"


def test_what_was_asked_for_is_passed_on(run, asked):
    run("tiny.gguf", "--backend", "onnxruntime", "--precision", "int4", "--quick", "--offline")
    assert asked["model"] == "tiny.gguf"
    assert (asked["backend"], asked["precision"]) == ("onnxruntime", "int4")
    assert asked["quick"]
    assert asked["offline"]


def test_nothing_timed_is_a_failure(run):
    nothing = Tuning(measurements=(), failures=TUNING.failures, plan=PLAN)
    status, out, _ = run(found=nothing)
    assert status == 1
    assert out.startswith("\nNot timed")


def test_nothing_that_could_run_it(run):
    status, _, err = run(found=UnsupportedModelError("Nothing here can run the model."))
    assert (status, err) == (1, "phirt: Nothing here can run the model.\n")


def test_a_wrong_name_is_wrong_usage(run):
    status, _, err = run(found=ValueError("device='a b' is not a device name."))
    assert status == 2
    assert "phirt tune --help" in err

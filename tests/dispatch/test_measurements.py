"""What is predicted of measured speeds, and how measurements are kept."""

import json
from dataclasses import replace

import pytest

from phirt.dispatch.measurements import (
    Batch,
    Measurement,
    Measurements,
    Point,
    Setting,
    fastest,
    predict_seconds,
)

# 100 tokens: 1 s, and 10 ms a token after them; 200 tokens: 3 s and 20 ms.
POINTS = (
    Point(tokens=100, prefill_s=1.0, decode_s=0.010),
    Point(tokens=200, prefill_s=3.0, decode_s=0.020),
)
MEASURED = Measurement(
    artifact="sha256:a:onnx-genai",
    backend="onnxruntime",
    device="cpu",
    version="onnxruntime 1",
    hardware="0123",
    setting=Setting(),
    points=POINTS,
    when="2026-11-22T03:00:00Z",
)


def slower(measurement, factor):
    points = tuple(
        replace(p, prefill_s=p.prefill_s * factor, decode_s=p.decode_s * factor)
        for p in measurement.points
    )
    return replace(measurement, points=points)


def best_of(*measurements, optimize="latency", **changes):
    wanted = {
        "artifact": MEASURED.artifact,
        "backend": "onnxruntime",
        "device": "cpu",
        "version": "onnxruntime 1",
    }
    return fastest(measurements, **wanted | changes, optimize=optimize)


def test_an_answer_is_interpolated():
    # A prompt of 128 is 28 % of the way from 100 to 200; the middle of its answer is at 192.
    prefill = 1.0 + 0.28 * 2.0
    step = 0.010 + 0.92 * 0.010
    assert predict_seconds(MEASURED, "latency") == pytest.approx(prefill + 128 * step)


def test_beyond_the_longest_prompt_the_last_slope_goes_on():
    prefill = 3.0 + (1024 - 200) * 0.02
    step = 0.020 + (1032 - 200) * 0.0001
    assert predict_seconds(MEASURED, "prefill") == pytest.approx(prefill + 16 * step)


def test_a_token_that_scatter_made_cheaper_later_does_not_become_free():
    first = Point(tokens=100, prefill_s=1.0, decode_s=0.02)
    scattered = replace(MEASURED, points=(first, replace(POINTS[1], decode_s=0.01)))
    assert predict_seconds(scattered, "prefill") == pytest.approx(3.0 + 824 * 0.02 + 16 * 0.01)


def test_one_point_says_what_it_can():
    single = replace(MEASURED, points=POINTS[:1])
    assert predict_seconds(single, "latency") == pytest.approx(1.28 + 128 * 0.010)


def test_requests_that_are_decoded_together_share_the_steps():
    batched = replace(MEASURED, batch=Batch(rows=4, step_s=0.015))
    prefill = 1.0 + 0.28 * 2.0
    assert predict_seconds(batched, "throughput") == pytest.approx(4 * prefill + 128 * 0.015)
    alone = predict_seconds(MEASURED, "throughput")
    assert alone == pytest.approx(4 * predict_seconds(MEASURED, "latency"))


def test_the_setting_that_is_best_for_the_workload_is_taken():
    better = replace(slower(MEASURED, 0.8), setting=Setting(threads=2))
    assert best_of(MEASURED, better) is better


def test_the_runtimes_own_setting_stays_where_another_is_hardly_better():
    hardly = replace(slower(MEASURED, 0.97), setting=Setting(threads=2))
    assert best_of(MEASURED, hardly) is MEASURED


@pytest.mark.parametrize(
    "change",
    [
        {"artifact": "sha256:b:onnx-genai"},
        {"backend": "openvino"},
        {"device": "cuda"},
        {"version": "onnxruntime 2"},
        {"version": None},
    ],
)
def test_what_was_measured_of_something_else_says_nothing(change):
    assert best_of(MEASURED, **change) is None


@pytest.mark.parametrize(
    "points",
    [
        (),
        POINTS[::-1],
        (POINTS[0], POINTS[0]),
        (replace(POINTS[0], prefill_s=0.0),),
        (replace(POINTS[0], decode_s=-1.0),),
    ],
)
def test_a_measurement_makes_sense(points):
    with pytest.raises(ValueError, match="ascending lengths"):
        replace(MEASURED, points=points)


def test_measurements_are_kept_and_replaced(own_machine_dir):
    other = replace(MEASURED, setting=Setting(threads=2, spinning=True))
    elsewhere = replace(MEASURED, hardware="4567", batch=Batch(rows=4, step_s=0.1))
    Measurements().save([MEASURED, other, elsewhere])
    updated = replace(slower(MEASURED, 2.0), version="onnxruntime 2")
    Measurements().save([updated])
    assert Measurements().find("0123") == [other, updated]
    assert Measurements().find("4567") == [elsewhere]


def test_what_is_damaged_in_the_file_is_left_out(own_machine_dir):
    Measurements().save([MEASURED])
    path = own_machine_dir / "measurements.json"
    document = json.loads(path.read_text())
    (row,) = document["measurements"]
    document["measurements"] += [row | {"points": []}, row | {"strange": 1}, 5]
    path.write_text(json.dumps(document))
    assert Measurements().find("0123") == [MEASURED]


def test_without_a_file_nothing_is_known(own_machine_dir):
    assert Measurements().find("0123") == []

"""The figures that follow from raw times, and their names."""

import json

import pytest

from phirt.benchmark.report import BenchPoint, BenchSample
from tests.benchmark.samples import point, report, row


def test_figures_are_medians_over_the_repeats_with_the_least_and_the_greatest():
    found = point(0.01)
    assert (found.ttft_s.low, found.ttft_s.median) == pytest.approx((0.09, 0.1))
    assert found.ttft_s.high == pytest.approx(0.11)
    assert found.decode_tokens_per_s.median == pytest.approx(100)
    assert found.prefill_tokens_per_s.median == pytest.approx(1280)
    assert found.total_tokens_per_s.median == pytest.approx(4 / 0.13)
    assert found.ttft_s.relative == pytest.approx(0.1)


def test_the_warm_up_does_not_count():
    assert point(0.01).ttft_s.high < 0.12


def test_of_several_streams_one_is_the_median_and_all_add_up():
    uneven = BenchSample(
        ttft_s=(0.1, 0.2, 0.9),
        prefill_tokens_per_s=(100.0, 50.0, 10.0),
        decode_tokens_per_s=(30.0, 20.0, 10.0),
        inter_token_s=((0.01,) * 100, (0.02,) * 98, (0.5, 0.6)),
        total_s=2.0,
    )
    found = BenchPoint(
        prompt_tokens=8, new_tokens=101, concurrency=3, samples=(uneven,), warm_up=uneven
    )
    assert found.ttft_s.median == 0.2
    assert found.decode_tokens_per_s.median == 20.0
    assert found.total_tokens_per_s.median == 3 * 101 / 2.0
    # 200 gaps: numpy's linear interpolation at 0.5 * 199 and 0.99 * 199.
    assert found.inter_token_p50_s == pytest.approx(0.015)
    assert found.inter_token_p99_s == pytest.approx(0.02 + 0.01 * 0.48)


def test_the_document_has_figures_and_raw_times_under_names_with_their_units():
    found = report(row("onnxruntime", point(0.01), notes=("It stopped.",)))
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert document["kind"] == "phirt benchmark"
    assert document["versions"]["phirt"] == "0.1.0"
    assert document["machine"]["cpu"]["threads"] == 4
    (line,) = document["rows"]
    assert line["peak_memory_bytes"] == 1_234_000_000
    assert line["notes"] == ["It stopped."]
    (case,) = line["points"]
    assert case["ttft_s"]["median"] == 0.1
    assert [each["total_s"] for each in case["samples"]] == pytest.approx([0.117, 0.13, 0.143])
    assert case["warm_up"]["inter_token_s"] == [pytest.approx([0.09] * 3)]
    assert document["failures"][0]["backend"] == "mlx"


def test_a_row_finds_what_was_measured():
    short, long = point(0.01), point(0.01, prompt_tokens=512)
    found = row("onnxruntime", short, long)
    assert found.point(512, 1) is long
    assert found.point(512, 2) is None

"""Whole comparisons of tiny models: across formats and backends, of damage, of what differs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import phirt
from phirt.build.convert import convert
from phirt.errors import NonFiniteLogitsError, UnsupportedModelError
from phirt.protocols import Capabilities, Lack
from phirt.testing import write_tiny_checkpoint
from tests.installed import require
from tests.quality.conftest import TEXTS

SIDES = ("name", "path", "format", "precision", "backend", "device", "bytes", "kv_precision")


def compare(reference, candidate, **options):
    options = {"text": TEXTS, "tokens": 256, "speed": False, **options}
    return phirt.compare_quality(reference, candidate, **options)


@pytest.fixture(scope="module")
def same(exact):
    """A model against itself, with everything that a report can have."""
    return compare(exact, exact, speed=True)


def test_a_model_is_equal_to_itself(same):
    report = same
    assert report.many_rows is not None
    assert (report.many_rows.figures.kl_mean, report.many_rows.figures.top1_agreement) == (0, 1)
    # The one-row kernels round otherwise, in float32.
    assert report.one_row.figures.kl_mean < 1e-9
    assert (report.verdict.grade, report.verdict.passed) == ("equal", True)
    assert report.notes == ()


@pytest.mark.parametrize(
    ("backend", "package"),
    [
        ("onnxruntime", "onnxruntime"),
        ("openvino", "openvino"),
        pytest.param("transformers", "transformers", marks=pytest.mark.oracle),
    ],
)
def test_the_same_weights_in_another_format_on_another_backend(
    exact, load, checkpoint, backend, package
):
    require(package)
    precision = "auto" if backend == "transformers" else "fp32"
    report = compare(exact, load(checkpoint, backend=backend, precision=precision))
    assert report.verdict.grade == "equal"
    for quality in report.kernels.values():
        assert quality.figures.kl_mean < 1e-6
        assert quality.figures.top1_agreement > 0.99
    assert (report.reference.format, report.candidate.backend) == ("safetensors", backend)


def test_formats_are_compared_with_each_other(load, checkpoint):
    require("onnxruntime", "openvino")
    ir = load(checkpoint, backend="openvino", precision="fp32")
    report = compare(ir, load(checkpoint, backend="onnxruntime", precision="fp32"))
    assert (report.reference.format, report.candidate.format) == ("openvino", "onnx-genai")
    assert report.verdict.grade == "equal"


def test_fewer_bits_are_further_away(exact, load, checkpoint):
    require("onnxruntime")
    distances, sizes = [], []
    for precision in ("fp32", "int8", "int4"):
        report = compare(exact, load(checkpoint, backend="onnxruntime", precision=precision))
        assert report.candidate.precision == precision
        distances.append(report.one_row.figures.kl_mean)
        sizes.append(report.candidate.bytes)
    assert distances == sorted(distances)
    assert distances[1] > 10 * distances[0]
    assert sizes == sorted(sizes, reverse=True)


def test_a_damaged_layer_is_broken(exact, load, edited):
    def damage(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][:] *= 30

    report = compare(exact, load(edited(damage), backend="reference"))
    assert (report.verdict.grade, report.verdict.passed) == ("broken", False)
    assert report.many_rows is not None
    assert all(worst.kl > 1 for worst in report.many_rows.worst)


def test_the_worst_positions_point_at_what_is_damaged(exact, load, edited):
    token = exact.tokenizer.encode("Z", add_special_tokens=False)[0]

    def damage(tensors):
        embedding = tensors["model.embed_tokens.weight"]
        embedding[token] = 5 * np.random.default_rng(3).standard_normal(64)

    texts = dict(TEXTS, zed="and then it was as it is, on and on and Z so on.")
    report = compare(exact, load(edited(damage), backend="reference"), text=texts)
    assert report.many_rows is not None
    distances = {each.name: each.figures.kl_mean for each in report.many_rows.sections}
    assert (distances["prose"], distances["code"]) == (0, 0)
    worst = report.many_rows.worst[0]
    assert worst.section == "zed"
    assert worst.before.endswith("Z")
    assert (worst.token + worst.after).startswith(" so on")


def test_nan_is_told_and_the_models_are_closed(exact, edited, monkeypatch):
    def damage(tensors):
        tensors["model.norm.weight"][3] = np.nan

    closed: list[phirt.Model] = []
    close = phirt.Model.close

    def closing(model):
        closed.append(model)
        close(model)

    monkeypatch.setattr(phirt.Model, "close", closing)
    with pytest.raises(NonFiniteLogitsError, match="The candidate computed a logit of nan"):
        compare(exact, edited(damage), backend="reference")
    assert len(closed) == 1
    assert exact not in closed


def test_a_candidate_without_verify_has_one_row_figures_only(exact, load, checkpoint, monkeypatch):
    candidate = load(checkpoint, backend="reference", device="cpu")
    able = candidate.loaded.capabilities
    lacks = dict(able.lacks, verify=Lack("never", "it has logits of the last position only"))
    unable = Capabilities(
        **{name: getattr(able, name) for name in ("truncate", "interrupt", "kv", "batch", "topk")},
        lacks=lacks,
    )
    monkeypatch.setattr(candidate.loaded, "capabilities", unable)
    report = compare(exact, candidate)
    assert report.many_rows is None
    assert report.to_json()["many_rows"] is None
    assert report.leading is report.one_row
    assert any("it has logits of the last position only" in note for note in report.notes)


def test_a_quantized_reference_is_noted(load, checkpoint):
    require("onnxruntime")
    int8 = load(checkpoint, backend="onnxruntime", precision="int8")
    assert any("The reference is quantized (int8)" in note for note in compare(int8, int8).notes)


def test_longrope_is_noted(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "phi3", "phi3")
    with phirt.load(folder, backend="reference") as model:
        report = compare(model, model)
    assert max(span.positions for span in report.one_row.spans) <= 32
    assert any("LongRoPE" in note for note in report.notes)


def rewrite_tokenizer(folder, edit):
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    edit(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return folder


def swap_two(document):
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_first_merge(document):
    document["model"]["merges"].pop(0)


def add_one(document):
    last = max(token["id"] for token in document["added_tokens"])
    document["added_tokens"].append(dict(document["added_tokens"][0], id=last + 1, content="<x>"))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (swap_two, r"token \d+ is '[ab]' to the tokenizer of the reference"),
        (add_one, "has 320 tokens, that of the candidate 321"),
    ],
)
def test_other_tokenizers_are_refused(exact, checkpoint, tmp_path, edit, message):
    folder = rewrite_tokenizer(shutil.copytree(checkpoint, tmp_path / "other"), edit)
    with pytest.raises(UnsupportedModelError, match=message):
        compare(exact, folder, backend="reference")


def test_a_tokenizer_that_cuts_otherwise_is_refused(exact, checkpoint, tmp_path):
    folder = rewrite_tokenizer(shutil.copytree(checkpoint, tmp_path / "other"), drop_first_merge)
    with pytest.raises(UnsupportedModelError, match="cut the text 'prose' differently"):
        compare(exact, folder, backend="reference")


def test_models_that_were_loaded_before_stay_open(exact):
    compare(exact, exact)
    assert exact.generate("a", max_new_tokens=1).token_ids


def test_settings_of_a_model_that_is_loaded_are_refused(exact):
    with pytest.raises(ValueError, match=r"reference_precision cannot be chosen: .* is loaded"):
        compare(exact, exact, reference_precision="fp32")
    with pytest.raises(ValueError, match="device and backend cannot be chosen"):
        compare(exact, exact, device="cpu", backend="reference")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": 0}, ValueError),
        ({"tokens": 10}, ValueError),
        ({"tokens": True}, TypeError),
        ({"tokens": 1.5}, TypeError),
        ({"max_kl": -0.1}, ValueError),
        ({"min_agreement": 95}, ValueError),
        ({"text": "  "}, ValueError),
        ({"text": "too short"}, ValueError),
    ],
)
def test_wrong_arguments(exact, options, error):
    with pytest.raises(error):
        compare(exact, exact, **options)


def test_a_checkpoint_as_reference_is_converted_without_loss(
    checkpoint, exact, tmp_path, monkeypatch
):
    require("onnxruntime")
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    report = compare(checkpoint, checkpoint, reference_backend="onnxruntime", precision="int8")
    assert (report.reference.precision, report.candidate.precision) == ("fp32", "int8")
    # And where a backend reads the folder, it is read as it is.
    report = compare(checkpoint, exact, reference_backend="reference")
    assert report.reference.path == str(checkpoint)


def test_a_converted_folder_as_reference_is_taken_as_it_is(checkpoint, exact, tmp_path):
    require("onnxruntime")
    folder = tmp_path / "int8"
    folder.mkdir()
    convert(checkpoint, folder, layout="onnx-genai", precision="int8")
    assert compare(folder, exact).reference.precision == "int8"


def test_progress_counts_tokens(exact):
    told: list[phirt.Progress] = []
    compare(exact, exact, progress=told.append)
    assert {(each.stage, each.unit) for each in told} == {("compare", "tokens")}
    assert [each.completed for each in told] == sorted(each.completed for each in told)
    assert told[-1].completed == told[-1].total == 256


def test_speeds_are_of_both_and_their_ratio(same):
    speed = same.speed
    assert speed is not None
    assert speed.rounds >= 1
    assert speed.prompt_tokens == 128
    for phase in (speed.prefill, speed.decode):
        assert min(phase.reference, phase.candidate, phase.ratio) > 0


def test_the_document_has_these_fields_and_no_others(same):
    document = same.to_json()
    figures = {"positions", "spans", "ppl_reference", "ppl", "kl_mean", "kl_se", "kl_p99"}
    figures |= {"top1_agreement", "top1_se"}
    assert list(document) == [
        "kind",
        "reference",
        "candidate",
        "vocabulary",
        "many_rows",
        "one_row",
        "speed",
        "verdict",
        "notes",
        "version",
        "histogram_edges",
    ]
    assert document["kind"] == "phirt quality report"
    assert tuple(document["reference"]) == SIDES == tuple(document["candidate"])
    for kernel in ("many_rows", "one_row"):
        quality = document[kernel]
        assert list(quality) == ["figures", "sections", "spans", "histogram", "worst"]
        assert set(quality["figures"]) == figures
        assert set(quality["sections"][0]) == {"name", "figures"}
        assert set(quality["spans"][0]) == {"section", "start", "positions", "kl_mean"}
        assert set(quality["worst"][0]) == {
            "section",
            "position",
            "before",
            "token",
            "after",
            "reference_token",
            "reference_probability",
            "candidate_token",
            "candidate_probability",
            "kl",
        }
        assert sum(quality["histogram"]) == quality["figures"]["positions"]
        assert len(quality["histogram"]) == len(document["histogram_edges"]) - 1
    rates = {"reference", "candidate", "ratio"}
    assert set(document["speed"]) == {"prefill", "decode", "prompt_tokens", "rounds"}
    assert set(document["speed"]["prefill"]) == rates
    assert set(document["verdict"]) == {"grade", "passed", "reasons", "thresholds"}
    assert document["verdict"]["thresholds"] == {"max_kl": 0.02, "min_agreement": 0.9}
    json.dumps(document, allow_nan=False)


def test_a_report_is_frozen(same):
    with pytest.raises(AttributeError):
        same.notes = ()


@pytest.mark.model
@pytest.mark.slow
def test_the_default_model_by_precision(model_home):
    distances = {}
    with phirt.load(precision="fp32", backend="onnxruntime") as reference:
        for precision in ("fp32", "int8", "int4"):
            report = phirt.compare_quality(
                reference, "smollm2-135m-instruct", precision=precision, tokens=512, speed=False
            )
            assert report.verdict.passed, report.verdict
            distances[precision] = report.one_row.figures.kl_mean
    assert distances["fp32"] < 1e-6
    # Both are measured in docs/precision.md.
    assert 1e-3 < distances["int4"] < 0.02
    assert 1e-3 < distances["int8"] < 0.02

"""`phirt.load(kv_precision=...)`, and what is said of it."""

from __future__ import annotations

import json

import pytest

import phirt
from phirt.cli import main
from phirt.testing.subject import random_ids
from tests.installed import require

require("onnxruntime", "onnx")

PROMPT = [token % 290 for token in random_ids(40)]


@pytest.fixture
def load(tiny_gguf):
    """Loads the tiny model in fp32 on onnxruntime; its answers are noise, and no canary is held."""

    def load(**options):
        settings = {"precision": "fp32", "backend": "onnxruntime", "device": "cpu", **options}
        return phirt.load(tiny_gguf, **settings)

    return load


def test_a_model_says_how_it_keeps_its_cache(load):
    with load(kv_precision="int8") as model, load() as own:
        assert (model.kv_precision, own.kv_precision) == ("int8", "auto")
        assert model.plan.kv_precision == "int8"
        need, usual = model.plan.chosen.memory, own.plan.chosen.memory
        assert 4 * need.kv == usual.kv
        answer = model.generate(PROMPT, max_new_tokens=12)
        # Another request continues from the cache of the first, and gets the same.
        again = model.generate(PROMPT, max_new_tokens=12)
        assert again.token_ids == answer.token_ids
        assert again.usage.cached_tokens == len(PROMPT) - 2
        several = model.generate_many([PROMPT, PROMPT[:20]], max_new_tokens=12)
        assert several[0].token_ids == answer.token_ids


def test_a_prefix_goes_from_one_precision_to_the_other(load, tmp_path):
    with load() as own, load(kv_precision="int8") as model:
        own.save_prefix(PROMPT, tmp_path / "prefix.kv")
        assert model.load_prefix(tmp_path / "prefix.kv") == len(PROMPT)
        answer = model.generate([*PROMPT, 7], max_new_tokens=4)
        assert answer.usage.cached_tokens == len(PROMPT) - 1


def test_prefix_caches_hold_more_of_what_is_smaller(load):
    kept = {}
    for precision in ("auto", "int8"):
        with load(kv_precision=precision, prefix_cache_bytes=60_000) as model:
            model.generate(PROMPT, max_new_tokens=1)
            kept[precision] = model.generate(PROMPT, max_new_tokens=1).usage.cached_tokens
    assert kept == {"auto": 0, "int8": len(PROMPT) - 2}


@pytest.mark.parametrize("value", ["int9", None, 8])
def test_what_is_no_precision(load, value):
    with pytest.raises(ValueError, match="is not auto or one of fp32, fp16, int8"):
        load(kv_precision=value)


def test_a_named_backend_that_has_none(load):
    with pytest.raises(phirt.UnsupportedModelError, match="it keeps no KV cache in fp16"):
        load(kv_precision="fp16")


def test_a_choice_leaves_out_who_has_none(tiny_gguf):
    plan = phirt.plan(tiny_gguf, kv_precision="int8")
    usable = {row.backend for row in plan.candidates if row.status != "rejected"}
    assert usable <= {"onnxruntime", "openvino", "mlx"}
    assert "onnxruntime" in usable


def test_the_command_line_says_what_was_asked_for(tiny_gguf, capsys):
    arguments = ["plan", str(tiny_gguf), "--kv-precision", "int8"]
    assert main(arguments) == 0
    assert "kv_precision 'int8'; for one answer" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_precision"] == "int8"
    assert main([*arguments[:-1], "int9"]) == 2
    assert "int9" in capsys.readouterr().err


def test_quality_tells_what_the_cache_costs(load, tiny_gguf):
    def compare(own, other, **options):
        return phirt.compare_quality(
            own, other, tokens=320, speed=False, kv_precision="int8", **options
        )

    with load() as own:
        report = compare(own, tiny_gguf, precision="fp32", backend="onnxruntime", device="cpu")
        assert report.reference.kv_precision == "auto"
        assert report.candidate.kv_precision == "int8"
        assert report.one_row.figures.kl_mean > 1e-6
        with pytest.raises(ValueError, match="kv_precision cannot be chosen"):
            compare(own, own)

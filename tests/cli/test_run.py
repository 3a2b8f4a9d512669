"""``phirt run``: what goes in, what comes out, and with which exit status."""

from __future__ import annotations

import json
import shlex

import pytest

from phirt.errors import BackendRuntimeError
from tests.cli.fake import FakeModel


def test_a_prompt_is_a_chat_message_where_the_model_has_a_template(phirt_run):
    model = FakeModel()
    outcome = phirt_run("Capital of France?", model=model)
    assert (outcome.status, outcome.out) == (0, "The capital is Paris.\n")
    assert model.asked[0].prompt == [{"role": "user", "content": "Capital of France?"}]
    assert model.closed


@pytest.mark.parametrize(
    ("options", "template"), [(["--raw"], "a template"), ([], None), (["--raw"], None)]
)
def test_a_prompt_is_plain_text_with_raw_or_without_a_template(phirt_run, options, template):
    model = FakeModel(chat_template=template)
    assert phirt_run("Once", *options, model=model).status == 0
    assert model.asked[0].prompt == "Once"


def test_an_answer_that_ends_a_line_gets_no_second_line_end(phirt_run):
    assert phirt_run("x", model=FakeModel(script=["yes\n", ""])).out == "yes\n"
    assert phirt_run("x", model=FakeModel(script=[])).out == ""


def test_only_what_was_given_overrides_the_model(phirt_run):
    model = FakeModel()
    phirt_run("x", model=model)
    sampling = "--temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1"
    others = "--max-new-tokens 5 --stop A --stop 'B C' --seed 3"
    phirt_run("x", *shlex.split(f"{sampling} {others}"), model=model)
    assert model.asked[0].overrides == {}
    assert model.asked[1].overrides == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop": ["A", "B C"],
        "seed": 3,
    }


def test_what_to_load_is_handed_on(phirt_run):
    model = FakeModel()
    options = "-m a.gguf --device cpu --backend onnxruntime --precision int8 --offline "
    options += "--kv-precision fp16 --prefill openvino --decode onnxruntime:cpu"
    phirt_run("x", *shlex.split(options), model=model)
    del model.loaded_with["progress"], model.loaded_with["announce"]
    assert model.loaded_with == {
        "model": "a.gguf",
        "device": "cpu",
        "backend": "onnxruntime",
        "precision": "int8",
        "kv_precision": "fp16",
        "prefill": "openvino",
        "decode": "onnxruntime:cpu",
        "offline": True,
    }


@pytest.mark.parametrize(
    ("stdin", "prompt"),
    [
        (b"two words\n", "two words"),
        (b"\xef\xbb\xbfwith a mark\r\n", "with a mark"),
        ("día\n\n".encode(), "día\n"),
    ],
)
def test_piped_input_is_the_prompt(phirt_run, stdin, prompt):
    model = FakeModel()
    assert phirt_run("--raw", model=model, stdin=stdin).status == 0
    assert model.asked[0].prompt == prompt


def test_an_argument_goes_before_piped_input(phirt_run):
    model = FakeModel()
    phirt_run("argument", "--raw", model=model, stdin=b"piped")
    assert model.asked[0].prompt == "argument"


def test_json_is_one_object_with_these_keys(phirt_run):
    outcome = phirt_run("x", "--json")
    assert outcome.status == 0
    assert json.loads(outcome.out) == {
        "text": "The capital is Paris.",
        "token_ids": [1, 2, 3, 4],
        "finish_reason": "stop",
        "model": "fake",
        "backend": "scripted",
        "device": "cpu",
        "usage": {
            "prompt_tokens": 7,
            "cached_tokens": 0,
            "completion_tokens": 4,
            "drafted_tokens": 0,
            "accepted_tokens": 0,
        },
        "timings": {
            "load_s": 0.5,
            "ttft_s": 0.25,
            "prefill_tokens_per_s": 28.0,
            "decode_tokens_per_s": None,
        },
    }


def test_text_outside_ascii_survives_json_and_pipes(phirt_run):
    model = FakeModel(script=["día ", "🦜"])
    assert phirt_run("x", model=model).out == "día 🦜\n"
    assert "día 🦜" in phirt_run("x", "--json", model=model).out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["x", "--top-k", "many"], "invalid int value: 'many'"),
        (["x", "--frequency"], "unrecognized arguments: --frequency"),
        (["x", "--max-new", "3"], "unrecognized arguments: --max-new"),
        (["What", "is"], "unrecognized arguments: is"),
        (["x", "--top-p", "2"], "top_p"),
        (["x", "--temperature", "nan"], "temperature"),
        (["x", "-m", "malformed"], "device='c p u' is not a device name."),
        ([], "stdin is empty"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(phirt_run, arguments, complaint):
    outcome = phirt_run(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("phirt: ")
    assert outcome.err.count("\n") == 1
    assert complaint in outcome.err
    assert "--help" in outcome.err


def test_wrong_parameters_are_told_before_anything_is_loaded(phirt_run):
    model = FakeModel()
    assert phirt_run("x", "--min-p", "-1", model=model).status == 2
    assert model.loaded_with == {}


def test_a_parameter_that_this_model_refuses_is_wrong_usage(phirt_run):
    model = FakeModel(refuses=ValueError("The prompt is empty."))
    for options in ([], ["--json"]):
        outcome = phirt_run("x", *options, model=model)
        assert outcome.status == 2
        assert "The prompt is empty." in outcome.err


def test_stdin_that_is_no_text_is_wrong_usage(phirt_run):
    outcome = phirt_run(stdin=b"ab\xff\xfe")
    assert outcome.status == 2
    assert "stdin is not UTF-8 text: byte 2" in outcome.err


def test_an_error_of_phirt_is_its_message_and_status_1(phirt_run):
    outcome = phirt_run("x", "-m", "missing")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err == "phirt: Model 'missing' is neither a name, a folder nor a file.\n"


def test_an_error_in_the_middle_keeps_what_was_said(phirt_run):
    model = FakeModel(script=["The", BackendRuntimeError("The runtime failed.")])
    outcome = phirt_run("x", model=model)
    assert (outcome.status, outcome.out) == (1, "The\n")
    assert outcome.err == "phirt: The runtime failed.\n"
    assert model.closed


def test_any_other_error_is_a_bug_and_keeps_its_traceback(phirt_run):
    with pytest.raises(ValueError, match="inside"):
        phirt_run("x", model=FakeModel(script=["The", ValueError("inside")]))


def test_ctrl_c_is_status_130_without_a_traceback(phirt_run):
    model = FakeModel(script=["The", KeyboardInterrupt()])
    outcome = phirt_run("x", model=model)
    assert (outcome.status, outcome.out) == (130, "The\n")
    assert outcome.err == ""
    assert model.streams[0].closed
    assert model.closed


def test_an_answer_cut_by_the_context_says_so(phirt_run):
    outcome = phirt_run("x", model=FakeModel(finish_reason="context"))
    assert outcome.status == 0
    assert "context is full" in outcome.err


def test_verbose_tells_what_ran_where(phirt_run):
    assert phirt_run("x").err == ""
    told = phirt_run("x", "-v").err
    assert "fake on cpu through scripted" in told
    assert "first token after 0.250 s; 4 tokens at (not measured); finished: stop" in told

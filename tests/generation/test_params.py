"""What `GenerationParams` refuses and normalises, and how a model's defaults enter."""

import copy
import math
import pickle
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from phirt.errors import ModelFormatError
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults, Sampling, resolve

REFUSED = [
    # L6, and every other parameter out of range: the message names parameter and value.
    ({"temperature": -1}, ValueError, "temperature must be 0 .greedy. or above.*not -1"),
    ({"temperature": math.nan}, ValueError, "temperature.*not nan"),
    ({"temperature": math.inf}, ValueError, "temperature.*finite.*not inf"),
    ({"temperature": 10**400}, ValueError, "temperature.*finite"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number.*'hot'"),
    ({"temperature": True}, TypeError, "temperature must be a number.*True"),
    ({"temperature": Decimal(1)}, TypeError, r"Decimal\('1'\) \(Decimal\)"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0.*not -1"),
    ({"top_k": 50.0}, TypeError, "top_k must be an integer, not 50.0"),
    ({"top_k": True}, TypeError, "top_k must be an integer, not True"),
    ({"top_p": 2}, ValueError, "top_p must be above 0 and at most 1, not 2"),
    ({"top_p": 0}, ValueError, "top_p.*not 0"),
    ({"min_p": -0.1}, ValueError, "min_p must be from 0 to 1, not -0.1"),
    ({"min_p": 1.1}, ValueError, "min_p.*1.1"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0"),
    ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty.*inf"),
    ({"presence_penalty": 2.1}, ValueError, "presence_penalty must be from -2 to 2, not 2.1"),
    ({"frequency_penalty": -3}, ValueError, "frequency_penalty.*-3"),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 1.*not -1"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens.*not 0"),
    ({"max_new_tokens": 2**63}, ValueError, "max_new_tokens.*below 2147483648"),
    ({"max_new_tokens": "9"}, TypeError, "max_new_tokens must be an integer, not '9'"),
    ({"min_new_tokens": -1}, ValueError, "min_new_tokens.*-1"),
    ({"min_new_tokens": 5, "max_new_tokens": 4}, ValueError, "min_new_tokens is 5.*is 4"),
    ({"no_repeat_ngram_size": -2}, ValueError, "no_repeat_ngram_size.*-2"),
    ({"seed": -1}, ValueError, "seed must be at least 0.*-1"),
    ({"seed": 2**64}, ValueError, "seed.*below 18446744073709551616"),
    ({"logprobs": -1}, ValueError, "logprobs.*-1"),
    ({"logprobs": True}, TypeError, "logprobs must be an integer, not True"),
    ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, not 1"),
    ({"do_sample": "yes"}, TypeError, "do_sample must be True or False, not 'yes'"),
    ({"stop": ""}, ValueError, "stop must not hold the empty string"),
    ({"stop": ["a", ""]}, ValueError, "stop must not hold the empty string"),
    ({"stop": [1]}, TypeError, "stop must hold strings, not 1"),
    ({"stop": 5}, TypeError, "stop must be a string or several, not 5"),
    ({"stop": b"a"}, TypeError, "stop must be a string or several"),
    ({"stop_token_ids": 2}, TypeError, "stop_token_ids must be a sequence of token ids, not 2"),
    ({"stop_token_ids": [-1]}, ValueError, "a token id in stop_token_ids.*-1"),
    ({"stop_token_ids": "12"}, TypeError, "stop_token_ids must be a sequence.*'12'"),
    ({"suppress_tokens": [2**31]}, ValueError, "a token id in suppress_tokens.*2147483648"),
    ({"suppress_tokens": [True]}, TypeError, "a token id in suppress_tokens.*True"),
    ({"logit_bias": [(1, 2.0)]}, TypeError, "logit_bias must be a mapping"),
    ({"logit_bias": {"1": 2.0}}, TypeError, "a token id in logit_bias.*'1'"),
    ({"logit_bias": {1: -math.inf}}, ValueError, "bias of token 1.*use suppress_tokens"),
    ({"logit_bias": {1: 1e39}}, ValueError, "bias of token 1.*1e.39"),
    ({"logits_processors": [3]}, TypeError, "logits_processors must hold functions.*not 3"),
    ({"logits_processors": abs}, TypeError, "not one: put it into a list"),
    ({"do_sample": True, "temperature": 0}, ValueError, "do_sample=True contradicts temperature=0"),
    ({"do_sample": False, "temperature": 0.8}, ValueError, "temperature=0.8 would have no effect"),
    ({"do_sample": False, "top_k": 50}, ValueError, "top_k=50 would have no effect"),
    ({"do_sample": False, "top_p": 0.9}, ValueError, "top_p=0.9 would have no effect"),
    ({"do_sample": False, "min_p": 0.1}, ValueError, "min_p=0.1 would have no effect"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED, ids=str)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        GenerationParams(**arguments)


def test_everything_is_unset_by_default():
    resolved = resolve(GenerationParams())
    assert resolved.sampling is None
    assert resolved.max_new_tokens is None
    assert resolved.repetition_penalty == 1
    assert resolved.presence_penalty == resolved.frequency_penalty == 0
    assert resolved.min_new_tokens == resolved.no_repeat_ngram_size == 0
    assert not resolved.logit_bias
    assert resolved.stop == ()
    assert resolved.stop_token_ids == resolved.suppress_tokens == ()
    assert resolved.logits_processors == ()
    assert resolved.ignore_eos is False
    assert resolved.logprobs is None
    assert resolved.num_beams == resolved.n == 1
    assert resolved.length_penalty == 1
    assert resolved.early_stopping is False


def test_boundary_values_are_allowed():
    GenerationParams(
        max_new_tokens=2**31 - 1, top_p=1, min_p=1, top_k=0, temperature=0, seed=2**64 - 1
    )
    GenerationParams(presence_penalty=-2, frequency_penalty=2, logprobs=0, min_new_tokens=0)


def test_numpy_scalars_become_python_numbers():
    scalars: dict[str, Any] = {
        "top_k": np.int32(5),
        "temperature": np.float32(0.5),
        "seed": np.uint64(7),
    }
    params = GenerationParams(**scalars)
    assert [type(x) for x in (params.top_k, params.temperature, params.seed)] == [int, float, int]


def test_collections_are_copied_and_immutable():
    bias, stops, ids = {1: 2}, ["a"], {3, 4}
    params = GenerationParams(logit_bias=bias, stop=stops, stop_token_ids=ids)
    bias[1], stops[0] = 9, "b"
    ids.clear()
    assert params.logit_bias == MappingProxyType({1: 2.0})
    assert params.stop == ("a",)
    assert sorted(params.stop_token_ids) == [3, 4]
    with pytest.raises(TypeError):
        params.logit_bias[1] = 0  # type: ignore[index]


def test_one_stop_string_is_not_read_as_characters():
    assert GenerationParams(stop="abc").stop == ("abc",)


def _pickled(params):
    return pickle.loads(pickle.dumps(params))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copies_and_pickles_equal_the_original(duplicate):
    params = GenerationParams(temperature=0.5, stop="a", logit_bias={1: 2.0})
    assert duplicate(params) == params
    assert hash(duplicate(params)) == hash(params)
    assert duplicate(params) != params.merge(logit_bias={})


class TestMerge:
    def test_overrides_replace_and_none_unsets(self):
        params = GenerationParams(temperature=0.5, top_k=5, stop="a")
        merged = params.merge(temperature=0.7, top_k=None, stop=None)
        assert merged == GenerationParams(temperature=0.7)
        assert params.temperature == 0.5

    def test_overrides_are_checked(self):
        with pytest.raises(ValueError, match="top_p"):
            GenerationParams().merge(top_p=2)
        with pytest.raises(ValueError, match="max_new_tokens"):
            GenerationParams(min_new_tokens=5).merge(max_new_tokens=4)

    @pytest.mark.parametrize(
        ("name", "nearest"),
        [("temprature", "temperature"), ("topk", "top_k"), ("max_tokens", "max_new_tokens")],
    )
    def test_an_unknown_name_is_refused_and_the_nearest_suggested(self, name, nearest):
        with pytest.raises(TypeError, match=f"'{name}'. Did you mean '{nearest}'"):
            GenerationParams().merge(**{name: 1})

    def test_without_a_near_name_all_are_listed(self):
        with pytest.raises(TypeError, match=r"There are max_new_tokens, .*logits_processors"):
            GenerationParams().merge(zzz=1)


@pytest.mark.parametrize(
    "arguments",
    [{"logit_bias": {100: 1.0}}, {"stop_token_ids": [3, 100]}, {"suppress_tokens": [100]}],
)
def test_token_ids_beyond_the_vocabulary_are_refused(arguments):
    params = GenerationParams(**arguments)
    params.check_vocabulary(101)
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} holds token id 100.*from 0 to 99"):
        params.check_vocabulary(100)


class TestDefaults:
    def test_takes_its_keys_and_leaves_the_others(self):
        config = {"do_sample": True, "top_k": 20, "temperature": 1, "eos_token_id": [1], "x": {}}
        assert GenerationDefaults.from_config(config) == GenerationDefaults(
            do_sample=True, top_k=20, temperature=1.0
        )

    def test_null_is_silence(self):
        assert GenerationDefaults.from_config({"top_p": None}) == GenerationDefaults()

    @pytest.mark.parametrize(
        "config",
        [
            {"temperature": "0.6"},
            {"temperature": math.nan},
            {"top_k": 2**70},
            {"top_p": 7},
            {"min_p": [0.1]},
            {"do_sample": 1},
            {"repetition_penalty": -1},
        ],
    )
    def test_a_wrong_value_is_an_error_of_the_model(self, config):
        (name,) = config
        with pytest.raises(ModelFormatError, match=f"generation_config.*{name} must be"):
            GenerationDefaults.from_config(config)


SAMPLES = GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
GREEDY = GenerationDefaults(do_sample=False, temperature=0.6, top_k=50, repetition_penalty=1.1)
SILENT = GenerationDefaults()


@pytest.mark.parametrize(
    ("asked", "defaults", "expected"),
    [
        # Nothing asked: the model decides, and is greedy where it says nothing.
        ({}, SILENT, None),
        ({}, GREEDY, None),
        ({}, SAMPLES, Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ({}, GenerationDefaults(do_sample=True), Sampling()),
        ({}, GenerationDefaults(do_sample=True, temperature=0.0), None),
        # do_sample wins over everything.
        ({"do_sample": False}, SAMPLES, None),
        ({"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0}, SAMPLES, None),
        ({"do_sample": True}, SILENT, Sampling()),
        ({"do_sample": True}, SAMPLES, Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ({"do_sample": True}, GenerationDefaults(do_sample=True, temperature=0.0), Sampling()),
        # Then the temperature.
        ({"temperature": 0.8}, SILENT, Sampling(temperature=0.8)),
        ({"temperature": 0}, SAMPLES, None),
        ({"temperature": 0, "top_p": 0.9}, SAMPLES, None),
        # Then what would be ignored without sampling.
        ({"top_k": 5}, SILENT, Sampling(top_k=5)),
        ({"top_p": 0.9}, SILENT, Sampling(top_p=0.9)),
        ({"min_p": 0.1}, SILENT, Sampling(min_p=0.1)),
        # A neutral value restricts nothing, so it does not ask for sampling ...
        ({"top_k": 0, "top_p": 1.0, "min_p": 0.0}, SILENT, None),
        # ... but it switches the model's own value off.
        ({"top_k": 0, "top_p": 1.0}, SAMPLES, Sampling(temperature=0.6)),
        ({"temperature": 1.0}, SAMPLES, Sampling(top_k=20, top_p=0.95)),
        # Values beside do_sample false are a class's defaults, not the model's advice.
        ({"temperature": 0.8}, GREEDY, Sampling(temperature=0.8)),
        ({"top_p": 0.9}, GREEDY, Sampling(top_p=0.9)),
        # A seed alone asks for nothing but repeatability.
        ({"seed": 1}, SILENT, None),
    ],
    ids=str,
)
def test_resolves_sampling(asked, defaults, expected):
    assert resolve(GenerationParams(**asked), defaults).sampling == expected


def test_the_models_repetition_penalty_holds_greedy_or_not_unless_the_caller_has_one():
    assert resolve(GenerationParams(), GREEDY).repetition_penalty == 1.1
    assert resolve(GenerationParams(temperature=1), GREEDY).repetition_penalty == 1.1
    assert resolve(GenerationParams(repetition_penalty=1), GREEDY).repetition_penalty == 1.0

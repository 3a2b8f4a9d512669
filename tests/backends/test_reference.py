"""The reference backend against transformers: it is the oracle of the conformance suite."""

from __future__ import annotations

import json

import numpy as np
import pytest

import phirt
from phirt.backends.reference import ReferenceBackend
from phirt.backends.reference.decoder import attend, gelu_tanh, rms_norm, rotate, silu, softmax
from phirt.errors import DeviceNotAvailableError, ModelFormatError, UnsupportedModelError
from phirt.models.rotary import Rotary
from phirt.protocols import Accept, LoadOptions, Reject
from phirt.testing import DENSE_ARCHITECTURES, write_tiny_checkpoint
from phirt.testing.subject import Oracle, random_ids, read_artifact
from tests.tiny_oracle import TransformersOracle


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_against_transformers(architecture, tmp_path):
    """Full passes within 1e-3 (they are within 1e-4), around windows and LongRoPE's boundary."""
    checkpoint = write_tiny_checkpoint(tmp_path / architecture, architecture, seed=7)
    reference, oracle = Oracle(checkpoint), TransformersOracle(checkpoint)
    for length in (1, 15, 16, 17, 31, 32, 33, 100):
        ids = random_ids(length, seed=length)
        difference = np.abs(reference.logits(ids) - oracle.logits(ids)).max()
        assert difference < 1e-3, f"{length} tokens differ by {difference}"


def test_rms_norm_of_a_known_vector():
    x = np.array([[3.0, 4.0]], np.float32)
    expected = [[3 / np.sqrt(12.5), 2 * 4 / np.sqrt(12.5)]]
    np.testing.assert_allclose(rms_norm(x, np.array([1, 2], np.float32), 0.0), expected, rtol=1e-6)


def test_activations_at_known_points():
    x = np.array([0.0, 1.0, -1000.0], np.float32)
    np.testing.assert_allclose(silu(x), [0, 0.7310586, 0], atol=1e-6)
    np.testing.assert_allclose(gelu_tanh(x), [0, 0.8411920, 0], atol=1e-6)


def test_softmax_of_a_masked_row():
    row = softmax(np.array([[0.0, np.log(3), -np.inf]], np.float32))
    np.testing.assert_allclose(row, [[0.25, 0.75, 0]], atol=1e-6)


def test_rotation_by_a_quarter_turn():
    """Element i turns with element i + dim / 2, and what lies beyond dim stays."""
    cosines, sines = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    x = np.array([[[1.0, 2.0, 5.0]]], np.float32)
    np.testing.assert_array_equal(rotate(x, cosines, sines), [[[-2.0, 1.0, 5.0]]])


def test_rotation_keeps_lengths():
    cosines, sines = Rotary(theta=10_000.0, dim=8).tables(20)
    x = np.random.default_rng(0).standard_normal((2, 20, 8), np.float32)
    lengths = np.linalg.norm(rotate(x, cosines, sines), axis=-1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(("window", "seen"), [(None, [1, 2, 3, 4]), (2, [1, 2, 2, 2])])
def test_a_position_attends_to_its_window(window, seen):
    """With equal scores the answer is the mean of the values that a position sees."""
    nothing = np.zeros((1, 4, 2), np.float32)
    value = np.array([1, 2, 4, 8], np.float32).reshape(1, 4, 1) * np.ones(2, np.float32)
    mixed = attend(nothing, nothing, value, scale=1.0, window=window)
    expected = [np.mean([1, 2, 4, 8][max(0, i + 1 - n) : i + 1]) for i, n in enumerate(seen)]
    np.testing.assert_allclose(mixed[:, 0], expected)


@pytest.fixture
def checkpoint(tmp_path):
    return write_tiny_checkpoint(tmp_path / "tiny", "llama")


def test_only_the_cpu(checkpoint):
    backend = ReferenceBackend()
    artifact = read_artifact(backend, checkpoint)
    assert isinstance(backend.accepts(artifact, "cuda"), Reject)
    with pytest.raises(DeviceNotAvailableError, match="cuda"):
        backend.load(artifact, "cuda", LoadOptions())


def test_the_first_cpu_is_the_cpu(checkpoint):
    backend = ReferenceBackend()
    artifact = read_artifact(backend, checkpoint)
    assert backend.accepts(artifact, "cpu:0") == Accept()
    backend.load(artifact, "cpu:0", LoadOptions()).close()


def test_a_damaged_model_is_not_a_rejected_one(checkpoint):
    """Under "auto" no other backend is tried on it, and the error is the model's."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 3}))
    with pytest.raises(ModelFormatError, match="cannot share"):
        phirt.load(checkpoint, backend="reference")


def test_it_has_no_settings(checkpoint):
    backend = ReferenceBackend()
    with pytest.raises(ValueError, match="no settings"):
        backend.load(read_artifact(backend, checkpoint), "cpu", LoadOptions(extra={"fast": True}))


def test_mixtures_of_experts_are_refused(tmp_path):
    backend = ReferenceBackend()
    artifact = read_artifact(backend, write_tiny_checkpoint(tmp_path / "moe", "phimoe"))
    verdict = backend.accepts(artifact, "cpu")
    assert isinstance(verdict, Reject)
    assert "phimoe" in verdict.reason
    with pytest.raises(UnsupportedModelError, match="phimoe"):
        backend.load(artifact, "cpu", LoadOptions())


def test_weights_that_config_json_does_not_describe(checkpoint):
    config = checkpoint / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"intermediate_size": 128', '"intermediate_size": 96'), "utf-8")
    backend = ReferenceBackend()
    with pytest.raises(ModelFormatError, match=r"gate_proj.*96.*128"):
        backend.load(read_artifact(backend, checkpoint), "cpu", LoadOptions())

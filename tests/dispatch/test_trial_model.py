"""The trial model: the same whenever it is made, sharp, and loaded by every backend."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest

from phirt.dispatch.registry import get_backend
from phirt.dispatch.trial_model import TRIAL_LAYOUTS, trial_folder
from phirt.errors import UnsupportedModelError
from phirt.models.canary import CANARY_NAME, read_canary
from phirt.models.folder import read_folder
from phirt.models.manifest import read_manifest
from phirt.protocols import LoadOptions
from phirt.text.tokenizer import Tokenizer
from phirt.types import FloatArray
from tests.installed import require

# Of the first 16 letters of the vocabulary, prefilled, and 8 more, decoded.
PROMPT, REST = list(range(16)), list(range(16, 24))


def log_probabilities(backend_name: str) -> FloatArray:
    """Of every position from the prompt's last on, (9, 64)."""
    backend = get_backend(backend_name)
    artifact = read_folder(trial_folder(backend.formats), formats=backend.formats).artifact
    model = backend.load(artifact, "cpu", LoadOptions())
    session = model.new_session(max_length=24, expected_length=24)
    rows = [session.prefill(PROMPT).numpy().copy()]
    rows += [session.decode(token).numpy().copy() for token in REST]
    session.close()
    model.close()
    return normalized(np.concatenate(rows).astype(np.float64))


def normalized(logits: FloatArray) -> FloatArray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    values: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return values


def mean_kl(expected: FloatArray, actual: FloatArray) -> float:
    return float((np.exp(expected) * (expected - actual)).sum(axis=1).mean())


@pytest.fixture
def expected() -> FloatArray:
    return log_probabilities("reference")


@pytest.mark.parametrize("layout", TRIAL_LAYOUTS)
def test_is_a_model_folder(layout: str) -> None:
    folder = read_folder(trial_folder([layout]))
    assert (folder.artifact.format, folder.artifact.architecture) == (layout, "llama")
    tokenizer = Tokenizer.from_file(folder.tokenizer_path)
    assert tokenizer.decode(tokenizer.encode("Hello, world!")) == "Hello, world!"


@pytest.mark.parametrize("layout", TRIAL_LAYOUTS)
def test_has_a_canary(layout: str) -> None:
    canary = read_canary(trial_folder([layout]))
    assert canary is not None
    assert canary.own_kl is not None
    assert canary.own_kl < 0.006


def test_is_small() -> None:
    root = trial_folder(TRIAL_LAYOUTS).parent
    assert sum(file.stat().st_size for file in root.rglob("*") if file.suffix != ".pyc") < 190_000


def test_a_backend_gets_the_layout_that_it_prefers() -> None:
    assert trial_folder(("openvino", "onnx-genai")).name == "openvino"
    assert trial_folder(("mlx", "safetensors")).name == "safetensors"


def test_layouts_that_there_are_not() -> None:
    with pytest.raises(UnsupportedModelError, match="reads mlx, other"):
        trial_folder(("mlx", "other"))


@pytest.mark.parametrize(
    ("name", "package", "bound"),
    [
        # In 8 bits, whose rounding costs 0.004.
        ("onnxruntime", "onnxruntime", 0.006),
        ("onnxruntime-genai", "onnxruntime_genai", 0.006),
        ("openvino", "openvino", 0.006),
        ("mlx", "mlx_lm", 1e-6),
        pytest.param("transformers", "transformers", 1e-6, marks=pytest.mark.oracle),
    ],
)
def test_every_backend_gives_the_same(
    name: str, package: str, bound: float, expected: FloatArray
) -> None:
    require(package)
    assert mean_kl(expected, log_probabilities(name)) < bound


def test_wrong_numbers_are_seen(expected: FloatArray) -> None:
    assert mean_kl(expected, normalized(1.2 * expected)) > 0.02
    assert mean_kl(expected, np.roll(expected, 1, axis=0)) > 1
    top20 = np.sort(np.exp(expected), axis=1)[:, -20:].sum(axis=1)
    assert top20.mean() > 0.95


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, made again."""
    require("onnx", "openvino")
    from phirt.testing.trial_model import main

    root = tmp_path_factory.mktemp("again")
    main([str(root)])
    return root


# Beside the texts, which are compared byte by byte: weights, and what is compared as numbers.
WEIGHTS = ("model.safetensors", "model.onnx.data", "openvino_model.bin")
# Another version of the package that writes it may write it otherwise.
GRAPHS = {"model.onnx": "onnx", "openvino_model.xml": "openvino"}


@pytest.mark.parametrize("layout", TRIAL_LAYOUTS)
def test_made_again_it_is_the_same(layout: str, again: Path) -> None:
    kept, made = trial_folder([layout]), again / layout
    before, after = read_manifest(kept), read_manifest(made)
    assert before is not None
    assert after is not None
    assert before.versions["converter"] == after.versions["converter"]
    assert (before.precision, before.files.keys()) == (after.precision, after.files.keys())
    for name in before.files:
        old, new = (kept / name).read_bytes(), (made / name).read_bytes()
        if name in WEIGHTS:
            # Another processor's or library's logarithm may round some random number otherwise.
            assert len(old) == len(new)
            is_same = np.frombuffer(old, np.uint8) == np.frombuffer(new, np.uint8)
            assert is_same.mean() > 0.99, name
        elif name in GRAPHS:
            package = GRAPHS[name]
            if importlib.metadata.version(package) == before.versions[package]:
                assert old == new, name
        elif name != CANARY_NAME:
            assert old == new, name


@pytest.mark.parametrize("layout", TRIAL_LAYOUTS)
def test_made_again_it_has_the_same_canary(layout: str, again: Path) -> None:
    kept, made = read_canary(trial_folder([layout])), read_canary(again / layout)
    assert kept is not None
    assert made is not None
    assert kept.token_ids == made.token_ids
    # As text tells numbers, and as sums of another order give them.
    for old, new in zip(kept.log_probabilities, made.log_probabilities, strict=True):
        np.testing.assert_allclose(old, new, atol=1e-4)
    assert kept.own_kl == pytest.approx(made.own_kl, abs=1e-4)

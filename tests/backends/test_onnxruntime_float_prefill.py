"""Long prompts in float activations, on onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from phirt.backends.onnxruntime import OnnxRuntimeBackend, cache
from phirt.backends.onnxruntime.adapter import OrtModel
from phirt.backends.onnxruntime.float_prefill import float_graph
from phirt.build.convert import convert
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
from phirt.testing.checkpoints import write_tiny_checkpoint
from phirt.testing.subject import random_ids
from phirt.types import FloatArray

LEAST = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by architecture and precision."""
    root = tmp_path_factory.mktemp("float-prefill")
    found = {}
    for architecture in ("llama", "phi3"):
        checkpoint = write_tiny_checkpoint(root / architecture, architecture)
        for precision in ("int8", "fp32"):
            name = f"{architecture}-{precision}"
            (root / name).mkdir()
            convert(checkpoint, root / name, layout="onnx-genai", precision=precision)
            found[name] = root / name
    return found


@pytest.fixture(scope="module")
def in_floats(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama in int8, with float activations for every run."""
    out = tmp_path_factory.mktemp("floats")
    source = folders["llama-int8"]
    for path in source.iterdir():
        if path.name not in {"phirt.json", "model.onnx"}:
            (out / path.name).write_bytes(path.read_bytes())
    model = onnx.load(source / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(model, out / "model.onnx")
    return out


def load(folder: Path, **extra: Any) -> OrtModel:
    backend = OnnxRuntimeBackend()
    artifact = read_folder(folder, formats=backend.formats).artifact
    return backend.load(artifact, "cpu", LoadOptions(extra=extra))


def keys_of(model: OrtModel, ids: list[int], *parts: int, row: int = 0) -> FloatArray:
    """Keys of all layers after a prompt in parts, in a row of a pool."""
    pool = model.new_pool(slots=row + 1, capacity=len(ids), expected_length=4)
    sessions = [pool.acquire() for _ in range(row + 1)]
    for part in np.split(np.array(ids), np.cumsum(parts)):
        sessions[row].prefill(part.tolist(), needs_logits=False)
    found = np.stack([layer.key for layer in sessions[row].export_kv().layers])
    pool.close()
    return found


@pytest.mark.parametrize(("parts", "row"), [((), 0), ((20,), 0), ((16, 16), 1)])
def test_keys_and_values_are_those_of_float_activations(folders, in_floats, parts, row):
    ids = random_ids(48)
    ours = keys_of(load(folders["llama-int8"], float_prefill_from=LEAST), ids, *parts, row=row)
    floats = keys_of(load(in_floats), ids)
    rounded = keys_of(load(folders["llama-int8"]), ids)
    assert np.abs(ours - floats).max() < 1e-5
    # Else nothing was shown.
    assert np.abs(rounded - floats).max() > 1e-4


def test_the_last_token_is_as_ever(folders, in_floats):
    """The LM head is that of the model; the keys behind it are not."""
    ids = random_ids(40)
    model = load(folders["llama-int8"], float_prefill_from=LEAST)
    session = model.new_session(max_length=64, expected_length=40)
    found = session.prefill(ids).numpy()
    assert found.shape == (1, model.info.vocab_size)
    assert session.length == 40
    floats = load(in_floats).new_session(max_length=64, expected_length=40)
    floats.prefill(ids[:-1])
    other = load(folders["llama-int8"]).new_session(max_length=64, expected_length=40)
    other.import_kv(_renamed(floats.export_kv(), model))
    assert np.abs(found - other.decode(ids[-1]).numpy()).max() < 1e-4
    # It goes on from there, and the judging of guesses is as ever.
    assert session.decode(3).numpy().shape == (1, model.info.vocab_size)
    assert session.verify(ids[:LEAST]).numpy().shape == (LEAST, model.info.vocab_size)


def _renamed(cache: Any, model: OrtModel) -> Any:
    return type(cache)(cache.layers, cache.length, model.info.weights_id, cache.regime)


def test_short_prompts_are_not_concerned(folders):
    ids = random_ids(LEAST)
    found = keys_of(load(folders["llama-int8"], float_prefill_from=LEAST + 1), ids)
    assert np.array_equal(found, keys_of(load(folders["llama-int8"]), ids))


def test_runs_of_few_tokens(folders, in_floats):
    model = load(folders["llama-int8"], float_prefill_from=LEAST, tokens_per_run=7)
    ids = random_ids(48)
    assert np.abs(keys_of(model, ids) - keys_of(load(in_floats), ids)).max() < 1e-5


@pytest.mark.parametrize(
    "extra", [{"float_prefill_from": LEAST}, {"tokens_per_run": 7}, {}], ids=str
)
@pytest.mark.parametrize("parts", [(33,), (20, 13), (10, 39, 1, 30)])
def test_a_buffer_that_grows_within_a_call(folders, monkeypatch, extra, parts):
    """One more token than there is room for, and what was there before is kept."""
    monkeypatch.setattr(cache, "_BUCKET", 16)
    ids = random_ids(sum(parts))
    model = load(folders["llama-int8"], **extra)
    rows = []
    for expected_length in (0, 96):
        session = model.new_session(max_length=96, expected_length=expected_length)
        for part in np.split(np.array(ids), np.cumsum(parts)[:-1]):
            logits = session.prefill(part.tolist())
        rows.append(logits.numpy())
    assert np.abs(rows[0] - rows[1]).max() < 1e-4


def test_a_long_session_that_begins(folders):
    """Its first call chooses LongRoPE's factors by its own length, and stays whole."""
    ids = random_ids(48)
    plain = load(folders["phi3-int8"])
    model = load(folders["phi3-int8"], float_prefill_from=LEAST)
    rows = []
    for each in (plain, model):
        session = each.new_session(max_length=64, expected_length=48)
        rows.append(session.prefill(ids).numpy())
    assert np.array_equal(rows[0], rows[1])


def test_a_graph_in_floats_needs_no_other(folders):
    ids = random_ids(40)
    assert float_graph((folders["llama-fp32"] / "model.onnx").read_bytes()) is None
    model = load(folders["llama-fp32"], float_prefill_from=LEAST)
    assert np.array_equal(keys_of(model, ids), keys_of(load(folders["llama-fp32"]), ids))


def test_a_graph_whose_cache_grows(folders, tmp_path):
    source, out = folders["llama-int8"], tmp_path / "growing"
    out.mkdir()
    for path in source.iterdir():
        if path.name != "phirt.json":
            (out / path.name).write_bytes(path.read_bytes())
    config = (out / "genai_config.json").read_text()
    assert '"past_present_share_buffer": true' in config
    config = config.replace('share_buffer": true', 'share_buffer": false')
    (out / "genai_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"float_prefill_from.*Load without it"):
        load(out, float_prefill_from=LEAST)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "96"])
def test_not_a_number_of_tokens(folders, value):
    with pytest.raises(ValueError, match="must be a positive integer"):
        load(folders["llama-int8"], float_prefill_from=value)

"""Every runtime speaks every architecture as transformers does: greedy, in fp32, 48 tokens.

The tokens of each runtime are judged in a full forward without a cache over prompt and
answer, so that one close call does not hide what comes after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from phirt.build.convert import convert
from phirt.dispatch.registry import get_backend
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.protocols import Accept, Backend, LoadedModel, LoadOptions
from phirt.testing import DENSE_ARCHITECTURES, TINY_ARCHITECTURES, write_tiny_checkpoint
from phirt.testing.subject import check_greedy, random_ids, read_artifact
from tests.installed import leave_out
from tests.tiny_oracle import TransformersOracle

RUNTIMES = ("onnxruntime", "onnxruntime-genai", "openvino", "mlx", "transformers", "reference")
# What is there to be judged: phirt's converter writes dense decoders, so that a mixture of
# experts runs where its checkpoint is read as it is.
MIXTURES = ("mlx", "transformers")
CELLS = [
    (architecture, backend)
    for architecture in TINY_ARCHITECTURES
    for backend in (RUNTIMES if architecture in DENSE_ARCHITECTURES else MIXTURES)
]
LONG_ROPE = ("phi3", "phimoe")
# On either side of a window of 16, and of LongRoPE's boundary of 32, which three cross.
PROMPTS = (20, 31, 32, 33, 60)
NEW_TOKENS = 48
TOLERANCE = 1e-3

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of an architecture."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(architecture: str) -> Path:
        folder = write_tiny_checkpoint(root / architecture, architecture)
        if architecture == "phimoe":
            give_long_rope(folder / "config.json")
        return folder

    return get


def give_long_rope(path: Path) -> None:
    """Turn plain rotary positions into LongRoPE, as Phi-3.5-MoE has it."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    config["rope_scaling"] = {
        "type": "longrope",
        "original_max_position_embeddings": 32,
        "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.1, 1.4, 1.9, 2.6, 3.4, 4.3, 5.2, 6.0],
        "short_mscale": 1.2,
        "long_mscale": 1.2,
    }
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def oracle(checkpoint) -> Callable[[str], TransformersOracle]:
    """transformers with the tiny checkpoint of an architecture."""
    known: dict[str, TransformersOracle] = {}

    def get(architecture: str) -> TransformersOracle:
        if architecture not in known:
            known[architecture] = TransformersOracle(checkpoint(architecture))
        return known[architecture]

    return get


def load(backend: Backend, checkpoint: Path, out: Path) -> LoadedModel:
    """The checkpoint on a backend, in the layout that it likes best."""
    folder = checkpoint
    if "safetensors" not in backend.formats:
        out.mkdir()
        convert(checkpoint, out, layout=backend.formats[0], precision="fp32")
        folder = out
    artifact = read_artifact(backend, folder)
    assert backend.accepts(artifact, "cpu") == Accept()
    return backend.load(artifact, "cpu", LoadOptions(threads=1))


@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_greedy(architecture, name, checkpoint, oracle, tmp_path):
    """Every token is transformers' best, but where two are within the tolerance."""
    backend = get_backend(name)
    if any(found.status == "missing" for found in backend.probe()):
        leave_out(name)
    model = load(backend, checkpoint(architecture), tmp_path / "converted")
    assert model.info.rope_boundary == (32 if architecture in LONG_ROPE else None)
    params = GenerationParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    faults = []
    for length in PROMPTS:
        prompt = random_ids(length, seed=length)
        loop = DecodeLoop(model, prompt, params, defaults=GenerationDefaults())
        ids = prompt + [step.token_id for step in loop]
        assert len(ids) == length + NEW_TOKENS
        faults += [
            f"prompt of {length}: {fault}"
            for fault in check_greedy(
                oracle(architecture).logits,
                ids,
                prompt_length=length,
                rope_boundary=model.info.rope_boundary,
                tolerance=2 * TOLERANCE,  # Either of two logits may be off by one.
            )
        ]
    model.close()
    assert not faults, f"{name} x {architecture}: " + "\n".join(faults)

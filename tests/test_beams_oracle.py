"""Beam search against `generate` of transformers, in fp32 on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.backends.onnxruntime_genai import OnnxRuntimeGenaiBackend
from phirt.backends.openvino import OpenVinoBackend
from phirt.backends.reference import ReferenceBackend
from phirt.backends.transformers import TransformersBackend
from phirt.build.convert import convert
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.sampling_logprobs import log_softmax_at
from phirt.generation.several import Completion, SeveralSequences
from phirt.protocols import Backend, LoadedModel, LoadOptions
from phirt.testing import write_tiny_checkpoint
from phirt.testing.subject import Oracle, random_ids, read_artifact
from tests.installed import leave_out, require
from tests.tiny_oracle import TransformersOracle

require("torch", "transformers")

pytestmark = pytest.mark.oracle

NEW = 10
PROMPT = random_ids(12, seed=3)
PENALTIES: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
)


def cases() -> list[dict[str, Any]]:
    """Every length penalty with every early_stopping; beams, penalties and ends take turns."""
    found: list[dict[str, Any]] = []
    for length_penalty in (-1.0, 0.0, 1.0, 2.0):
        for early_stopping in (True, False, "never"):
            for ends in (0, 1, 3):
                number = len(found)
                found.append(
                    {
                        "num_beams": 2 + number % 4,
                        "length_penalty": length_penalty,
                        "early_stopping": early_stopping,
                        "ends": ends,
                        **PENALTIES[(number // 4) % 3],
                    }
                )
    return found


class Never:
    """No stop string."""

    def add(self, token_id: int) -> bool:
        return False

    def copy(self) -> Never:
        return self


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("beams") / "llama", "llama", seed=7)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Callable[..., list[tuple[list[int], float | None]]]:
    """What transformers generates, each case once: ids after the prompt, and the score."""
    import torch

    network = TransformersOracle(checkpoint)._network
    known: dict[str, list[tuple[list[int], float | None]]] = {}

    def get(ends: Sequence[int], **options: Any) -> list[tuple[list[int], float | None]]:
        key = repr((ends, sorted(options.items())))
        if key not in known:
            prompt = torch.tensor([PROMPT])
            with torch.inference_mode():
                found = network.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    max_new_tokens=NEW,
                    eos_token_id=list(ends) or None,
                    pad_token_id=-1,
                    return_dict_in_generate=True,
                    output_scores=True,
                    num_return_sequences=options["num_beams"],
                    **options,
                )
            scores = found.sequences_scores.tolist()
            rows = [row[len(PROMPT) :] for row in found.sequences.tolist()]
            ids = [[token for token in row if token != -1] for row in rows]
            known[key] = list(zip(ids, scores, strict=True))
        return known[key]

    return get


def load(backend: Backend, checkpoint: Path, out: Path) -> LoadedModel:
    """The checkpoint on a backend, in the layout that it likes best."""
    if any(found.status == "missing" for found in backend.probe()):
        leave_out(backend.name)
    folder = checkpoint
    if "safetensors" not in backend.formats:
        out.mkdir()
        convert(checkpoint, out, layout=backend.formats[0], precision="fp32")
        folder = out
    return backend.load(read_artifact(backend, folder), "cpu", LoadOptions(threads=1))


@pytest.fixture(scope="module", params=[ReferenceBackend, OnnxRuntimeBackend])
def model(request, checkpoint, tmp_path_factory):
    loaded = load(request.param(), checkpoint, tmp_path_factory.mktemp("beams") / "converted")
    assert loaded.capabilities.batch
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def likely(checkpoint):
    """Tokens that beams choose at different steps, to end them with."""
    backend = ReferenceBackend()
    model = backend.load(read_artifact(backend, checkpoint), "cpu", LoadOptions())
    found = ours(model, (), num_beams=5)
    return [found[0].steps[4].token_id, found[2].steps[2].token_id, found[1].steps[7].token_id]


def ours(model: LoadedModel, ends: Sequence[int], **options: Any) -> list[Completion]:
    params = GenerationParams(
        max_new_tokens=NEW,
        stop_token_ids=ends,
        ignore_eos=True,
        n=options["num_beams"],
        **options,
    )
    request = SeveralSequences(model, PROMPT, params, defaults=GenerationDefaults())
    return request.run(Never())


def compare(found: Sequence[Completion], expected, *, length_penalty: float = 1.0) -> None:
    assert [[step.token_id for step in one.steps] for one in found] == [ids for ids, _ in expected]
    for one, (ids, score) in zip(found, expected, strict=True):
        # A penalty below 0 multiplies the sum, and its rounding in float32 with it.
        tolerance = 1e-4 * max(1.0, len(ids) ** -length_penalty)
        assert one.score == pytest.approx(score, abs=tolerance)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_sequences_and_scores(case, model, theirs, likely):
    options = dict(case)
    ends = likely[: options.pop("ends")]
    expected = theirs(ends, **options)
    compare(ours(model, ends, **options), expected, length_penalty=case["length_penalty"])


def test_sequences_end_at_different_lengths(theirs, likely):
    """Else the cases above would say little about what a length penalty does."""
    lengths = {
        len(ids)
        for early_stopping in (True, False, "never")
        for ids, _ in theirs(likely, num_beams=5, length_penalty=0.0, early_stopping=early_stopping)
    }
    assert len(lengths) > 2
    assert min(lengths) < NEW


def test_fewer_are_the_best_of_more(model, theirs, likely):
    expected = theirs(likely, num_beams=4)
    params = GenerationParams(
        num_beams=4, n=2, max_new_tokens=NEW, stop_token_ids=likely, ignore_eos=True
    )
    found = SeveralSequences(model, PROMPT, params, defaults=GenerationDefaults()).run(Never())
    compare(found, expected[:2])


def test_min_new_tokens(model, theirs, likely):
    expected = theirs(likely, num_beams=3, min_new_tokens=5)
    compare(ours(model, likely, num_beams=3, min_new_tokens=5), expected)


def test_suppressed_tokens(model, theirs, likely):
    expected = theirs((), num_beams=3, suppress_tokens=likely)
    compare(ours(model, (), num_beams=3, suppress_tokens=likely), expected)


def test_one_beam_is_greedy(model, checkpoint):
    import torch

    network = TransformersOracle(checkpoint)._network
    prompt = torch.tensor([PROMPT])
    expected = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        num_beams=1,
        do_sample=False,
        max_new_tokens=NEW,
    )[0, len(PROMPT) :].tolist()
    params = GenerationParams(num_beams=1, max_new_tokens=NEW)
    loop = DecodeLoop(model, PROMPT, params, defaults=GenerationDefaults())
    assert [step.token_id for step in loop] == expected


@pytest.mark.parametrize("backend", [ReferenceBackend, OnnxRuntimeBackend, OpenVinoBackend])
@pytest.mark.parametrize("architecture", ["phi3", "mistral"])
def test_across_the_boundary_of_longrope_and_in_a_window(architecture, backend, tmp_path):
    """Each score is that of whole passes without a cache, on either side of 32 tokens."""
    checkpoint = write_tiny_checkpoint(tmp_path / architecture, architecture, seed=7)
    oracle = Oracle(checkpoint)
    model = load(backend(), checkpoint, tmp_path / "converted")
    assert (model.info.rope_boundary, model.info.window) != (None, None)
    prompt = random_ids(28, seed=3)
    params = GenerationParams(num_beams=3, n=3, max_new_tokens=NEW, length_penalty=0.0)
    found = SeveralSequences(model, prompt, params, defaults=GenerationDefaults()).run(Never())
    for one in found:
        ids, total = list(prompt), 0.0
        for step in one.steps:
            total += float(log_softmax_at(oracle.logits(ids)[-1], [step.token_id])[0])
            ids.append(step.token_id)
        assert one.score == pytest.approx(total, abs=1e-3)
    model.close()


@pytest.mark.parametrize("backend", [OpenVinoBackend, TransformersBackend, OnnxRuntimeGenaiBackend])
def test_a_backend_without_pools(backend, checkpoint, theirs, likely, tmp_path):
    """Each beam has a session of its own, and the tokens are the same."""
    model = load(backend(), checkpoint, tmp_path / "converted")
    assert not model.capabilities.batch
    options = {"num_beams": 3, "length_penalty": 0.0}
    found = ours(model, likely, **options)
    model.close()
    compare(found, theirs(likely, **options), length_penalty=0.0)

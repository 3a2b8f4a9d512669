"""Every architecture's GGUF file, against the checkpoint that it was made of and llama.cpp.

transformers says what a checkpoint means; llama.cpp says what a file means. Where they differ,
phirt computes what transformers computes, and the tests below say where.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.convert import convert
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.types import FloatArray
from tests.build.gguf.converter import convert_to_gguf
from tests.build.gguf.folders import MODELS, WINDOW, write_folder
from tests.build.gguf.llama_cpp import LlamaCpp
from tests.build.onnx.oracle import pretrained, transformers_logits
from tests.build.onnx.runtime import OnnxDecoder, written

pytestmark = pytest.mark.oracle

TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 400)]

# llama.cpp does not apply a window to llama, and has switched phi3's off.
WINDOWED = ["mistral-window", "phi3-window"]


@dataclass(frozen=True)
class Case:
    """One model: its folder and the files made of it."""

    name: str
    folder: Path

    def file(self, encoding: str) -> Path:
        path = self.folder / f"{encoding}.gguf"
        return path if path.exists() else convert_to_gguf(self.folder, path, encoding=encoding)

    def decoder(self, encoding: str) -> OnnxDecoder:
        """The graph that phirt makes of a file."""
        path = self.folder / encoding / "model.onnx"
        if path.exists():
            return OnnxDecoder(path)
        path.parent.mkdir()
        with GgufCheckpoint(self.file(encoding)) as checkpoint:
            return written(checkpoint, path.parent)


class Cases:
    """Models and what transformers makes of them, each made once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._oracles: dict[str, Any] = {}

    def case(self, name: str) -> Case:
        folder = self._folder / name
        if not folder.exists():
            write_folder(folder, MODELS[name])
        return Case(name, folder)

    def expected(self, name: str, length: int, *, first: int = 0) -> FloatArray:
        if name not in self._oracles:
            self._oracles[name] = pretrained(self.case(name).folder)
        return transformers_logits(self._oracles[name], TOKENS[first : first + length])


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    return Cases(tmp_path_factory.mktemp("gguf-architectures"))


def difference(found: FloatArray, expected: FloatArray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


def same_choice(ours: FloatArray, theirs: FloatArray, *, tie: float) -> bool:
    """Whether the largest logits of every position are of the same token.

    Args:
        ours: (positions, vocabulary).
        theirs: The same.
        tie: Logits of theirs that lie no further apart count as equal.
    """
    chosen = np.take_along_axis(theirs, ours.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return bool((theirs.max(axis=-1) - chosen <= tie).all())


@pytest.mark.parametrize("name", MODELS)
class TestCheckpoint:
    """The file is read as the folder is."""

    def test_configuration(self, cases, name):
        case = cases.case(name)
        with SafetensorsCheckpoint(case.folder) as checkpoint:
            expected = checkpoint.config
        with GgufCheckpoint(case.file("F32")) as checkpoint:
            found = checkpoint.config
        for rope in ("rope", "local_rope"):
            ours, theirs = getattr(found, rope), getattr(expected, rope)
            if theirs is None or (found.window is None and rope == "local_rope"):
                continue
            assert ours.dim == theirs.dim
            assert ours.theta == theirs.theta
            assert ours.boundary == theirs.boundary
            assert ours.attention_factor == pytest.approx(theirs.attention_factor, rel=1e-6)
            for regime in ("short", "long"):
                np.testing.assert_allclose(
                    ours.frequencies(regime), theirs.frequencies(regime), rtol=1e-6
                )
        assert found.window == expected.window
        layers = range(found.num_layers)
        assert [found.window_of(i) for i in layers] == [expected.window_of(i) for i in layers]
        assert found.scale == pytest.approx(expected.scale)
        assert found.embedding_scale == pytest.approx(expected.embedding_scale)
        assert found.context_length == expected.context_length
        assert found.tie_word_embeddings == expected.tie_word_embeddings

    @pytest.mark.parametrize("encoding", ["F32", "F16"])
    def test_tensors(self, cases, name, encoding):
        case = cases.case(name)
        with (
            SafetensorsCheckpoint(case.folder) as folder,
            GgufCheckpoint(case.file(encoding)) as file,
        ):
            assert set(file.names()) == set(folder.names())
            for tensor in folder.names():
                found, expected = file.tensor(tensor), folder.tensor(tensor)
                assert found.shape == expected.shape
                # Gemma's norms, of at most 4, are stored with 1 added: that rounds once.
                tolerance = 2**-22 if tensor.endswith("norm.weight") else 0
                np.testing.assert_allclose(
                    found.float32(), expected.float32(), rtol=0, atol=tolerance, err_msg=tensor
                )


class TestTransformers:
    """The graph of a file computes what transformers makes of the checkpoint."""

    @pytest.mark.parametrize("encoding", ["F32", "F16"])
    @pytest.mark.parametrize("name", MODELS)
    def test_every_position_of_a_prompt(self, cases, name, encoding):
        decoder = cases.case(name).decoder(encoding)
        for length in (1, 20, 100):
            expected = cases.expected(name, length)
            assert np.abs(expected).max() > 5, "the logits are too small to tell anything"
            assert difference(decoder.logits(TOKENS[:length]), expected) < 1e-3

    @pytest.mark.parametrize(
        ("name", "lengths"), [("phi3", [31, 32, 33, 60]), ("phi3-256", [255, 256, 257, 400])]
    )
    def test_long_factors_begin_beyond_the_original_context(self, cases, name, lengths):
        decoder = cases.case(name).decoder("F32")
        for length in lengths:
            expected = cases.expected(name, length)
            assert difference(decoder.logits(TOKENS[:length]), expected) < 1e-3


class TestFolder:
    """The folder of safetensors that is made of a file is the checkpoint, for transformers too."""

    @pytest.mark.parametrize("name", ["llama", "phi3", "phi3-window", "gemma3", "gemma3-full"])
    def test_logits(self, cases, name, tmp_path):
        convert(cases.case(name).file("F32"), tmp_path, layout="safetensors", precision="fp32")
        model = pretrained(tmp_path)
        for length in (20, 100):
            found = transformers_logits(model, TOKENS[:length])
            assert difference(found, cases.expected(name, length)) < 1e-3


class TestLlamaCpp:
    """llama.cpp computes the same logits of the same file.

    With weights in half precision it rounds to that what it multiplies by them, too, and GELU
    it looks up in a table of halves.
    """

    def compare(self, case: Case, lengths: list[int], *, context: int = 256) -> None:
        rounds_gelu = case.name.startswith("gemma3")
        for encoding in ("F32", "F16"):
            bound, tie = (0.2, 0.1) if encoding == "F16" else (1e-3, 0.0)
            if rounds_gelu:
                bound, tie = max(bound, 0.05), max(tie, 0.05)
            decoder = case.decoder(encoding)
            with LlamaCpp(case.file(encoding), context=context) as theirs:
                for first, length in enumerate(lengths):
                    tokens = TOKENS[first : first + length]
                    ours, expected = decoder.logits(tokens), theirs.logits(tokens)
                    assert difference(ours, expected) < bound
                    assert same_choice(ours, expected, tie=tie)

    @pytest.mark.parametrize(
        "name", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-full"]
    )
    def test_at_every_position_of_several_prompts(self, cases, name):
        self.compare(cases.case(name), [1, 20, 60, 100])

    @pytest.mark.parametrize("name", WINDOWED)
    def test_within_a_window(self, cases, name):
        self.compare(cases.case(name), [1, 10, WINDOW])

    @pytest.mark.parametrize("name", WINDOWED)
    def test_beyond_a_window_it_attends_to_everything(self, cases, name):
        """There, transformers is right: the window is the checkpoint's own."""
        case, length = cases.case(name), WINDOW + 1
        with LlamaCpp(case.file("F32")) as theirs:
            found = theirs.logits(TOKENS[:length])
        expected = cases.expected(name, length)
        assert difference(found[:WINDOW], expected[:WINDOW]) < 1e-3
        assert difference(found[WINDOW:], expected[WINDOW:]) > 0.1

    @pytest.mark.parametrize("name", ["phi3", "phi3-partial"])
    def test_long_factors(self, cases, name):
        """Its cache has 256 tokens, more than the original 32, so every length gets them."""
        self.compare(cases.case(name), [33, 60, 100])

    @pytest.mark.parametrize(("context", "lengths"), [(256, [1, 100, 256]), (512, [257, 390])])
    def test_short_and_long_factors(self, cases, context, lengths):
        self.compare(cases.case("phi3-256"), lengths, context=context)

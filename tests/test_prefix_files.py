"""A prompt's cache is written by one model, and another goes on from it."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest

import phirt
from phirt.errors import (
    ContextLengthError,
    ModelFormatError,
    ModelNotFoundError,
    SessionClosedError,
    UnsupportedModelError,
)
from phirt.generation.prefix import PrefixCache
from phirt.prefix_files import load_prefix, save_prefix
from phirt.testing.subject import random_ids
from tests.backends.test_paired import CachedModel
from tests.fakes import FakeModel
from tests.installed import require

PREFIX = [token % 290 for token in random_ids(60)]
PROMPT = [*PREFIX, 5, 6, 7, 8]
SETTINGS = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _one_store(home, monkeypatch):
    monkeypatch.setenv("PHIRT_HOME", str(home))


@contextmanager
def loaded(tiny_gguf, *, precision="fp32", **options):
    options = {"backend": "onnxruntime"} | options
    with phirt.load(tiny_gguf, precision=precision, **options) as model:
        yield model


@pytest.fixture
def model(tiny_gguf):
    require("onnxruntime")
    with loaded(tiny_gguf) as model:
        yield model


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefix.kv"


class TestAModel:
    def test_goes_on_from_what_another_saved(self, model, path, tiny_gguf):
        expected = model.generate(PROMPT, **SETTINGS)
        assert model.save_prefix(PREFIX, path) == 60
        with loaded(tiny_gguf) as other:
            assert other.load_prefix(str(path)) == 60
            found = other.generate(PROMPT, **SETTINGS)
        assert found.usage.cached_tokens == 60
        assert found.token_ids == expected.token_ids

    @pytest.mark.parametrize("backend", ["openvino", "mlx", "transformers", "reference"])
    def test_goes_on_on_another_runtime_with_the_same_weights(
        self, model, path, tiny_gguf, backend
    ):
        require(*([] if backend == "reference" else [backend]))
        expected = model.generate(PROMPT, **SETTINGS)
        model.save_prefix(PREFIX, path)
        with loaded(tiny_gguf, backend=backend) as other:
            other.load_prefix(path)
            found = other.generate(PROMPT, **SETTINGS)
        assert found.usage.cached_tokens == 60
        assert found.token_ids == expected.token_ids

    def test_a_pair_saves_and_loads_its_own(self, model, path, tiny_gguf):
        require("openvino")
        expected = model.generate(PROMPT, **SETTINGS)
        names = {"backend": "auto", "prefill": "openvino", "decode": "onnxruntime"}
        with loaded(tiny_gguf, **names) as pair:
            pair.save_prefix(PREFIX, path)
        with loaded(tiny_gguf, **names) as pair:
            pair.load_prefix(path)
            found = pair.generate(PROMPT, **SETTINGS)
        assert found.usage.cached_tokens == 60
        assert found.token_ids == expected.token_ids

    def test_text_is_a_prefix_too(self, model, path):
        text = "A long text that many prompts begin with. " * 3
        count = model.save_prefix(text, path)
        assert count == len(model.encode(text))

    def test_what_was_saved_is_kept(self, model, path):
        model.save_prefix(PREFIX, path)
        assert model.generate(PROMPT, **SETTINGS).usage.cached_tokens == 60

    def test_what_is_kept_is_saved_without_computing_it(self, model, path, tiny_gguf):
        answer = model.generate(PROMPT, **SETTINGS)
        model.save_prefix(PROMPT + list(answer.token_ids), path)
        with loaded(tiny_gguf) as other:
            other.load_prefix(path)
            found = other.generate([*PROMPT, *answer.token_ids, 9, 10], **SETTINGS)
        assert found.usage.cached_tokens == 72

    def test_without_kept_caches_it_is_saved_and_not_loaded(self, path, tiny_gguf):
        require("onnxruntime")
        with loaded(tiny_gguf, prefix_cache_bytes=0) as model:
            model.save_prefix(PREFIX, path)
            with pytest.raises(ValueError, match="prefix_cache_bytes above 0"):
                model.load_prefix(path)

    def test_no_room_among_what_is_kept(self, model, path, tiny_gguf):
        model.save_prefix(PREFIX, path)
        with (
            loaded(tiny_gguf, prefix_cache_bytes=1000) as other,
            pytest.raises(ValueError, match="prefix_cache_bytes is 1,000"),
        ):
            other.load_prefix(path)

    def test_other_weights(self, model, path, tiny_gguf):
        model.save_prefix(PREFIX, path)
        with (
            loaded(tiny_gguf, precision="int8") as other,
            pytest.raises(UnsupportedModelError, match="weights"),
        ):
            other.load_prefix(path)

    def test_a_damaged_file(self, model, path):
        model.save_prefix(PREFIX, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(ModelFormatError, match="CRC-32"):
            model.load_prefix(path)
        with pytest.raises(ModelNotFoundError):
            model.load_prefix(path.with_name("nothing"))

    @pytest.mark.parametrize(
        ("prompt", "error"),
        [
            ([], ValueError),
            ([300], ValueError),
            ([-1], ValueError),
            ([1] * 3000, ContextLengthError),
        ],
        ids=["empty", "beyond", "negative", "long"],
    )
    def test_prompts_that_cannot_be_saved(self, model, path, prompt, error):
        with pytest.raises(error):
            model.save_prefix(prompt, path)
        assert not path.exists()

    def test_after_it_is_closed(self, path, tiny_gguf):
        require("onnxruntime")
        with loaded(tiny_gguf) as model:
            model.save_prefix(PREFIX, path)
        with pytest.raises(SessionClosedError):
            model.save_prefix(PREFIX, path)
        with pytest.raises(SessionClosedError):
            model.load_prefix(path)


IDS = [index % 8 for index in range(20)]


class TestLoadedModels:
    """Over fakes, of whose caches a token takes 8 bytes."""

    @pytest.fixture
    def prefixes(self):
        return PrefixCache(capacity_bytes=2**20, bytes_per_token=8)

    def load(self, model, prefixes, path):
        return load_prefix(model, prefixes, path, bytes_per_token=8)

    @pytest.mark.parametrize(("boundary", "limit"), [(None, 64), (20, 20), (19, 64)])
    def test_a_session_serves_any_request_of_its_rotary_regime(
        self, prefixes, path, boundary, limit
    ):
        model = CachedModel(rope_boundary=boundary)
        save_prefix(model, None, IDS, path)
        assert self.load(model, prefixes, path) == 20
        assert [most for most, _ in model.requests] == [limit, limit]
        opened = prefixes.take(model, np.array([*IDS, 1, 2]), limit=limit)
        assert opened is not None
        assert opened.session.length == 20

    def test_nothing_is_left_open(self, prefixes, path):
        model = CachedModel()
        save_prefix(model, None, IDS, path)
        assert model.sessions_open == 0

        def refuse():
            raise ValueError("of another shape")

        model.hooks = {"import": refuse}
        with pytest.raises(UnsupportedModelError, match="of another shape"):
            self.load(model, prefixes, path)
        model.hooks = {"export": refuse}
        with pytest.raises(ValueError, match="of another shape"):
            save_prefix(model, None, IDS, path)
        assert model.sessions_open == 0

    def test_a_prefix_too_short_to_be_reused(self, prefixes, path):
        model = CachedModel()
        save_prefix(model, None, IDS[:15], path)
        with pytest.raises(ValueError, match="fewer than 16"):
            self.load(model, prefixes, path)

    def test_a_runtime_without_portable_caches(self, prefixes, path):
        for call in (
            lambda: save_prefix(FakeModel(), prefixes, IDS, path),
            lambda: self.load(FakeModel(), prefixes, path),
        ):
            with pytest.raises(UnsupportedModelError, match="a fake needs none"):
                call()

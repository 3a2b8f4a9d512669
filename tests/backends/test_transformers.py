"""The transformers backend, held against transformers' own full forward without a cache."""

from __future__ import annotations

import gc
import threading
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.backends.base import HostLogits
from phirt.errors import (
    OutOfMemoryError,
    SessionClosedError,
)
from phirt.protocols import KVCache, KVLayer, LoadedModel
from phirt.testing import TINY_ARCHITECTURES, write_tiny_checkpoint
from phirt.types import FloatArray
from tests.backends.transformers_models import edit_config, load, oracle
from tests.installed import require

require("torch", "transformers")
torch = import_module("torch")
transformers = import_module("transformers")

pytestmark = pytest.mark.oracle

BOUNDARY = 32  # of the tiny phi3's LongRoPE; its context is 128
TOLERANCE = 1e-3
# Any causal language model, not only what phirt knows itself: learned positions, ALiBi, one
# key head for all, norms after attention, softcapped scores, attention sinks.
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
COMMON = SIZES | {
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 0}),
    "falcon": ("FalconConfig", {"alibi": True, "max_position_embeddings": 128}),
    "gemma2": ("Gemma2Config", COMMON | {"head_dim": 16, "sliding_window": 16}),
    "gpt_oss": (
        "GptOssConfig",
        COMMON
        | {
            "head_dim": 16,
            "sliding_window": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
}


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(2, 300, count)]


def full_forward(network: Any, ids: list[int]) -> FloatArray:
    """Logits of every position, computed at once and without a cache."""
    with torch.no_grad():
        output = network(input_ids=torch.tensor([ids]), use_cache=False)
    logits: FloatArray = output.logits[0].numpy()
    return logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for architecture in TINY_ARCHITECTURES:
        write_tiny_checkpoint(root / architecture, architecture)
    return root


@pytest.fixture(scope="module")
def llama(checkpoints: Path) -> LoadedModel:
    return load(checkpoints / "llama")


class TestAgreesWithTheFullForward:
    @pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
    def test_prefill_and_greedy_decoding(self, checkpoints: Path, architecture: str) -> None:
        """Within windows (16 tokens) and beyond, on both sides of LongRoPE's boundary."""
        model = load(checkpoints / architecture)
        network = oracle(checkpoints / architecture)
        for count in (5, 20, 31, BOUNDARY, BOUNDARY + 1, 60):
            ids = random_ids(count, seed=count)
            short = architecture == "phi3" and count <= BOUNDARY
            max_length = BOUNDARY if short else count + 48
            session = model.new_session(max_length=max_length, expected_length=count)
            rows = [session.prefill(ids).numpy()]
            while len(ids) < max_length:
                ids.append(int(rows[-1][0].argmax()))
                rows.append(session.decode(ids[-1]).numpy())
            expected = full_forward(network, ids)[count - 1 :]
            assert np.abs(np.concatenate(rows) - expected).max() < TOLERANCE
            session.close()

    @pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
    def test_chunks_and_rolling_back(self, checkpoints: Path, architecture: str) -> None:
        model = load(checkpoints / architecture)
        ids = random_ids(70)
        expected = full_forward(oracle(checkpoints / architecture), ids)
        session = model.new_session(max_length=70, expected_length=1)
        first = BOUNDARY + 1 if architecture == "phi3" else 7
        session.prefill(ids[:first])
        session.prefill(ids[first:50])
        assert np.abs(session.verify(ids[50:]).numpy() - expected[50:]).max() < TOLERANCE
        for length in (60, BOUNDARY + 1):
            session.truncate(length)
            again = session.verify(ids[length : length + 5]).numpy()
            assert np.abs(again - expected[length : length + 5]).max() < TOLERANCE

    @pytest.mark.parametrize("name", OTHERS)
    def test_any_causal_language_model(self, checkpoints: Path, tmp_path: Path, name: str) -> None:
        config_class, settings = OTHERS[name]
        settings = (
            {"bos_token_id": 0, "eos_token_id": 1}
            | ({"vocab_size": 320} if name == "gpt2" else SIZES)
            | settings
        )
        config = getattr(transformers, config_class)(**settings)
        torch.manual_seed(0)
        network = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.2)
        network.save_pretrained(tmp_path)
        tokenizer = checkpoints / "llama" / "tokenizer.json"
        (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        ids = random_ids(60)
        session = load(tmp_path).new_session(max_length=60, expected_length=20)
        first = session.prefill(ids[:20]).numpy()
        rows = [first, session.verify(ids[20:40]).numpy()]
        rows += [session.decode(token).numpy() for token in ids[40:]]
        expected = full_forward(network, ids)[19:]
        assert np.abs(np.concatenate(rows) - expected).max() < TOLERANCE

    def test_stored_half_precision_is_computed_in_float32(
        self, checkpoints: Path, tmp_path: Path
    ) -> None:
        oracle(checkpoints / "qwen2").half().save_pretrained(tmp_path)
        tokenizer = checkpoints / "qwen2" / "tokenizer.json"
        (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
        ids = random_ids(20)
        session = load(tmp_path).new_session(max_length=20, expected_length=20)
        logits = session.verify(ids).numpy()
        assert np.abs(logits - full_forward(oracle(tmp_path), ids)).max() < TOLERANCE

    def test_phimoe_beyond_its_longrope_boundary(self, tmp_path: Path) -> None:
        """transformers itself makes the frequencies of phimoe with the short factors always."""
        long = [1.1, 1.4, 1.9, 2.6, 3.4, 4.3, 5.2, 6.0]
        scaling = {
            "type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": long,
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": BOUNDARY,
        }
        phimoe = write_tiny_checkpoint(tmp_path / "phimoe", "phimoe")
        model: Any = load(
            edit_config(phimoe, rope_scaling=scaling, original_max_position_embeddings=BOUNDARY)
        )
        rotary = model.network.model.rotary_emb
        assert model.info.rope_boundary == BOUNDARY
        for count, factors, scale in ((BOUNDARY, 1.0, 1.1), (BOUNDARY + 1, long, 1.3)):
            cosines, _ = rotary(torch.zeros(1), torch.arange(count)[None])
            frequencies = 1 / (np.array(factors) * 10_000 ** (np.arange(8) / 8))
            expected = np.cos(np.arange(count)[:, None] * frequencies) * scale
            assert np.abs(cosines[0, :, :8].numpy() - expected).max() < 1e-5


class TestSessions:
    def test_a_cache_moves_to_another_session(self, llama: LoadedModel) -> None:
        ids = random_ids(20)
        session = llama.new_session(max_length=30, expected_length=20)
        session.prefill(ids)
        cache = session.export_kv()
        assert cache.layers[0].key.shape == (2, 20, 16)
        stayed = session.decode(7).numpy()
        other = llama.new_session(max_length=30, expected_length=1)
        other.import_kv(cache)
        assert other.length == 20
        assert np.array_equal(other.decode(7).numpy(), stayed)

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (KVLayer(0, *[np.zeros((2, 4, 8), np.float32)] * 2), "shapes"),
            (KVLayer(1, *[np.zeros((2, 3, 16), np.float32)] * 2), "begins at position 1"),
        ],
    )
    def test_a_cache_that_does_not_fit_is_refused(
        self, llama: LoadedModel, layer: KVLayer, reason: str
    ) -> None:
        session = llama.new_session(max_length=30, expected_length=1)
        cache = KVCache((layer, layer), 4, llama.info.weights_id)
        with pytest.raises(ValueError, match=reason):
            session.import_kv(cache)
        with pytest.raises(ValueError, match="1 layers"):
            session.import_kv(KVCache((layer,), 4, llama.info.weights_id))
        session.prefill([1, 2])  # and the session is as it was

    def test_interrupt_ends_a_call_between_two_layers(self, checkpoints: Path) -> None:
        model: Any = load(checkpoints / "llama")
        session = model.new_session(max_length=30, expected_length=10)
        second = model.network.model.layers[1]
        second.register_forward_pre_hook(lambda *_: session.interrupt())
        with pytest.raises(SessionClosedError, match="interrupted"):
            session.prefill([1, 2, 3])
        with pytest.raises(SessionClosedError):
            session.decode(1)

    def test_the_largest_logits_are_those_of_the_whole_row(self, llama: LoadedModel) -> None:
        session = llama.new_session(max_length=10, expected_length=10)
        logits = session.verify(random_ids(10))
        expected = HostLogits(logits.numpy()).top(7)
        found = logits.top(7)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.values, expected.values)
        assert np.allclose(found.logsumexp, expected.logsumexp, atol=1e-5)
        for k in (0, 321):
            with pytest.raises(ValueError, match="vocabulary"):
                logits.top(k)

    def test_equal_logits_come_by_ascending_id(self, llama: LoadedModel) -> None:
        session: Any = llama.new_session(max_length=10, expected_length=10)
        logits: Any = session.prefill([1])
        logits._values = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0]])
        assert logits.top(4).ids.tolist() == [[1, 2, 4, 3]]

    def test_too_much_memory_is_a_typed_error(self, llama: LoadedModel) -> None:
        with pytest.raises(OutOfMemoryError, match="KV cache for 1000000000000 tokens"):
            llama.new_session(max_length=10**12, expected_length=10**12)

    def test_threads_are_set_for_a_call_only(self, checkpoints: Path) -> None:
        before = torch.get_num_threads()
        model: Any = load(checkpoints / "llama", threads=before + 1)
        seen = []
        model.network.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
        model.new_session(max_length=4, expected_length=4).prefill([1])
        assert seen == [before + 1]
        assert torch.get_num_threads() == before

    def test_threads_of_two_models_at_once_leave_the_process_as_it_was(
        self, checkpoints: Path
    ) -> None:
        before = torch.get_num_threads()
        models: list[Any] = [load(checkpoints / "llama", threads=before + n) for n in (1, 2)]
        # Each begins during the other's call, and the first to begin ends first.
        inside = [threading.Event(), threading.Event()]

        def first(*_: object) -> None:
            inside[0].set()
            inside[1].wait(timeout=30)

        def second(*_: object) -> None:
            inside[1].set()
            ended.wait(timeout=30)

        ended = threading.Event()
        for model, hook in zip(models, (first, second), strict=True):
            model.network.register_forward_pre_hook(hook)

        def call(index: int) -> None:
            session = models[index].new_session(max_length=8, expected_length=8)
            if index:
                inside[0].wait(timeout=30)
            session.prefill([1, 2])
            if index == 0:
                ended.set()

        threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        found: list[int] = []
        fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert [torch.get_num_threads(), *found] == [before, before]

    def test_closing_frees_the_weights(self, checkpoints: Path) -> None:
        model: Any = load(checkpoints / "llama")
        session = model.new_session(max_length=4, expected_length=4)
        weights = weakref.ref(model.network.model.embed_tokens.weight)
        model.close()
        session.prefill([1])  # the last session keeps them
        session.close()
        gc.collect()
        assert weights() is None

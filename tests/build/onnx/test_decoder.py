"""The decoder graph: held against transformers, and against itself in other precisions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import FORMAT_PRECISIONS, Precision
from phirt.build.recipe import Recipe
from phirt.errors import UnsupportedModelError
from phirt.models.rotary import Rotary
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import random_llama, tiny
from tests.build.onnx.oracle import transformers_logits, transformers_model
from tests.build.onnx.runtime import mean_kl, written

TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 96, 40)]

VARIANTS = {
    "grouped heads": tiny(),
    "one kv head": tiny(num_kv_heads=1),
    "as many kv heads as heads": tiny(num_kv_heads=4),
    "wide heads": tiny(head_size=32, rope=Rotary(theta=10_000.0, dim=32)),
    "one layer": tiny(num_layers=1),
    "untied": tiny(tie_word_embeddings=False),
    "rope factors": tiny(
        rope=Rotary(theta=10_000.0, dim=16, factors=np.array([1, 1, 2, 3, 5, 8, 8, 8], np.float32))
    ),
    "large theta": tiny(rope=Rotary(theta=500_000.0, dim=16)),
    "window": tiny(windows=(7, 7)),
    "large epsilon": tiny(rms_norm_eps=0.1),
}


@pytest.mark.oracle
class TestAgainstTransformers:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_fp32(self, variant, tmp_path):
        checkpoint = random_llama(VARIANTS[variant])
        expected = transformers_logits(transformers_model(checkpoint), TOKENS)
        found = written(checkpoint, tmp_path).logits(TOKENS)
        assert np.abs(expected).max() > 1, "the logits are too small to tell anything"
        assert np.abs(found - expected).max() < 1e-4

    @pytest.mark.parametrize("encoding", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_exact(self, encoding, tied, tmp_path):
        checkpoint = random_llama(tiny(tie_word_embeddings=tied), encoding=encoding)
        expected = transformers_logits(transformers_model(checkpoint), TOKENS)
        decoder = written(checkpoint, tmp_path, precision=Precision.EXACT)
        for chunk in (None, 1):  # Many rows and one row are different kernels.
            found = decoder.logits(TOKENS, chunk=chunk)
            assert np.abs(found - expected).max() < 1e-3


# ONNX Runtime's attention rotates heads, and parts of them, of multiples of 16.
ODD_HEADS = {
    "heads of 24": tiny(head_size=24, rope=Rotary(theta=10_000.0, dim=24)),
    "12 of 24, normed": tiny(head_size=24, qk_norm=True, rope=Rotary(theta=10_000.0, dim=12)),
    "16 of 32": tiny(head_size=32),
}


class TestAgainstTheFormulas:
    @pytest.mark.parametrize(
        "config", [*DECODERS.values(), *ODD_HEADS.values()], ids=[*DECODERS, *ODD_HEADS]
    )
    def test_prefill_and_decode(self, config, tmp_path):
        checkpoint = random_decoder(config)
        expected = numpy_logits(checkpoint, TOKENS)
        decoder = written(checkpoint, tmp_path)
        assert np.abs(decoder.logits(TOKENS) - expected).max() < 1e-4
        decoder.reset()
        steps = [decoder.run(TOKENS[:35]), *(decoder.run([token]) for token in TOKENS[35:])]
        assert np.abs(np.concatenate(steps) - expected[34:]).max() < 1e-4

    @pytest.mark.parametrize("config", ODD_HEADS.values(), ids=ODD_HEADS)
    def test_rows_of_other_lengths_have_other_positions(self, config, tmp_path):
        decoder = written(random_decoder(config), tmp_path)
        lengths, alone, caches = (5, 9), [], []
        for length in lengths:
            decoder.reset()
            decoder.run(TOKENS[:length])
            padding = ((0, 0), (0, 0), (0, 9 - length), (0, 0))
            caches.append({name: np.pad(cache, padding) for name, cache in decoder.cache.items()})
            alone.append(decoder.run([7])[0])
        feeds = {name: np.concatenate([c[name] for c in caches]) for name in caches[0]}
        feeds["input_ids"] = np.full((2, 1), 7, np.int64)
        feeds["attention_mask"] = np.array([[i <= n for i in range(10)] for n in lengths], np.int64)
        (together,) = decoder.session.run(["logits"], feeds)
        np.testing.assert_allclose(together[:, 0], np.stack(alone), atol=1e-5)


def test_longrope_in_a_context_that_ends_at_the_boundary_has_one_table(tmp_path):
    config = replace(DECODERS["phi3"], context_length=32)
    checkpoint = random_decoder(config)
    decoder = written(checkpoint, tmp_path)
    expected = numpy_logits(checkpoint, TOKENS[:32])
    assert np.abs(decoder.logits(TOKENS[:32]) - expected).max() < 1e-4
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    tables = {t.name: tuple(t.dims) for t in graph.initializer if "_cache" in t.name}
    assert tables == {"cos_cache": (32, 8), "sin_cache": (32, 8)}


class TestPositions:
    @pytest.mark.parametrize("precision", FORMAT_PRECISIONS["onnx-genai"])
    def test_the_last_position_alone_has_logits_unless_more_are_asked_for(
        self, precision, tmp_path
    ):
        decoder = written(random_llama(), tmp_path, precision=precision)
        everything = decoder.logits(TOKENS)
        assert everything.shape == (40, 96)
        for keep in (None, 1, 3, 40):
            decoder.reset()
            kept = decoder.run(TOKENS, keep=keep)
            assert kept.shape == (keep or 1, 96)
            # The last layer's MLP runs on kept positions only; one row is another kernel.
            tolerance = 1e-4 if precision in {Precision.FP32, Precision.EXACT} else 0.1
            np.testing.assert_allclose(kept, everything[-(keep or 1) :], atol=tolerance)

    @pytest.mark.parametrize("windows", [(), (7, 7)])
    def test_decode_after_prefill_equals_one_prefill(self, windows, tmp_path):
        decoder = written(random_llama(tiny(windows=windows)), tmp_path)
        whole = decoder.logits(TOKENS)
        decoder.reset()
        steps = [decoder.run(TOKENS[:25], keep=1), *(decoder.run([t]) for t in TOKENS[25:])]
        np.testing.assert_allclose(np.concatenate(steps), whole[24:], atol=1e-4)

    @pytest.mark.parametrize(
        ("precision", "tolerance"),
        [
            (Precision.INT8, 0),
            # MatMulNBits adds the blocks of one row up in another order than those of several:
            # with float activations, and of 4 bits where a processor has AVX2 and no more. That
            # is 5e-7 of a product, but may turn what an 8-bit activation is rounded to: 0.01
            # here, once in sixty rows.
            (Precision.EXACT, 1e-5),
            (Precision.INT4, 0.02),
        ],
    )
    def test_a_sequence_decodes_alike_alone_and_in_a_batch(self, precision, tolerance, tmp_path):
        decoder = written(random_llama(encoding="Q4_1"), tmp_path, precision=precision)
        prompts = [TOKENS[:5], TOKENS[5:10], TOKENS[10:15]]
        alone, caches = [], []
        for prompt in prompts:
            decoder.reset()
            decoder.run(prompt)
            caches.append(decoder.cache)
            alone.append(decoder.run([7])[0])
        feeds = {name: np.concatenate([c[name] for c in caches]) for name in caches[0]}
        feeds["input_ids"] = np.full((3, 1), 7, np.int64)
        feeds["attention_mask"] = np.ones((3, 6), np.int64)
        (together,) = decoder.session.run(["logits"], feeds)
        np.testing.assert_allclose(together[:, 0], np.stack(alone), rtol=0, atol=tolerance)
        assert np.abs(alone[0] - alone[1]).max() > 0.1  # what another row's cache would do

    def test_a_window_forgets(self, tmp_path):
        decoder = written(random_llama(tiny(windows=(4,), num_layers=1)), tmp_path)
        last = decoder.run(TOKENS)
        decoder.reset()
        changed = decoder.run([(t + 1) % 96 for t in TOKENS[:30]] + TOKENS[30:])
        np.testing.assert_allclose(changed, last, atol=1e-5)


class TestPrecisions:
    @pytest.mark.parametrize(("precision", "bound"), [("int8", 1e-3), ("int4", 0.2)])
    @pytest.mark.parametrize("tied", [True, False])
    def test_rounded_weights_stay_close(self, precision, bound, tied, tmp_path):
        checkpoint = random_llama(tiny(tie_word_embeddings=tied))
        (tmp_path / "fp32").mkdir()
        expected = written(checkpoint, tmp_path / "fp32").logits(TOKENS)
        found = written(checkpoint, tmp_path, precision=Precision(precision)).logits(TOKENS)
        assert 0 < mean_kl(expected, found) < bound

    @pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_int4_keeps_blocks_that_have_four_bits(self, encoding, tied, tmp_path):
        checkpoint = random_llama(tiny(tie_word_embeddings=tied), encoding=encoding)
        (tmp_path / "fp32").mkdir()
        expected = written(checkpoint, tmp_path / "fp32").logits(TOKENS)
        decoder = written(checkpoint, tmp_path, precision=Precision.INT4)
        for chunk in (None, 1):
            assert 0 < mean_kl(expected, decoder.logits(TOKENS, chunk=chunk)) < 1e-3

    def test_int4_holds_blocks_that_zero_is_far_from(self, tmp_path):
        checkpoint = random_llama(encoding="Q4_1")
        name = "model.layers.0.mlp.up_proj.weight"
        far = checkpoint.tensor(name).float32() + 5
        checkpoint.put(name, far, "Q4_1")
        (tmp_path / "fp32").mkdir()
        expected = written(checkpoint, tmp_path / "fp32").logits(TOKENS)
        found = written(checkpoint, tmp_path, precision=Precision.INT4).logits(TOKENS)
        assert mean_kl(expected, found) < 1e-3

    def test_exact_takes_files_that_mix_encodings(self, tmp_path):
        mixed = {"v_proj": "Q8_0", "up_proj": "F16", "embed": "Q8_0", "layers.1.mlp.down": "Q4_0"}
        checkpoint = random_llama(encoding="Q4_1", encodings=mixed)
        (tmp_path / "fp32").mkdir()
        expected = written(checkpoint, tmp_path / "fp32").logits(TOKENS)
        found = written(checkpoint, tmp_path, precision=Precision.EXACT).logits(TOKENS)
        assert np.abs(found - expected).max() < 1e-3

    @pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8, Precision.INT4])
    def test_a_tied_head_costs_no_bytes(self, precision, tmp_path):
        sizes = {}
        for tied in (True, False):
            config = tiny(tie_word_embeddings=tied, vocab_size=4096)
            path = tmp_path / f"{tied}.onnx"
            write_decoder(random_llama(config), path, recipe=Recipe(precision))
            sizes[tied] = path.with_name(f"{path.name}.data").stat().st_size
        bytes_per_weight = 4 if precision is Precision.FP32 else 1
        assert sizes[False] - sizes[True] >= 4096 * 64 * bytes_per_weight


class TestGraph:
    def test_names_what_genai_expects(self, tmp_path):
        write_decoder(random_llama(), tmp_path / "model.onnx", recipe=Recipe(Precision.INT8))
        graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
        caches = [f"{n}.{part}" for n in (0, 1) for part in ("key", "value")]
        assert [item.name for item in graph.input] == [
            "input_ids",
            "attention_mask",
            *(f"past_key_values.{cache}" for cache in caches),
            "num_logits_to_keep",
        ]
        assert [item.name for item in graph.output] == [
            "logits",
            *(f"present.{cache}" for cache in caches),
        ]
        logits = graph.output[0].type.tensor_type.shape.dim
        assert [dim.dim_param or dim.dim_value for dim in logits] == ["batch_size", 1, 96]

    def test_external_data_is_one_file_of_aligned_tensors(self, tmp_path):
        write_decoder(random_llama(), tmp_path / "model.onnx", recipe=Recipe(Precision.INT4))
        graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
        size = (tmp_path / "model.onnx.data").stat().st_size
        entries = [
            {entry.key: entry.value for entry in tensor.external_data}
            for tensor in graph.initializer
            if tensor.external_data
        ]
        assert {entry["location"] for entry in entries} == {"model.onnx.data"}
        assert all(int(entry["offset"]) % 4096 == 0 for entry in entries)
        assert all(int(entry["offset"]) + int(entry["length"]) <= size for entry in entries)

    def test_the_same_checkpoint_gives_the_same_bytes(self, tmp_path):
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            write_decoder(random_llama(), tmp_path / name / "m.onnx", recipe=Recipe(Precision.INT8))
        for file in ("m.onnx", "m.onnx.data"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_existing_files_are_not_overwritten(self, tmp_path):
        (tmp_path / "model.onnx.data").write_bytes(b"weights")
        with pytest.raises(FileExistsError):
            write_decoder(random_llama(), tmp_path / "model.onnx", recipe=Recipe(Precision.FP32))
        assert (tmp_path / "model.onnx.data").read_bytes() == b"weights"


class TestRefusals:
    @pytest.mark.parametrize("precision", [Precision.BF16])
    def test_a_precision_of_other_layouts(self, precision, tmp_path):
        with pytest.raises(UnsupportedModelError, match="fp32, fp16, exact, int8, int4"):
            write_decoder(random_llama(), tmp_path / "model.onnx", recipe=Recipe(precision))
        assert not list(tmp_path.iterdir())

    def test_another_architecture(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="'mamba'"):
            write_decoder(
                random_llama(tiny(architecture="mamba")),
                tmp_path / "model.onnx",
                recipe=Recipe(Precision.FP32),
            )

    @pytest.mark.parametrize("field", ["vocab_size", "context_length", "intermediate_size"])
    def test_m12_a_huge_dimension_is_refused_before_anything_is_allocated(self, field, tmp_path):
        checkpoint = random_llama()
        checkpoint.config = tiny(**{field: 10**12})
        with pytest.raises(UnsupportedModelError, match="would take"):
            write_decoder(checkpoint, tmp_path / "model.onnx", recipe=Recipe(Precision.FP32))
        assert not list(tmp_path.iterdir())

    def test_a_width_that_blocks_do_not_divide(self, tmp_path):
        checkpoint = random_llama(tiny(intermediate_size=80))
        with pytest.raises(UnsupportedModelError, match=r"80 columns.*fp32"):
            write_decoder(checkpoint, tmp_path / "model.onnx", recipe=Recipe(Precision.INT8))

    def test_an_encoding_that_exact_cannot_hold(self, tmp_path):
        checkpoint = random_llama()
        name = "model.layers.0.mlp.down_proj.weight"
        object.__setattr__(checkpoint.tensors[name], "encoding", "Q3_K")
        with pytest.raises(UnsupportedModelError, match=r"down_proj.*Q3_K.*fp32"):
            write_decoder(checkpoint, tmp_path / "model.onnx", recipe=Recipe(Precision.EXACT))

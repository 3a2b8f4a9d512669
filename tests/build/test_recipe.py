"""What a recipe decides of each matrix, and what it is called."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from phirt.build.precision import EMBEDDING, LM_HEAD, Precision
from phirt.build.recipe import BLOCK_SIZES, Quantization, Recipe
from phirt.build.repack import BELOW_8_BITS, FOUR_BIT_ENCODINGS
from tests.build.onnx.checkpoints import MemoryTensor, tiny

DOWN = "model.layers.11.mlp.down_proj.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
NAMES = (EMBEDDING, LM_HEAD, QUERY, DOWN)


def kept(*patterns: str) -> list[str]:
    chosen = Quantization(int8_layers=patterns)
    return [name for name in NAMES if chosen.keeps_8_bits(name)]


def stored(encoding: str, name: str = DOWN) -> MemoryTensor:
    return MemoryTensor(name, (1, 256), encoding, np.zeros((1, 1), np.uint8))


class TestPatterns:
    @pytest.mark.parametrize(
        ("pattern", "matches"),
        [
            ("down_proj", [DOWN]),
            ("mlp.down_proj", [DOWN]),
            ("model.layers.11.mlp.down_proj", [DOWN]),
            ("layers.1.*", [QUERY]),  # and not layer 11
            ("layers.*", [QUERY, DOWN]),
            ("[qk]_proj", [QUERY]),
            ("lm_head", [LM_HEAD]),
            ("embed_tokens", [EMBEDDING]),
            ("*", list(NAMES)),
            ("proj", []),  # the end of a name's part is no name
            ("down_proj.weight", []),
            ("DOWN_PROJ", []),
        ],
    )
    def test_a_pattern_is_of_the_end_of_a_name(self, pattern, matches):
        assert kept(pattern) == matches

    def test_many_patterns_are_each_enough_and_none_keeps_nothing(self):
        assert kept("lm_head", "down_proj") == [LM_HEAD, DOWN]
        assert kept() == []

    def test_the_default_keeps_what_costs_most(self):
        chosen = Quantization()
        assert [name for name in NAMES if chosen.keeps_8_bits(name)] == [EMBEDDING, LM_HEAD, QUERY]

    def test_one_that_matches_nothing_is_a_slip(self):
        Quantization(int8_layers=("layers.11.*", "lm_head")).check_patterns([EMBEDDING, DOWN])
        Quantization().check_patterns([EMBEDDING, DOWN])  # a decoder without q_proj
        for slip in ("dwon_proj", "q_proj.bias", "input_layernorm"):
            names = [EMBEDDING, DOWN, "model.layers.0.input_layernorm.weight", "a.q_proj.bias"]
            with pytest.raises(ValueError, match=f"'{slip}', which matches no matrix"):
                Quantization(int8_layers=("lm_head", slip)).check_patterns(names)

    def test_a_text_is_no_list_of_patterns(self):
        with pytest.raises(TypeError, match="'lm_head'"):
            Quantization(int8_layers="lm_head")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("patterns", "tied", "keeps"),
        [
            (("lm_head",), True, True),  # the embedding is the LM head
            (("lm_head",), False, False),
            (("embed_tokens",), True, True),
            ((), True, False),
        ],
    )
    def test_a_tied_embedding_is_the_lm_head_too(self, patterns, tied, keeps):
        chosen = Quantization(int8_layers=patterns).for_decoder(tiny(tie_word_embeddings=tied))
        assert chosen.keeps_8_bits(EMBEDDING) == keeps


@pytest.mark.parametrize("size", [0, 8, 33, 512, -32])
def test_a_block_size_that_nothing_multiplies_by_is_refused(size):
    with pytest.raises(ValueError, match=rf"block_size={size} is not one of 16, 32, 64, 128, 256"):
        Quantization(block_size=size)


class TestNames:
    def test_a_plain_recipe_is_its_precision(self):
        for precision in Precision:
            assert Recipe(precision).name == precision.value
        assert Recipe(Precision.INT8, Quantization(symmetric=True)).name == "int8"

    def test_whatever_decides_what_is_written_is_in_the_name(self):
        chosen = Quantization(block_size=128, symmetric=True, int8_layers=(), calibrate=True)
        name = Recipe(Precision.INT4, chosen, half=True).name
        assert name == "int4-b128-sym-none-calibrated-half"

    def test_no_two_recipes_have_the_same(self):
        recipes = [
            Recipe(precision, Quantization(**changes), half=half)
            for precision in (Precision.INT4, Precision.FP16)
            for half in (False, True)
            for changes in (
                {},
                {"block_size": 64},
                {"symmetric": True},
                {"int8_layers": ()},
                {"int8_layers": ("lm_head",)},
                {"calibrate": True},
            )
            if precision is Precision.INT4 or not changes
        ]
        assert len({recipe.name for recipe in recipes}) == len(recipes) == 14

    def test_what_was_rounded_already_makes_recipes_no_different(self):
        recipe = Recipe(Precision.INT4)
        assert replace(recipe, rounded={DOWN: None}) == recipe  # type: ignore[dict-item]


class TestOwnBlocks:
    @pytest.mark.parametrize("encoding", ["F32", "BF16", "Q8_0"])
    def test_what_has_8_bits_or_more_is_rounded(self, encoding):
        recipe = Recipe(Precision.INT4)
        assert not recipe.keeps_own_blocks(stored(encoding))
        assert recipe.rounds_to_4_bits(stored(encoding))
        assert not recipe.rounds_to_4_bits(stored(encoding, QUERY)), "which keeps 8 bits"
        assert not Recipe(Precision.INT8).rounds_to_4_bits(stored(encoding))

    @pytest.mark.parametrize("encoding", sorted(BELOW_8_BITS))
    def test_what_has_less_is_taken_as_it_is(self, encoding):
        assert Recipe(Precision.INT4).keeps_own_blocks(stored(encoding))
        assert not Recipe(Precision.INT4).rounds_to_4_bits(stored(encoding))

    @pytest.mark.parametrize("size", BLOCK_SIZES)
    @pytest.mark.parametrize("encoding", sorted(FOUR_BIT_ENCODINGS))
    def test_blocks_of_another_size_are_made_anew(self, encoding, size):
        recipe = Recipe(Precision.INT4, Quantization(block_size=size))
        assert recipe.keeps_own_blocks(stored(encoding)) == (size == 32)

    def test_without_zero_points_only_blocks_that_have_none_stay(self):
        recipe = Recipe(Precision.INT4, Quantization(symmetric=True))
        assert recipe.keeps_own_blocks(stored("Q4_0"))
        assert not recipe.keeps_own_blocks(stored("Q4_1"))
        assert not recipe.keeps_own_blocks(stored("Q4_K"))


@pytest.mark.parametrize(
    ("recipe", "float_type"),
    [
        (Recipe(Precision.FP32), np.float32),
        (Recipe(Precision.INT4), np.float32),
        (Recipe(Precision.FP16), np.float16),
        (Recipe(Precision.INT4, half=True), np.float16),
    ],
)
def test_what_a_graph_computes_in(recipe, float_type):
    assert recipe.float_type is float_type

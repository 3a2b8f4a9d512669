"""The canary's arithmetic, and its file, which is data from a stranger."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from phirt.errors import ModelFormatError
from phirt.models.canary import (
    CANARY_NAME,
    choose_tokens,
    make_canary,
    mean_kl,
    read_canary,
    write_canary,
)

TOKENS = tuple(range(1, 17))


def logits_of(probabilities):
    """Logits of 8 positions that all have these probabilities."""
    return np.tile(np.log(np.array(probabilities, np.float32)), (8, 1))


def random_logits(seed=0, vocab=100, scale=3.0):
    random = np.random.default_rng(seed)
    return random.normal(scale=scale, size=(8, vocab)).astype(np.float32)


def full_kl(p_logits, q_logits):
    """Mean KL divergence over the whole vocabulary."""

    def log_softmax(x):
        x = x.astype(np.float64)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(p_logits), log_softmax(q_logits)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()


class TestDivergence:
    def test_a_case_worked_by_hand(self):
        """0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)."""
        canary = make_canary(TOKENS, logits_of([0.5, 0.5]))
        found = mean_kl(canary, logits_of([0.25, 0.75]))
        assert found == pytest.approx(0.5 * math.log(2) - 0.5 * math.log(1.5), abs=1e-6)

    def test_the_most_probable_come_first(self):
        canary = make_canary(TOKENS, logits_of([0.1, 0.6, 0.3]))
        assert canary.top_ids.tolist() == [[1, 2, 0]] * 8
        expected = np.log([0.6, 0.3, 0.1])
        np.testing.assert_allclose(canary.log_probabilities[0], expected, atol=1e-6)

    def test_of_a_large_vocabulary_twenty_are_kept(self):
        logits = random_logits()
        canary = make_canary(TOKENS, logits)
        assert canary.top_ids.shape == canary.log_probabilities.shape == (8, 20)
        np.testing.assert_array_equal(canary.top_ids, np.argsort(-logits, axis=-1)[:, :20])

    def test_the_same_logits_do_not_diverge(self):
        canary = make_canary(TOKENS, random_logits())
        assert mean_kl(canary, random_logits()) < 1e-6
        assert mean_kl(canary, random_logits() + 7) < 1e-6, "a constant changes no probability"

    @pytest.mark.parametrize("seed", range(20))
    def test_it_is_a_lower_bound_of_the_whole_divergence(self, seed):
        """The data processing inequality: 80 tokens became one bucket."""
        p, noise = random_logits(seed), random_logits(seed + 100, scale=0.5)
        found = mean_kl(make_canary(TOKENS, p), p + noise)
        assert 0 < found <= full_kl(p, p + noise) + 1e-6

    def test_what_differs_in_the_rest_only_as_a_sum_is_seen(self):
        p = logits_of([0.04] * 20 + [0.01] * 20)
        q = p.copy()
        q[:, 20:] += 1
        assert mean_kl(make_canary(TOKENS, p), q) > 0.01

    @pytest.mark.parametrize("factor", [0.9, 1.1])
    def test_a_tenth_of_a_logit_shows_in_probabilities_as_language_has_them(self, factor):
        """Zipf's law: the i-th word has a probability near 1 / i (tiny random models have not)."""
        ranks = np.random.default_rng(0).permuted(np.tile(np.arange(1, 30_001), (8, 1)), axis=-1)
        logits = -np.log(ranks).astype(np.float32)
        assert mean_kl(make_canary(TOKENS, logits), logits * np.float32(factor)) > 0.02

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_one_logit_that_is_not_finite_is_infinitely_wrong(self, value):
        canary, logits = make_canary(TOKENS, random_logits()), random_logits()
        logits[3, 50] = value
        assert mean_kl(canary, logits) == math.inf

    def test_extreme_logits_give_a_finite_number(self):
        logits = np.zeros((8, 100), np.float32)
        logits[:, 7] = 1e30
        assert math.isfinite(mean_kl(make_canary(TOKENS, random_logits()), logits))

    def test_nothing_is_made_of_logits_that_are_not_finite(self):
        with pytest.raises(ValueError, match="NaN"):
            make_canary(TOKENS, np.full((8, 3), np.nan, np.float32))


class TestTokens:
    def test_the_first_sixteen(self):
        assert choose_tokens(range(40), vocab_size=40, longest=100) == tuple(range(16))

    @pytest.mark.parametrize(
        ("count", "vocab_size", "longest"), [(15, 40, 100), (40, 40, 15), (40, 15, 100)]
    )
    def test_none_where_there_are_too_few_or_one_is_unknown(self, count, vocab_size, longest):
        assert choose_tokens(range(count), vocab_size=vocab_size, longest=longest) is None


class TestFile:
    @pytest.fixture
    def folder(self, tmp_path):
        write_canary(tmp_path, make_canary(TOKENS, random_logits()))
        return tmp_path

    def test_reads_back_to_the_bit(self, tmp_path):
        canary = make_canary(TOKENS, random_logits())
        write_canary(tmp_path, canary)
        found = read_canary(tmp_path, vocab_size=100)
        assert found is not None
        assert found.token_ids == TOKENS
        assert found.own_kl is None
        np.testing.assert_array_equal(found.top_ids, canary.top_ids)
        np.testing.assert_array_equal(found.log_probabilities, canary.log_probabilities)

    def test_is_small(self, folder):
        assert (folder / CANARY_NAME).stat().st_size < 8192

    def test_a_folder_without_one_has_none(self, tmp_path):
        assert read_canary(tmp_path) is None

    def test_ids_beyond_the_vocabulary(self, folder):
        with pytest.raises(ModelFormatError, match="between 0 and 49"):
            read_canary(folder, vocab_size=50)

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("format_version", None),
            ("format_version", 0),
            ("format_version", 2),
            ("token_ids", None),
            ("token_ids", list(range(15))),
            ("token_ids", ["a"] * 16),
            ("token_ids", [-1] * 16),
            ("token_ids", [1 << 40] * 16),
            ("positions", None),
            ("positions", []),
            ("positions", [3] * 8),
            ("own_kl", "small"),
            ("own_kl", -0.5),
            ("own_kl", 1e300),
            ("positions.0.ids", []),
            ("positions.0.ids", [5] * 20),
            ("positions.0.ids", list(range(21))),
            ("positions.0.ids", list(range(19))),
            ("positions.0.log_probabilities", [0.0] * 20),
            ("positions.0.log_probabilities", [1.0] * 20),
            ("positions.0.log_probabilities", [-1e300] * 20),
            ("positions.0.log_probabilities", [None] * 20),
        ],
    )
    def test_a_damaged_one(self, folder, path, value):
        file = folder / CANARY_NAME
        document = json.loads(file.read_text())
        place = document
        *walked, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        for key in walked:
            place = place[key]
        place[last] = value
        file.write_text(json.dumps(document))
        with pytest.raises(ModelFormatError, match=CANARY_NAME):
            read_canary(folder, vocab_size=100)

    def test_positions_of_different_width(self, folder):
        file = folder / CANARY_NAME
        document = json.loads(file.read_text())
        for field in ("ids", "log_probabilities"):
            document["positions"][3][field].pop()
        file.write_text(json.dumps(document))
        with pytest.raises(ModelFormatError, match="different numbers"):
            read_canary(folder)

    def test_cut_anywhere(self, folder):
        file = folder / CANARY_NAME
        whole = file.read_bytes()
        for length in range(0, len(whole) - 2, 97):
            file.write_bytes(whole[:length])
            with pytest.raises(ModelFormatError):
                read_canary(folder)

    def test_a_huge_one_is_not_read(self, folder):
        (folder / CANARY_NAME).write_bytes(b" " * (1 << 17))
        with pytest.raises(ModelFormatError, match="larger"):
            read_canary(folder)

"""Rotary tables, by hand."""

import numpy as np

from phirt.models.rotary import Rotary
from phirt.protocols import RopeRegime
from phirt.types import FloatArray

ANGLES = np.array([[0, 0], [1, 0.1], [2, 0.2]])  # theta ** (-2 / 4) = 0.1


def test_tables_by_hand():
    cosines, sines = Rotary(theta=100.0, dim=4).tables(3)
    np.testing.assert_allclose(cosines, np.cos(ANGLES), atol=1e-7)
    np.testing.assert_allclose(sines, np.sin(ANGLES), atol=1e-7)


def test_each_regime_has_its_divisors_and_both_the_factor():
    short, long = np.array([1, 2], np.float32), np.array([4, 8], np.float32)
    rope = Rotary(
        theta=100.0, dim=4, factors=short, long_factors=long, boundary=2, attention_factor=1.5
    )
    regimes: dict[RopeRegime, FloatArray] = {"short": short, "long": long}
    for regime, divisors in regimes.items():
        cosines, sines = rope.tables(3, regime)
        np.testing.assert_allclose(cosines, 1.5 * np.cos(ANGLES / divisors), atol=1e-6)
        np.testing.assert_allclose(sines, 1.5 * np.sin(ANGLES / divisors), atol=1e-6)

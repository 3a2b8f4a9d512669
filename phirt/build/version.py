"""The version of what the converter writes, apart from it: a load needs no converter."""

from __future__ import annotations

__all__ = ["CONVERTER_VERSION"]

CONVERTER_VERSION = 6
"""Counts changes of what the converter writes: artifacts of another version are made anew."""

"""The trial model: a decoder of one layer, small enough to be part of phirt itself.

A device counts as working once this model has run on it and has given the numbers that its
canary.json expects. `phirt.testing.trial_model` writes it, in each layout that phirt converts
to and in that layout's default precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from phirt.errors import UnsupportedModelError

__all__ = ["TRIAL_LAYOUTS", "trial_folder"]

TRIAL_LAYOUTS = ("onnx-genai", "openvino", "safetensors")
"""The layouts that there are folders of."""


def trial_folder(formats: Sequence[str]) -> Path:
    """The model folder to try a backend with.

    Args:
        formats: The layouts that the backend reads, preferred first (`Backend.formats`).

    Raises:
        UnsupportedModelError: The trial model is in none of them.
    """
    layout = next((layout for layout in formats if layout in TRIAL_LAYOUTS), None)
    if layout is None:
        raise UnsupportedModelError(
            f"The trial model is there in the layouts {', '.join(TRIAL_LAYOUTS)}; the backend "
            f"reads {', '.join(formats) or 'none'}."
        )
    # Runtimes open files by path: phirt is installed unpacked, as every installer does it.
    return Path(str(files(__name__))) / layout

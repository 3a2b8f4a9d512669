"""What no converter writes, whichever the format: unknown decoders, and arrays beyond any use."""

from __future__ import annotations

from collections.abc import Mapping

from phirt.errors import UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.huggingface_config import DECODER_ARCHITECTURES

__all__ = ["check_convertible"]

# Beyond this a single matrix or table is refused: no machine that runs phirt converts it,
# and a damaged or hostile size must not reach an allocation.
_LARGEST_ARRAY_BYTES = 1 << 35


def check_convertible(config: DecoderConfig, pieces: Mapping[str, int]) -> None:
    """Refuse a decoder before anything of it is allocated.

    Args:
        config: The decoder.
        pieces: Elements of the arrays that the format keeps in one piece beside the
            embedding, by what to call them.

    Raises:
        UnsupportedModelError: The architecture, or the size of one piece in float32.
    """
    if config.architecture not in DECODER_ARCHITECTURES:
        raise UnsupportedModelError(
            f"phirt writes decoders of the architectures {', '.join(DECODER_ARCHITECTURES)}; this "
            f"is {config.architecture!r}."
        )
    elements = {"embedding": config.vocab_size * config.hidden_size, **pieces}
    name, largest = max(elements.items(), key=lambda item: item[1])
    if 4 * largest > _LARGEST_ARRAY_BYTES:
        raise UnsupportedModelError(
            f"The {name} of this model would take {4 * largest:,} bytes in one piece; phirt "
            f"converts up to {_LARGEST_ARRAY_BYTES:,}. Check the file, or use a smaller model."
        )

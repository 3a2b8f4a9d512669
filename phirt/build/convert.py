"""From a checkpoint to a model folder of any layout, in one call."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

from phirt._version import __version__
from phirt.build.canary import canary_beside, rounding_of
from phirt.build.checkpoint import Checkpoint
from phirt.build.documents import genai_document, write_json
from phirt.build.precision import Precision, check_precision
from phirt.build.recipe import Quantization, Recipe
from phirt.build.rounding import RoundedFiles, round_matrices
from phirt.build.sources import Source, open_source
from phirt.build.version import CONVERTER_VERSION
from phirt.build.watched_checkpoint import WatchedCheckpoint
from phirt.models.canary import write_canary
from phirt.models.genai_config import GENAI_CONFIG_NAME
from phirt.models.manifest import write_manifest
from phirt.types import ProgressCallback

__all__ = ["choose_precision", "convert", "estimate_bytes"]

# Bits per weight, scales included, from above.
_BITS = {
    Precision.FP32: 32,
    Precision.FP16: 16,
    Precision.BF16: 16,
    Precision.EXACT: 32,
    Precision.INT8: 10,
    Precision.INT4: 8,
}


def choose_precision(source: Path, layout: str) -> str:
    """The precision that ``"auto"`` stands for.

    The fastest whose mean KL divergence from fp32 is under 0.02 (docs/precision.md and
    docs/backends/openvino.md have the measurements): ``"int8"`` for ONNX and OpenVINO, or
    ``"fp32"`` for a decoder whose widths do not divide into blocks. Folders of safetensors are
    read by runtimes that compute in float: ``"fp32"``.

    Args:
        source: What is to be converted.
        layout: What it is converted to.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The file is damaged.
        UnsupportedModelError: It is sound, but phirt does not convert it.
    """
    if layout == "safetensors":
        return Precision.FP32.value
    with open_source(source, source_id="") as opened:
        config = opened.checkpoint.config
    widths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_size)
    divisible = all(width % _SMALLEST_BLOCK == 0 for width in widths)
    return (Precision.INT8 if divisible else Precision.FP32).value


_SMALLEST_BLOCK = 32


def estimate_bytes(source: Path, precision: str) -> int:
    """Disk space that a conversion takes, from above."""
    with open_source(source, source_id="") as opened:
        config = opened.checkpoint.config
    heads = config.num_heads + config.num_kv_heads
    layer = (2 * heads * config.head_size + 3 * config.intermediate_size) * config.hidden_size
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    rotary = 4 * config.context_length * config.rope.dim
    weights = config.num_layers * layer + tables
    return weights * _BITS[Precision(precision)] // 8 + rotary + (1 << 24)


def convert(
    source: Path,
    out_dir: Path,
    *,
    layout: str,
    precision: str,
    quantization: Quantization | None = None,
    half: bool = False,
    float_embedding: bool = False,
    source_id: str | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Convert a checkpoint to a model folder.

    Args:
        source: A ``.gguf`` file, or a Hugging Face folder of safetensors.
        out_dir: An empty folder, which is filled; phirt.json is written last. Flushing it to
            the disk and placing it where it is found are the caller's
            (`phirt.models.store`).
        layout: ``"onnx-genai"``, ``"openvino"`` or ``"safetensors"``.
        precision: One that the layout can have (`FORMAT_PRECISIONS`).
        quantization: How ``"int4"`` rounds; None for `Quantization`'s defaults. Calibration
            keeps what it has rounded so far in a folder beside ``out_dir``.
        half: Whether an ONNX graph computes in float16.
        float_embedding: Whether it reads the embedding as floats in any case.
        source_id: Identity of the source's weights, where it is known.
        progress: Called for every tensor.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The file is damaged.
        UnsupportedModelError: It is sound, but phirt does not convert it to this.
        FileExistsError: The folder is not empty.
        ValueError: There is no such precision, or a pattern of ``quantization`` is of no matrix.
    """
    recipe = Recipe(
        check_precision(layout, precision),
        quantization or Quantization(),
        half=half,
        float_embedding=float_embedding,
    )
    if any(out_dir.iterdir()):
        raise FileExistsError(f"The folder {out_dir} is not empty; an artifact needs its own.")
    with open_source(source, source_id=source_id) as opened, _scratch(out_dir) as scratch:
        checkpoint, name = opened.checkpoint, recipe.name
        recipe.quantization.check_patterns(checkpoint.names())
        recipe = replace(recipe, quantization=recipe.quantization.for_decoder(checkpoint.config))
        if recipe.precision is Precision.INT4:
            rounded = RoundedFiles(scratch)
            if recipe.quantization.calibrate:
                # Imported here: few conversions calibrate.
                from phirt.build.calibration import calibrate, calibration_tokens

                token_ids = calibration_tokens(opened.encode, checkpoint.config)
                calibrate(checkpoint, recipe, token_ids, rounded, progress=progress)
            round_matrices(checkpoint, recipe, rounded, progress=progress)
            recipe = replace(recipe, rounded=rounded)
        watched = WatchedCheckpoint(checkpoint, progress)
        rounding = rounding_of(layout, recipe)
        with canary_beside(checkpoint, opened.encode, rounding) as wait_for_canary:
            packages = _WRITERS[layout](opened, watched, out_dir, recipe)
            opened.write_text_files(out_dir)
            canary = wait_for_canary()
        if canary is not None:
            write_canary(out_dir, canary)
        identity = f"{opened.source_id}:{layout}:{name}:{CONVERTER_VERSION}"
        derived = "sha256:" + hashlib.sha256(identity.encode()).hexdigest()
        write_manifest(
            out_dir,
            weights_id=opened.source_id if rounding is None else derived,
            architecture=checkpoint.config.architecture,
            precision=str(recipe.precision),
            source={"name": opened.name, "id": opened.source_id},
            versions={
                "phirt": __version__,
                "converter": str(CONVERTER_VERSION),
                **{package: version(package) for package in (*opened.packages, *packages)},
            },
            build={"engine": "phirt", "recipe": name},
        )


@contextmanager
def _scratch(out_dir: Path) -> Iterator[Path]:
    """A folder beside another for the time of a conversion."""
    with tempfile.TemporaryDirectory(
        prefix=".phirt-", dir=out_dir.parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


def _write_onnx(
    source: Source, checkpoint: Checkpoint, out_dir: Path, recipe: Recipe
) -> tuple[str, ...]:
    from phirt.build.onnx_decoder import write_decoder

    del source
    filename = "model.onnx"
    write_decoder(checkpoint, out_dir / filename, recipe=recipe)
    document = genai_document(checkpoint.config, filename=filename)
    write_json(out_dir / GENAI_CONFIG_NAME, document)
    return ("onnx",)


def _write_openvino(
    source: Source, checkpoint: Checkpoint, out_dir: Path, recipe: Recipe
) -> tuple[str, ...]:
    from phirt.build.openvino_decoder import write_openvino

    write_openvino(checkpoint, out_dir, recipe=recipe)
    source.write_config(out_dir)
    return ("openvino",)


def _write_safetensors(
    source: Source, checkpoint: Checkpoint, out_dir: Path, recipe: Recipe
) -> tuple[str, ...]:
    from phirt.build.huggingface_config import config_document
    from phirt.build.safetensors_writer import write_safetensors

    del source
    precision = str(recipe.precision)
    write_safetensors(checkpoint, out_dir / "model.safetensors", precision=precision)
    # Not the source's own: the tensors are in the precision and the names that it says.
    document = config_document(checkpoint.config, precision=precision)
    write_json(out_dir / "config.json", document)
    return ()


_Writer = Callable[[Source, Checkpoint, Path, Recipe], tuple[str, ...]]
# Each writes weights and configuration, and names the packages that had a part in it. What a
# writer needs is imported when it runs, so that one extra is enough for one backend.
_WRITERS: Mapping[str, _Writer] = MappingProxyType(
    {
        "onnx-genai": _write_onnx,
        "openvino": _write_openvino,
        "safetensors": _write_safetensors,
    }
)

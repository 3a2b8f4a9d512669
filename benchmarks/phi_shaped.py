"""A model with the widths and depth of Phi-3.5-mini and random int4 weights.

    python -m benchmarks.phi_shaped FOLDER [--layers 32]

3.8 billion weights, of which nobody has to fetch any: how fast they are does not depend on what
they are. The LM head is in 4 bits too, the embedding in 8.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from phirt.build.documents import genai_document, write_json
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import EMBEDDING, Precision
from phirt.build.quantize import QuantizedMatrix
from phirt.build.recipe import Quantization, Recipe
from phirt.build.rounding import RoundedFiles
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.models.genai_config import GENAI_CONFIG_NAME
from tests.build.streamed_build import write_phi3_shaped

__all__ = ["write_phi_shaped"]

BLOCK = 32


def random_matrix(rows: int, columns: int, random: np.random.Generator) -> QuantizedMatrix:
    """Symmetric int4 with weights of about 0.02, as trained ones have them."""
    blocks = columns // BLOCK
    values = random.integers(0, 256, (rows, blocks, BLOCK // 2), np.uint8)
    scales = random.uniform(0.002, 0.006, (rows, blocks)).astype(np.float32)
    return QuantizedMatrix(bits=4, block_size=BLOCK, values=values, scales=scales)


def write_phi_shaped(folder: Path, *, layers: int = 32) -> Path:
    """Write the model folder; 2.3 GB with all 32 layers.

    Args:
        folder: An empty folder.
        layers: Decoder blocks.
    """
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        source = write_phi3_shaped(Path(name) / "checkpoint", layers=layers)
        kept = Path(name) / "rounded"
        kept.mkdir()
        recipe = Recipe(Precision.INT4, Quantization(symmetric=True, int8_layers=()))
        rounded = RoundedFiles(kept)
        with SafetensorsCheckpoint(source) as checkpoint:
            for tensor_name in checkpoint.names():
                shape = checkpoint.tensor(tensor_name).shape
                if len(shape) == 2 and tensor_name != EMBEDDING:
                    rounded.add(tensor_name, random_matrix(*shape, random))
            recipe = replace(recipe, rounded=rounded)
            write_decoder(checkpoint, folder / "model.onnx", recipe=recipe)
            document = genai_document(checkpoint.config, filename="model.onnx")
        write_json(folder / GENAI_CONFIG_NAME, document)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(source / file, folder / file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    print(write_phi_shaped(arguments.folder, layers=arguments.layers))


if __name__ == "__main__":
    main()

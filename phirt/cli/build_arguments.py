"""What ``phirt build`` accepts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_build"]

# As in phirt.build, which is not imported to tell what it offers.
_FORMATS = ("onnx", "openvino", "mlx", "safetensors")
_PRECISIONS = ("auto", "fp32", "fp16", "bf16", "exact", "int8", "int4")
_ENGINES = ("auto", "phirt", "model-builder", "mlx")


def add_build(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "build a model folder for a device from a checkpoint, and say what it cost"
    build = commands.add_parser(
        "build",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. The folder appears whole or not at all.",
        allow_abbrev=False,
    )
    build.add_argument(
        "source",
        metavar="SOURCE",
        nargs="?",
        help="a GGUF file, a Hugging Face folder of safetensors, or a model's name",
    )
    build.add_argument("-o", "--out", type=Path, metavar="OUT", help="the folder to make")
    target = build.add_argument_group("target")
    target.add_argument("--format", default="onnx", choices=_FORMATS, help="(default: onnx)")
    target.add_argument(
        "--precision",
        default="auto",
        choices=_PRECISIONS,
        help="(default: int8 for CPUs and NPUs, else fp16)",
    )
    target.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    target.add_argument(
        "--engine",
        default="auto",
        choices=_ENGINES,
        help="who builds (default: phirt itself, where it can)",
    )
    rounding = build.add_argument_group("how phirt's own int4 rounds")
    rounding.add_argument(
        "--block-size", type=int, metavar="N", help="weights that share a scale (default: 32)"
    )
    rounding.add_argument(
        "--symmetric", action="store_true", help="no zero points: faster, and a little worse"
    )
    rounding.add_argument(
        "--int8-layers",
        action="append",
        metavar="PATTERN",
        help="matrices to keep in 8 bits, such as down_proj, 'layers.0.*', lm_head, or none; may "
        "be repeated (default: embedding, LM head, queries, keys, values)",
    )
    rounding.add_argument(
        "--calibrate",
        action="store_true",
        help="run a text through the model and round for it: much closer, and slower to build",
    )
    engine = build.add_argument_group("engines")
    engine.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="K=V",
        help="an option of the engine model-builder or mlx; may be repeated",
    )
    engine.add_argument(
        "--prepare-engine",
        metavar="NAME",
        help="make an environment for model-builder or mlx, and build nothing",
    )
    engine.add_argument(
        "--with",
        dest="requirements",
        action="append",
        metavar="REQUIREMENT",
        help="with --prepare-engine: install this in place of what would be, such as "
        "torch==2.13.0 (on Linux, pip's newest torch brings CUDA along); may be repeated",
    )
    engine.add_argument("--force", action="store_true", help="with --prepare-engine: make it anew")
    engine.add_argument(
        "--remove-engine",
        metavar="NAME",
        help="remove the environment that --prepare-engine made, and build nothing",
    )
    check = build.add_argument_group("check")
    check.add_argument(
        "--check",
        type=float,
        metavar="MAX_KL",
        help="fail, leaving nothing, where the mean KL from the original weights is larger",
    )
    check.add_argument(
        "--check-tokens", type=int, default=2048, metavar="N", help="(default: 2048)"
    )
    output = build.add_argument_group("output")
    output.add_argument("--overwrite", action="store_true", help="replace an earlier build")
    output.add_argument("--offline", action="store_true", help="use no network at all")
    output.add_argument(
        "--yes", action="store_true", help="download more than 5 GB without being asked"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )

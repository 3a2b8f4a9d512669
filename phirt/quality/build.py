"""Holds a model that was built against what it was built from."""

from __future__ import annotations

import tempfile
from pathlib import Path

from phirt.build.convert import convert
from phirt.build.targets import Target
from phirt.dispatch.candidates import check_offered, machine_for
from phirt.errors import QualityCheckError
from phirt.locate import Checkpoint
from phirt.quality.comparison import compare_quality
from phirt.quality.report import KERNEL_NAMES, QualityReport
from phirt.quality.spans import check_enough, read_sections
from phirt.types import ProgressCallback

__all__ = ["check_build", "check_request"]

# Which backend runs what is built, to check it.
_BACKENDS = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "mlx": "mlx",
    "safetensors": "transformers",
}


def check_request(target: Target, *, device: str, max_kl: float, tokens: int) -> None:
    """Refuse a check that means nothing, or that this machine cannot make.

    Args:
        target: What is to be built.
        device: Name of the device that it is to run on.
        max_kl: Largest mean KL divergence, in nats.
        tokens: About how many tokens it is measured on.

    Raises:
        BackendError: No backend here runs it.
        DeviceError: There is no such device.
        TypeError: ``tokens`` is no whole number.
        ValueError: ``max_kl`` or ``tokens`` is out of range.
    """
    if not 0 < max_kl < float("inf"):
        raise ValueError(f"max_kl={max_kl} must be a number of nats above 0")
    number: object = tokens
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"check_tokens must be an int, not {number!r}")
    check_enough(read_sections(None), tokens)
    backend = _BACKENDS[target.format]
    check_offered(machine_for(backend), device=device, backend=backend)


def check_build(
    checkpoint: Checkpoint,
    folder: Path,
    target: Target,
    *,
    device: str,
    max_kl: float,
    tokens: int,
    progress: ProgressCallback | None,
) -> QualityReport:
    """Hold what was built against the original weights in fp32.

    Args:
        checkpoint: What it was built from.
        folder: What was built. The reference is made beside it, and removed.
        target: What it is.
        device: Name of the device to run it on.
        max_kl: Largest mean KL divergence, in nats.
        tokens: About how many tokens it is measured on.
        progress: Called as this advances.

    Raises:
        QualityCheckError: It is worse than asked.
    """
    backend = _BACKENDS[target.format]
    with tempfile.TemporaryDirectory(
        prefix=".phirt-", dir=folder.parent, ignore_cleanup_errors=True
    ) as scratch:
        reference = Path(scratch) / "fp32"
        reference.mkdir()
        layout = target.layout if target.format != "mlx" else "safetensors"
        convert(
            checkpoint.path,
            reference,
            layout=layout,
            precision="fp32",
            source_id=checkpoint.source_id,
            progress=progress,
        )
        report = compare_quality(
            reference,
            folder,
            tokens=tokens,
            max_kl=max_kl,
            min_agreement=0.0,
            speed=False,
            reference_device="cpu",
            reference_backend=backend,
            device=device,
            backend=backend,
            progress=progress,
        )
    worst, kernel = max((each.figures.kl_mean, name) for name, each in report.kernels.items())
    if worst > max_kl:
        raise QualityCheckError(
            f"The build is worse than asked: with the {KERNEL_NAMES[kernel]} kernels its mean KL "
            f"divergence from the original weights is {worst:.4f} nats, and at most {max_kl:g} was "
            "asked for. Nothing was left behind. Choose another precision, or let it be calibrated."
        )
    return report

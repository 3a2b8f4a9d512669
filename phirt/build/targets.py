"""What can be built for what: formats, devices, precisions, and the engines that build them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from phirt.build.engines.mlx import MLX_PRECISIONS
from phirt.build.engines.model_builder import MODEL_BUILDER_PRECISIONS
from phirt.build.precision import Precision
from phirt.build.recipe import Quantization
from phirt.devices.names import DeviceName
from phirt.errors import UnsupportedModelError
from phirt.models.huggingface_config import DECODER_ARCHITECTURES

__all__ = [
    "BUILD_ENGINES",
    "BUILD_FORMATS",
    "Target",
    "check_device",
    "choose_engine",
    "default_precision",
    "quantization_for",
    "target_of",
]

BUILD_FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "onnx": "onnx-genai",
        "openvino": "openvino",
        "mlx": "safetensors",
        "safetensors": "safetensors",
    }
)
"""What can be asked for, each with the layout of the folder that comes of it."""

BUILD_ENGINES = ("auto", "phirt", "model-builder", "mlx")
"""Who can be asked to build."""

_FLOATS = ("fp32", "fp16")
_INTEGERS = ("int8", "int4")

# What phirt itself writes. What ONNX Runtime's providers multiply by is what Model Builder
# writes for them; of the GPUs none has run any of it (docs/hardware.md).
_PHIRT: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("onnx", "cpu"): (*_FLOATS, "exact", *_INTEGERS),
        ("onnx", "cuda"): (*_FLOATS, *_INTEGERS),
        ("onnx", "directml"): (*_FLOATS, "int4"),
        ("onnx", "webgpu"): (*_FLOATS, *_INTEGERS),
        ("openvino", "cpu"): (*_FLOATS, "exact", *_INTEGERS),
        ("openvino", "gpu"): (*_FLOATS, *_INTEGERS),
        ("openvino", "npu"): ("fp16", *_INTEGERS),
        ("safetensors", "cpu"): (*_FLOATS, "bf16"),
        ("safetensors", "cuda"): (*_FLOATS, "bf16"),
        ("safetensors", "metal"): (*_FLOATS, "bf16"),
    }
)
# MLX's folders are the same for every device.
_MLX_DEVICES = ("metal", "cpu", "cuda")

# OpenVINO's compiler for NPUs takes symmetric 4-bit weights in groups of 128, or whole rows
# (openvino.genai's documentation, "NPU with OpenVINO GenAI").
_NPU_BLOCK_SIZE = 128


@dataclass(frozen=True, slots=True)
class Target:
    """What is to be built.

    Attributes:
        format: One of `BUILD_FORMATS`.
        device: Kind of the device that it is for.
        precision: How its weights are stored.
    """

    format: str
    device: str
    precision: str

    @property
    def layout(self) -> str:
        """The layout of the folder that comes of it."""
        return BUILD_FORMATS[self.format]

    @property
    def half(self) -> bool:
        """Whether an ONNX graph computes in float16: GPUs attend in nothing wider."""
        return self.format == "onnx" and self.device != "cpu" and self.precision != "fp32"

    @property
    def float_embedding(self) -> bool:
        """Whether the embedding stays in floats: DirectML reads no rows of quantized ones."""
        return self.format == "onnx" and self.device == "directml"


def default_precision(format: str, device: str) -> str:  # noqa: A002  # as it is called
    """The precision where none was asked for: the fastest that is close to the original.

    On a CPU that is ``"int8"`` (docs/precision.md); on a GPU ``"fp16"``, where nobody has
    measured anything yet.

    Args:
        format: One of `BUILD_FORMATS`.
        device: A kind of device.
    """
    if format in ("mlx", "safetensors") or (device not in ("cpu", "npu")):
        return "fp16"
    return "int8"


def target_of(*, format: str, precision: str, device: str) -> Target:  # noqa: A002  # as called
    """What the arguments of a build ask for.

    Args:
        format: One of `BUILD_FORMATS`.
        precision: A `Precision`, or ``"auto"``.
        device: A name of a device.

    Raises:
        ValueError: One of them is not, or the device is ``"auto"``.
    """
    kind = check_device(device)
    _check_one_of(BUILD_FORMATS, format=format)
    if precision == "auto":
        precision = default_precision(format, kind)
    _check_one_of([each.value for each in Precision], precision=precision)
    return Target(format, kind, precision)


def _check_one_of(known: Iterable[str], **named: str) -> None:
    for name, value in named.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}")


def choose_engine(target: Target, *, architecture: str | None, engine: str) -> str:
    """Who builds it: ``"phirt"``, ``"model-builder"`` or ``"mlx"``.

    Args:
        target: What is to be built.
        architecture: ``model_type`` of the checkpoint; None where it is not known yet, for who
            would build it of some architecture.
        engine: One of `BUILD_ENGINES`; ``"auto"`` takes phirt's own, where it can.

    Raises:
        UnsupportedModelError: Nobody can, or not the one that was named.
        ValueError: There is no such engine.
    """
    _check_one_of(BUILD_ENGINES, engine=engine)
    faults: dict[str, str] = {}
    for name in ("phirt", "model-builder", "mlx"):
        if engine in ("auto", name):
            fault = _fault(name, target, architecture)
            if fault is None:
                return name
            faults[name] = fault
    source = "" if architecture is None else f" from a checkpoint of {architecture!r}"
    reasons = " ".join(f"{name}: {fault}." for name, fault in faults.items())
    raise UnsupportedModelError(
        f"format={target.format!r}, precision={target.precision!r} for device={target.device!r} "
        f"is not built{source}. {reasons}"
    )


def quantization_for(target: Target, wanted: Quantization | None) -> Quantization:
    """How int4 rounds: as asked for, or else as the device wants it."""
    if wanted is not None or target.device != "npu":
        return wanted or Quantization()
    return replace(Quantization(), symmetric=True, block_size=_NPU_BLOCK_SIZE)


def _fault(engine: str, target: Target, architecture: str | None) -> str | None:
    """Why an engine does not build something; None where it does."""
    offered = _offered(engine, target.format)
    if not offered:
        formats = [each for each in BUILD_FORMATS if _offered(engine, each)]
        return f"it writes {', '.join(formats)}"
    if target.device not in offered:
        return f"it writes {target.format} for {', '.join(offered)}"
    precisions = offered[target.device]
    if target.precision not in precisions:
        return f"for {target.device} it writes {target.format} in {', '.join(precisions)}"
    if engine == "model-builder" or architecture is None:
        return None
    if architecture not in DECODER_ARCHITECTURES:
        return f"it knows the architectures {', '.join(DECODER_ARCHITECTURES)}"
    return None


def _offered(engine: str, format: str) -> Mapping[str, tuple[str, ...]]:  # noqa: A002  # as above
    """The precisions in which an engine writes a format, by device."""
    if engine == "model-builder":
        return MODEL_BUILDER_PRECISIONS if format == "onnx" else {}
    if engine == "mlx":
        return dict.fromkeys(_MLX_DEVICES, MLX_PRECISIONS) if format == "mlx" else {}
    return {device: each for (name, device), each in _PHIRT.items() if name == format}


def check_device(device: str) -> str:
    """The kind of a device's name.

    Raises:
        ValueError: It is ``"auto"`` or malformed: an artifact is for a device that is named.
    """
    kind = DeviceName.parse(device).kind
    if kind == "auto":
        raise ValueError("device='auto': a build is for a device that is named, such as 'cpu'")
    return kind

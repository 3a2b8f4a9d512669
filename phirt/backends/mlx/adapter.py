"""MLX: mlx-lm's model folders on Metal, on CUDA and on the CPU.

mlx-lm's own loader is not used: it downloads what it does not find, can run code that a folder
brings, and knows the model in some places otherwise than transformers. Configuration and
weights are read by phirt, which checks them, and only mlx-lm's layers compute
(`phirt.backends.mlx.modules`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from phirt.backends.importing import import_runtime, unavailable
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.mlx.cache import CacheFormat, group_size_of
from phirt.backends.mlx.config import MlxConfig, read_mlx_config
from phirt.backends.mlx.decoder import Decoder
from phirt.backends.mlx.listing import device_names, list_devices
from phirt.backends.mlx.memory import check_host_memory, translate
from phirt.backends.mlx.model import MlxModel, MlxTarget
from phirt.backends.mlx.modules import build_decoder, import_model_module
from phirt.devices.names import DeviceName
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    ModelError,
    ModelFormatError,
    PhirtError,
    UnsupportedModelError,
)
from phirt.models.folder import read_folder
from phirt.models.safetensors import SafetensorsFolder
from phirt.protocols import Accept, Availability, LoadOptions, Reject
from phirt.types import Artifact

__all__ = ["MlxBackend"]

_NAME = "mlx"
_FORMATS = ("mlx", "safetensors")
_KINDS = ("cpu", "metal", "cuda")

# MLX's name and NumPy's view of each type of element that these folders hold.
_DTYPES = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "U32": ("uint32", "<u4"),
}
_FLOATS = ("F32", "F16", "BF16")


def _import() -> Any:
    # float32 is float32: MLX would multiply it in TF32, with 10 bits, on recent GPUs. Read
    # when the first matrices meet; a user's own setting stands.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    import_runtime("mlx", backend=_NAME, extra=_NAME)
    return import_runtime("mlx.core", backend=_NAME, extra=_NAME)


class MlxBackend:
    """Adapter to MLX and the layers of mlx-lm."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = _FORMATS
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"fp32": ("cpu",), "int8": ("cpu",)}
    )

    def probe(self) -> list[Availability]:
        """Whether MLX imports, and which devices it names."""
        try:
            mx = _import()
            import_model_module("base")
        except (BackendNotInstalledError, BackendBrokenError) as error:
            return unavailable(error, extra=_NAME)
        return list_devices(mx)

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts folders of safetensors of the architectures that were held against an oracle."""
        if artifact.format not in _FORMATS:
            return Reject(
                f"mlx reads folders of safetensors, not {artifact.format!r}",
                "Name the GGUF file or the safetensors folder that the model was made from.",
            )
        try:
            _find_device(_import(), device)
        except DeviceNotAvailableError as error:
            return Reject(str(error), 'Pass device="cpu", "metal" or "cuda".')
        except BackendError:
            pass  # Loading says how to install it.
        try:
            read_mlx_config(artifact.path)
        except ModelFormatError:
            pass  # The model is at fault, and not the backend: loading says so.
        except ModelError as error:
            return Reject(str(error))
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> MlxModel:
        """Put the weights on the device.

        MLX has no setting for threads or spinning (its CPU build computes on one thread), so
        ``options.threads`` and ``options.spinning`` have nothing to act on.

        Raises:
            BackendNotInstalledError: mlx or mlx-lm is not installed.
            BackendBrokenError: One is installed and does not import.
            DeviceNotAvailableError: MLX does not offer the device.
            DevicePlacementError: MLX computes elsewhere.
            ModelFormatError: The folder's files are damaged or contradict each other.
            UnsafeModelError: A file reaches outside the folder, or names code to run.
            UnsupportedModelError: The model is none that phirt has held against transformers.
            OutOfMemoryError: The weights do not fit.
            ValueError: ``options.extra`` is not empty: there is nothing to set.
        """
        check_kv_precision(self, device, options)
        if options.extra:
            raise ValueError(f"The backend 'mlx' has no settings, not {sorted(options.extra)}.")
        folder = read_folder(artifact.path, name=artifact.name, formats=_FORMATS)
        config = read_mlx_config(folder.artifact.path)
        mx = _import()
        target = _find_device(mx, device)
        with SafetensorsFolder(folder.artifact.path) as weights:
            _check_weights(weights, config, target)
            quantizes = options.kv_precision == "int8"
            group_size = group_size_of(config.decoder.head_size) if quantizes else None
            return MlxModel(
                target,
                config.decoder,
                lambda: _build(target, config, weights),
                weights_id=folder.artifact.weights_id,
                eos_token_ids=frozenset(folder.facts.eos_token_ids),
                cache_format=CacheFormat(mx, group_size),
            )


def _find_device(mx: Any, text: str) -> MlxTarget:
    """The device of that name.

    Raises:
        DeviceNotAvailableError: MLX has none.
    """
    name = DeviceName.parse(text)
    offered = device_names(mx)
    if not name.is_one_of(offered):
        known = f" Its devices are called {', '.join(_KINDS)}." if name.kind not in _KINDS else ""
        raise DeviceNotAvailableError(
            f"Device {text!r} is not available to backend 'mlx': this build of MLX has "
            f"{', '.join(offered)}.{known}"
        )
    kind = mx.cpu if name.kind == "cpu" else mx.gpu
    return MlxTarget(mx, str(name), mx.Device(kind, name.index or 0))


def _check_weights(weights: SafetensorsFolder, config: MlxConfig, target: MlxTarget) -> None:
    """Refuse types of elements that nothing here reads, and what the memory does not hold."""
    size = 0
    for name in weights.names():
        dtype = weights.dtype(name)
        if dtype not in _DTYPES or (dtype == "U32" and config.quantization is None):
            raise UnsupportedModelError(
                f"{config.source}: the tensor {name[:80]!r} is {dtype}; this folder may hold "
                f"{', '.join(_DTYPES if config.quantization else _FLOATS)}."
            )
        # Computed with, on the CPU, in four bytes whatever is stored.
        size += 4 * int(np.prod(weights.shape(name), dtype=np.int64))
    if target.is_host:
        check_host_memory(size, f"loading {config.source}")


def _build(target: MlxTarget, config: MlxConfig, weights: SafetensorsFolder) -> Decoder:
    try:
        arrays = {name: _array(target, weights, name) for name in weights.names()}
        return build_decoder(target.mx, config, arrays)
    except PhirtError:
        raise
    # Building modules runs mlx-lm's code, which raises what it likes.
    except Exception as error:
        raise translate(error, f"loading {config.source}") from error


def _array(target: MlxTarget, weights: SafetensorsFolder, name: str) -> Any:
    mx = target.mx
    dtype, view = _DTYPES[weights.dtype(name)]
    stored = np.require(weights.raw(name).view(view), requirements=["ALIGNED"])
    array = mx.array(stored.reshape(weights.shape(name)))
    if dtype == "bfloat16":
        array = array.view(mx.bfloat16)
    if target.is_host and weights.dtype(name) in _FLOATS:
        # MLX's CPU kernels for 16 bits are slow (docs/backends/mlx.md) and round every result.
        array = array.astype(mx.float32)
    mx.eval(array)
    return array

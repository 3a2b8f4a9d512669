"""transformers on torch: any causal language model in safetensors, on any device of torch's.

The module has the name of the package that it adapts: `import transformers` means the package
everywhere in it, since imports are absolute.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from phirt.backends.importing import unavailable
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.transformers.devices import (
    BACKEND,
    EXTRA,
    check_device,
    import_both,
    parse_device,
)
from phirt.backends.transformers.listing import list_devices
from phirt.backends.transformers.loading import find_objection, load_network, quiet
from phirt.backends.transformers.model import TransformersModel, translate
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    ModelError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.safetensors import SafetensorsFolder
from phirt.protocols import Accept, Availability, LoadOptions, Reject
from phirt.types import Artifact

__all__ = ["TransformersBackend"]

_FORMAT = "safetensors"
# What LoadOptions.extra may hold: from_pretrained's names, and the values that are tested.
_SETTINGS = {
    "attn_implementation": ("sdpa", "eager"),
    "dtype": ("float32", "float16", "bfloat16"),
}


class TransformersBackend:
    """Adapter to transformers' causal language models."""

    name: ClassVar[str] = BACKEND
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def probe(self) -> list[Availability]:
        """What is installed; torch is imported only where it may find an accelerator."""
        try:
            return list_devices()
        except (BackendNotInstalledError, BackendBrokenError) as error:
            return unavailable(error, extra=EXTRA)

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts folders of plain safetensors."""
        try:
            parse_device(device)
            if artifact.format != _FORMAT:
                return Reject(f"transformers reads folders of safetensors, not {artifact.format!r}")
            objection = find_objection(artifact.path)
        except DeviceNotAvailableError as error:
            return Reject(str(error), 'Pass device="cpu".')
        except ModelError as error:
            return Reject(str(error))
        return Reject(f"{artifact.name}: {objection}") if objection else Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> TransformersModel:
        """Put the weights on the device.

        Raises:
            BackendNotInstalledError: transformers or torch is not installed.
            BackendBrokenError: One is installed and does not import, or is too old.
            DeviceNotAvailableError: torch does not offer the device.
            ModelFormatError: The folder's files are damaged or contradict each other.
            UnsafeModelError: A file reaches outside the folder.
            UnsupportedModelError: The model is of a kind that phirt cannot drive.
            OutOfMemoryError: The weights do not fit.
            ValueError: ``options.extra`` holds an unknown setting.
        """
        check_kv_precision(self, device, options)
        _check_settings(options.extra)
        folder = read_folder(artifact.path, name=artifact.name, formats=self.formats)
        objection = find_objection(folder.artifact.path)
        if objection:
            raise UnsupportedModelError(f"{artifact.name}: {objection}.")
        torch, transformers = import_both()
        target = check_device(torch, device)
        with quiet(transformers):
            network = _load(torch, transformers, folder, target, options)
            return TransformersModel(
                torch,
                transformers,
                network,
                folder=folder,
                device=str(parse_device(device)),
                threads=options.threads,
            )


def _load(
    torch: Any, transformers: Any, folder: ModelFolder, target: Any, options: LoadOptions
) -> Any:
    path = folder.artifact.path
    try:
        with SafetensorsFolder(path) as weights:
            network = load_network(
                torch,
                transformers,
                weights,
                path,
                dtype=options.extra.get("dtype", "float32" if target.type == "cpu" else None),
                attention=options.extra.get("attn_implementation"),
            )
        return network.to(target)
    except ModelError:
        raise
    except ImportError as error:
        # transformers imports an architecture, and what it needs, only now.
        raise BackendBrokenError(
            f"Backend {BACKEND!r}: transformers cannot import what {path} needs: {error}. "
            "Install that package, or choose another backend."
        ) from error
    # Building a model runs code of its architecture, which raises what it likes.
    except Exception as error:
        raise translate(error, f"loading {path}") from error


def _check_settings(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if value not in _SETTINGS.get(key, ()):
            known = "; ".join(f"{name}: {', '.join(of)}" for name, of in _SETTINGS.items())
            raise ValueError(
                f"The backend {BACKEND!r} has no setting {key}={value!r}. It has: {known}."
            )

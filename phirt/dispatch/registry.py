"""Backends by name. Nothing is imported until it is asked for.

A package adds a backend through the entry-point group ``phirt.backends``::

    [project.entry-points."phirt.backends"]
    mine = "my_package.backend:MyBackend"
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points

from phirt.backends.distributions import PathState, path_state
from phirt.errors import BackendBrokenError, UnknownBackendError
from phirt.protocols import Backend

__all__ = [
    "ENTRY_POINT_GROUP",
    "backend_names",
    "check_registered",
    "formats_of",
    "get_backend",
    "is_automatic",
    "kv_precisions_of",
]

ENTRY_POINT_GROUP = "phirt.backends"

# In order of preference under "auto".
_BUILT_IN = {
    "onnxruntime": "phirt.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "phirt.backends.openvino:OpenVinoBackend",
    "onnxruntime-genai": "phirt.backends.onnxruntime_genai:OnnxRuntimeGenaiBackend",
    "mlx": "phirt.backends.mlx:MlxBackend",
    "transformers": "phirt.backends.transformers:TransformersBackend",
    "reference": "phirt.backends.reference:ReferenceBackend",
}
# What each adapter says in `Backend.formats`, so that a plan need not import all of them.
_FORMATS = {
    "onnxruntime": ("onnx-genai", "onnx"),
    "openvino": ("openvino", "onnx-genai", "onnx"),
    "onnxruntime-genai": ("onnx-genai",),
    "mlx": ("mlx", "safetensors"),
    "transformers": ("safetensors",),
    "reference": ("safetensors",),
}
# And in `Backend.kv_precisions`.
_KV_PRECISIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": {"fp32": ("cpu",), "int8": ("cpu",)},
    "openvino": {"fp32": ("cpu",), "fp16": ("cpu",), "int8": ("cpu",)},
    "onnxruntime-genai": {},
    "mlx": {"fp32": ("cpu",), "int8": ("cpu",)},
    "transformers": {},
    "reference": {},
}
# Written to be read and compared with, not to be fast: used where it is named.
_ONLY_BY_NAME = ("reference",)


def backend_names() -> list[str]:
    """Names of all registered backends, phirt's own first, in order of preference."""
    return [*_BUILT_IN, *sorted(_plugins().keys() - _BUILT_IN.keys())]


def is_automatic(name: str) -> bool:
    """Whether ``"auto"`` may choose the backend of that name."""
    return name not in _ONLY_BY_NAME


def check_registered(name: str) -> str:
    """Where the adapter of a backend is, as an entry point has it; nothing is imported.

    Raises:
        UnknownBackendError: No backend of that name is registered.
    """
    target = _BUILT_IN.get(name) or _plugins().get(name)
    if target is None:
        names = backend_names()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownBackendError(
            f"backend={name!r} is not registered; registered are: {', '.join(names)}.{hint}"
        )
    return target


def get_backend(name: str) -> Backend:
    """The backend of that name. Its adapter is imported now, its runtime is not.

    Raises:
        UnknownBackendError: No backend of that name is registered.
        BackendBrokenError: A plugin's adapter cannot be imported.
    """
    target = check_registered(name)
    module, _, attribute = target.partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
    # A plugin is somebody else's code; whatever it raises becomes one error that names it.
    except Exception as error:
        raise BackendBrokenError(
            f"The adapter of backend {name!r} ({target}) cannot be imported: "
            f"{type(error).__name__}: {error}. Reinstall or update the package that brings it."
        ) from error
    return backend


def formats_of(name: str, *, imports: bool = True) -> tuple[str, ...]:
    """The layouts that a backend reads, preferred first; none where its adapter is broken.

    Args:
        name: Name of the backend.
        imports: Whether a plugin's adapter may be imported to be asked; else it has none.

    Raises:
        UnknownBackendError: No backend of that name is registered.
    """
    if name in _FORMATS:
        return _FORMATS[name]
    if not imports:
        return ()
    try:
        return tuple(get_backend(name).formats)
    except BackendBrokenError:
        return ()


def kv_precisions_of(name: str, *, imports: bool = True) -> Mapping[str, tuple[str, ...]]:
    """The precisions of a KV cache that a backend may be asked for, and on what kinds of devices.

    Args:
        name: As for `formats_of`.
        imports: Likewise.

    Raises:
        UnknownBackendError: No backend of that name is registered.
    """
    if name in _KV_PRECISIONS:
        return _KV_PRECISIONS[name]
    if not imports:
        return {}
    try:
        # A plugin may be older than this attribute.
        return dict(getattr(get_backend(name), "kv_precisions", {}))
    except BackendBrokenError:
        return {}


def _plugins() -> Mapping[str, str]:
    return _plugins_of(path_state())


@lru_cache(maxsize=8)
def _plugins_of(state: PathState) -> Mapping[str, str]:  # noqa: ARG001  # what the result is kept by
    """The plugins that are installed: finding them reads a file of every distribution."""
    # A plugin cannot take the name of a built-in backend: get_backend looks there first.
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}

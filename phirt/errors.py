"""Every error that phirt raises on its own account.

The tree, with a second base in parentheses where there is one::

    PhirtError
    ├── BackendError
    │   ├── UnknownBackendError (ValueError)
    │   ├── BackendNotInstalledError (ImportError)
    │   ├── BackendBrokenError (ImportError)
    │   └── BackendRuntimeError
    ├── DeviceError
    │   ├── DeviceNotAvailableError
    │   ├── DevicePlacementError
    │   └── OutOfMemoryError (MemoryError)
    ├── ModelError
    │   ├── ModelNotFoundError (FileNotFoundError)
    │   ├── ModelFormatError
    │   ├── UnsafeModelError
    │   ├── UnsupportedModelError
    │   └── StoreError
    ├── BuildError
    │   ├── EngineNotInstalledError (ImportError)
    │   ├── EngineFailedError
    │   └── QualityCheckError
    └── GenerationError
        ├── ContextLengthError
        ├── UnsupportedParameterError
        ├── NonFiniteLogitsError
        └── SessionClosedError

An argument that is wrong in itself (a negative temperature, a prompt that is not text)
stays a plain `ValueError` or `TypeError`: it is a mistake in the calling code, not a
condition of the machine. A message says what was asked, what was found and what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendBrokenError",
    "BackendError",
    "BackendNotInstalledError",
    "BackendRuntimeError",
    "BuildError",
    "ContextLengthError",
    "DeviceError",
    "DeviceNotAvailableError",
    "DevicePlacementError",
    "EngineFailedError",
    "EngineNotInstalledError",
    "GenerationError",
    "ModelError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "PhirtError",
    "QualityCheckError",
    "SessionClosedError",
    "StoreError",
    "UnknownBackendError",
    "UnsafeModelError",
    "UnsupportedModelError",
    "UnsupportedParameterError",
]


class PhirtError(Exception):
    """Base class of every error that phirt raises on its own account."""


class BackendError(PhirtError):
    """A backend (the adapter to one runtime) cannot do what was asked."""


class UnknownBackendError(BackendError, ValueError):
    """No backend of that name is registered."""


class BackendNotInstalledError(BackendError, ImportError):
    """The backend's runtime is not installed; the message names the extra to install."""


class BackendBrokenError(BackendError, ImportError):
    """The backend's runtime is installed, but importing it fails."""


class BackendRuntimeError(BackendError):
    """The runtime failed while it loaded or ran a model; its own error is chained."""


class DeviceError(PhirtError):
    """A device cannot do what was asked."""


class DeviceNotAvailableError(DeviceError):
    """The named device is absent, or absent for the named backend."""


class DevicePlacementError(DeviceError):
    """The model was loaded, but runs somewhere else than on the device asked for."""


class OutOfMemoryError(DeviceError, MemoryError):
    """Weights, KV cache or workspace do not fit in the memory that is free."""


class ModelError(PhirtError):
    """A model cannot be found, read, trusted or run."""


class ModelNotFoundError(ModelError, FileNotFoundError):
    """No model of that name, folder or file exists."""


class ModelFormatError(ModelError):
    """A model's file is damaged or does not follow its own format."""


class UnsafeModelError(ModelError):
    """A model asks for something that data must not do, such as reading outside its folder."""


class UnsupportedModelError(ModelError):
    """The model is sound, but phirt does not support it; the message names what is missing."""


class StoreError(ModelError):
    """The store of models cannot be written: its disk is full, or it is not permitted."""


class BuildError(PhirtError):
    """A model cannot be built as it was asked for."""


class EngineNotInstalledError(BuildError, ImportError):
    """No environment has what the engine is made of; the message says how to prepare one."""


class EngineFailedError(BuildError):
    """The engine, or what prepares its environment, ended without a result.

    Attributes:
        log: The last of what it wrote, at most some ten thousand characters.
    """

    def __init__(self, message: str, *, log: str = "") -> None:
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> tuple[object, ...]:
        # As `ContextLengthError` does, for the same reason.
        return (_engine_failed_error, (str(self), self.log))


def _engine_failed_error(message: str, log: str) -> EngineFailedError:
    return EngineFailedError(message, log=log)


class QualityCheckError(BuildError):
    """What was built differs from its source by more than was allowed."""


class GenerationError(PhirtError):
    """A generation cannot start or go on."""


class ContextLengthError(GenerationError):
    """Prompt and new tokens do not fit in the model's context.

    Attributes:
        required: Tokens that the request needs, prompt included.
        available: The model's context length, in tokens.
    """

    def __init__(self, message: str, *, required: int, available: int) -> None:
        super().__init__(message)
        self.required = required
        self.available = available

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments do not survive pickling by default, and
        # process pools pickle the exceptions of their workers.
        return (_context_length_error, (str(self), self.required, self.available))


def _context_length_error(message: str, required: int, available: int) -> ContextLengthError:
    return ContextLengthError(message, required=required, available=available)


class UnsupportedParameterError(GenerationError):
    """The loaded model or its backend cannot honour a generation parameter."""


class NonFiniteLogitsError(GenerationError):
    """The logits hold NaN or infinity, or the processors left no token to choose."""


class SessionClosedError(GenerationError):
    """A session, stream or model was used after it was closed."""

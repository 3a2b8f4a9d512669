"""Runs small language models on whatever accelerator a machine has.

    import phirt

    with phirt.load() as model:
        print(model.generate([{"role": "user", "content": "Hello!"}]).text)

No runtime is imported until a model is loaded.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from phirt._version import __version__
from phirt.devices.device import Device, DeviceBackend
from phirt.dispatch.device_list import devices
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    BackendRuntimeError,
    BuildError,
    ContextLengthError,
    DeviceError,
    DeviceNotAvailableError,
    DevicePlacementError,
    EngineFailedError,
    EngineNotInstalledError,
    GenerationError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    PhirtError,
    QualityCheckError,
    SessionClosedError,
    StoreError,
    UnknownBackendError,
    UnsafeModelError,
    UnsupportedModelError,
    UnsupportedParameterError,
)
from phirt.generation.failover import Failover
from phirt.generation.params import GenerationParams
from phirt.generation.timings import Timings, Usage
from phirt.loading import load
from phirt.locate import pull
from phirt.model import Model
from phirt.remote import PullPlan
from phirt.stream import Generation, Token, TokenLogprobs, TokenStream
from phirt.types import Progress

if TYPE_CHECKING:
    from phirt.benchmark.report import BenchReport
    from phirt.benchmark.run import bench
    from phirt.build.recipe import Quantization
    from phirt.building import BuildReport, build_model
    from phirt.dispatch.plan import Plan
    from phirt.planning import plan
    from phirt.quality.comparison import compare_quality
    from phirt.quality.report import QualityReport
    from phirt.tuning import Tuning, TuningFailure, tune

__all__ = [
    "BackendBrokenError",
    "BackendError",
    "BackendNotInstalledError",
    "BackendRuntimeError",
    "BenchReport",
    "BuildError",
    "BuildReport",
    "ContextLengthError",
    "Device",
    "DeviceBackend",
    "DeviceError",
    "DeviceNotAvailableError",
    "DevicePlacementError",
    "EngineFailedError",
    "EngineNotInstalledError",
    "Failover",
    "Generation",
    "GenerationError",
    "GenerationParams",
    "Model",
    "ModelError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "PhirtError",
    "Plan",
    "Progress",
    "PullPlan",
    "QualityCheckError",
    "QualityReport",
    "Quantization",
    "SessionClosedError",
    "StoreError",
    "Timings",
    "Token",
    "TokenLogprobs",
    "TokenStream",
    "Tuning",
    "TuningFailure",
    "UnknownBackendError",
    "UnsafeModelError",
    "UnsupportedModelError",
    "UnsupportedParameterError",
    "Usage",
    "__version__",
    "bench",
    "build_model",
    "compare_quality",
    "devices",
    "load",
    "plan",
    "pull",
    "tune",
]

# `devices` is the function here: of the package of that name, code imports modules and names,
# `from phirt.devices.names import DeviceName`, and none goes through this attribute.

# Imported when they are asked for: few programs plan, measure or compare by themselves.
_LAZY = {
    "BenchReport": "phirt.benchmark.report",
    "BuildReport": "phirt.building",
    "Quantization": "phirt.build.recipe",
    "bench": "phirt.benchmark.run",
    "build_model": "phirt.building",
    "Plan": "phirt.dispatch.plan",
    "QualityReport": "phirt.quality.report",
    "Tuning": "phirt.tuning",
    "TuningFailure": "phirt.tuning",
    "compare_quality": "phirt.quality.comparison",
    "plan": "phirt.planning",
    "tune": "phirt.tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


# A library leaves it to the application where its log goes.
logging.getLogger("phirt").addHandler(logging.NullHandler())

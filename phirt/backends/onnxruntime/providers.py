"""Execution providers: which device name means which, how each is opened, and what it took.

onnxruntime falls back to the CPU silently: in its list of providers, in its constructor, and
node by node. Here no fallback is asked for, and the assignment of the nodes is read back.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from phirt.backends.ort_plugins import plugin_devices
from phirt.backends.placement import place_nodes
from phirt.devices.names import DeviceName
from phirt.errors import DeviceNotAvailableError
from phirt.protocols import Placement

__all__ = ["Provider", "add_to", "find_provider", "installed", "read_placement"]

_CPU = "CPUExecutionProvider"
_PREFIX = "onnxruntime_ep_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """One way to run on a kind of device.

    Attributes:
        device: The device name, without an index.
        name: onnxruntime's name of the execution provider; empty for a plugin that this table
            does not know and that is not loaded yet.
        module: The package that brings it as a plugin, or None where it is built in.
        hardware: Which of a plugin's devices: ``"CPU"``, ``"GPU"`` or ``"NPU"``; None for any.
        memory: onnxruntime's name of the memory that the cache lies in.
        shares_buffer: Whether its attention writes new keys and values into the buffer
            that it reads the old ones from.
        index_option: The provider's option that chooses among several devices.
        options: Options that it is given.
        config: Entries of the session's configuration that it needs.
        index: Which of several devices, from 0.
    """

    device: str
    name: str
    module: str | None = None
    hardware: str | None = None
    memory: str = "cpu"
    shares_buffer: bool = False
    index_option: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    index: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether it is onnxruntime's own CPU provider."""
        return self.name == _CPU


# With the channels-last layout that it prefers for convolutions, the provider's nodes are
# placed before onnxruntime begins to record who got which.
_WEBGPU_CONFIG = {"ep.webgpuexecutionprovider.preferredLayout": "NCHW"}
_OPENVINO = "OpenVINOExecutionProvider"
_OPENVINO_EP = "onnxruntime_ep_openvino"
_QNN = "QNNExecutionProvider"
_RTX = "NvTensorRTRTXExecutionProvider"
_MLX = "MLXExecutionProvider"

# In order of preference for each device. A provider that copies the cache on every step
# (shares_buffer False) is right on any graph; sharing is for those known to support it.
_TABLE = (
    Provider(device="cpu", name=_CPU, shares_buffer=True),
    Provider(
        device="cuda",
        name="CUDAExecutionProvider",
        memory="cuda",
        shares_buffer=True,
        index_option="device_id",
    ),
    Provider(device="tensorrt-rtx", name=_RTX, memory="cuda", index_option="device_id"),
    Provider(device="tensorrt-rtx", name=_RTX, module="onnxruntime_ep_nv_tensorrt_rtx"),
    Provider(
        device="directml",
        name="DmlExecutionProvider",
        memory="dml",
        shares_buffer=True,
        index_option="device_id",
    ),
    Provider(
        device="webgpu",
        name="WebGpuExecutionProvider",
        memory="webgpu",
        shares_buffer=True,
        index_option="deviceId",
        config=_WEBGPU_CONFIG,
    ),
    Provider(
        device="webgpu",
        name="WebGpuExecutionProvider",
        module="onnxruntime_ep_webgpu",
        config=_WEBGPU_CONFIG,
    ),
    Provider(device="coreml", name="CoreMLExecutionProvider"),
    Provider(device="metal", name=_MLX, module="onnxruntime_ep_mlx"),
    Provider(device="openvino-cpu", name=_OPENVINO, module=_OPENVINO_EP, hardware="CPU"),
    Provider(device="openvino-cpu", name=_OPENVINO, options={"device_type": "CPU"}),
    Provider(device="gpu", name=_OPENVINO, module=_OPENVINO_EP, hardware="GPU"),
    Provider(device="gpu", name=_OPENVINO, options={"device_type": "GPU"}),
    Provider(device="gpu", name=_QNN, module="onnxruntime_qnn", hardware="GPU"),
    Provider(device="npu", name=_QNN, module="onnxruntime_qnn", hardware="NPU"),
    Provider(device="npu", name=_QNN),
    Provider(device="npu", name=_OPENVINO, module=_OPENVINO_EP, hardware="NPU"),
    Provider(device="npu", name=_OPENVINO, options={"device_type": "NPU"}),
)
_KNOWN_MODULES = {row.module for row in _TABLE if row.module is not None}


def installed(ort: Any, kind: str | None = None) -> Iterator[Provider]:
    """The providers that are installed here, preferred first; of one device kind, if named.

    Nothing is loaded: whether a device is there shows when a model is loaded on it.
    """
    built_in = ort.get_available_providers()
    for row in _rows():
        if kind not in (None, row.device):
            continue
        if row.name in built_in if row.module is None else _is_installed(row.module):
            yield row


def find_provider(ort: Any, device: str) -> Provider:
    """The provider that serves a device. Plugins for it are loaded.

    Raises:
        DeviceNotAvailableError: None is installed, or it finds no such device.
        BackendBrokenError: A plugin for it is installed and cannot be loaded.
    """
    wanted = DeviceName.parse(device)
    index = wanted.index or 0
    empty = []
    for row in installed(ort, wanted.kind):
        # A built-in provider without an option for it has one device.
        if row.module is None:
            if index == 0 or row.index_option is not None:
                return replace(row, index=index)
        elif index < len(devices := _plugin_devices(ort, row)):
            return replace(row, index=index, name=devices[index].ep_name)
        empty.append(row)
    if empty:
        found = f"{empty[0].module or empty[0].name} is installed, and finds no such device"
    else:
        names = ", ".join(dict.fromkeys(row.name or str(row.module) for row in installed(ort)))
        found = f"none of the execution providers that are installed serves it ({names})"
    raise DeviceNotAvailableError(
        f"Device {device!r} is not available to backend 'onnxruntime': {found}. "
        'Install the wheel or plugin that serves it, or pass device="cpu".'
    )


def add_to(ort: Any, provider: Provider, settings: Any, options: Mapping[str, Any]) -> list[Any]:
    """Choose the provider in a session's options.

    Args:
        ort: The onnxruntime module.
        provider: The provider.
        settings: The ``SessionOptions``; a plugin's device is added to them.
        options: The user's own options for the provider.

    Returns:
        What to pass as ``providers``; empty for a plugin.
    """
    for key, value in provider.config.items():
        settings.add_session_config_entry(key, value)
    if provider.memory == "dml":
        settings.enable_mem_pattern = False  # DirectML's own condition
    chosen = {**provider.options, **{key: str(value) for key, value in options.items()}}
    if provider.module is not None:
        found = _plugin_devices(ort, provider)[provider.index]
        settings.add_provider_for_devices([found], chosen)
        return []
    if provider.index_option is not None and provider.index:
        chosen[provider.index_option] = str(provider.index)
    return [(provider.name, chosen)] if chosen else [provider.name]


def read_placement(inference: Any, provider: Provider, device: str) -> Placement:
    """Who took which nodes.

    Raises:
        DevicePlacementError: A node of the heavy kinds (products of matrices, attention) is
            not on the device, or onnxruntime does not say where any node is.
    """
    nodes = [
        (assignment.ep_name, node.op_type)
        for assignment in inference.get_provider_graph_assignment_info()
        for node in assignment.get_nodes()
    ]
    return place_nodes(nodes, device=device, provider=provider.name)


def _rows() -> Iterator[Provider]:
    yield from _TABLE
    for name in _module_names():
        if name.startswith(_PREFIX) and name not in _KNOWN_MODULES:
            # What it calls its provider, it says once it is loaded.
            device = name.removeprefix(_PREFIX).replace("_", "-")
            yield Provider(device=device, name="", module=name)


def _module_names() -> list[str]:
    return [found.name for found in pkgutil.iter_modules()]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _plugin_devices(ort: Any, provider: Provider) -> list[Any]:
    """The devices that a plugin offers for a row of the table."""
    if provider.module is None:
        return []
    return plugin_devices(ort, provider.module, provider.hardware)

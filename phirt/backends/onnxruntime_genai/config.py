"""The configuration that onnxruntime-genai is given: phirt's own, never the folder's.

A genai_config.json can name native libraries, files to write, provider options and rules of
generation, in several places and more with every version. So none of it is passed on. A new
one is written from the facts that phirt has checked, into a folder of its own, and the graph
is handed over in memory beside it.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from phirt.devices.names import DeviceName
from phirt.errors import BackendBrokenError, DeviceNotAvailableError
from phirt.models.genai_config import GENAI_CONFIG_NAME, DecoderSpec
from phirt.protocols import LoadOptions
from phirt.silence import import_silently

__all__ = ["PROVIDERS", "Provider", "Settings", "choose_provider", "last_token", "open_config"]

_EXTRA_KEYS = ("append_once", "provider", "provider_options", "session_options", "tokens_per_run")

_KINDS_OF_VALUES: Mapping[str, tuple[type, str]] = {
    "append_once": (bool, "True, False or None"),
    "provider": (str, "the name of a provider"),
    "provider_options": (Mapping, "a mapping"),
    "session_options": (Mapping, "a mapping"),
}

# genai treats these two in ways of its own. Positions of padding are left out of attention,
# and trailing padding even of "the last position's logits": phirt pads nothing, and many
# models use their end-of-turn token as padding, so no token may be it.
_NO_PADDING = -1
# A plain decoder graph. Under the type "phi3" genai would prefill once more, by itself, at
# 4,097 tokens (LongRoPE); phirt's loop does that where the model's own boundary is.
_TYPE = "decoder"


@dataclass(frozen=True, slots=True)
class Provider:
    """An execution provider, as genai and as onnxruntime name it.

    Attributes:
        name: genai's name.
        execution_provider: onnxruntime's name.
        build: How the distribution of genai that has it inside ends, where not every one has.
        plugin: The package that brings it, where it is a plugin.
        wheel: The build of onnxruntime that has it inside, where not every one has.
        index_option: Its option for the device's index, or None where it has none.
        append_once: genai appends tokens to an empty cache only, there.
        options: Options that phirt sets.
    """

    name: str
    execution_provider: str
    build: str = ""
    plugin: str | None = None
    wheel: str | None = None
    index_option: str | None = None
    append_once: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_plugin(self) -> bool:
        """Whether its plugin is there."""
        return self.plugin is not None and importlib.util.find_spec(self.plugin) is not None

    def is_installed(self, og: Any) -> bool:
        """Whether genai's build has it, and onnxruntime's or its plugin.

        genai's own ``is_cuda_available`` and the like are constants of the build, and those
        of webgpu, qnn and openvino are always true.
        """
        if not getattr(og, "__id__", "").endswith(self.build):
            return False
        return self.plugin is None or self.has_plugin or _has_wheel(self.wheel)


def _has_wheel(name: str | None) -> bool:
    if name is None:
        return False
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


_CPU = Provider("CPU", "CPUExecutionProvider")
_OPENVINO = Provider(
    "OpenVINO",
    "OpenVINOExecutionProvider",
    plugin="onnxruntime_ep_openvino",
    wheel="onnxruntime-openvino",
    index_option="device_type",
)
_OPENVINO_DEVICES = {"openvino-cpu": "CPU", "gpu": "GPU", "npu": "NPU"}

PROVIDERS: Mapping[str, tuple[Provider, ...]] = {
    "cpu": (_CPU,),
    "cuda": (Provider("cuda", "CUDAExecutionProvider", build="-cuda", index_option="device_id"),),
    "directml": (
        Provider(
            "DML",
            "DmlExecutionProvider",
            build="-directml",
            index_option="device_index",
            append_once=True,
            # Replaying captured commands computes wrong logits on some drivers, says genai's
            # own source.
            options={"enable_graph_capture": "0"},
        ),
    ),
    "webgpu": (
        Provider(
            "WebGPU",
            "WebGpuExecutionProvider",
            plugin="onnxruntime_ep_webgpu",
            wheel="onnxruntime-webgpu",
        ),
    ),
    "tensorrt-rtx": (
        Provider(
            "NvTensorRtRtx",
            "NvTensorRTRTXExecutionProvider",
            build="-cuda",
            plugin="onnxruntime_ep_nv_tensorrt_rtx",
            index_option="device_id",
        ),
    ),
    "openvino-cpu": (_OPENVINO,),
    "gpu": (_OPENVINO,),
    "npu": (
        Provider("QNN", "QNNExecutionProvider", plugin="onnxruntime_qnn", append_once=True),
        _OPENVINO,
    ),
}
"""Kinds of devices, and the providers that can drive each, preferred first."""


@dataclass(frozen=True, slots=True)
class Settings:
    """`LoadOptions`, with the settings that its ``extra`` holds.

    Attributes:
        threads: Threads within one operator, or None for genai's default.
        spinning: Whether idle threads spin, or None for onnxruntime's default.
        append_once: Prefill once and feed every later token through the logits, the only way
            that DirectML and QNN have; None for what the provider needs.
        provider: genai's name of the provider, or None for the device's own.
        provider_options: Its options, by its own names.
        session_options: Entries of ``session_options`` in genai_config.json.
        tokens_per_run: Most tokens that genai is given at once, or None for the device's own.
    """

    threads: int | None = None
    spinning: bool | None = None
    append_once: bool | None = None
    provider: str | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)
    session_options: Mapping[str, Any] = field(default_factory=dict)
    tokens_per_run: int | None = None

    @classmethod
    def read(cls, options: LoadOptions) -> Settings:
        """Take the options apart.

        Raises:
            ValueError: ``extra`` has a setting that does not exist, or a value is not of its
                kind.
        """
        unknown = sorted(options.extra.keys() - set(_EXTRA_KEYS))
        if unknown:
            raise ValueError(
                f"Backend 'onnxruntime-genai' has no setting {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(map(repr, _EXTRA_KEYS))}."
            )
        limit = options.extra.get("tokens_per_run")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"extra['tokens_per_run'] must be a positive integer, not {limit!r}")
        for key, (kind, called) in _KINDS_OF_VALUES.items():
            value = options.extra.get(key)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"extra[{key!r}] must be {called}, not {value!r}")
        given = {key: value for key, value in options.extra.items() if value is not None}
        return cls(threads=options.threads, spinning=options.spinning, **given)


def choose_provider(og: Any, device: DeviceName, settings: Settings) -> Provider:
    """The provider that drives a device here.

    Args:
        og: The module.
        device: The device.
        settings: May name another provider than the device's first.

    Raises:
        DeviceNotAvailableError: genai has none for this kind of device, or cannot choose the
            one of that index.
        ValueError: The settings name one that does not drive it.
    """
    candidates = PROVIDERS.get(device.kind)
    if candidates is None:
        raise DeviceNotAvailableError(
            f"Device '{device}' is not available to backend 'onnxruntime-genai', which has "
            f"execution providers for {', '.join(PROVIDERS)}. Pass one of these."
        )
    provider = _named(candidates, device, settings.provider)
    if provider is None:
        provider = next((p for p in candidates if p.is_installed(og)), candidates[0])
    if device.index and provider.index_option is None:
        raise DeviceNotAvailableError(
            f"Device '{device}' is not available to backend 'onnxruntime-genai': its provider "
            f"{provider.name} has no choice among several devices. Pass device={device.kind!r}."
        )
    return provider


def _named(
    candidates: tuple[Provider, ...], device: DeviceName, name: str | None
) -> Provider | None:
    if name is None:
        return None
    for provider in candidates:
        if provider.name.lower() == name.lower():
            return provider
    names = ", ".join(repr(provider.name) for provider in candidates)
    raise ValueError(f"provider={name!r} does not drive '{device}'; it has {names}.")


def last_token(spec: DecoderSpec) -> int:
    """The one token behind which genai chooses no other; it insists on having one."""
    return min(spec.eos_token_ids, default=0)


@contextmanager
def open_config(
    og: Any,
    spec: DecoderSpec,
    model_path: Path,
    *,
    device: DeviceName,
    provider: Provider,
    settings: Settings,
) -> Iterator[Any]:
    """An ``og.Config`` for a graph that phirt has checked, to make an ``og.Model`` from.

    Args:
        og: The module.
        spec: The graph's inputs, outputs and sizes.
        model_path: The graph; it and its weights are all that is opened of the folder.
        device: What to run on.
        provider: What drives it.
        settings: How.
    """
    if provider.plugin is not None:
        _register_plugin(og, provider, provider.plugin)
    data_folder = model_path.parent.resolve()
    with _folder_near(data_folder) as scratch:
        document = _document(spec, device, provider, settings)
        document["model"]["decoder"]["session_options"] |= {
            # Relative, since genai takes a path for one inside the folder of its configuration.
            "session.model_external_initializers_file_folder_path": os.path.relpath(
                data_folder, scratch
            )
        }
        # genai's parser knows no \u escapes.
        text = json.dumps(document, ensure_ascii=False)
        (scratch / GENAI_CONFIG_NAME).write_text(text, encoding="utf-8")
        config = og.Config(os.fspath(scratch))
        with (
            model_path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as graph,
        ):
            # The configuration keeps the address only: the mapping must outlive the load.
            config.add_model_data(spec.filename, graph)
            yield config


@contextmanager
def _folder_near(data_folder: Path) -> Iterator[Path]:
    """A temporary folder from which a relative path leads to another one."""
    parent = None
    if Path(tempfile.gettempdir()).resolve().drive != data_folder.drive:
        parent = data_folder.parent  # On Windows no relative path leads to another drive.
    with tempfile.TemporaryDirectory(
        prefix="phirt-genai-", dir=parent, ignore_cleanup_errors=True
    ) as name:
        yield Path(name).resolve()


def _document(
    spec: DecoderSpec, device: DeviceName, provider: Provider, settings: Settings
) -> dict[str, Any]:
    """genai_config.json, from facts only."""
    inputs = {
        "input_ids": spec.input_ids,
        "attention_mask": spec.attention_mask,
        "past_key_names": spec.past_key_names,
        "past_value_names": spec.past_value_names,
    }
    if spec.position_ids is not None:
        inputs["position_ids"] = spec.position_ids
    decoder = {
        "session_options": {
            # Errors reach the caller as exceptions; a library does not write to stderr as well.
            "log_severity_level": 4,
            "provider_options": _provider_options(device, provider, settings),
            **_threading(settings),
            **settings.session_options,
        },
        "filename": spec.filename,
        "head_size": spec.head_size,
        "num_attention_heads": spec.num_heads or spec.num_kv_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": spec.num_kv_heads,
        "inputs": inputs,
        "outputs": {
            "logits": spec.logits,
            "present_key_names": spec.present_key_names,
            "present_value_names": spec.present_value_names,
        },
    }
    return {
        "model": {
            "type": _TYPE,
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_length,
            "pad_token_id": _NO_PADDING,
            "eos_token_id": [last_token(spec)],
            "decoder": decoder,
        },
        "search": {
            "past_present_share_buffer": bool(spec.search.get("past_present_share_buffer", False))
        },
    }


def _threading(settings: Settings) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    if settings.threads is not None:
        entries["intra_op_num_threads"] = settings.threads
    if settings.spinning is not None:
        entries["session.intra_op.allow_spinning"] = "1" if settings.spinning else "0"
    return entries


def _provider_options(
    device: DeviceName, provider: Provider, settings: Settings
) -> list[dict[str, Any]]:
    if provider is _CPU:
        return []
    entries: dict[str, Any] = dict(provider.options)
    if provider is _OPENVINO:
        name = _OPENVINO_DEVICES[device.kind]
        entries["device_type"] = name if device.index is None else f"{name}.{device.index}"
    elif provider.index_option is not None and device.index is not None:
        entries[provider.index_option] = str(device.index)
    entries |= {key: str(value) for key, value in settings.provider_options.items()}
    return [{provider.name: entries}]


_registered: set[str] = set()
_registering = threading.Lock()


def _register_plugin(og: Any, provider: Provider, module: str) -> None:
    """Tell genai's onnxruntime where a plugin's library is, once in a process.

    Raises:
        BackendBrokenError: The plugin is not there, or does not load.
    """
    with _registering:
        if provider.name in _registered or not provider.has_plugin:
            return  # It may be inside the installed onnxruntime; the load will tell.
        try:
            plugin = import_silently(module)
            og.register_execution_provider_library(module, plugin.get_library_path())
        except Exception as error:
            raise BackendBrokenError(
                f"Backend 'onnxruntime-genai': the plugin {module!r} is installed, but does not "
                f"load: {error}. Reinstall it with: "
                f"python -m pip install --force-reinstall {module.replace('_', '-')}"
            ) from error
        _registered.add(provider.name)

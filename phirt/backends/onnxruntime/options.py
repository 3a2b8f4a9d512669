"""`LoadOptions` in onnxruntime's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from phirt.protocols import LoadOptions

__all__ = ["Settings", "session_options"]

# How long an idle worker spins before it sleeps, in microseconds. Measured on 2 cores
# (docs/performance.md): alone it decodes as fast as with onnxruntime's own, far longer
# spinning, and beside one busy process 1.5 times as fast.
_SPIN_US = "10"
_AFFINITIES = "session.intra_op_thread_affinities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a load may set.

    Attributes:
        threads: Threads within one operator, or None for onnxruntime's default.
        spinning: Whether idle worker threads spin; None for a short while.
        pinning: Whether worker threads are bound to a processor each, or None for
            onnxruntime's default, which binds them where it chooses how many there are.
        provider_options: The execution provider's own options.
        tokens_per_run: Most tokens of one run, or None.
        float_prefill_from: How many tokens of a prompt run with float activations, or None.
        kv_precision: As in `LoadOptions`.
        config: Entries of the session's configuration.
    """

    threads: int | None
    spinning: bool | None
    pinning: bool | None
    provider_options: Mapping[str, Any]
    tokens_per_run: int | None
    float_prefill_from: int | None
    kv_precision: str | None
    config: Mapping[str, str]

    @classmethod
    def of(cls, options: LoadOptions) -> Settings:
        """Read `LoadOptions`; ``extra`` holds names of phirt's own beside onnxruntime's.

        Raises:
            ValueError: There is no such setting, or a value is not of its kind.
        """
        extra = dict(options.extra)
        provider_options = extra.pop("provider_options", {})
        if not isinstance(provider_options, Mapping):
            raise ValueError(  # noqa: TRY004  # a wrong setting, among right ones
                f"extra['provider_options'] must be a mapping, not {provider_options!r}"
            )
        limit = _count_of(extra, "tokens_per_run")
        from_floats = _count_of(extra, "float_prefill_from")
        strange = [key for key in extra if "." not in str(key)]
        if strange:
            # onnxruntime takes any name, and does nothing about those that it does not know.
            raise ValueError(
                f"The backend 'onnxruntime' has no setting {strange[0]!r}. It has "
                "'provider_options', 'tokens_per_run', 'float_prefill_from', and the session's "
                "configuration entries, such as 'session.intra_op.allow_spinning'."
            )
        return cls(
            threads=options.threads,
            spinning=options.spinning,
            pinning=options.pinning,
            provider_options=provider_options,
            tokens_per_run=limit,
            float_prefill_from=from_floats,
            kv_precision=options.kv_precision,
            config={key: str(value) for key, value in extra.items()},
        )


def _count_of(extra: dict[str, Any], name: str) -> int | None:
    """Take a positive integer out of the settings, if it is there."""
    value = extra.pop(name, None)
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"extra[{name!r}] must be a positive integer, not {value!r}")
    return value


def session_options(ort: Any, settings: Settings) -> Any:
    """New ``SessionOptions``; the execution provider is not among them yet."""
    options = ort.SessionOptions()
    # Errors reach the caller as exceptions; a library does not write to stderr as well.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    threads = settings.threads
    if settings.pinning is not None:
        # Told a number, onnxruntime binds none by itself.
        threads = threads or psutil.cpu_count(logical=False) or 1
        if settings.pinning and threads > 1 and _AFFINITIES not in settings.config:
            options.add_session_config_entry(_AFFINITIES, _affinities(threads))
    if threads is not None:
        options.intra_op_num_threads = threads
    if settings.spinning is None:
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    else:
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if settings.spinning else "0"
        )
    for key, value in settings.config.items():
        options.add_session_config_entry(key, value)
    return options


def _affinities(threads: int) -> str:
    """A processor for each thread but the first, which is the caller's, as onnxruntime counts them.

    Raises:
        ValueError: The system binds no threads.
    """
    process: Any = psutil.Process()
    if not hasattr(process, "cpu_affinity"):
        raise ValueError("pinning=True: this system binds no threads. Pass None or False.")
    allowed = process.cpu_affinity() or [0]
    # Its processors begin at 1.
    return ";".join(str(allowed[index % len(allowed)] + 1) for index in range(1, threads))

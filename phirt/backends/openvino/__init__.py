"""OpenVINO's infer requests."""

from __future__ import annotations

from phirt.backends.openvino.adapter import OpenVinoBackend

__all__ = ["OpenVinoBackend"]

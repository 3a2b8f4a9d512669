"""ONNX Runtime, driven directly."""

from __future__ import annotations

from phirt.backends.onnxruntime.adapter import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]

"""onnxruntime-genai: its model and its cache, none of its search."""

from __future__ import annotations

from phirt.backends.onnxruntime_genai.adapter import OnnxRuntimeGenaiBackend

__all__ = ["OnnxRuntimeGenaiBackend"]

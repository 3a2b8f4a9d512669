"""The other sides: the runtimes' own loops."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np

__all__ = ["GenaiLoop"]


class GenaiLoop:
    """onnxruntime-genai's own loop on the same model folder.

    Args:
        folder: The model folder.
        threads: Threads within one operator; None for genai's own choice, half of the
            logical processors.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(os.fspath(folder))
        if threads is not None:
            options = {"intra_op_num_threads": threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = og.Model(config)

    def decode_rate(self, prompt_ids: list[int], new_tokens: int) -> float:
        """Greedy decode, tokens/s: (n - 1) / (t_last - t_first)."""
        params = self._og.GeneratorParams(self._model)
        length = len(prompt_ids) + new_tokens
        # A minimum length keeps it from ending early, as ignore_eos does on phirt's side.
        params.set_search_options(max_length=length, min_length=length)
        generator = self._og.Generator(self._model, params)
        generator.append_tokens(np.array(prompt_ids, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        rate = (new_tokens - 1) / (time.perf_counter() - first)
        assert generator.token_count() == length
        return rate

"""The other sides: the runtimes' own loops."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GenaiLoop", "LlamaCppLoop", "MlxLoop", "OpenVinoLoop"]


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


class LlamaCppLoop:
    """llama.cpp's own steps and greedy sampler on a GGUF file, as cyllama has built them.

    Args:
        path: The file.
        threads: Threads.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        import cyllama.llama.llama_cpp as library

        class Model(library.LlamaModel):  # type: ignore[misc]  # a class of an untyped library
            @property
            def n_vocab(self) -> Any:
                """cyllama 0.2.18 asks the model for what its vocabulary has."""
                return self.get_vocab().n_vocab

        library.disable_logging()
        self._library: Any = library
        params = library.LlamaModelParams()
        params.n_gpu_layers = 0
        self._model = Model(os.fspath(path), params, verbose=False)
        self._params = library.LlamaContextParams()
        self._params.n_ctx = 512
        self._params.n_threads = self._params.n_threads_batch = threads

    def decode_rate(self, prompt_ids: list[int], new_tokens: int) -> float:
        """Greedy decode, tokens/s: (n - 1) / (t_last - t_first); end tokens do not end it."""
        library = self._library
        context = library.LlamaContext(self._model, self._params, verbose=False)
        sampler = library.LlamaSampler(library.LlamaSamplerChainParams())
        sampler.add_greedy()
        batch = library.LlamaBatch(n_tokens=len(prompt_ids), embd=0, n_seq_max=1)
        one = library.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        try:
            for position, token in enumerate(prompt_ids):
                batch.add(token, position, [0], position == len(prompt_ids) - 1)
            context.decode(batch)
            token = sampler.sample(context, -1)
            first = time.perf_counter()
            for step in range(new_tokens - 1):
                one.reset()
                one.add(token, len(prompt_ids) + step, [0], True)
                context.decode(one)
                token = sampler.sample(context, -1)
            return (new_tokens - 1) / (time.perf_counter() - first)
        finally:
            for each in (batch, one, sampler, context):
                each.close()


class MlxLoop:
    """mlx-lm's own ``generate_step`` on a folder that it wrote.

    Args:
        folder: The model folder.
    """

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        self._model: Any = load_model(folder)[0]

    def decode_rate(self, prompt_ids: list[int], new_tokens: int) -> float:
        """Greedy decode, tokens/s: (n - 1) / (t_last - t_first)."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        moments = [
            time.perf_counter()
            for _ in generate_step(mx.array(prompt_ids), self._model, max_tokens=new_tokens)
        ]
        return (len(moments) - 1) / (moments[-1] - moments[0])


class OpenVinoLoop:
    """``openvino_genai.LLMPipeline`` on an IR folder.

    Args:
        folder: The model folder.
    """

    def __init__(self, folder: Path) -> None:
        import openvino as ov
        import openvino_genai

        self._ov = ov
        self._genai = openvino_genai
        self._pipeline = openvino_genai.LLMPipeline(os.fspath(folder), "CPU")

    def decode_rate(self, prompt_ids: list[int], new_tokens: int) -> float:
        """Greedy decode, tokens/s, from the pipeline's own times of each token after the first."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        result = self._pipeline.generate(self._ov.Tensor(np.array([prompt_ids], np.int64)), config)
        assert len(result.tokens[0]) == new_tokens
        return 1000 / float(result.perf_metrics.get_tpot().mean)

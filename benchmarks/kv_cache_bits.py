"""What a KV cache in 8 bits would give and cost on onnxruntime's CPU.

    python -m benchmarks.kv_cache_bits [--context 4000]

What it gives: one attention node in both ways, taking turns. The node is that of the default
model (9 query heads on 3 of keys and values, 64 wide), with random keys and values; scales are
the largest value by 127.

What it costs: the default model in fp32 goes on with a text from a cache whose keys and values
were rounded, with scales that were found on another part of the text.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

import phirt
from benchmarks.precision_table import TEXT
from phirt.protocols import KVCache
from phirt.quality.divergence import compare_rows
from phirt.types import FloatArray

HEADS, KV_HEADS, WIDTH = 9, 3, 64
ROUNDS = 200
CALIBRATED, FORCED = 700, 100


def graph(capacity: int, quantized: str | None) -> bytes:
    """GroupQueryAttention on a shared buffer: of float32, or of int8 with scales of a kind."""
    element = TensorProto.INT8 if quantized else TensorProto.FLOAT
    attributes: dict[str, Any] = {"num_heads": HEADS, "kv_num_heads": KV_HEADS}
    names = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total_length"]
    cache = [1, KV_HEADS, capacity, WIDTH]
    inputs = [
        helper.make_tensor_value_info("query", TensorProto.FLOAT, [1, 1, HEADS * WIDTH]),
        helper.make_tensor_value_info("key", TensorProto.FLOAT, [1, 1, KV_HEADS * WIDTH]),
        helper.make_tensor_value_info("value", TensorProto.FLOAT, [1, 1, KV_HEADS * WIDTH]),
        helper.make_tensor_value_info("past_key", element, cache),
        helper.make_tensor_value_info("past_value", element, cache),
        helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
        helper.make_tensor_value_info("total_length", TensorProto.INT32, []),
    ]
    if quantized:
        attributes |= {"k_quant_type": quantized, "v_quant_type": quantized}
        attributes["kv_cache_bit_width"] = 8
        names += [""] * 5 + ["key_scale", "value_scale"]
        shape = [1] if quantized == "PER_TENSOR" else [1, KV_HEADS, 1, WIDTH]
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name in ("key_scale", "value_scale")
        ]
    outputs = [
        helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1, HEADS * WIDTH]),
        helper.make_tensor_value_info("present_key", element, cache),
        helper.make_tensor_value_info("present_value", element, cache),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        [output.name for output in outputs],
        domain="com.microsoft",
        **attributes,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "attention", inputs, outputs), opset_imports=opsets, ir_version=10
    )
    return bytes(model.SerializeToString())


class Side:
    """One kind of cache, bound once.

    Args:
        context: Tokens in the cache.
        quantized: None, ``"PER_TENSOR"`` or ``"PER_CHANNEL"``.
    """

    def __init__(self, context: int, quantized: str | None) -> None:
        random = np.random.default_rng(0)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = os.cpu_count() or 1
        self._session = onnxruntime.InferenceSession(
            graph(context + 256, quantized), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._bind("seqlens_k", np.array([context], np.int32))
        self._bind("total_length", np.array(context + 1, np.int32))
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
            self._bind(name, random.standard_normal((1, 1, heads * WIDTH), np.float32))
        self._binding.bind_output("output", "cpu")
        for name in ("key", "value"):
            values = random.standard_normal((1, KV_HEADS, context, WIDTH), np.float32)
            stored = np.zeros((1, KV_HEADS, context + 256, WIDTH), np.float32)
            stored[:, :, :context] = values
            if quantized:
                axes = None if quantized == "PER_TENSOR" else (0, 2)
                scale = np.abs(values).max(axes, keepdims=axes is not None) / np.float32(127)
                stored = np.rint(stored / scale).astype(np.int8)
                shape = (1,) if axes is None else scale.shape
                self._bind(f"{name}_scale", np.reshape(scale, shape).astype(np.float32))
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(stored)
            self._binding.bind_ortvalue_input(f"past_{name}", buffer)
            self._binding.bind_ortvalue_output(f"present_{name}", buffer)
        self.seconds: list[float] = []

    def _bind(self, name: str, values: Any) -> None:
        self._binding.bind_cpu_input(name, values)

    def run(self) -> Any:
        """The attention's output; notes how long it took."""
        started = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        self.seconds.append(time.perf_counter() - started)
        return self._binding.get_outputs()[0].numpy()


def rounded(cache: KVCache, seen: KVCache, kind: str) -> KVCache:
    """A cache in 8 bits, with scales of one that was seen before."""
    axes = None if kind == "PER_TENSOR" else 1

    def one(values: FloatArray, others: FloatArray) -> FloatArray:
        largest = np.abs(others).max(axis=axes, keepdims=axes is not None)
        scale = np.maximum(largest / np.float32(127), np.float32(1e-6))
        stored = np.clip(np.rint(values / scale), -128, 127)
        found: FloatArray = (stored * scale).astype(np.float32)
        return found

    layers = [
        replace(layer, key=one(layer.key, other.key), value=one(layer.value, other.value))
        for layer, other in zip(cache.layers, seen.layers, strict=True)
    ]
    return replace(cache, layers=tuple(layers))


def cost() -> None:
    """Print the divergence that rounded keys and values cause."""
    with phirt.load(backend="onnxruntime", precision="fp32", prefix_cache_bytes=0) as model:
        ids = model.encode(TEXT.read_text(encoding="utf-8"))

        def prefilled(part: list[int]) -> KVCache:
            session = model.loaded.new_session(max_length=2048, expected_length=len(part))
            session.prefill(part, needs_logits=False)
            cache = session.export_kv()
            session.close()
            return cache

        def rows(cache: KVCache) -> FloatArray:
            session = model.loaded.new_session(max_length=2048, expected_length=2048)
            session.import_kv(cache)
            found = [session.decode(token).numpy()[0].copy() for token in forced[:-1]]
            session.close()
            return np.stack(found)

        seen = prefilled(ids[:CALIBRATED])
        forced = ids[-FORCED - 1 :]
        cache = prefilled(ids[CALIBRATED : -FORCED - 1])
        expected = rows(cache)
        for kind in ("PER_TENSOR", "PER_CHANNEL"):
            compared = compare_rows(
                expected, rows(rounded(cache, seen, kind)), np.array(forced[1:])
            )
            print(
                f"{kind}: mean KL {compared.kl.mean():.5f}, largest {compared.kl.max():.4f}, over "
                f"{FORCED} positions after {cache.length:,} tokens"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, default=4000)
    context = parser.parse_args().context
    floats = Side(context, None)
    print(f"| Cache of {context:,} tokens | us a node | against float32 | largest error |")
    print("|---|---:|---:|---:|")
    for kind in ("PER_TENSOR", "PER_CHANNEL"):
        side = Side(context, kind)
        floats.seconds.clear()
        for _ in range(ROUNDS):
            expected, found = floats.run(), side.run()
        ratio = statistics.median(a / b for a, b in zip(floats.seconds, side.seconds, strict=True))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        print(
            f"| int8, {kind} | {1e6 * statistics.median(side.seconds):.0f} | {ratio:.2f} times as "
            f"fast | {error:.1%} |"
        )
    print()
    cost()


if __name__ == "__main__":
    main()

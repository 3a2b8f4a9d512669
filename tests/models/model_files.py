"""A tiny model folder, well formed, for tests to damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

WEIGHTS = np.arange(24, dtype=np.float32).reshape(4, 6)


def genai_config(**decoder: Any) -> dict[str, Any]:
    """As the Model Builder writes it; ``decoder`` replaces fields of that section."""
    return {
        "model": {
            "bos_token_id": 1,
            "context_length": 64,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": 4,
                "hidden_size": 8,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "num_key_value_heads": 1,
            }
            | decoder,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "type": "llama",
            "vocab_size": 16,
        },
        "search": {"do_sample": False, "top_k": 50},
    }


def external_tensor(name: str = "weight", **entries: str) -> TensorProto:
    """A (4, 6) float tensor in ``model.onnx.data``; ``entries`` replaces what it says of it."""
    tensor = TensorProto(name=name, dims=WEIGHTS.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    said = {"location": "model.onnx.data", "offset": "0", "length": str(WEIGHTS.nbytes)} | entries
    for key, value in said.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def onnx_model(*tensors: TensorProto) -> onnx.ModelProto:
    """A graph of one node, with ``tensors`` as its initializers."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        initializer=tensors or [external_tensor()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def write_onnx(folder: Path, model: onnx.ModelProto) -> None:
    """Write the graph and its weights."""
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(WEIGHTS.tobytes())


def write_model_folder(folder: Path) -> Path:
    """Write a genai folder that `read_folder` and `check_onnx_files` take."""
    folder.mkdir(parents=True, exist_ok=True)
    write_onnx(folder, onnx_model())
    write_json(folder / "genai_config.json", genai_config())
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE"}})
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

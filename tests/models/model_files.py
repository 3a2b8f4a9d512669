"""Tiny model folders in every layout, well formed, for tests to damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write the files about text that all layouts share."""
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE"}})
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}},
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")


def hub_config(**changes: Any) -> dict[str, Any]:
    """A config.json of the same model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "dtype": "float16",
        "eos_token_id": 2,
        "hidden_size": 8,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "pad_token_id": 2,
        "vocab_size": 16,
    } | changes


def write_hub_folder(folder: Path, **config: Any) -> Path:
    """Write config.json and the tokenizer's files, without any weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", hub_config(**config))
    write_tokenizer(folder)
    return folder


def write_safetensors_folder(folder: Path) -> Path:
    """Write a Hugging Face folder of safetensors."""
    header = {"weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, WEIGHTS.nbytes]}}
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + WEIGHTS.tobytes()
    (write_hub_folder(folder) / "model.safetensors").write_bytes(content)
    return folder


def write_mlx_folder(folder: Path) -> Path:
    """Write a folder of safetensors that mlx-lm quantized."""
    write_safetensors_folder(folder)
    write_json(folder / "config.json", hub_config(quantization={"group_size": 64, "bits": 4}))
    return folder


def write_openvino_folder(folder: Path) -> Path:
    """Write a folder as Optimum exports it to OpenVINO."""
    write_hub_folder(folder)
    (folder / "openvino_model.xml").write_text('<net name="tiny"/>')
    (folder / "openvino_model.bin").write_bytes(WEIGHTS.tobytes())
    return folder


def write_onnx_folder(folder: Path, *names: str) -> Path:
    """Write a folder as transformers.js wants it; ``names`` are its graphs'."""
    write_hub_folder(folder)
    for name in names or ("onnx/model.onnx",):
        (folder / name).parent.mkdir(exist_ok=True)
        data = folder / f"{name}_data"
        graph = onnx_model(external_tensor(location=data.name))
        (folder / name).write_bytes(graph.SerializeToString())
        data.write_bytes(WEIGHTS.tobytes())
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "onnx-genai": write_model_folder,
    "openvino": write_openvino_folder,
    "onnx": write_onnx_folder,
    "mlx": write_mlx_folder,
    "safetensors": write_safetensors_folder,
}
"""For each layout, what writes a folder of it."""


def write_snapshot(folder: Path, hub: Path, link: Callable[[Path, Path], None]) -> Path:
    """The folder as a snapshot in a Hugging Face cache at ``hub``: links into ``blobs/``."""
    repository = hub / "models--org--Tiny.1B"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            name = snapshot / file.relative_to(folder)
            name.parent.mkdir(parents=True, exist_ok=True)
            link(name, blob)
    return snapshot


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

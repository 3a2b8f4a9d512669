"""The graph of a decoder as OpenVINO IR, in the form in which optimum-intel exports it.

Inputs are ``input_ids``, ``attention_mask`` (as wide as all tokens so far), ``position_ids``
and ``beam_idx`` (which row of the states each row goes on from); the output is ``logits`` of
every position. Keys and values are states of the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from phirt.backends.openvino.runtime import import_openvino
from phirt.build.checkpoint import Checkpoint
from phirt.build.limits import check_convertible
from phirt.build.openvino_attention import AttentionWriter, rms_norm
from phirt.build.openvino_weights import MatrixWriter, ScratchFile
from phirt.build.precision import EMBEDDING, LM_HEAD, Precision, check_precision
from phirt.build.recipe import Recipe
from phirt.models.decoder_config import DecoderConfig

ov = import_openvino()
ops = ov.opset13

__all__ = ["write_openvino"]


def write_openvino(checkpoint: Checkpoint, out_dir: Path, *, recipe: Recipe) -> None:
    """Write a decoder: ``openvino_model.xml`` and its weights, ``openvino_model.bin``.

    Weights are streamed: about one matrix is in memory at a time. While it runs, the folder
    needs room for them twice.

    Args:
        checkpoint: Configuration and weights.
        out_dir: The folder; it exists, and neither file does.
        recipe: How the weights are stored: in one of `FORMAT_PRECISIONS`.

    Raises:
        UnsupportedModelError: The precision, the architecture, a size, or an encoding in this
            precision.
        FileExistsError: One of the files exists.
    """
    check_precision("openvino", recipe.precision)
    check_convertible(checkpoint.config, _pieces(checkpoint.config))
    xml = out_dir / "openvino_model.xml"
    for path in (xml, xml.with_suffix(".bin")):
        if path.exists():
            raise FileExistsError(f"{path} exists; phirt overwrites no model.")
    with ScratchFile(out_dir / "openvino_model.bin.part") as scratch:
        # Only the call below refers to the graph, which maps the scratch file.
        ov.serialize(_graph(checkpoint, MatrixWriter(checkpoint, recipe, scratch), recipe), xml)


def _pieces(config: DecoderConfig) -> dict[str, int]:
    """Elements of the largest matrices."""
    return {
        "MLP": config.intermediate_size * config.hidden_size,
        "attention": config.num_heads * config.head_size * config.hidden_size,
    }


def _graph(checkpoint: Checkpoint, matrices: MatrixWriter, recipe: Recipe) -> Any:
    config = checkpoint.config
    inputs = {
        name: _input(name, axes)
        for name, axes in (
            ("input_ids", 2),
            ("attention_mask", 2),
            ("position_ids", 2),
            ("beam_idx", 1),
        )
    }
    attention = AttentionWriter(config, matrices, inputs)
    layers = _LayerWriter(config, matrices, attention)
    x = matrices.embed(inputs["input_ids"], EMBEDDING)
    if config.embedding_scale != 1:
        x = ops.multiply(x, ops.constant(np.float32(config.embedding_scale)))
    for layer in range(config.num_layers):
        x = layers.write(layer, x)
    x = layers.norm(x, "model.norm.weight")
    logits = matrices.head(x, EMBEDDING if config.tie_word_embeddings else LM_HEAD)
    result = ops.result(logits)
    result.get_output_tensor(0).set_names({"logits"})
    model = ov.Model([result], attention.sinks, list(inputs.values()), "decoder")
    if recipe.precision is Precision.EXACT:
        # Plugins multiply integer weights by activations rounded to 8 bits, unless told not to.
        model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    return model


def _input(name: str, axes: int) -> Any:
    kind = ov.Type.i32 if name == "beam_idx" else ov.Type.i64
    parameter = ops.parameter(ov.PartialShape([-1] * axes), kind, name=name)
    parameter.get_output_tensor(0).set_names({name})
    return parameter


class _LayerWriter:
    """Writes the blocks around the attention."""

    def __init__(
        self, config: DecoderConfig, matrices: MatrixWriter, attention: AttentionWriter
    ) -> None:
        self._config = config
        self._matrices = matrices
        self._attention = attention

    def norm(self, x: Any, tensor: str) -> Any:
        """The RMS norm of ``x`` with that weight."""
        weight = self._matrices.vector(tensor, offset=self._config.norm_offset)
        return rms_norm(x, weight, self._config.rms_norm_eps)

    def write(self, layer: int, x: Any) -> Any:
        """Write one block: ``x`` and its result are (batch, positions, hidden)."""
        scope, config = f"model.layers.{layer}", self._config
        hidden = self.norm(x, f"{scope}.input_layernorm.weight")
        attended = self._matrices.project(
            self._attention.write(layer, hidden),
            f"{scope}.self_attn.o_proj.weight",
            bias=f"{scope}.self_attn.o_proj.bias" if config.output_bias else None,
        )
        before_mlp = "post_attention_layernorm"
        if config.sandwich_norms:
            attended = self.norm(attended, f"{scope}.post_attention_layernorm.weight")
            before_mlp = "pre_feedforward_layernorm"
        x = ops.add(x, attended)
        output = self._write_mlp(scope, self.norm(x, f"{scope}.{before_mlp}.weight"))
        if config.sandwich_norms:
            output = self.norm(output, f"{scope}.post_feedforward_layernorm.weight")
        return ops.add(x, output)

    def _write_mlp(self, scope: str, x: Any) -> Any:
        """``down(activation(gate(x)) * up(x))``."""
        gate = self._matrices.project(x, f"{scope}.mlp.gate_proj.weight")
        up = self._matrices.project(x, f"{scope}.mlp.up_proj.weight")
        activated = ops.swish(gate) if self._config.activation == "silu" else ops.gelu(gate, "tanh")
        return self._matrices.project(ops.multiply(activated, up), f"{scope}.mlp.down_proj.weight")

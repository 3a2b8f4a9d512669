"""The graph of a dense decoder, as ONNX Runtime and onnxruntime-genai read it.

Inputs and outputs follow onnxruntime-genai's Model Builder: ``input_ids`` and
``attention_mask``, per layer ``past_key_values.N.key`` and ``.value`` in, ``present.N.key``
and ``.value`` out, and ``logits``. One input is added, ``num_logits_to_keep``: from how many
of the last positions logits are made. It is optional (an initializer of the same name holds
the default, 1), because logits of every position of a long prompt would take gigabytes.

onnxruntime-genai 0.18 knows the six architectures by the same names (``model.type`` in its
configuration) and needs no further key for any. ``sliding_window`` stays out of it: the graph
masks windows itself, on a cache that keeps every position. LongRoPE is in the graph too, but a
sequence that crosses the boundary needs a new prefill, which genai itself makes for phi3 alone,
at 4,097 tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phirt._version import __version__
from phirt.build.checkpoint import Checkpoint
from phirt.build.limits import check_convertible
from phirt.build.onnx_attention import AttentionWriter
from phirt.build.onnx_external import ExternalData
from phirt.build.onnx_graph import GraphBuilder
from phirt.build.onnx_linear import LinearWriter
from phirt.build.onnx_norm import NormWriter
from phirt.build.onnx_rope import table_rows
from phirt.build.precision import EMBEDDING, LM_HEAD, check_precision
from phirt.build.recipe import Recipe
from phirt.models.decoder_config import DecoderConfig

__all__ = ["write_decoder"]

_INT64_MAX = np.iinfo(np.int64).max


def write_decoder(checkpoint: Checkpoint, model_path: Path, *, recipe: Recipe) -> None:
    """Write a decoder: ``model_path`` and, beside it, its weights in ``NAME.data``.

    Weights are streamed: about one layer's fused matrix is in memory at a time.

    Args:
        checkpoint: Configuration and weights.
        model_path: The ONNX file to create; its folder exists and neither file does.
        recipe: How the weights are stored, and what the graph computes in.

    Raises:
        UnsupportedModelError: The precision, the architecture, a size, or an encoding in this
            precision.
        FileExistsError: One of the files exists.
    """
    check_precision("onnx-genai", recipe.precision)
    check_convertible(checkpoint.config, _pieces(checkpoint.config))
    with ExternalData(model_path.with_name(model_path.name + ".data")) as external:
        graph = GraphBuilder("decoder", external, recipe.float_type)
        _DecoderWriter(graph, checkpoint, recipe).write()
    graph.save(model_path, producer="phirt", producer_version=__version__)


def _pieces(config: DecoderConfig) -> dict[str, int]:
    """Elements of the largest arrays: the weights that are fused, and the tables."""
    return {
        "MLP": 2 * config.intermediate_size * config.hidden_size,
        "attention": 3 * config.num_heads * config.head_size * config.hidden_size,
        "rotary tables": table_rows(config.rope, config.context_length) * config.rope.dim,
    }


class _DecoderWriter:
    """Writes one decoder, layer by layer."""

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint, recipe: Recipe) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._linear = LinearWriter(graph, checkpoint, recipe)
        self._norms = NormWriter(graph, checkpoint)

    def write(self) -> None:
        """Write the whole graph."""
        graph, config = self._graph, self._config
        token_ids, mask = self._declare()
        self._attention = AttentionWriter(
            graph,
            self._checkpoint,
            self._linear,
            self._norms,
            token_ids=token_ids,
            mask=mask,
        )
        keep = graph.input("num_logits_to_keep", np.int64, [1])
        graph.initializer(keep, np.array([1], np.int64))
        self._first_kept = graph.node("Neg", [keep], name="/model/first_kept_position")
        residual = self._embed(token_ids)
        hidden = self._norms.norm(
            residual,
            "model.layers.0.input_layernorm.weight",
            name="/model/layers.0/input_layernorm",
        )
        for layer in range(config.num_layers):
            hidden, residual = self._write_layer(layer, hidden, residual)
        head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
        self._linear.head(hidden, head, name="/lm_head", output="logits")

    def _declare(self) -> tuple[str, str]:
        """Declare inputs and outputs; return the names of token ids and attention mask."""
        graph, config = self._graph, self._config
        token_ids = graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])
        mask = graph.input("attention_mask", np.int64, ["batch_size", "total_sequence_length"])

        def cache(length: str) -> list[int | str]:
            return ["batch_size", config.num_kv_heads, length, config.head_size]

        # onnxruntime-genai takes logits as those of the last position if they are declared
        # as one; a run that keeps more yields more, which ONNX Runtime allows.
        float_type = graph.float_type
        graph.output("logits", float_type, ["batch_size", 1, config.vocab_size])
        for layer in range(config.num_layers):
            for part in ("key", "value"):
                past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
                graph.input(past, float_type, cache("past_sequence_length"))
                graph.output(present, float_type, cache("total_sequence_length"))
        return token_ids, mask

    def _embed(self, token_ids: str) -> str:
        embedded = self._linear.embed(token_ids, EMBEDDING, name="/model/embed_tokens")
        if self._config.embedding_scale == 1:
            return embedded
        scale = np.array(self._config.embedding_scale, np.float32)
        factor = self._graph.floats("embedding_scale", scale)
        return self._graph.node("Mul", [embedded, factor], name="/model/embed_tokens/scaled")

    def _write_layer(self, layer: int, hidden: str, residual: str) -> tuple[str, str]:
        """Write one block.

        Args:
            layer: Its index.
            hidden: Its normalized input.
            residual: Its input before the norm.

        Returns:
            The normalized input and the residual of the next block, or of the LM head.
        """
        norms, scope, tensors = self._norms, f"/model/layers.{layer}", f"model.layers.{layer}"
        attended = self._attention.attend(layer, hidden)
        is_last = layer == self._config.num_layers - 1
        if is_last:
            # From here on positions no longer meet: only those with logits are computed.
            attended = self._keep_last(attended, name=f"{scope}/attn/kept")
            residual = self._keep_last(residual, name=f"{scope}/residual_kept")
        attended = self._attention.project_output(layer, attended)
        before_mlp = "post_attention_layernorm"
        if self._config.sandwich_norms:
            attended = self._norm_output(layer, attended, "post_attention_layernorm")
            before_mlp = "pre_feedforward_layernorm"
        hidden, residual = norms.add_and_norm(
            residual, attended, f"{tensors}.{before_mlp}.weight", name=f"{scope}/{before_mlp}"
        )
        output = self._write_mlp(layer, hidden)
        if self._config.sandwich_norms:
            output = self._norm_output(layer, output, "post_feedforward_layernorm")
        if is_last:
            return norms.add_and_norm(residual, output, "model.norm.weight", name="/model/norm")
        return norms.add_and_norm(
            residual,
            output,
            f"model.layers.{layer + 1}.input_layernorm.weight",
            name=f"/model/layers.{layer + 1}/input_layernorm",
        )

    def _norm_output(self, layer: int, x: str, norm: str) -> str:
        """What attention or the MLP adds to the residual, normalized."""
        return self._norms.norm(
            x, f"model.layers.{layer}.{norm}.weight", name=f"/model/layers.{layer}/{norm}"
        )

    def _write_mlp(self, layer: int, hidden: str) -> str:
        """``down(act(gate(x)) * up(x))``."""
        graph, linear = self._graph, self._linear
        scope, tensors = f"/model/layers.{layer}/mlp", f"model.layers.{layer}.mlp"
        both = linear.project(
            hidden,
            [f"{tensors}.gate_proj.weight", f"{tensors}.up_proj.weight"],
            name=f"{scope}/gate_up_proj",
        )
        gate, up = f"{scope}/gate", f"{scope}/up"
        graph.node("Split", [both], [gate, up], name=f"{scope}/Split", axis=-1, num_outputs=2)
        if self._config.activation == "gelu_tanh":
            activated = graph.contrib("FastGelu", [gate], name=f"{scope}/GELU")
        else:
            # QuickGelu is x * sigmoid(alpha * x): SiLU at alpha 1, in one node.
            activated = graph.contrib("QuickGelu", [gate], name=f"{scope}/SiLU", alpha=1.0)
        product = graph.node("Mul", [activated, up], name=f"{scope}/product")
        return linear.project(product, [f"{tensors}.down_proj.weight"], name=f"{scope}/down_proj")

    def _keep_last(self, x: str, *, name: str) -> str:
        """The last ``num_logits_to_keep`` positions of (batch, positions, width)."""
        graph = self._graph
        end, axis = graph.constant([_INT64_MAX]), graph.constant([1])
        return graph.node("Slice", [x, self._first_kept, end, axis], name=name)

"""How large a decoder is: what the memory that it takes follows from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phirt.dispatch.graph_shape import read_graph_shape
from phirt.errors import ModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.folder import ModelFolder
from phirt.models.huggingface_config import CONFIG_NAME, read_decoder_config
from phirt.models.layouts import Layout, files_of_weights

__all__ = ["ModelShape", "bits_of", "shape_of", "shape_of_config", "weights_bytes"]

# Bits of a weight in what phirt's converters write, scales included: files of SmolLM2 by its
# 134.5 million weights, those of ONNX, which are the larger ones.
_BITS = {"fp32": 32.0, "fp16": 16.0, "bf16": 16.0, "exact": 9.0, "int8": 8.7, "int4": 6.3}

# Where nobody says how weights are stored, what bits they have on average tells it.
_LIKELY = ((18.0, "fp32"), (10.0, "fp16"), (6.45, "int8"), (0.0, "int4"))


def bits_of(precision: str) -> float | None:
    """Bits of one weight in a precision of phirt's, on average; None for others."""
    return _BITS.get(precision)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder.

    Attributes:
        num_layers: Decoder blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_size: Width of one head.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        vocab_size: Logits per position.
        context_length: Longest sequence that the model was made for, in tokens.
        num_weights: Weights of its matrices, an embedding that is the LM head counted once;
            estimated where the folder does not say.
        tied: Whether the LM head is the embedding; assumed where the folder does not say.
        prunes_logits: Whether a prompt's logits are computed for its last position alone.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    num_weights: int
    tied: bool = True
    prunes_logits: bool = True

    @property
    def kv_values(self) -> int:
        """Numbers that one token adds to the KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def weights_bytes(self, precision: str) -> int | None:
        """Size of its weights' files in a precision that phirt converts to, estimated.

        None for a precision that is not phirt's.
        """
        bits = bits_of(precision)
        return None if bits is None else round(self.num_weights * bits / 8)

    def likely_precision(self, weights_bytes: int) -> str:
        """The precision of weights that take so many bytes."""
        bits = 8 * weights_bytes / self.num_weights
        return next(name for least, name in _LIKELY if bits >= least)


def shape_of_config(config: DecoderConfig) -> ModelShape:
    """The shape of a decoder whose configuration is known, such as a checkpoint's."""
    return _shape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        tied=config.tie_word_embeddings,
        prunes_logits=True,
    )


def shape_of(folder: ModelFolder) -> ModelShape:
    """The shape of a model folder, from its small files and the names in its graph.

    What neither says is taken to be as in most decoders: an MLP of four times the width, an LM
    head that is the embedding.
    """
    # phirt's own graphs compute the logits of the positions that are asked for; so do the
    # runtimes that read safetensors.
    prunes = folder.manifest is not None or folder.model_path is None
    try:
        config = read_decoder_config(folder.artifact.path / CONFIG_NAME)
    except ModelError:
        # Not there, as in the folders of Model Builder, or of an architecture that phirt does
        # not convert. What running the model needs is known all the same.
        pass
    else:
        return replace(shape_of_config(config), prunes_logits=prunes)
    facts, spec = folder.facts, folder.decoder
    num_heads = (spec and spec.num_heads) or facts.num_kv_heads
    hidden_size = num_heads * facts.head_size
    graph = None
    if folder.model_path is not None and folder.model_path.suffix == ".onnx":
        graph = read_graph_shape(folder.model_path, hidden_size=hidden_size)
    return _shape(
        num_layers=facts.num_layers,
        num_heads=num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_size=facts.head_size,
        hidden_size=hidden_size,
        intermediate_size=graph.intermediate_size if graph else 4 * hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        tied=graph is None or graph.tied,
        prunes_logits=prunes,
    )


def _shape(
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    context_length: int,
    tied: bool,
    prunes_logits: bool,
) -> ModelShape:
    """A shape, its weights counted: attention, the gated MLP, and the tables."""
    attention = 2 * (num_heads + num_kv_heads) * head_size * hidden_size
    mlp = 3 * intermediate_size * hidden_size
    tables = (1 if tied else 2) * vocab_size * hidden_size
    return ModelShape(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        context_length=context_length,
        num_weights=num_layers * (attention + mlp) + tables,
        tied=tied,
        prunes_logits=prunes_logits,
    )


def weights_bytes(folder: ModelFolder) -> int:
    """Size of the files that hold a folder's graph and weights."""
    artifact = folder.artifact
    layout = Layout(format=artifact.format, model_path=folder.model_path)
    files = files_of_weights(artifact.path, layout)
    graph = folder.model_path
    if artifact.format == "onnx" and graph is not None:
        # Exports of one model in several precisions lie beside each other.
        files = [file for file in files if file.name.startswith(graph.name)]
    return sum(file.stat().st_size for file in files)

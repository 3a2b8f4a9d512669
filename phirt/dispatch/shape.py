"""How large a decoder is: what the memory that it takes follows from."""

from __future__ import annotations

from dataclasses import dataclass

from phirt.errors import ModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.folder import ModelFolder
from phirt.models.huggingface_config import CONFIG_NAME, read_decoder_config
from phirt.models.layouts import Layout, files_of_weights

__all__ = ["ModelShape", "shape_of", "shape_of_config", "weights_bytes"]

# Bits of one weight of a matrix, by layout and precision, as phirt's converters write it: the
# numbers and their block's scales. What stays in float32 (the embedding in some, the norms,
# the rotary factors) is in the average over SmolLM2's matrices; docs/memory.md has the sizes.
_BITS = {
    "fp32": 32.0,
    "fp16": 16.0,
    "bf16": 16.0,
    "exact": 9.0,
    "int8": 8.6,
    "int4": 6.3,
}


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
        num_weights: Weights of its matrices, one embedding counted once where the LM head is
            the same; None where the folder does not say.
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
    num_weights: int | None = None
    prunes_logits: bool = True

    @property
    def kv_values(self) -> int:
        """Numbers that one token adds to the KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size

    def weights_bytes(self, precision: str) -> int | None:
        """Size of its weights' files in a precision that phirt converts to, estimated.

        None where the number of weights is not known, or the precision is not phirt's.
        """
        bits = _BITS.get(precision)
        if self.num_weights is None or bits is None:
            return None
        return round(self.num_weights * bits / 8)


def shape_of_config(config: DecoderConfig) -> ModelShape:
    """The shape of a decoder whose configuration is known, such as a checkpoint's."""
    heads = config.num_heads + config.num_kv_heads
    layer = (2 * heads * config.head_size + 3 * config.intermediate_size) * config.hidden_size
    tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    return ModelShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        num_weights=config.num_layers * layer + tables,
    )


def shape_of(folder: ModelFolder) -> ModelShape:
    """The shape of a model folder, from its small files.

    What they do not say is taken to be as in the decoders of today: as many query heads as
    key and value heads, an MLP of four times the width.
    """
    try:
        return shape_of_config(read_decoder_config(folder.artifact.path / CONFIG_NAME))
    except ModelError:
        # Not there, as in Model Builder's folders, or of an architecture that phirt does not
        # convert; the few facts that running it needs are known all the same.
        pass
    facts, spec = folder.facts, folder.decoder
    num_heads = (spec and spec.num_heads) or facts.num_kv_heads
    hidden_size = num_heads * facts.head_size
    return ModelShape(
        num_layers=facts.num_layers,
        num_heads=num_heads,
        num_kv_heads=facts.num_kv_heads,
        head_size=facts.head_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        vocab_size=facts.vocab_size,
        context_length=facts.context_length,
        # phirt's own graphs compute the logits of the positions that are asked for.
        prunes_logits=folder.manifest is not None,
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

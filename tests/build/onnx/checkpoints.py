"""Random decoders in memory, so that a test can choose what no file would hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary
from phirt.types import FloatArray

TINY = DecoderConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=128,
    rms_norm_eps=1e-5,
    rope=Rotary(theta=10_000.0, dim=16),
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(2,),
    pad_token_id=0,
)


@dataclass(frozen=True)
class MemoryTensor:
    name: str
    shape: tuple[int, ...]
    encoding: str
    encoded: NDArray[np.uint8]

    def blocks(self) -> NDArray[np.uint8]:
        return self.encoded

    def float32(self) -> FloatArray:
        values: FloatArray = dequantize(self.encoded, GGMLQuantizationType[self.encoding])
        return values.astype(np.float32).reshape(self.shape)

    def rows(self, start: int, stop: int) -> MemoryTensor:
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, encoded=self.encoded[start:stop])


@dataclass
class MemoryCheckpoint:
    """A `Checkpoint` of tensors in memory."""

    config: DecoderConfig
    tensors: dict[str, MemoryTensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, name: str) -> MemoryTensor:
        return self.tensors[name]

    def put(self, name: str, values: FloatArray, encoding: str) -> None:
        encoded = quantize(values, GGMLQuantizationType[encoding]).view(np.uint8)
        rows = encoded.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
        self.tensors[name] = MemoryTensor(name, values.shape, encoding, rows)


def random_llama(
    config: DecoderConfig = TINY,
    *,
    encoding: str = "F32",
    encodings: dict[str, str] | None = None,
    seed: int = 0,
) -> MemoryCheckpoint:
    """A random decoder.

    Args:
        config: Its shape.
        encoding: Encoding of its matrices.
        encodings: Encodings of the matrices whose names contain a key.
        seed: Seed of its weights.
    """
    random = np.random.default_rng(seed)
    checkpoint = MemoryCheckpoint(config)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns)) / np.sqrt(columns)
        values += 0.3 / np.sqrt(columns)  # Off centre: a dropped block offset must show.
        chosen = next((e for key, e in (encodings or {}).items() if key in name), encoding)
        checkpoint.put(name, values.astype(np.float32), chosen)

    def norm(name: str) -> None:
        values = 1 + 0.2 * random.standard_normal(config.hidden_size)
        checkpoint.put(name, values.astype(np.float32), "F32")

    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_size for heads in (config.num_heads, config.num_kv_heads))
    matrix("model.embed_tokens.weight", config.vocab_size, hidden)
    for layer in range(config.num_layers):
        scope = f"model.layers.{layer}"
        norm(f"{scope}.input_layernorm.weight")
        matrix(f"{scope}.self_attn.q_proj.weight", queries, hidden)
        matrix(f"{scope}.self_attn.k_proj.weight", keys, hidden)
        matrix(f"{scope}.self_attn.v_proj.weight", keys, hidden)
        matrix(f"{scope}.self_attn.o_proj.weight", hidden, queries)
        norm(f"{scope}.post_attention_layernorm.weight")
        matrix(f"{scope}.mlp.gate_proj.weight", inner, hidden)
        matrix(f"{scope}.mlp.up_proj.weight", inner, hidden)
        matrix(f"{scope}.mlp.down_proj.weight", hidden, inner)
    norm("model.norm.weight")
    if not config.tie_word_embeddings:
        matrix("lm_head.weight", config.vocab_size, hidden)
    return checkpoint


def tiny(**changes: object) -> DecoderConfig:
    """`TINY`, changed."""
    return replace(TINY, **changes)  # type: ignore[arg-type]  # names of fields, by the caller

"""A decoder in NumPy, one function per formula: what every backend's graphs compute.

It is the executable statement of `phirt.models.decoder_config.DecoderConfig`, written to be
read. Everything is float32. Names and shapes of the weights are Hugging Face's, see
`phirt.build.checkpoint`; n is the number of new tokens, m that of all tokens so far. Axes
before those that are named (``...``) are sequences that do not meet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from phirt.models.decoder_config import DecoderConfig
from phirt.protocols import KVLayer, RopeRegime
from phirt.types import FloatArray

__all__ = [
    "Cache",
    "Decoder",
    "Weights",
    "attend",
    "gelu_tanh",
    "rms_norm",
    "rotate",
    "silu",
    "softmax",
]

_BUCKET = 256  # tokens; caches grow by multiples of it


def rms_norm(x: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    """``x / sqrt(mean(x**2) + epsilon) * weight`` over the last axis (Zhang, Sennrich 2019)."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    normalized: FloatArray = x / np.sqrt(mean_square + np.float32(epsilon)) * weight
    return normalized


def silu(x: FloatArray) -> FloatArray:
    """``x * sigmoid(x)`` (Elfwing et al. 2017), by tanh, which cannot overflow."""
    sigmoid: FloatArray = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))
    return x * sigmoid


def gelu_tanh(x: FloatArray) -> FloatArray:
    """GELU's tanh approximation (Hendrycks, Gimpel 2016, section 2)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    gate: FloatArray = np.float32(0.5) * (1 + np.tanh(inner))
    return x * gate


def softmax(x: FloatArray) -> FloatArray:
    """Exponentials over their sum, along the last axis; ``-inf`` becomes 0."""
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    normalized: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return normalized


def rotate(x: FloatArray, cosines: FloatArray, sines: FloatArray) -> FloatArray:
    """Rotary embedding (Su et al. 2021, equation 34), pairs split in halves.

    Args:
        x: Queries or keys, shape (..., heads, n, head_size).
        cosines: Of the angles of the n positions, shape (n, dim / 2). Elements of a head
            beyond ``dim`` do not rotate.
        sines: Likewise.
    """
    half = cosines.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate(
        [first * cosines - second * sines, second * cosines + first * sines, rest], axis=-1
    )


def attend(
    query: FloatArray, key: FloatArray, value: FloatArray, *, scale: float, window: int | None
) -> FloatArray:
    """Causal attention (Vaswani et al. 2017, equation 1) with grouped queries.

    Position i attends to position j if ``j <= i`` and, with a window W, ``i - j < W``.

    Args:
        query: Of the last n of m positions, shape (..., heads, n, head_size).
        key: Shape (..., kv_heads, m, head_size); ``heads / kv_heads`` queries share one.
        value: Likewise.
        scale: The scores are multiplied by it.
        window: W, or None.

    Returns:
        Shape (..., n, heads * head_size).
    """
    *sequences, heads, n, head_size = query.shape
    kv_heads, m = key.shape[-3:-1]
    grouped = query.reshape(*sequences, kv_heads, heads // kv_heads, n, head_size)
    scores = grouped @ key[..., None, :, :].swapaxes(-1, -2) * np.float32(scale)
    distance = np.arange(m - n, m)[:, None] - np.arange(m)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
    mixed = (weights @ value[..., None, :, :]).reshape(query.shape)
    return mixed.swapaxes(-3, -2).reshape(*sequences, n, heads * head_size)


class Weights(Protocol):
    """A decoder's weights by Hugging Face's names, projections apart (no ``qkv_proj``)."""

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        """Rows of the embedding, shape (..., n, hidden_size)."""

    def vector(self, name: str) -> FloatArray:
        """A norm's weight or a bias, shape (..., width)."""

    def multiply(self, x: FloatArray, name: str) -> FloatArray:
        """``x @ weight.T``: x (..., n, in), the matrix (out, in), the result (..., n, out)."""


class Cache:
    """Keys (after rotary) and values of one sequence, for every layer and at full length.

    Args:
        config: The decoder that fills it.
        regime: Which rotary factors LongRoPE uses.
        capacity: Tokens to make room for; more is made when needed.

    Raises:
        MemoryError: There is no room.
    """

    def __init__(self, config: DecoderConfig, regime: RopeRegime | None, capacity: int) -> None:
        self._config = config
        self._regime: RopeRegime = regime or "short"
        empty = np.zeros((config.num_kv_heads, 0, config.head_size), np.float32)
        self._keys = [empty] * config.num_layers
        self._values = [empty] * config.num_layers
        self._tables: list[tuple[FloatArray, FloatArray]] = []
        self.reserve(capacity)

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._keys[0].shape[1]

    def reserve(self, capacity: int) -> None:
        """Make room for ``capacity`` tokens at least; what is there stays."""
        if capacity <= self.capacity:
            return
        more = -(-capacity // _BUCKET) * _BUCKET - self.capacity
        # Fresh zeros are not touched by the system until they are written.
        room = np.zeros((self._config.num_kv_heads, more, self._config.head_size), np.float32)
        self._keys = [np.concatenate([key, room], axis=1) for key in self._keys]
        self._values = [np.concatenate([value, room], axis=1) for value in self._values]
        config, full = self._config, self._config.rope.tables(self.capacity, self._regime)
        local = config.local_rope.tables(self.capacity, self._regime) if config.local_rope else full
        self._tables = [
            full if config.rope_of(layer) is config.rope else local
            for layer in range(config.num_layers)
        ]

    def rotary(self, layer: int, start: int, end: int) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines of positions ``start`` to ``end - 1``, each (n, dim / 2)."""
        cosines, sines = self._tables[layer]
        return cosines[start:end], sines[start:end]

    def append(
        self, layer: int, start: int, key: FloatArray, value: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Write n positions from ``start`` on; returns keys and values of all m positions."""
        end = start + key.shape[1]
        self._keys[layer][:, start:end] = key
        self._values[layer][:, start:end] = value
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def copy(self, length: int) -> list[KVLayer]:
        """A copy of the first ``length`` positions."""
        return [
            KVLayer(0, key[:, :length].copy(), value[:, :length].copy())
            for key, value in zip(self._keys, self._values, strict=True)
        ]


class Decoder:
    """A decoder's weights, and its forward pass.

    Args:
        config: Shape and constants.
        weights: Its tensors, wherever they are.
    """

    def __init__(self, config: DecoderConfig, weights: Weights) -> None:
        self.config = config
        self._weights = weights

    def forward(
        self,
        token_ids: Sequence[int],
        cache: Cache | None = None,
        start: int = 0,
        *,
        before_layer: Callable[[], None] = lambda: None,
    ) -> FloatArray:
        """Run tokens through every block, writing their keys and values to the cache.

        Args:
            token_ids: n ids.
            cache: Of one sequence; holds ``start`` tokens, with room for n more. None where
                the tokens are all that there is; LongRoPE then uses its short factors.
            start: Position of the first of the tokens.
            before_layer: Called before each block, so that a caller can end the pass.

        Returns:
            Normalized hidden states, shape (..., n, hidden_size).
        """
        config = self.config
        x = self._weights.embed(token_ids) * np.float32(config.embedding_scale)
        for layer in range(config.num_layers):
            before_layer()
            scope = f"model.layers.{layer}"
            mixed = self._attention(layer, self._norm(f"{scope}.input_layernorm", x), cache, start)
            if config.sandwich_norms:
                x = x + self._norm(f"{scope}.post_attention_layernorm", mixed)
                inner = self._mlp(scope, self._norm(f"{scope}.pre_feedforward_layernorm", x))
                x = x + self._norm(f"{scope}.post_feedforward_layernorm", inner)
            else:
                x = x + mixed
                x = x + self._mlp(scope, self._norm(f"{scope}.post_attention_layernorm", x))
        return self._norm("model.norm", x)

    def logits(self, hidden: FloatArray) -> FloatArray:
        """Scores of every token, (..., n, vocab_size), from hidden states (..., n, hidden_size)."""
        tied = self.config.tie_word_embeddings
        head = "model.embed_tokens" if tied else "lm_head"
        return self._weights.multiply(hidden, f"{head}.weight")

    def _attention(self, layer: int, x: FloatArray, cache: Cache | None, start: int) -> FloatArray:
        """Attention of normalized positions (..., n, hidden_size), to themselves and the cache."""
        config, scope = self.config, f"model.layers.{layer}.self_attn"
        query, key, value = (
            self._heads(self._linear(f"{scope}.{part}_proj", x, bias=config.qkv_bias))
            for part in "qkv"
        )
        if config.qk_norm:
            query = self._norm(f"{scope}.q_norm", query)
            key = self._norm(f"{scope}.k_norm", key)
        n = x.shape[-2]
        if cache is None:
            cosines, sines = config.rope_of(layer).tables(n)
        else:
            cosines, sines = cache.rotary(layer, start, start + n)
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        if cache is not None:
            key, value = cache.append(layer, start, key, value)
        mixed = attend(query, key, value, scale=config.scale, window=config.window_of(layer))
        return self._linear(f"{scope}.o_proj", mixed, bias=config.output_bias)

    def _mlp(self, scope: str, x: FloatArray) -> FloatArray:
        """The gated MLP (Shazeer 2020, "GLU variants"): ``down(act(gate(x)) * up(x))``."""
        activation = gelu_tanh if self.config.activation == "gelu_tanh" else silu
        gate = activation(self._linear(f"{scope}.mlp.gate_proj", x))
        return self._linear(
            f"{scope}.mlp.down_proj", gate * self._linear(f"{scope}.mlp.up_proj", x)
        )

    def _norm(self, scope: str, x: FloatArray) -> FloatArray:
        weight = self._vector(f"{scope}.weight", x) + np.float32(self.config.norm_offset)
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def _linear(self, scope: str, x: FloatArray, *, bias: bool = False) -> FloatArray:
        product = self._weights.multiply(x, f"{scope}.weight")
        return product + self._vector(f"{scope}.bias", product) if bias else product

    def _vector(self, name: str, x: FloatArray) -> FloatArray:
        """A vector, with axes of 1 for those of positions and heads that x (..., width) has."""
        vector = self._weights.vector(name)
        *sequences, width = vector.shape
        return vector.reshape(*sequences, *[1] * (x.ndim - vector.ndim), width)

    def _heads(self, x: FloatArray) -> FloatArray:
        """(..., n, heads * head_size) as (..., heads, n, head_size)."""
        return x.reshape(*x.shape[:-1], -1, self.config.head_size).swapaxes(-3, -2)

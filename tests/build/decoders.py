"""Random decoders of every dense architecture, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary
from phirt.types import FloatArray
from tests.build.onnx.checkpoints import MemoryCheckpoint, tiny

WINDOW = 16
BOUNDARY = 32
CONTEXT = 128

_SHORT = np.linspace(1, 1.5, 8, dtype=np.float32)
_LONG = np.linspace(2, 8, 8, dtype=np.float32)
_WIDE = Rotary(theta=10_000.0, dim=32)

DECODERS: dict[str, DecoderConfig] = {
    "llama": tiny(),
    "llama-divisors": tiny(rope=Rotary(theta=10_000.0, dim=16, factors=_LONG)),
    "llama-biases": tiny(qkv_bias=True, output_bias=True, tie_word_embeddings=False),
    "mistral": tiny(architecture="mistral", windows=(WINDOW, WINDOW), head_size=32, rope=_WIDE),
    "qwen2": tiny(architecture="qwen2", qkv_bias=True),
    "qwen2-window": tiny(architecture="qwen2", qkv_bias=True, windows=(None, WINDOW)),
    "qwen3": tiny(architecture="qwen3", qk_norm=True, head_size=32, rope=_WIDE),
    "phi3": tiny(
        architecture="phi3",
        tie_word_embeddings=False,
        rope=Rotary(
            theta=10_000.0,
            dim=16,
            factors=_SHORT,
            long_factors=_LONG,
            boundary=BOUNDARY,
            attention_factor=math.sqrt(1 + math.log(CONTEXT / BOUNDARY) / math.log(BOUNDARY)),
        ),
    ),
    "phi3-partial": tiny(architecture="phi3", rope=Rotary(theta=10_000.0, dim=8), windows=(24, 24)),
    "gemma3_text": tiny(
        architecture="gemma3_text",
        hidden_size=72,  # Whose root bfloat16 does not hold.
        intermediate_size=96,
        num_heads=4,
        head_size=16,
        rope=Rotary(theta=1_000_000.0, dim=16, factors=np.full(8, 8, np.float32)),
        local_rope=Rotary(theta=10_000.0, dim=16),
        windows=(WINDOW, None),
        activation="gelu_tanh",
        qk_norm=True,
        norm_offset=1.0,
        sandwich_norms=True,
        embedding_scale=math.sqrt(72),
        attention_scale=24**-0.5,
    ),
}


def random_decoder(config: DecoderConfig, *, seed: int = 0) -> MemoryCheckpoint:
    """A random decoder with every tensor that its configuration calls for."""
    random = np.random.default_rng(seed)
    checkpoint = MemoryCheckpoint(config)

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns)) / math.sqrt(columns)
        checkpoint.put(f"{name}.weight", values.astype(np.float32), "F32")

    def vector(name: str, size: int, mean: float) -> None:
        values = mean + 0.2 * random.standard_normal(size)
        checkpoint.put(name, values.astype(np.float32), "F32")

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_size
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    gain = 1 - config.norm_offset
    norms = ["input_layernorm", "post_attention_layernorm"]
    if config.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    matrix("model.embed_tokens", config.vocab_size, hidden)
    for layer in range(config.num_layers):
        scope = f"model.layers.{layer}"
        for norm in norms:
            vector(f"{scope}.{norm}.weight", hidden, gain)
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            matrix(f"{scope}.self_attn.{part}_proj", rows, hidden)
            if config.qkv_bias:
                vector(f"{scope}.self_attn.{part}_proj.bias", rows, 0)
        if config.qk_norm:
            vector(f"{scope}.self_attn.q_norm.weight", head, gain)
            vector(f"{scope}.self_attn.k_norm.weight", head, gain)
        matrix(f"{scope}.self_attn.o_proj", hidden, queries)
        if config.output_bias:
            vector(f"{scope}.self_attn.o_proj.bias", hidden, 0)
        matrix(f"{scope}.mlp.gate_proj", inner, hidden)
        matrix(f"{scope}.mlp.up_proj", inner, hidden)
        matrix(f"{scope}.mlp.down_proj", hidden, inner)
    vector("model.norm.weight", hidden, gain)
    if not config.tie_word_embeddings:
        matrix("lm_head", config.vocab_size, hidden)
    return checkpoint


def numpy_logits(checkpoint: MemoryCheckpoint, token_ids: list[int]) -> FloatArray:
    """Logits of every position, (n, vocab), straight from `DecoderConfig`'s definitions."""
    config = checkpoint.config

    def weight(name: str) -> NDArray[np.float64]:
        return checkpoint.tensor(f"{name}.weight").float32().astype(np.float64)

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        mean_square = np.square(x).mean(-1, keepdims=True)
        scaled: NDArray[np.float64] = x / np.sqrt(mean_square + config.rms_norm_eps)
        return scaled * (weight(name) + config.norm_offset)

    x = weight("model.embed_tokens")[token_ids] * config.embedding_scale
    for layer in range(config.num_layers):
        scope = f"model.layers.{layer}"
        attended = _attend(checkpoint, layer, norm(x, f"{scope}.input_layernorm"), norm)
        if config.sandwich_norms:
            x = x + norm(attended, f"{scope}.post_attention_layernorm")
            inner = norm(x, f"{scope}.pre_feedforward_layernorm")
        else:
            x = x + attended
            inner = norm(x, f"{scope}.post_attention_layernorm")
        gate = inner @ weight(f"{scope}.mlp.gate_proj").T
        cubic = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        is_silu = config.activation == "silu"
        gate = gate / (1 + np.exp(-gate)) if is_silu else 0.5 * gate * (1 + np.tanh(cubic))
        down = (gate * (inner @ weight(f"{scope}.mlp.up_proj").T)) @ weight(
            f"{scope}.mlp.down_proj"
        ).T
        x = x + (
            norm(down, f"{scope}.post_feedforward_layernorm") if config.sandwich_norms else down
        )
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return (norm(x, "model.norm") @ weight(head).T).astype(np.float32)


def _attend(
    checkpoint: MemoryCheckpoint,
    layer: int,
    x: NDArray[np.float64],
    norm: Callable[[NDArray[np.float64], str], NDArray[np.float64]],
) -> NDArray[np.float64]:
    config, scope, length = checkpoint.config, f"model.layers.{layer}.self_attn", len(x)

    def project(part: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        projected = x @ checkpoint.tensor(f"{scope}.{part}_proj.weight").float32().T
        bias = f"{scope}.{part}_proj.bias"
        return projected + (checkpoint.tensor(bias).float32() if bias in checkpoint.tensors else 0)

    rope, window = config.rope_of(layer), config.window_of(layer)
    is_long = rope.boundary is not None and length > rope.boundary
    cosines, sines = rope.tables(length, "long" if is_long else "short")

    def rotate(heads: NDArray[np.float64]) -> NDArray[np.float64]:
        half = rope.dim // 2
        a, b, rest = np.split(heads, [half, rope.dim], axis=-1)
        cos, sin = cosines[:, None], sines[:, None]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)

    q, k, v = (project(part, x).reshape(length, -1, config.head_size) for part in "qkv")
    if config.qk_norm:
        q, k = norm(q, f"{scope}.q_norm"), norm(k, f"{scope}.k_norm")
    groups = config.num_heads // config.num_kv_heads
    q, k, v = rotate(q), np.repeat(rotate(k), groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) * config.scale
    distance = np.arange(length)[:, None] - np.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = np.where(hidden, -np.inf, scores)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return project("o", np.einsum("hij,jhd->ihd", shares, v).reshape(length, -1))

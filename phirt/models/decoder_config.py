"""A dense decoder's shape and constants, whatever kind of file they were read from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from phirt.models.rotary import Rotary

__all__ = ["DecoderConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Shape and constants of a dense decoder (llama, mistral, qwen2, qwen3, phi3, gemma3).

    All of them are pre-norm decoders with RMS norms, rotary positions, grouped-query
    attention and a gated MLP: ``x += attn(norm(x)); x += down(act(gate(norm(x))) * up(norm(x)))``.
    The attributes below say where they differ.

    Attributes:
        architecture: Name as Hugging Face's ``model_type``: ``"llama"``, ``"gemma3_text"``.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_size: Width of one head.
        context_length: Longest sequence that the model was made for, in tokens.
        rms_norm_eps: Epsilon of every RMS norm.
        rope: Rotary embedding of the layers (of those with full attention, if
            ``local_rope`` is given).
        local_rope: Rotary embedding of the layers with a window, where it differs (Gemma 3).
        tie_word_embeddings: Whether the LM head is the embedding.
        windows: Per layer, the tokens that a position attends to, itself included, or None
            for all; empty where every layer has full attention.
        activation: Of the MLP's gate; ``"gelu_tanh"`` is GELU's tanh approximation.
        qkv_bias: Whether the q, k and v projections have biases (Qwen 2).
        output_bias: Whether the o projection has one.
        qk_norm: Whether each head's queries and keys pass an RMS norm of their own, before
            the rotary embedding (Qwen 3, Gemma 3).
        norm_offset: Added to the weight of every RMS norm (Gemma: 1).
        sandwich_norms: Whether attention and MLP are also normalized on their way *out*
            (Gemma 3): ``post_attention_layernorm`` is then the norm after attention, and
            ``pre_feedforward_layernorm`` and ``post_feedforward_layernorm`` surround the MLP.
        embedding_scale: The embedding is multiplied by it (Gemma: the root of the width).
        attention_scale: The scores are multiplied by it; None for ``head_size ** -0.5``.
        bos_token_id: Beginning-of-sequence id, or None.
        eos_token_ids: Every id that ends a generation.
        pad_token_id: Padding id, or None.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rotary
    local_rope: Rotary | None = None
    tie_word_embeddings: bool = False
    windows: tuple[int | None, ...] = ()
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @property
    def window(self) -> int | None:
        """The narrowest window of any layer, or None."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale

    def window_of(self, layer: int) -> int | None:
        """The window of a layer, counted from 0, or None for full attention."""
        return self.windows[layer] if self.windows else None

    def rope_of(self, layer: int) -> Rotary:
        """The rotary embedding of a layer, counted from 0."""
        local = self.local_rope is not None and self.window_of(layer) is not None
        return self.local_rope if local and self.local_rope is not None else self.rope

"""A decoder's pass over its layers: which mask, which rotary frequencies, which logits.

mlx-lm's models are not called as a whole: they give no window to mistral, qwen and phi3, know
only the long factors of LongRoPE, round Gemma's embedding scale to bfloat16, and make logits of
every position of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary
from phirt.protocols import RopeRegime

__all__ = ["Decoder"]


class _Rope:
    """Turns queries and keys; takes the place of the rotary module of mlx-lm's layers.

    Which of LongRoPE's factors it uses is set before every forward pass, by `Decoder`.

    Args:
        mx: The module ``mlx.core``.
        rotary: Frequencies and factors.
    """

    def __init__(self, mx: Any, rotary: Rotary) -> None:
        self._mx = mx
        self._dim = rotary.dim
        self._scale = rotary.attention_factor
        # MLX takes wavelengths where others take frequencies.
        short = mx.array(1 / rotary.frequencies("short"))
        has_long = rotary.long_factors is not None
        long = mx.array(1 / rotary.frequencies("long")) if has_long else short
        self._wavelengths: dict[RopeRegime, Any] = {"short": short, "long": long}
        mx.eval(short, long)
        self.regime: RopeRegime = "short"

    def __call__(self, x: Any, offset: int = 0) -> Any:
        """Turn ``x``, shape (1, heads, n, head_size), whose first position is ``offset``."""
        if self._scale != 1.0:
            # A rotation is linear: scaling what is turned scales cosines and sines.
            x = x.at[..., : self._dim].multiply(self._scale)
        return self._mx.fast.rope(
            x,
            self._dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths[self.regime],
        )


class _Together:
    """One layer's caches of several sequences, in the place of one cache, for one token of each.

    Args:
        mx: The module ``mlx.core``.
        caches: A cache of mlx-lm's for each sequence.
    """

    def __init__(self, mx: Any, caches: Sequence[Any]) -> None:
        self._mx = mx
        self._caches = caches
        self.offset = mx.array([cache.offset for cache in caches])

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Append a token's keys and values, (rows, kv_heads, 1, head_size), to each.

        Returns:
            All of them, padded at the end to the longest.
        """
        held = [
            cache.update_and_fetch(keys[row : row + 1], values[row : row + 1])
            for row, cache in enumerate(self._caches)
        ]
        longest = max(cache.offset for cache in self._caches)
        return self._pad([k for k, _ in held], longest), self._pad([v for _, v in held], longest)

    def _pad(self, arrays: Sequence[Any], length: int) -> Any:
        mx = self._mx
        padded = [mx.pad(a, [(0, 0), (0, 0), (0, length - a.shape[2]), (0, 0)]) for a in arrays]
        return mx.concatenate(padded)


class Decoder:
    """A decoder in MLX: from token ids to logits, over a cache.

    Every call must come from the thread that built it.

    Args:
        mx: The module ``mlx.core``.
        model: mlx-lm's model, with its weights.
        config: Shape and constants.

    Attributes:
        dtype: What activations are computed in.
    """

    def __init__(self, mx: Any, model: Any, config: DecoderConfig) -> None:
        self._mx = mx
        self._config = config
        self._embedding = model.model.embed_tokens
        self.dtype = self._embedding(mx.array([0])).dtype
        self._layers = list(model.model.layers)
        self._norm = model.model.norm
        tied = config.tie_word_embeddings
        self._head = model.model.embed_tokens.as_linear if tied else model.lm_head
        self._ropes = [_Rope(mx, config.rope)]
        if config.local_rope is not None:
            self._ropes.append(_Rope(mx, config.local_rope))
        for index, layer in enumerate(self._layers):
            is_local = config.rope_of(index) is not config.rope
            layer.self_attn.rope = self._ropes[is_local]
            layer.self_attn.scale = config.scale

    def forward(
        self,
        token_ids: Sequence[int],
        caches: Sequence[Any],
        *,
        regime: RopeRegime | None,
        every_position: bool,
        between_layers: Callable[[], None] | None = None,
    ) -> Any:
        """Append tokens to the caches and compute their logits.

        Args:
            token_ids: n tokens.
            caches: A cache of mlx-lm's interface for every layer.
            regime: Which of LongRoPE's factors to use.
            every_position: Whether to make logits of all of them, or of the last.
            between_layers: Called after each layer, whose result is computed by then. Without
                it the layers are computed in one go.

        Returns:
            Logits, (n or 1, vocab), float32, not yet computed.
        """
        mx = self._mx
        for rope in self._ropes:
            rope.regime = regime or "short"
        x = self._embed(mx.array([list(token_ids)]))
        masks = dict(self._masks(len(token_ids), caches[0].offset))
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            x = layer(x, masks[self._config.window_of(index)], cache)
            if between_layers is not None:
                mx.eval(x)
                between_layers()
        if not every_position:
            x = x[:, -1:]
        return self._head(self._norm(x))[0].astype(mx.float32)

    def step(
        self,
        token_ids: Sequence[int],
        rows: Sequence[Sequence[Any]],
        *,
        regime: RopeRegime | None,
    ) -> Any:
        """Append one token to each of several sequences.

        Args:
            token_ids: One token for each.
            rows: The caches of each, one for every layer.
            regime: Which of LongRoPE's factors all of them use.

        Returns:
            Logits, (rows, vocab), float32, not yet computed.
        """
        mx = self._mx
        for rope in self._ropes:
            rope.regime = regime or "short"
        x = self._embed(mx.array(list(token_ids))[:, None])
        starts = [row[0].offset for row in rows]
        positions = mx.array(starts)[:, None, None, None]
        keys = mx.arange(max(starts) + 1)
        masks: dict[int | None, Any] = {None: keys <= positions}
        for window in self._config.windows:
            if window is not None and window not in masks:
                masks[window] = masks[None] & (keys > positions - window)
        for index, layer in enumerate(self._layers):
            together = _Together(mx, [row[index] for row in rows])
            x = layer(x, masks[self._config.window_of(index)], together)
        return self._head(self._norm(x))[:, 0].astype(mx.float32)

    def _embed(self, ids: Any) -> Any:
        x = self._embedding(ids)
        scale = self._config.embedding_scale
        return x if scale == 1.0 else x * self._mx.array(scale, x.dtype)

    def _masks(self, count: int, start: int) -> Iterator[tuple[int | None, Any]]:
        """For each width of window, the mask of ``count`` positions from ``start`` on."""
        mx, total = self._mx, start + count
        for window in {None, *self._config.windows}:
            if window is None or total <= window:
                yield window, None if count == 1 else "causal"
                continue
            queries = mx.arange(start, total)[:, None]
            keys = mx.arange(total)[None]
            yield window, (keys <= queries) & (keys > queries - window)

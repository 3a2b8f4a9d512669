"""Guesses from a smaller model of the same vocabulary."""

from __future__ import annotations

import numpy as np

from phirt.errors import PhirtError, UnsupportedParameterError
from phirt.generation.history import TokenHistory
from phirt.generation.speculation import Draft
from phirt.protocols import LoadedModel, Session
from phirt.types import IntArray

__all__ = ["ModelDrafter"]

_CHANCE = 0.7


class ModelDrafter:
    """Continues the text greedily with a model of its own session.

    Args:
        model: The draft model; whoever loaded it closes it.

    Raises:
        UnsupportedParameterError: Its sessions cannot be rolled back.
    """

    def __init__(self, model: LoadedModel) -> None:
        if not model.capabilities.truncate:
            lack = model.capabilities.lacks["truncate"].reason
            raise UnsupportedParameterError(
                f"assistant_model cannot go back to where a guess failed: {lack}. Load it with "
                "another backend."
            )
        self._model = model
        self._session: Session | None = None
        self._held: IntArray = np.empty(0, np.int64)

    def propose(self, history: TokenHistory, most: int) -> Draft:
        """Its own greedy continuation; none where its context or its session ends."""
        info = self._model.info
        ids = history.token_ids
        boundary = info.rope_boundary
        limit = info.context_length if boundary is None else min(boundary, info.context_length)
        most = min(most, limit - ids.size)
        if most < 1:
            return Draft(())
        try:
            return Draft(self._continue(ids, most, limit), chance=_CHANCE)
        except PhirtError:
            # A guess is no part of the request: without it, the target goes on alone.
            self.close()
            return Draft(())

    def close(self) -> None:
        """Free its session."""
        session, self._session = self._session, None
        self._held = self._held[:0]
        if session is not None:
            session.close()

    def _continue(self, ids: IntArray, most: int, limit: int) -> list[int]:
        session = self._session
        if session is None:
            session = self._model.new_session(max_length=limit, expected_length=ids.size + most)
            self._session = session
        common = _common(self._held, ids)
        # At least the last token is run, for its logits.
        keep = min(common, ids.size - 1)
        if keep < session.length:
            session.truncate(max(keep, session.floor))
        row = session.prefill(ids[session.length :].tolist()).numpy()[-1]
        drafted = [int(row.argmax())]
        while len(drafted) < most:
            row = session.decode(drafted[-1]).numpy()[-1]
            drafted.append(int(row.argmax()))
        # The last guess is not in its cache.
        self._held = np.concatenate([ids, np.array(drafted[:-1], np.int64)])
        return drafted


def _common(held: IntArray, ids: IntArray) -> int:
    length = min(held.size, ids.size)
    differ = np.flatnonzero(held[:length] != ids[:length])
    return int(differ[0]) if differ.size else length

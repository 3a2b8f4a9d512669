"""Prefill, decode, verify and truncate: the logits are those of one pass over all tokens."""

from __future__ import annotations

import numpy as np
import pytest

from phirt.errors import ContextLengthError, SessionClosedError
from phirt.testing.subject import Subject, random_ids

__all__ = ["StepConformance"]

_LENGTH = 48  # tokens: three windows of 16, and beyond LongRoPE's boundary of 32
_FIRST = 36  # tokens of the first call: a long session wants more than 32


class StepConformance:
    """One session, one call after the other."""

    @pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 60])
    def test_prefill(self, subject: Subject, length: int) -> None:
        """A whole prompt gives the logits of its last position, short and long."""
        ids = random_ids(length, seed=length)
        with subject.session(length) as session:
            logits = session.prefill(ids)
            subject.assert_logits(logits, subject.oracle.logits(ids)[-1:], f"prefill of {length}")
            subject.check(session.length == length, f"length is {session.length}, not {length}")

    def test_decode_after_prefill(self, subject: Subject) -> None:
        """A token at a time, after a prompt: as one prefill of them all."""
        ids = random_ids(_LENGTH)
        expected = subject.oracle.logits(ids)
        with subject.session(_LENGTH) as session:
            subject.assert_logits(
                session.prefill(ids[:_FIRST]), expected[_FIRST - 1 : _FIRST], "prefill"
            )
            for index in range(_FIRST, _LENGTH):
                logits = session.decode(ids[index])
                what = f"decode of token {index + 1}"
                subject.assert_logits(logits, expected[index : index + 1], what)

    def test_decode_from_the_first_token(self, subject: Subject) -> None:
        """A prompt of one token, and the rest one by one through a window of 16."""
        ids = random_ids(24, seed=1)
        expected = subject.oracle.logits(ids)
        with subject.session(24) as session:
            session.prefill(ids[:1])
            for index in range(1, 24):
                logits = session.decode(ids[index])
                what = f"decode of token {index + 1} after a prompt of one"
                subject.assert_logits(logits, expected[index : index + 1], what)

    @pytest.mark.parametrize("chunks", [(36, 12), (40, 3, 5), (34, 1, 13)])
    def test_chunked_prefill(self, subject: Subject, chunks: tuple[int, ...]) -> None:
        """A prompt in parts, where the session can extend: as one prefill."""
        ids = random_ids(_LENGTH, seed=2)
        with subject.session(_LENGTH) as session:
            session.prefill(ids[: chunks[0]])
            if not session.can_extend:
                pytest.skip("the session takes one prompt only")
            start = chunks[0]
            for size in chunks[1:]:
                logits = session.prefill(ids[start : start + size])
                start += size
            what = f"prefill in parts of {chunks}"
            subject.assert_logits(logits, subject.oracle.logits(ids)[-1:], what)

    @pytest.mark.parametrize("chunks", [(36, 12), (34, 13, 1)])
    def test_chunks_without_logits(self, subject: Subject, chunks: tuple[int, ...]) -> None:
        """Logits that nobody needs may be left out, and nothing else may."""
        ids, start = random_ids(_LENGTH, seed=2), 0
        with subject.session(_LENGTH) as session:
            for size in chunks:
                if start and not session.can_extend:
                    pytest.skip("the session takes one prompt only")
                part = ids[start : start + size]
                start += size
                logits = session.prefill(part, needs_logits=start == _LENGTH)
                subject.check(session.length == start, f"the length is {session.length}")
            what = f"prefill in parts of {chunks}, without logits but the last"
            subject.assert_logits(logits, subject.oracle.logits(ids)[-1:], what)

    def test_growing_past_the_expected_length(self, subject: Subject) -> None:
        """``expected_length`` is a hint: a session grows to ``max_length``."""
        ids = random_ids(100, seed=3)
        session = subject.model.new_session(max_length=100, expected_length=_FIRST)
        session.prefill(ids[:_FIRST])
        for token in ids[_FIRST:]:
            logits = session.decode(token)
        session.close()
        subject.assert_logits(logits, subject.oracle.logits(ids)[-1:], "100 tokens, 36 expected")

    def test_logits_are_the_callers(self, subject: Subject) -> None:
        """float32 of the vocabulary, writable, and nothing changes by writing to them."""
        ids = random_ids(_LENGTH, seed=4)
        expected = subject.oracle.logits(ids)
        with subject.session(_LENGTH) as session:
            values = session.prefill(ids[:-1]).numpy()
            subject.check(values.dtype == np.float32, f"logits are {values.dtype}")
            subject.check(bool(values.flags.writeable), "logits cannot be written to")
            values[:] = -np.inf
            subject.assert_logits(session.decode(ids[-1]), expected[-1:], "after writing to logits")

    @pytest.mark.parametrize("k", [1, 5])
    def test_top(self, subject: Subject, k: int) -> None:
        """The k largest logits, largest first, and the logarithm of the whole sum."""
        ids = random_ids(_FIRST, seed=5)
        with subject.session(_FIRST) as session:
            logits = session.prefill(ids)
            top = logits.top(k)
            row = logits.numpy()[0].astype(np.float64)
        order = np.argsort(-row, kind="stable")[:k]
        subject.check(
            top.ids.shape == top.values.shape == (1, k), f"top({k}): shape {top.ids.shape}"
        )
        subject.check(top.ids[0].tolist() == order.tolist(), f"top({k}): {top.ids[0]}, not {order}")
        subject.check(np.array_equal(top.values[0], row[order].astype(np.float32)), "top: values")
        total = np.log(np.exp(row - row.max()).sum()) + row.max()
        subject.check(
            abs(top.logsumexp[0] - total) < 1e-4, f"logsumexp {top.logsumexp}, not {total}"
        )

    @pytest.mark.parametrize("k", [0, -1, 10**9])
    def test_top_of_too_many(self, subject: Subject, k: int) -> None:
        """``k`` is from 1 to the size of the vocabulary."""
        with subject.session(_FIRST) as session:
            logits = session.prefill(random_ids(_FIRST))
            with pytest.raises(ValueError, match=r"\d"):
                logits.top(k)

    def test_verify(self, subject: Subject) -> None:
        """Several tokens at once: the logits of every one of them, then of the next."""
        _need(subject, "verify")
        ids = random_ids(_LENGTH, seed=6)
        expected = subject.oracle.logits(ids)
        with subject.session(_LENGTH) as session:
            session.prefill(ids[:_FIRST])
            logits = session.verify(ids[_FIRST:-2])
            subject.assert_logits(logits, expected[_FIRST:-2], f"verify of {_LENGTH - _FIRST - 2}")
            subject.assert_logits(session.verify(ids[-2:-1]), expected[-2:-1], "verify of one")
            subject.assert_logits(session.decode(ids[-1]), expected[-1:], "decode after verify")

    def test_verify_of_a_whole_prompt(self, subject: Subject) -> None:
        """The first call may be a verify."""
        _need(subject, "verify")
        ids = random_ids(_LENGTH, seed=7)
        with subject.session(_LENGTH) as session:
            subject.assert_logits(session.verify(ids), subject.oracle.logits(ids), "verify of all")

    @pytest.mark.parametrize("back", [1, 4, 9])
    def test_truncate(self, subject: Subject, back: int) -> None:
        """Forgotten tokens leave no trace in what follows."""
        _need(subject, "truncate")
        ids, others = random_ids(_LENGTH, seed=8), random_ids(9, seed=9)
        with subject.session(_LENGTH + 9) as session:
            session.prefill(ids[:_FIRST])
            for token in ids[_FIRST:]:
                session.decode(token)
            kept = max(session.floor, _LENGTH - back)
            session.truncate(kept)
            subject.check(session.length == kept, f"truncate({kept}) left {session.length} tokens")
            expected = subject.oracle.logits(ids[:kept] + others)
            for index, token in enumerate(others):
                what = f"decode {index + 1} after truncate from {_LENGTH} to {kept}"
                row = expected[kept + index : kept + index + 1]
                subject.assert_logits(session.decode(token), row, what)

    def test_truncate_to_the_floor(self, subject: Subject) -> None:
        """``floor`` is a promise: truncating to it works, and a new prompt follows."""
        _need(subject, "truncate")
        ids = random_ids(_FIRST + 2, seed=10)
        with subject.session(_LENGTH) as session:
            session.prefill(ids[:_FIRST])
            kept = session.floor
            session.truncate(kept)
            others = random_ids(_LENGTH - kept, seed=11)
            if not session.can_extend and len(others) > 1 and kept:
                pytest.skip("the session takes one prompt only")
            logits = session.prefill(others)
            expected = subject.oracle.logits(ids[:kept] + others)[-1:]
            subject.assert_logits(logits, expected, f"prefill after truncate to the floor, {kept}")

    def test_truncate_out_of_range(self, subject: Subject) -> None:
        """Below the floor or beyond the length: refused, and the session goes on."""
        _need(subject, "truncate")
        ids = random_ids(_LENGTH, seed=12)
        with subject.session(_LENGTH) as session:
            session.prefill(ids[:-1])
            for length in (-1, session.floor - 1, session.length + 1):
                with pytest.raises(ValueError, match=str(session.length)):
                    session.truncate(length)
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(session.decode(ids[-1]), expected, "decode after a refusal")

    def test_too_many_tokens(self, subject: Subject) -> None:
        """A session holds ``max_length`` tokens and no more."""
        ids = random_ids(_FIRST + 1)
        with subject.session(_FIRST) as session:
            with pytest.raises(ContextLengthError) as caught:
                session.prefill(ids)
            found = (caught.value.required, caught.value.available)
            subject.check(found == (_FIRST + 1, _FIRST), f"the error says {found}")
        with subject.session(_FIRST) as session:
            session.prefill(ids[:-1])
            with pytest.raises(ContextLengthError):
                session.decode(ids[-1])

    def test_no_tokens(self, subject: Subject) -> None:
        """An empty prompt is a mistake of the caller's."""
        with subject.session(_FIRST) as session, pytest.raises(ValueError, match="token"):
            session.prefill([])

    def test_closed(self, subject: Subject) -> None:
        """After close every call says so, but for close itself."""
        ids = random_ids(_FIRST)
        with subject.session(_LENGTH) as session:
            session.prefill(ids)
            session.close()
            session.close()
            with pytest.raises(SessionClosedError):
                session.decode(ids[0])
            with pytest.raises(SessionClosedError):
                session.prefill(ids)


def _need(subject: Subject, capability: str) -> None:
    if not getattr(subject.model.capabilities, capability):
        pytest.skip(f"declared lack: {subject.model.capabilities.lacks[capability].reason}")

"""LongRoPE: two sets of rotary factors, and no session that mixes them."""

from __future__ import annotations

import pytest

from phirt.testing.subject import Subject, random_ids

__all__ = ["RopeConformance"]


class RopeConformance:
    """What `phirt.protocols.Session` promises about ``rope_boundary``."""

    @pytest.fixture
    def long_rope(self, subject: Subject) -> Subject:
        """A subject with LongRoPE, whose boundary is 32 tokens; the others are left out."""
        return subject

    def test_boundary(self, long_rope: Subject) -> None:
        """The model says where the long factors begin."""
        found, expected = long_rope.model.info.rope_boundary, long_rope.oracle.info.rope_boundary
        long_rope.check(found == expected, f"rope_boundary is {found}, not {expected}")

    def test_a_short_session_up_to_the_boundary(self, long_rope: Subject) -> None:
        """The last token with the short factors is the boundary's."""
        ids = random_ids(32)
        expected = long_rope.oracle.logits(ids)
        with long_rope.session(32) as session:
            session.prefill(ids[:28])
            for index in range(28, 32):
                logits = session.decode(ids[index])
                what = f"decode of token {index + 1}, short factors"
                long_rope.assert_logits(logits, expected[index : index + 1], what)

    def test_a_long_session_from_the_boundary(self, long_rope: Subject) -> None:
        """The first call of a long session is one token beyond it."""
        ids = random_ids(40)
        expected = long_rope.oracle.logits(ids)
        with long_rope.session(40) as session:
            long_rope.assert_logits(session.prefill(ids[:33]), expected[32:33], "prefill of 33")
            for index in range(33, 40):
                logits = session.decode(ids[index])
                what = f"decode of token {index + 1}, long factors"
                long_rope.assert_logits(logits, expected[index : index + 1], what)

    @pytest.mark.parametrize("length", [1, 20, 32])
    def test_a_long_session_that_begins_short(self, long_rope: Subject, length: int) -> None:
        """Refused: a runtime would choose the short factors for such a call."""
        with long_rope.session(40) as session, pytest.raises(ValueError, match="32"):
            session.prefill(random_ids(length))

    def test_the_floor_of_a_long_session(self, long_rope: Subject) -> None:
        """Going on from below the boundary would mix the factors too."""
        if not long_rope.model.capabilities.truncate:
            pytest.skip("declared lack: truncate")
        with long_rope.session(40) as session:
            session.prefill(random_ids(36))
            long_rope.check(session.floor >= 32, f"floor is {session.floor}, below the boundary")
            with pytest.raises(ValueError, match=r"\d"):
                session.truncate(31)

    def test_sessions_of_both_regimes_at_once(self, long_rope: Subject) -> None:
        """The factors are a session's, not the model's."""
        short, long = random_ids(30, seed=1), random_ids(40, seed=2)
        with long_rope.session(30) as one, long_rope.session(40) as other:
            one.prefill(short[:24])
            other.prefill(long[:34])
            for step in range(6):
                for session, ids, name in ((one, short, "short"), (other, long, "long")):
                    index = len(ids) - 6 + step
                    expected = long_rope.oracle.logits(ids)[index : index + 1]
                    what = f"the {name} one of two sessions, token {index + 1}"
                    long_rope.assert_logits(session.decode(ids[index]), expected, what)

    def test_a_cache_of_the_other_regime(self, long_rope: Subject) -> None:
        """A cache made with the short factors does not go on in a long session."""
        if not long_rope.model.capabilities.kv:
            pytest.skip(f"declared lack: {long_rope.model.capabilities.lacks['kv'].reason}")
        with long_rope.session(20) as session:
            session.prefill(random_ids(20))
            cache = session.export_kv()
        with long_rope.session(40) as session, pytest.raises(ValueError, match="regime"):
            session.import_kv(cache)

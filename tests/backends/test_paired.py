"""Two fakes as one model: which of them runs what, and where the cache is meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from phirt.backends.execution import InTurn
from phirt.backends.paired import PREFILL_FROM, PairedModel
from phirt.errors import (
    BackendError,
    BackendRuntimeError,
    OutOfMemoryError,
    SessionClosedError,
    UnsupportedModelError,
)
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.protocols import Capabilities, KVLayer, Lack
from tests.fakes import FakeModel, FakeSession

LONG = list(range(1, 7))


class CachedModel(FakeModel):
    """A fake whose cache holds its tokens, and that tells where they went."""

    def __init__(self, name="fake", *, hooks=None, truncate=True, topk=False, **options):
        super().__init__(**options)
        self.info = replace(self.info, weights_id=name)
        self.hooks = hooks or {}
        self.moves: list[str] = []
        have = {"truncate": truncate, "verify": True, "interrupt": True, "kv": True, "topk": topk}
        lacks = {name: Lack("never", "a fake") for name, there in have.items() if not there}
        lacks["batch"] = Lack("never", "a fake")
        self.capabilities = Capabilities(**have, lacks=lacks)

    def _new_session(self, *, max_length, expected_length):
        self.hook("open")
        self.sessions_opened += 1
        self.sessions_open += 1
        self.requests.append((max_length, expected_length))
        return CachedSession(self, max_length=max_length)

    def hook(self, name):
        self.hooks.get(name, lambda: None)()


class CachedSession(FakeSession):
    model: CachedModel

    def _export_kv(self):
        self.model.hook("export")
        self.model.moves.append(f"out {len(self.ids)}")
        tokens = np.array(self.ids, np.float32).reshape(1, -1, 1)
        return [KVLayer(0, tokens, tokens)]

    def _import_kv(self, cache):
        self.model.hook("import")
        self.model.moves.append(f"in {cache.length}")
        self.ids = [int(token) for token in cache.layers[0].key[0, :, 0]]


def pair(*, prefill=None, decode=None, prefill_from=4, **options):
    return PairedModel(
        prefill or CachedModel("a", **options),
        decode or CachedModel("b", **options),
        prefill_from=prefill_from,
    )


def new_session(model, length=64):
    return model.new_session(max_length=length, expected_length=length)


def best(logits):
    return int(logits.numpy()[-1].argmax())


class TestWhoRunsWhat:
    def test_a_long_prefill_runs_on_the_one_and_single_tokens_on_the_other(self):
        model = pair()
        session = new_session(model)
        assert best(session.prefill(LONG)) == 7
        assert (model.prefill.calls, model.decode.calls) == ([("run", 6)], [])
        assert model.prefill.moves == []  # the first token does not wait for it
        assert best(session.decode(7)) == 0
        assert best(session.decode(3)) == 4
        assert model.decode.calls == [("run", 1), ("run", 1)]
        assert (model.prefill.moves, model.decode.moves) == (["out 6"], ["in 6"])
        assert session.length == 8

    def test_a_prefill_below_the_limit_stays_on_the_decoder(self):
        model = pair()
        session = new_session(model)
        session.prefill(LONG[:3])
        session.decode(4)
        assert model.prefill.sessions_opened == 0
        assert model.decode.moves == []

    def test_every_part_of_a_prompt_that_began_there_goes_there(self):
        model = pair()
        session = new_session(model)
        for part in (LONG[:4], LONG[4:6], [1]):
            session.prefill(part)
        assert model.prefill.calls == [("run", 4), ("run", 2)]
        assert model.decode.calls == [("run", 1)]  # of one token, as in a decode step

    def test_all_positions_are_the_decoders(self):
        model = pair()
        session = new_session(model)
        assert session.verify(LONG).numpy().shape == (6, 8)
        session.prefill(LONG)
        session.verify(LONG[:2])
        assert model.decode.calls == [("verify", 6), ("verify", 2)]

    def test_a_later_long_prefill_takes_the_cache_back(self):
        model = pair()
        session = new_session(model)
        session.prefill(LONG)
        session.decode(7)
        assert best(session.prefill(LONG[:5])) == 6
        session.decode(6)
        assert model.prefill.calls == [("run", 6), ("run", 5)]
        assert model.prefill.moves == ["out 6", "in 7", "out 12"]
        assert session.length == 13

    def test_a_prefill_that_is_short_beside_the_cache_does_not(self):
        model = pair(context_length=128)
        session = new_session(model, 128)
        session.prefill(LONG * 8)
        session.decode(7)
        session.prefill(LONG[:5])  # 5 beside 49
        assert model.decode.calls == [("run", 1), ("run", 5)]

    def test_the_limit_may_be_changed(self):
        model = pair()
        model.prefill_from = 7
        new_session(model).prefill(LONG)
        assert model.prefill.calls == []
        assert PairedModel(CachedModel(), CachedModel()).prefill_from == PREFILL_FROM

    def test_a_window_keeps_to_the_decoder_what_it_would_roll_over(self):
        model = pair()
        for part in (model, model.prefill, model.decode):
            part.info = replace(part.info, window=8)
        session = new_session(model)
        session.prefill(LONG)
        session.prefill(LONG)  # of 12 positions, the window would keep 8
        session.prefill(LONG)
        assert model.prefill.calls == [("run", 6)]
        assert model.decode.calls == [("run", 6), ("run", 6)]

    def test_rope_regimes_are_the_same_on_both(self):
        model = pair(rope_boundary=8)
        session = new_session(model, 20)
        assert session.floor == 0
        with pytest.raises(ValueError, match="first call"):
            session.prefill(LONG)
        session.prefill(LONG + LONG)
        session.decode(1)
        assert session.floor == 8
        assert model.prefill.requests == model.decode.requests == [(20, 20)]

    def test_truncate_needs_no_move(self):
        model = pair()
        session = new_session(model)
        session.prefill(LONG)
        session.truncate(4)
        assert best(session.prefill([5, 6])) == 7
        assert model.prefill.moves == []
        session.decode(7)
        session.truncate(0)
        assert best(session.prefill(LONG)) == 7
        assert session.length == 6


class TestCaches:
    def test_of_the_pair_go_on_in_the_pair(self):
        model = pair()
        session, other = new_session(model), new_session(model)
        session.prefill(LONG)
        cache = session.export_kv()
        assert (cache.length, cache.weights_id) == (6, model.info.weights_id)
        other.import_kv(cache)
        assert best(other.decode(7)) == 0
        assert model.decode.sessions_open == 1
        assert new_session(model).export_kv().length == 0

    def test_of_different_weights_have_an_id_of_their_own(self):
        model = pair()
        session = new_session(model)
        session.prefill(LONG)
        cache = session.export_kv()
        for part in (model.prefill, model.decode):
            with pytest.raises(ValueError, match="weights"):
                new_session(part).import_kv(cache)
            single = new_session(part)
            single.prefill(LONG)
            with pytest.raises(ValueError, match="weights"):
                new_session(model).import_kv(single.export_kv())
        assert model.info.weights_id == pair().info.weights_id
        assert model.info.weights_id != PairedModel(model.decode, model.prefill).info.weights_id

    def test_of_the_same_weights_are_everybodys(self):
        model = PairedModel(CachedModel("w"), CachedModel("w"), prefill_from=4)
        session = new_session(model)
        session.prefill(LONG)
        other = new_session(model.decode)
        other.import_kv(session.export_kv())
        assert best(other.decode(7)) == 0


class TestWhatIsRefused:
    def test_a_runtime_without_caches_to_hand_over(self):
        for parts in ((FakeModel(), CachedModel()), (CachedModel(), FakeModel())):
            with pytest.raises(BackendError, match="a fake needs none"):
                PairedModel(*parts)

    @pytest.mark.parametrize(
        "change", [{"vocab_size": 9}, {"rope_boundary": 16}, {"window": 16}], ids=str
    )
    def test_models_that_differ(self, change):
        other = CachedModel()
        other.info = replace(other.info, **change)
        with pytest.raises(UnsupportedModelError, match=next(iter(change))):
            PairedModel(other, CachedModel())

    def test_what_one_of_them_lacks(self):
        model = pair(prefill=CachedModel(truncate=False), decode=CachedModel(topk=True))
        lacks = model.capabilities.lacks
        assert lacks.keys() == {"truncate", "topk", "batch"}
        assert lacks["truncate"].reason == "a fake"
        with pytest.raises(NotImplementedError):
            model.new_pool(slots=2, capacity=8, expected_length=8)

    def test_the_shorter_context_counts_and_both_ends(self):
        model = pair(
            prefill=CachedModel(context_length=40, eos=[1]),
            decode=CachedModel(context_length=50, eos=[2]),
        )
        assert model.info.context_length == 40
        assert model.info.eos_token_ids == {1, 2}


class TestFailures:
    def test_in_the_middle_of_a_prefill(self):
        model = pair(prefill=CachedModel("a", fail_at=2))
        session = new_session(model)
        session.prefill(LONG)
        with pytest.raises(BackendRuntimeError, match="as it was told to"):
            session.prefill(LONG)
        with pytest.raises(SessionClosedError, match="failed"):
            session.decode(1)
        session.close()
        assert model.prefill.sessions_open == model.decode.sessions_open == 0
        again = new_session(model)
        again.prefill(LONG)
        assert best(again.decode(7)) == 0

    @pytest.mark.parametrize("step", ["export", "open", "import"])
    def test_in_the_middle_of_a_hand_over(self, step):
        def fail():
            raise OutOfMemoryError("no room")

        which = "prefill" if step == "export" else "decode"
        model = pair(**{which: CachedModel(which, hooks={step: fail})})
        session = new_session(model)
        session.prefill(LONG)
        with pytest.raises(OutOfMemoryError, match="no room"):
            session.decode(1)
        with pytest.raises(SessionClosedError):
            session.decode(1)
        session.close()
        assert model.prefill.sessions_open == model.decode.sessions_open == 0

    def test_a_cache_that_the_other_refuses(self):
        def refuse():
            raise ValueError("of another shape")

        session = new_session(pair(decode=CachedModel("b", hooks={"import": refuse})))
        session.prefill(LONG)
        with pytest.raises(BackendRuntimeError, match="handed over: of another shape"):
            session.decode(1)

    def test_an_argument_that_is_refused_changes_nothing(self):
        model = pair()
        session = new_session(model)
        session.prefill(LONG)
        with pytest.raises(ValueError, match="Token ids"):
            session.decode(8)
        assert best(session.decode(7)) == 0


class TestInterruptions:
    @pytest.mark.parametrize("where", ["prefill", "decode"])
    def test_reach_whichever_runs(self, where):
        model = pair(**{where: CachedModel(where, stall=True)})
        session = new_session(model)
        if where == "decode":
            session.prefill(LONG)
        outcome = []

        def run():
            with pytest.raises(SessionClosedError) as caught:
                session.prefill(LONG) if where == "prefill" else session.decode(1)
            outcome.append(caught.value)

        thread = threading.Thread(target=run)
        thread.start()
        running = getattr(model, where)
        while not running.calls:
            thread.join(0.01)
        session.interrupt()
        thread.join(10)
        assert len(outcome) == 1
        session.close()
        assert model.prefill.sessions_open == model.decode.sessions_open == 0

    @pytest.mark.parametrize(
        ("which", "step"), [("prefill", "export"), ("decode", "open"), ("decode", "import")]
    )
    def test_during_a_hand_over(self, which, step):
        model = pair()
        session = new_session(model)
        getattr(model, which).hooks = {step: session.interrupt}
        session.prefill(LONG)
        with pytest.raises(SessionClosedError):
            session.decode(1)
        assert model.decode.calls == []
        session.close()
        assert model.prefill.sessions_open == model.decode.sessions_open == 0

    def test_a_loop_is_cancelled_from_another_thread(self):
        model = pair(prefill=CachedModel("a", stall=True))
        loop = DecodeLoop(model, LONG, GenerationParams(), defaults=GenerationDefaults())
        thread = threading.Thread(target=loop.step)
        thread.start()
        while not model.prefill.calls:
            thread.join(0.01)
        loop.cancel()
        thread.join(10)
        assert loop.finish_reason == "cancelled"
        assert model.prefill.sessions_open == model.decode.sessions_open == 0


class TestClosing:
    def test_frees_both_once_the_last_session_has_ended(self):
        model = pair()
        session = new_session(model)
        model.close()
        assert not model.prefill.closed
        with pytest.raises(SessionClosedError):
            new_session(model)
        # Neither has a session yet, and both still open one.
        session.prefill(LONG)
        session.decode(7)
        session.close()
        session.close()
        assert model.prefill.unloaded
        assert model.decode.unloaded
        model.close()

    def test_frees_the_other_where_one_fails_to_close(self):
        class Stuck(CachedModel):
            def close(self):
                raise BackendRuntimeError("stuck")

        model = pair(prefill=Stuck("a"))
        with pytest.raises(BackendRuntimeError, match="stuck"):
            model.close()
        assert model.decode.unloaded

    def test_a_session_that_ran_nothing(self):
        model = pair()
        session = new_session(model)
        session.truncate(0)
        assert (session.length, session.can_extend) == (0, True)
        session.interrupt()
        session.close()
        assert model.prefill.sessions_opened == model.decode.sessions_opened == 0


class TestWhatItSays:
    def test_placement_names_both(self):
        model = pair()
        model.prefill.device = "cuda:0"
        assert model.placement().device == "cuda:0+cpu"
        assert model.placement().provider == "fake+fake"
        assert pair().placement().device == "cpu"

    def test_concurrency_is_that_of_the_stricter(self):
        assert pair().concurrency == "parallel"
        assert pair(execution=InTurn()).concurrency == "serial"

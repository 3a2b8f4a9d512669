"""`phirt.load(prefill=..., decode=...)`: one generation on two runtimes."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import phirt
from phirt import pairing
from phirt.backends.paired import PairedModel
from phirt.build.convert import convert
from phirt.devices.hardware import hardware_id
from phirt.devices.machine import Memory
from phirt.dispatch import canary, select
from phirt.dispatch.candidates import machine_for
from phirt.dispatch.fit import check_pair_fit
from phirt.dispatch.measurements import Measurement, Measurements, Point, Setting
from phirt.dispatch.pair import PairChoice, choose_pair, join_plans
from phirt.dispatch.plan import MemoryNeed, Plan, PlanCandidate, PlannedArtifact, Speed
from phirt.dispatch.planner import listed_as
from phirt.errors import (
    BackendRuntimeError,
    OutOfMemoryError,
    SessionClosedError,
    UnknownBackendError,
    UnsupportedModelError,
)
from phirt.pairing import Part, check_pair
from phirt.testing import write_tiny_checkpoint
from phirt.testing.subject import empty_folder, random_ids
from tests.faulty import FaultyModel
from tests.installed import require


def some_ids(count, *, seed=0):
    """Token ids of the tiny model, whose vocabulary is smaller."""
    return [token % 290 for token in random_ids(count, seed=seed)]


PROMPT = some_ids(80)


class TestArguments:
    def check(self, prefill, decode, **changes):
        defaults = {
            "device": "auto",
            "backend": "auto",
            "options": None,
            "failover": False,
            "tune": False,
        }
        return check_pair(prefill, decode, **(defaults | changes))

    def test_names_with_and_without_a_device(self):
        parts = self.check("openvino:gpu", "onnxruntime")
        assert parts == (Part("openvino", "gpu"), Part("onnxruntime", "cpu"))
        assert self.check("onnxruntime:cuda:1", "onnxruntime")[0].device == "cuda:1"

    @pytest.mark.parametrize(
        ("prefill", "decode", "changes", "message"),
        [
            ("openvino", None, {}, "pass backend='openvino'"),
            (None, "onnxruntime", {}, "pass backend='onnxruntime'"),
            ("onnxruntime", "onnxruntime:cpu", {}, "are the same"),
            ("openvino", "onnxruntime", {"backend": "mlx"}, "backend='mlx'.*leave one"),
            ("openvino", "onnxruntime", {"device": "gpu"}, 'prefill="openvino:gpu"'),
            ("openvino", "onnxruntime", {"options": {"a": 1}}, "settings of one runtime"),
            ("openvino", "onnxruntime", {"failover": True}, "failover=True"),
            ("openvino", "onnxruntime", {"tune": True}, "tune=True"),
            ("openvino", "onnxruntime", {"kv_precision": "int8"}, "as it does by itself"),
            ("auto", "onnxruntime", {}, "must name a backend"),
            ("openvino:auto", "onnxruntime", {}, "must name a backend"),
            ("openvino:", "onnxruntime", {}, "not a device name"),
        ],
    )
    def test_what_cannot_be_meant(self, prefill, decode, changes, message):
        with pytest.raises(ValueError, match=message):
            self.check(prefill, decode, **changes)

    def test_an_unknown_backend(self):
        with pytest.raises(UnknownBackendError, match="abacus"):
            self.check("openvino", "abacus")

    def test_no_name(self):
        with pytest.raises(TypeError, match="prefill"):
            self.check(7, "onnxruntime")

    def test_load_checks_them_first(self):
        with pytest.raises(ValueError, match="failover=True"):
            phirt.load("nothing", prefill="openvino", decode="onnxruntime", failover=True)


def candidate(backend, device="cpu", *, total=100_000_000, free=150_000_000):
    need = MemoryNeed(weights=total - 3, kv=2, workspace=1, context=64, free=free, host=7)
    return PlanCandidate(
        artifact=None,
        backend=backend,
        device=device,
        status="chosen",
        reason="",
        memory=need,
    )


class TestMemory:
    def test_both_count(self):
        with pytest.raises(OutOfMemoryError) as caught:
            check_pair_fit(candidate("openvino"), candidate("onnxruntime"), model="m")
        for part in ("200 MB", "100 MB for openvino on cpu", "150 MB", 'backend="onnxruntime"'):
            assert part in str(caught.value)

    def test_what_fits(self):
        parts = [candidate(name, free=200_000_000) for name in ("openvino", "onnxruntime")]
        check_pair_fit(*parts, model="m")

    def test_memory_of_different_devices_is_not_added(self):
        check_pair_fit(candidate("openvino", "gpu"), candidate("onnxruntime"), model="m")
        with pytest.raises(OutOfMemoryError, match="device 'cuda'"):
            check_pair_fit(candidate("a", "cuda"), candidate("b", "cuda"), model="m")

    def test_what_nobody_knows(self):
        unknown = replace(candidate("openvino"), memory=None)
        check_pair_fit(unknown, candidate("onnxruntime"), model="m")
        free = candidate("onnxruntime", free=None)
        check_pair_fit(free, free, model="m")


def test_the_plan_tells_of_both():
    def plan(chosen, note):
        return Plan(
            model="m",
            device="cpu",
            backend=chosen.backend,
            precision="auto",
            context=64,
            optimize="latency",
            candidates=(chosen,),
            notes=(note, "both"),
        )

    first, second = candidate("openvino", "gpu"), candidate("onnxruntime")
    joined = join_plans(plan(first, "one"), plan(second, "two"), prefill_from=32)
    assert (joined.backend, joined.device) == ("openvino+onnxruntime", "gpu+cpu")
    assert joined.notes == ("one", "both", "two")
    chosen, *parts = joined.candidates
    assert joined.chosen is chosen
    assert "32 tokens or more run on openvino on gpu" in chosen.reason
    assert chosen.memory is not None
    assert (chosen.memory.total, chosen.memory.free) == (200_000_000, 150_000_000)
    assert [(each.backend, each.status) for each in parts] == [
        ("openvino", "usable"),
        ("onnxruntime", "usable"),
    ]


def timed(backend, precision, prefill_s, decode_s, *, kl=0.001, total=100_000_000, **changes):
    """A candidate whose prompt and answer would take so many seconds."""
    speed = Speed(
        prefill_tokens_per_s=1,
        decode_tokens_per_s=1,
        seconds=prefill_s + decode_s,
        prefill_seconds=prefill_s,
        setting=Setting(),
        when="",
    )
    artifact = PlannedArtifact(format="some", precision=precision, state="here", kl=kl)
    found = candidate(backend, total=total, free=1_000_000_000)
    return replace(found, status="usable", speed=speed, artifact=artifact, **changes)


def plan_of(*candidates, optimize="latency"):
    return Plan(
        model="m",
        device="auto",
        backend="auto",
        precision="auto",
        context=64,
        optimize=optimize,
        candidates=candidates,
    )


class TestChoice:
    FAST_PREFILL = timed("openvino", "int8", 1, 8)
    FAST_DECODE = timed("onnxruntime", "int8", 4, 2)

    def test_the_two_that_are_fastest_together(self):
        slow = timed("mlx", "int8", 9, 9)
        choice = choose_pair(plan_of(slow, self.FAST_DECODE, self.FAST_PREFILL))
        assert isinstance(choice, PairChoice)
        assert choice.prefill is self.FAST_PREFILL
        assert choice.decode is self.FAST_DECODE
        assert choice.reason.startswith("as 6 s are predicted for onnxruntime on cpu (some int8)")
        assert choice.reason.endswith("alone, and 3 s for these two")

    def test_two_forms_on_one_backend(self):
        exact = timed("onnxruntime", "fp32", 1, 8, kl=0.0)
        choice = choose_pair(plan_of(self.FAST_DECODE, exact))
        assert isinstance(choice, PairChoice)
        assert choice.prefill is exact
        assert choice.decode is self.FAST_DECODE

    @pytest.mark.parametrize(
        ("candidates", "optimize", "why"),
        [
            ([FAST_DECODE, timed("a", "int8", 3.9, 8)], "latency", "6 s are predicted for onnx"),
            ([FAST_DECODE], "latency", "fewer than two .* were measured .phirt tune m"),
            ([FAST_DECODE, replace(FAST_PREFILL, speed=None)], "latency", "fewer than two"),
            ([FAST_DECODE, replace(FAST_PREFILL, status="rejected")], "latency", "fewer than two"),
            ([FAST_DECODE, replace(FAST_PREFILL, device="gpu")], "latency", "fewer than two"),
            ([FAST_DECODE, FAST_PREFILL], "throughput", "share no batch"),
            ([FAST_DECODE, timed("a", "int4", 1, 8, kl=0.02)], "latency", "fewer than two"),
            ([FAST_DECODE, timed("a", "int4", 1, 8, kl=None)], "latency", "fewer than two"),
            ([FAST_DECODE, timed("onnxruntime-genai", "int8", 1, 8)], "latency", "fewer than two"),
            (
                [FAST_DECODE, timed("a", "int8", 1, 8, total=950_000_000)],
                "latency",
                "none fits into memory",
            ),
        ],
    )
    def test_why_there_is_none(self, candidates, optimize, why):
        found = choose_pair(plan_of(*candidates, optimize=optimize))
        assert isinstance(found, str)
        assert re.search(why, found)

    def test_what_loses_more_is_taken_where_it_was_named_and_for_no_prompt(self):
        coarse = timed("onnxruntime", "int4", 5, 1, kl=0.15)
        plan = plan_of(replace(self.FAST_DECODE, status="chosen"), coarse, self.FAST_PREFILL)
        choice = choose_pair(plan)
        assert isinstance(choice, PairChoice)
        assert choice.decode.artifact == self.FAST_DECODE.artifact
        named = choose_pair(replace(plan, precision="int4"))
        assert isinstance(named, PairChoice)
        assert (named.prefill, named.decode) == (self.FAST_PREFILL, coarse)

    def test_a_device_of_its_own_goes_before_two_on_the_cpu(self):
        gpu = replace(candidate("openvino", "gpu"), status="chosen")
        found = choose_pair(plan_of(gpu, self.FAST_DECODE, self.FAST_PREFILL))
        assert found == "no pair was looked for: openvino on gpu goes before the CPU"

    def test_moving_the_cache_counts(self):
        """128 tokens of a gigabyte each are not worth three seconds."""
        need = replace(self.FAST_DECODE.memory, kv=10**9, context=1, free=10**12)
        heavy = replace(self.FAST_DECODE, memory=need)
        assert "no pair was taken" in str(choose_pair(plan_of(heavy, self.FAST_PREFILL)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _one_store(home, monkeypatch):
    monkeypatch.setenv("PHIRT_HOME", str(home))


@pytest.fixture(scope="module")
def alone(home, tiny_gguf):
    require("onnxruntime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(home))
        with phirt.load(tiny_gguf, backend="onnxruntime", precision="fp32") as model:
            yield model


@pytest.fixture
def pair(tiny_gguf):
    require("openvino", "onnxruntime")
    with load(tiny_gguf) as model:
        yield model


def load(model, **options):
    options = {"prefill": "openvino", "decode": "onnxruntime", "precision": "fp32"} | options
    return phirt.load(model, **options)


@pytest.fixture
def measured(tiny_gguf, own_machine_dir):
    """``measured(prefill_s, decode_s, backend)``: notes a speed, as `phirt.tune` does."""
    require("openvino", "onnxruntime")

    def note(backend, prefill_s, decode_s, model=tiny_gguf):
        is_built = Path(model).is_dir() and (Path(model) / "genai_config.json").exists()
        precision = "auto" if is_built else "fp32"
        with phirt.load(model, backend=backend, device="cpu", precision=precision) as loaded:
            chosen = loaded.plan.chosen
        assert chosen is not None
        assert chosen.artifact is not None
        assert chosen.artifact.id is not None
        machine = machine_for("auto")
        record = machine.backend(backend)
        assert record is not None
        measurement = Measurement(
            artifact=chosen.artifact.id,
            backend=backend,
            device="cpu",
            version=listed_as(machine, backend, "cpu").version or record.version,
            hardware=hardware_id(machine),
            setting=Setting(),
            points=(Point(tokens=128, prefill_s=prefill_s, decode_s=decode_s),),
        )
        Measurements().save([measurement])

    return note


class TestAuto:
    def load(self, tiny_gguf, **options):
        return phirt.load(tiny_gguf, prefill="auto", decode="auto", precision="fp32", **options)

    def test_two_that_were_measured(self, tiny_gguf, measured):
        measured("openvino", 1, 1)
        measured("onnxruntime", 9, 0.01)
        with self.load(tiny_gguf) as model:
            assert model.backend == "openvino+onnxruntime"
            reason = model.plan.chosen.reason
            assert "everything else on onnxruntime on cpu (onnx-genai fp32), as 10.3 s" in reason
            assert len(model.generate(PROMPT, max_new_tokens=4).token_ids) == 4

    def test_one_is_better(self, tiny_gguf, measured):
        measured("openvino", 9, 1)
        measured("onnxruntime", 1, 0.01)
        with self.load(tiny_gguf) as model:
            assert model.backend == "onnxruntime"
            assert any(note.startswith("No pair was taken: 2.28 s") for note in model.plan.notes)

    def test_nothing_was_measured(self, tiny_gguf, own_machine_dir):
        require("openvino", "onnxruntime")
        with self.load(tiny_gguf) as model:
            assert "+" not in model.backend
            assert any("phirt tune" in note for note in model.plan.notes)

    def test_a_folder_that_both_read(self, tiny_gguf, measured, tmp_path):
        with phirt.load(tiny_gguf, backend="onnxruntime", precision="fp32") as model:
            folder = shutil.copytree(model.path, tmp_path / "built")
        measured("openvino", 1, 1, folder)
        measured("onnxruntime", 9, 0.01, folder)
        with phirt.load(folder, prefill="auto", decode="auto") as model:
            assert model.backend == "openvino+onnxruntime"
            chosen = model.plan.chosen
            assert chosen is not None
            assert "openvino on cpu (onnx-genai fp32)" in chosen.reason

    def test_a_window_that_the_prompt_exceeds(self, tmp_path, measured):
        checkpoint = write_tiny_checkpoint(tmp_path / "mistral", "mistral")
        measured("openvino", 1, 1, checkpoint)
        measured("onnxruntime", 9, 0.01, checkpoint)
        with phirt.load(checkpoint, prefill="auto", decode="auto", precision="fp32") as model:
            assert "+" not in model.backend
            assert any("window of 16 tokens" in note for note in model.plan.notes)

    def test_what_computes_wrong_numbers_is_not_taken(self, tiny_gguf, measured, monkeypatch):
        measured("openvino", 1, 1)
        measured("onnxruntime", 9, 0.01)
        check = canary.check_loaded

        def judge(loaded, folder, place, **rest):
            found = check(loaded, folder, place, **rest)
            if place.backend != "openvino":
                return found
            return replace(found, status="failed", reason="it is far off")

        monkeypatch.setattr(select, "check_loaded", judge)
        with self.load(tiny_gguf) as model:
            assert model.backend == "onnxruntime"
            assert any("wrong numbers" in note for note in model.plan.notes)

    def test_a_pair_that_fails(self, tiny_gguf, measured, monkeypatch):
        measured("openvino", 1, 1)
        measured("onnxruntime", 9, 0.01)

        def fail(*_, **__):
            raise UnsupportedModelError("They cannot.")

        monkeypatch.setattr(pairing, "_load_sides", fail)
        with self.load(tiny_gguf) as model:
            assert "+" not in model.backend
            assert "No pair was taken: They cannot." in model.plan.notes

    def test_only_one_of_them(self, tiny_gguf):
        with pytest.raises(ValueError, match='or both are "auto"'):
            phirt.load(tiny_gguf, prefill="auto", decode="onnxruntime")
        with pytest.raises(ValueError, match="backend='mlx'"):
            self.load(tiny_gguf, backend="mlx")


class TestAModel:
    def test_says_what_it_runs_on(self, pair):
        assert (pair.backend, pair.device) == ("openvino+onnxruntime", "cpu")
        assert pair.placement.device == "cpu"
        assert pair.placement.provider == "CPU+CPUExecutionProvider"
        assert "openvino+onnxruntime on cpu" in repr(pair)
        assert "run on openvino on cpu (openvino fp32)" in pair.plan.chosen.reason
        assert pair.plan.chosen.memory.weights == sum(
            each.memory.weights for each in pair.plan.candidates[1:]
        )
        assert pair.artifact.format == "onnx-genai"

    def test_gives_the_decoders_tokens(self, pair, alone):
        for prompt in (PROMPT, PROMPT[:5], PROMPT + some_ids(20, seed=3)):
            found = pair.generate(prompt, max_new_tokens=12, ignore_eos=True)
            expected = alone.generate(prompt, max_new_tokens=12, ignore_eos=True)
            assert found.token_ids == expected.token_ids

    def test_gives_the_decoders_logits(self, pair, alone):
        ids, rows = PROMPT + some_ids(6, seed=1), []
        for model in (pair, alone):
            session = model.loaded.new_session(max_length=128, expected_length=128)
            found = [session.prefill(ids[:80]).numpy()[-1].copy()]
            found += [session.decode(token).numpy()[-1].copy() for token in ids[80:]]
            session.close()
            rows.append(np.stack(found))
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)

    @pytest.mark.parametrize(
        ("prefill", "decode"), [("onnxruntime", "openvino"), ("mlx", "onnxruntime")]
    )
    def test_the_other_way_round(self, tiny_gguf, alone, prefill, decode):
        require(prefill, decode)
        with load(tiny_gguf, prefill=prefill, decode=decode) as model:
            found = model.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        expected = alone.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        assert found.token_ids == expected.token_ids

    def test_a_chats_next_turn_goes_on_from_the_kept_cache(self, pair, alone):
        first = pair.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
        for more in (some_ids(3, seed=4), some_ids(60, seed=5)):
            prompt = PROMPT + list(first.token_ids) + more
            found = pair.generate(prompt, max_new_tokens=8, ignore_eos=True)
            assert found.usage.cached_tokens >= 80
            expected = alone.generate(prompt, max_new_tokens=8, ignore_eos=True)
            assert found.token_ids == expected.token_ids

    def test_scores_as_the_decoder(self, pair, alone):
        np.testing.assert_allclose(pair.score(PROMPT), alone.score(PROMPT), atol=1e-3)

    def test_sampled_with_a_seed(self, pair, alone):
        settings = {"temperature": 0.8, "seed": 3, "max_new_tokens": 12, "ignore_eos": True}
        found = pair.generate(PROMPT, **settings)
        assert found.token_ids == alone.generate(PROMPT, **settings).token_ids

    def test_a_stream_that_is_closed_from_another_thread(self, pair):
        stream = pair.stream(PROMPT, max_new_tokens=1000, ignore_eos=True)
        next(stream)
        closer = threading.Timer(0.05, stream.close)
        closer.start()
        count = sum(1 for _ in stream)
        closer.join()
        assert stream.result.finish_reason == "cancelled"
        assert count < 999

    def test_closing_frees_both(self, tiny_gguf):
        require("openvino", "onnxruntime")
        model = load(tiny_gguf)
        loaded = model.loaded
        assert isinstance(loaded, PairedModel)
        model.close()
        for part in (loaded.prefill, loaded.decode):
            with pytest.raises(SessionClosedError):
                part.new_session(max_length=8, expected_length=8)
        with pytest.raises(SessionClosedError):
            model.generate(PROMPT)

    def test_a_prefill_that_fails_is_raised_and_the_next_one_runs(self, pair):
        loaded = pair.loaded
        loaded.prefill = FaultyModel(loaded.prefill, at=1)
        with pytest.raises(BackendRuntimeError, match="device was lost"):
            pair.generate(PROMPT, max_new_tokens=4)
        loaded.prefill = loaded.prefill.model
        assert len(pair.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids) == 4


class TestWhatIsRefused:
    def test_a_runtime_that_hands_no_cache_over(self, tiny_gguf):
        require("onnxruntime", "onnxruntime_genai")
        with pytest.raises(phirt.BackendError, match="cannot hand a KV cache over"):
            load(tiny_gguf, prefill="onnxruntime-genai")

    def test_memory_for_one_only(self, tiny_gguf, monkeypatch):
        require("openvino", "onnxruntime")
        with load(tiny_gguf) as model:
            needs = [each.memory.total for each in model.plan.candidates[1:]]
        from phirt.dispatch import candidates

        memory = Memory(total=2**40, available=max(needs) + 1_000_000)
        monkeypatch.setattr(candidates, "read_memory", lambda: memory)
        with pytest.raises(OutOfMemoryError, match="on two runtimes"):
            load(tiny_gguf)

    def test_forms_of_different_sources(self, tiny_gguf, tmp_path):
        require("openvino", "onnxruntime")
        both, other = empty_folder(tmp_path / "both"), empty_folder(tmp_path / "other")
        convert(tiny_gguf, both, layout="onnx-genai", precision="fp32")
        convert(tiny_gguf, other, layout="openvino", precision="fp32")
        # As a folder from elsewhere, which holds two exports and says nothing of them.
        (both / "phirt.json").unlink()
        for file in other.iterdir():
            if file.name != "phirt.json":
                shutil.copy(file, both)
        with pytest.raises(UnsupportedModelError, match="one source"):
            load(both, precision="auto")

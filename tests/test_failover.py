"""A model whose backend fails in the middle of a generation goes on with the next candidate."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import phirt
from phirt.build.convert import convert
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact
from phirt.dispatch.registry import get_backend
from phirt.dispatch.select import Selection
from phirt.errors import BackendError, BackendRuntimeError, SessionClosedError
from phirt.model import Model
from phirt.models.folder import ModelFolder, read_folder
from phirt.protocols import LoadedModel, LoadOptions
from phirt.testing import write_tiny_checkpoint
from phirt.testing.subject import random_ids
from tests.fakes import FakeModel
from tests.faulty import Fault, FaultyModel
from tests.installed import leave_out

PLAN = Plan(
    model="tiny",
    device="auto",
    backend="auto",
    precision="auto",
    context=64,
    optimize="latency",
    candidates=(),
)
LOST = "the device was lost"


def selection(loaded: LoadedModel, folder: ModelFolder, backend: str = "first") -> Selection:
    return Selection(backend, "cpu", folder, loaded, PLAN)


class Candidates:
    """What is loaded one after the other; a `phirt.failover.LoadNext`."""

    def __init__(self, folder: ModelFolder, *models: LoadedModel, delay: float = 0.0) -> None:
        self.left = [
            selection(loaded, folder, f"candidate-{number}")
            for number, loaded in enumerate(models, 2)
        ]
        self.delay = delay
        self.asked: list[tuple[str, str]] = []
        self.plans: list[Plan] = []

    def __call__(self, failed: Selection, reason: str) -> Selection:
        self.plans.append(failed.plan)
        self.asked.append((failed.backend, reason))
        time.sleep(self.delay)
        if not self.left:
            raise BackendError("no other candidate is left")
        return self.left.pop(0)


class TestAModel:
    """Over fakes, whose logits depend on every token so far."""

    POISON = 9  # A prompt that begins with it kills the first model.

    @pytest.fixture
    def folder(self, tiny_model):
        return tiny_model._folder

    @pytest.fixture
    def fake(self, tiny_model) -> Callable[..., FakeModel]:
        vocab = tiny_model._loaded.info.vocab_size

        def mixing(ids):
            seed = 0
            for token in ids:
                seed = (seed * 1_000_003 + token + 1) % 2**32
            return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)

        def poisoned(ids):
            if ids[0] == self.POISON and len(ids) > 4:
                raise BackendRuntimeError(LOST)
            return mixing(ids)

        def make(*, healthy: bool = True, **options: Any) -> FakeModel:
            return FakeModel(mixing if healthy else poisoned, vocab=vocab, **options)

        return make

    @pytest.fixture
    def make(self, folder, fake):
        """A model that poison kills, and what takes over."""

        def make(*others: LoadedModel, first: LoadedModel | None = None, delay: float = 0.0):
            candidates = Candidates(folder, *others, delay=delay)
            first = first or fake(healthy=False)
            model = Model(selection(first, folder), started=0.0, load_next=candidates)
            return model, first, candidates

        return make

    def expected(self, folder, fake, prompt):
        return Model(selection(fake(), folder), started=0.0).generate(prompt, max_new_tokens=8)

    def test_the_stream_goes_on_and_its_result_says_so(self, make, folder, fake, caplog):
        model, _, candidates = make(fake())
        with caplog.at_level(logging.WARNING, logger="phirt"):
            result = model.generate([self.POISON, 1, 2], max_new_tokens=8)
        assert result.token_ids == self.expected(folder, fake, [self.POISON, 1, 2]).token_ids
        assert result.failovers == (
            phirt.Failover(
                backend="first",
                device="cpu",
                reason=LOST,
                next_backend="candidate-2",
                next_device="cpu",
                tokens=2,
            ),
        )
        assert candidates.asked == [("first", LOST)]
        (line,) = caplog.messages
        assert line == f"first on cpu failed, and candidate-2 on cpu goes on. {LOST}"

    def test_later_requests_run_where_it_went_on(self, make, fake):
        second = fake()
        model, first, candidates = make(second)
        model.generate([self.POISON, 1, 2], max_new_tokens=4)
        calls = len(first.calls)
        result = model.generate([self.POISON, 1, 2], max_new_tokens=4)
        assert result.failovers == ()
        assert len(first.calls) == calls
        assert len(candidates.asked) == 1
        assert (model.backend, model._loaded) == ("candidate-2", second)

    def test_the_failed_model_is_freed_once_its_last_session_ends(self, make, folder, fake):
        model, first, _ = make(fake())
        with model.stream([1, 2, 3], max_new_tokens=8) as healthy:
            next(healthy)
            model.generate([self.POISON, 1, 2], max_new_tokens=4)
            assert first.closed
            assert not first.unloaded
            list(healthy)  # Its session runs on where it was.
        assert first.unloaded
        assert healthy.result.failovers == ()
        assert healthy.result.token_ids == self.expected(folder, fake, [1, 2, 3]).token_ids

    def test_who_needs_a_new_session_gets_it_where_the_others_went(self, make, fake):
        model, _, candidates = make(fake())
        not_begun = model.stream([4, 5], max_new_tokens=3)
        with model.stream([1, 2, 3], max_new_tokens=3) as begun:
            next(begun)
            model.generate([self.POISON, 1, 2], max_new_tokens=4)
            begun.params = begun.params.merge(max_new_tokens=6)
            assert len(list(begun)) == 5
        assert len(list(not_begun)) == 3
        for stream, tokens in ((begun, 4), (not_begun, 0)):
            (failover,) = stream.result.failovers
            assert (failover.backend, failover.reason, failover.tokens) == ("first", LOST, tokens)
        assert len(candidates.asked) == 1

    def test_eight_streams_that_fail_at_once_load_once_and_all_go_on(self, make, folder, fake):
        prompts = [[self.POISON, token, 2] for token in range(8)]
        expected = [self.expected(folder, fake, prompt).token_ids for prompt in prompts]
        model, first, candidates = make(fake(), delay=0.1)
        together = threading.Barrier(len(prompts))
        results: dict[int, phirt.Generation] = {}

        def run(index):
            together.wait(timeout=30)
            results[index] = model.generate(prompts[index], max_new_tokens=8)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert [results[index].token_ids for index in range(8)] == expected
        assert all(len(result.failovers) == 1 for result in results.values())
        assert len(candidates.asked) == 1
        assert first.unloaded

    def test_candidates_that_fail_in_turn(self, make, folder, fake):
        model, _, candidates = make(fake(healthy=False), fake(healthy=False), fake())
        result = model.generate([self.POISON, 1, 2], max_new_tokens=8)
        assert result.token_ids == self.expected(folder, fake, [self.POISON, 1, 2]).token_ids
        assert [backend for backend, _ in candidates.asked] == [
            "first",
            "candidate-2",
            "candidate-3",
        ]
        assert [each.next_backend for each in result.failovers] == [
            "candidate-2",
            "candidate-3",
            "candidate-4",
        ]

    def test_where_nothing_takes_over_the_error_is_the_first_and_the_model_stays(self, make):
        model, first, _ = make()
        with pytest.raises(BackendRuntimeError, match=LOST) as caught:
            model.generate([self.POISON, 1, 2], max_new_tokens=8)
        assert caught.value.__notes__ == ["Nothing takes over: no other candidate is left"]
        assert not first.closed
        assert len(model.generate([1, 2], max_new_tokens=3).token_ids) == 3

    def test_nothing_is_fetched_in_the_middle_of_a_generation(self, make, folder, fake):
        model, first, candidates = make(fake())
        usable = PlanCandidate(
            artifact=PlannedArtifact(format="onnx", precision="fp32", state="here"),
            backend="first",
            device="cpu",
            status="usable",
            reason="",
        )
        to_fetch = PlannedArtifact(format="onnx", precision="fp32", state="to fetch")
        to_convert = PlannedArtifact(format="onnx", precision="fp32", state="to convert")
        rows = (
            replace(usable, status="chosen"),
            replace(usable, backend="fetched", artifact=to_fetch),
            replace(usable, backend="converted", artifact=to_convert),
        )
        model._standby._current = replace(
            selection(first, folder), plan=replace(PLAN, candidates=rows)
        )
        model.generate([self.POISON, 1, 2], max_new_tokens=8)
        (plan,) = candidates.plans
        assert [(row.backend, row.status) for row in plan.candidates] == [
            ("first", "chosen"),  # which load_next rejects
            ("converted", "usable"),
            ("fetched", "rejected"),
        ]
        assert "not fetched" in plan.candidates[-1].reason

    def test_a_closed_model_has_nothing_that_takes_over(self, make, fake):
        model, _, candidates = make(fake())
        with model.stream([self.POISON, 1, 2], max_new_tokens=8) as stream:
            next(stream)
            model.close()
            with pytest.raises(BackendRuntimeError, match=LOST) as caught:
                list(stream)
        assert caught.value.__notes__ == ["Nothing takes over: the model is closed."]
        assert candidates.asked == []

    def test_closing_it_while_the_next_one_is_loaded_frees_both(self, make, fake):
        second = fake()
        model, first, candidates = make(second)
        really_load = candidates.__call__

        def load_next(failed, reason):
            model.close()
            return really_load(failed, reason)

        model._standby._load_next = load_next
        with pytest.raises(BackendRuntimeError, match=LOST):
            model.generate([self.POISON, 1, 2], max_new_tokens=8)
        assert (first.unloaded, second.unloaded) == (True, True)
        with pytest.raises(SessionClosedError):
            model.generate([1])

    def test_a_model_that_cannot_be_closed_is_given_up_all_the_same(self, make, fake, monkeypatch):
        model, first, _ = make(fake())

        def close():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(first, "close", close)
        assert len(model.generate([self.POISON, 1, 2], max_new_tokens=8).failovers) == 1

    def test_an_interruption_of_the_load_leaves_the_next_request_to_try_again(self, make, fake):
        model, _, candidates = make(fake())
        really_load = candidates.__call__

        def interrupted(failed, reason):
            raise KeyboardInterrupt

        model._standby._load_next = interrupted
        with pytest.raises(KeyboardInterrupt):
            model.generate([self.POISON, 1, 2], max_new_tokens=8)
        model._standby._load_next = really_load
        assert len(model.generate([self.POISON, 1, 2], max_new_tokens=8).failovers) == 1

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
    def test_a_forked_child_gets_the_error_and_loads_nothing(self, make, fake):
        """Row L4: the parent's lock may be held by a thread that is not in the child."""
        model, _, candidates = make(fake())
        with model._standby._lock:
            child = os.fork()  # type: ignore[attr-defined,unused-ignore]
            if child == 0:
                try:
                    model.generate([1], max_new_tokens=1)
                except BackendRuntimeError:
                    os._exit(len(candidates.asked))
                finally:
                    os._exit(100)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# The tokens of one request, on two runtimes, are those of one.

LONG_ROPE = "phi3"  # Its boundary is at 32 tokens, which the prompts below cross.
PROMPT = random_ids(24, seed=3)


@pytest.fixture(scope="module")
def load_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Selection]:
    """A tiny fp32 checkpoint on a backend."""
    root = tmp_path_factory.mktemp("failover")

    def load_tiny(name: str, architecture: str) -> Selection:
        backend = get_backend(name)
        if any(found.status == "missing" for found in backend.probe()):
            leave_out(name)
        folder = checkpoint = root / architecture
        if not checkpoint.exists():
            write_tiny_checkpoint(checkpoint, architecture)
        if "safetensors" not in backend.formats:
            folder = root / f"{architecture}-{backend.formats[0]}"
            if not folder.exists():
                folder.mkdir()
                convert(checkpoint, folder, layout=backend.formats[0], precision="fp32")
        found = read_folder(folder, formats=backend.formats)
        loaded = backend.load(found.artifact, "cpu", LoadOptions(threads=1))
        return selection(loaded, found, name)

    return load_tiny


def failing(
    load_tiny: Callable[[str, str], Selection],
    architecture: str,
    *,
    then: str,
    at: int | None,
    fault: Fault | None = None,
) -> Model:
    """onnxruntime, which fails at a call, and then another backend."""
    first = load_tiny("onnxruntime", architecture)
    faulty = selection(FaultyModel(first.loaded, at, fault), first.folder, "onnxruntime")
    return Model(
        faulty, started=0.0, load_next=lambda failed, reason: load_tiny(then, architecture)
    )


def answer(model: Model) -> phirt.Generation:
    """With everything that a generation remembers: penalties, a seed, a state, new params."""
    calls = []

    def processor(token_ids, logits):
        calls.append(len(token_ids))
        logits[len(calls) % 7] += 1.0
        return logits

    with model:
        stream = model.stream(
            PROMPT,
            max_new_tokens=24,
            ignore_eos=True,
            temperature=0.9,
            top_p=0.95,
            seed=11,
            repetition_penalty=1.2,
            logprobs=2,
            logits_processors=[processor],
        )
        for index, _ in enumerate(stream):
            if index == 5:
                stream.params = stream.params.merge(temperature=0.5, frequency_penalty=0.3)
    assert calls == list(range(len(PROMPT), len(PROMPT) + 24))
    return stream.result


def logprobs_of(result: phirt.Generation) -> list[float]:
    """Of the chosen tokens and of the two best, position by position."""
    found: list[float] = []
    for entry in result.logprobs or ():
        assert entry is not None
        found += [entry.logprob, *(logprob for _, logprob in entry.top)]
    assert len(found) == 3 * len(result.token_ids)
    return found


@pytest.mark.parametrize("architecture", ["llama", LONG_ROPE])
@pytest.mark.parametrize(
    "then", ["openvino", "reference", pytest.param("transformers", marks=pytest.mark.oracle)]
)
def test_on_two_runtimes_the_answer_is_that_of_one(load_tiny, architecture, then):
    expected = answer(failing(load_tiny, architecture, then=then, at=None))
    assert expected.failovers == ()
    # The first prefill, the second token, about the boundary (32 tokens: the ninth call is the
    # last before it, the tenth prefills beyond it), later.
    for at in (1, 2, 9, 10, 11, 20):
        for fault in (None, "nan") if at == 10 else (None,):
            found = answer(failing(load_tiny, architecture, then=then, at=at, fault=fault))
            assert found.token_ids == expected.token_ids
            assert found.text == expected.text
            assert logprobs_of(found) == pytest.approx(logprobs_of(expected), abs=1e-3)
            (failover,) = found.failovers
            assert (failover.backend, failover.next_backend) == ("onnxruntime", then)
            assert failover.tokens == at - 1


@pytest.mark.parametrize("at", [3, 9])
def test_a_stop_string_over_the_change(load_tiny, at):
    def run(at, **params):
        with failing(load_tiny, "llama", then="openvino", at=at) as model:
            return model.generate(PROMPT, max_new_tokens=16, ignore_eos=True, **params)

    text = run(None).text
    stop = text[len(text) // 3 : len(text) // 3 + 4]
    expected, found = run(None, stop=[stop]), run(at, stop=[stop])
    assert expected.finish_reason == "stop_string"
    assert (found.text, found.token_ids, found.stop) == (expected.text, expected.token_ids, stop)


def test_a_closed_stream_of_two_runtimes_frees_both(load_tiny):
    with failing(load_tiny, "llama", then="openvino", at=3) as model:
        with model.stream(PROMPT, max_new_tokens=16) as stream:
            for _ in range(5):
                next(stream)
        assert stream.result.finish_reason == "cancelled"
        assert len(stream.result.failovers) == 1
        assert model.backend == "openvino"


class TestLoad:
    def test_a_named_backend_on_a_named_device_has_nothing_that_takes_over(self, tiny_gguf):
        with pytest.raises(ValueError, match=r"failover=True with backend='onnxruntime'.*'cpu'"):
            phirt.load(tiny_gguf, backend="onnxruntime", device="cpu", failover=True)

    @pytest.fixture
    def faulty(self, monkeypatch):
        """onnxruntime, which fails when it is told to."""
        backend = type(get_backend("onnxruntime"))
        really_load = backend.load
        loaded: list[FaultyModel] = []

        def load(self, artifact, device, options):
            loaded.append(FaultyModel(really_load(self, artifact, device, options), None))
            return loaded[-1]

        monkeypatch.setattr(backend, "load", load)
        return loaded

    def test_the_next_candidate_of_the_plan_goes_on(self, tiny_gguf, faulty):
        if find_spec("openvino") is None:
            leave_out("openvino")
        with phirt.load(tiny_gguf, precision="fp32", device="cpu", failover=True) as model:
            expected = model.generate("hello", max_new_tokens=12, ignore_eos=True)
            order = [row.backend for row in model.plan.candidates if row.status != "rejected"]
            assert order[:2] == ["onnxruntime", "openvino"]
            faulty[0].at = faulty[0].calls + 4
            found = model.generate("hello", max_new_tokens=12, ignore_eos=True)
            assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
            (failover,) = found.failovers
            assert (failover.backend, failover.next_backend, failover.tokens) == (
                "onnxruntime",
                "openvino",
                3,
            )
            assert (model.backend, model.device, model.placement.device) == (
                "openvino",
                "cpu",
                "cpu",
            )
            assert model.plan.chosen is not None
            assert model.plan.chosen.backend == "openvino"
            row = next(row for row in model.plan.candidates if row.stage == "use")
            assert (row.backend, row.status) == ("onnxruntime", "rejected")
            assert LOST in row.reason
        assert faulty[0].closed

    def test_without_it_the_error_is_raised(self, tiny_gguf, faulty):
        with phirt.load(tiny_gguf, precision="fp32", backend="onnxruntime") as model:
            faulty[0].at = faulty[0].calls + 4
            with pytest.raises(BackendRuntimeError, match=LOST):
                model.generate("hello", max_new_tokens=12, ignore_eos=True)

    def test_where_the_named_backend_has_no_other_device_the_error_says_so(self, tiny_gguf, faulty):
        options: dict[str, Any] = {"precision": "fp32", "backend": "onnxruntime"}
        with phirt.load(tiny_gguf, **options, failover=True) as model:
            faulty[0].at = faulty[0].calls + 4
            with pytest.raises(BackendRuntimeError, match=LOST) as caught:
                model.generate("hello", max_new_tokens=12, ignore_eos=True)
        (note,) = caught.value.__notes__
        assert note.startswith("Nothing takes over: ")
        assert "onnxruntime on cpu" in note
        assert LOST in note

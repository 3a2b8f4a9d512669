"""A device that computes wrong numbers is found out by sixteen tokens."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from phirt.backends.base import HostLogits
from phirt.build.convert import convert
from phirt.dispatch.canary import (
    TOLERANCE,
    Place,
    Verdict,
    canary_logits,
    check_loaded,
    forget_verdicts,
    run_canary,
)
from phirt.dispatch.machine_dir import machine_dir
from phirt.dispatch.registry import get_backend
from phirt.errors import BackendRuntimeError, ModelFormatError
from phirt.models.canary import CANARY_NAME, mean_kl, read_canary, write_canary
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
from phirt.testing import DENSE_ARCHITECTURES, write_tiny_checkpoint
from tests.installed import require

BACKENDS = {
    # By name: the layout that it reads, and the precision that phirt writes it in by default.
    "reference": ("safetensors", "fp32", "numpy"),
    "onnxruntime": ("onnx-genai", "int8", "onnxruntime"),
    "onnxruntime-genai": ("onnx-genai", "int8", "onnxruntime_genai"),
    "openvino": ("openvino", "int8", "openvino"),
    "mlx": ("safetensors", "fp32", "mlx_lm"),
    "transformers": ("safetensors", "fp32", "transformers"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tiny models as phirt converts them, each made once."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def make(architecture, layout, precision):
        key = (architecture, layout, precision)
        if key not in known:
            source = root / architecture
            if not source.exists():
                write_tiny_checkpoint(source, architecture)
            out = root / "-".join(key)
            out.mkdir()
            convert(source, out, layout=layout, precision=precision)
            known[key] = out
        return known[key]

    return make


def load(path, backend):
    adapter = get_backend(backend)
    folder = read_folder(path, formats=adapter.formats)
    return folder, adapter.load(folder.artifact, "cpu", LoadOptions(threads=1))


def canary_of(folder):
    found = read_canary(folder.artifact.path, vocab_size=folder.facts.vocab_size)
    assert found is not None
    assert found.own_kl is not None
    return found


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.oracle if name == "transformers" else ())
        for name in BACKENDS
    ],
)
def test_every_backend_passes_with_every_architecture(backend, architecture, made):
    """LongRoPE among them, and windows as long as the canary."""
    layout, precision, module = BACKENDS[backend]
    require(module)
    folder, loaded = load(made(architecture, layout, precision), backend)
    try:
        canary = canary_of(folder)
        kl = run_canary(loaded, canary)
    finally:
        loaded.close()
    assert kl <= canary.own_kl + TOLERANCE
    if precision == "fp32":
        assert kl < 1e-5


class _Changed:
    """A loaded model on a device that changes what it computes.

    Args:
        loaded: The model.
        change: Given logits (1, vocab) and the number of tokens before them, gives others.
    """

    def __init__(self, loaded, change):
        self.loaded = loaded
        self.change = change
        self.sessions = 0
        self.closed = False
        self.info = loaded.info

    def new_session(self, **lengths):
        self.sessions += 1
        return _ChangedSession(self.loaded.new_session(**lengths), self.change)

    def close(self):
        self.closed = True


def changed(loaded, change):
    """Untyped, as all that tests call: it has as much of a loaded model as a canary needs."""
    return _Changed(loaded, change)


class _ChangedSession:
    def __init__(self, session, change):
        self.session = session
        self.change = change

    def prefill(self, ids):
        return self._of(self.session.prefill(ids))

    def decode(self, token):
        return self._of(self.session.decode(token))

    def _of(self, logits):
        return HostLogits(self.change(logits.numpy().copy(), self.session.length))

    def close(self):
        self.session.close()


def shifted():
    """Each position has the logits of the one before."""
    last = []

    def change(logits, length):
        last.append(logits)
        return last[-2] if len(last) > 1 else logits

    return change


def only_at(lengths, factor):
    return lambda logits, length: logits * factor if length in lengths else logits


def permuted(logits, length):
    return logits[:, np.random.default_rng(0).permutation(logits.shape[1])]


def with_one(value):
    def change(logits, length):
        if length == 12:
            logits[0, 5] = value
        return logits

    return change


FAULTS = {
    "twice too large": lambda: lambda logits, length: logits * 2,
    "half as large": lambda: lambda logits, length: logits / 2,
    "of the position before": shifted,
    "of a permuted vocabulary": lambda: permuted,
    "wrong in the prefill only": lambda: only_at({9}, -1),
    "wrong in the decode steps only": lambda: only_at(range(10, 17), -1),
    "NaN": lambda: with_one(np.nan),
    "infinite": lambda: with_one(np.inf),
    "all zero": lambda: lambda logits, length: logits * 0,
}


@pytest.fixture(scope="module")
def tiny(made):
    folder, loaded = load(made("llama", "safetensors", "fp32"), "reference")
    yield folder, loaded
    loaded.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_logits_that_are_wrong_are_found(fault, tiny):
    folder, loaded = tiny
    assert run_canary(changed(loaded, FAULTS[fault]()), canary_of(folder)) > TOLERANCE


@pytest.mark.model
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_real_model_a_tenth_too_large(precision, smollm2_gguf):
    import phirt

    with phirt.load(smollm2_gguf, backend="onnxruntime", precision=precision) as model:
        canary = read_canary(model.path)
        assert canary is not None
        assert canary.own_kl is not None
        logits = canary_logits(model._loaded, canary.token_ids)
        assert mean_kl(canary, logits) <= canary.own_kl + TOLERANCE
        assert mean_kl(canary, logits * np.float32(1.1)) > canary.own_kl + TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("llama", "rope_parameters", {"rope_type": "default", "rope_theta": 100.0}),
        ("llama", "rms_norm_eps", 0.5),
        ("mistral", "sliding_window", 3),
        ("gemma3_text", "query_pre_attn_scalar", 6),
    ],
)
def test_a_runtime_that_computes_another_decoder_is_found(
    architecture, field, value, made, tmp_path
):
    wrong = tmp_path / "wrong"
    shutil.copytree(made(architecture, "safetensors", "fp32"), wrong)
    (wrong / "phirt.json").unlink()
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, field: value}))
    folder, loaded = load(wrong, "reference")
    assert run_canary(loaded, canary_of(folder)) > TOLERANCE


def test_a_canary_of_another_vocabulary(tiny):
    folder, loaded = tiny
    canary = replace(canary_of(folder), token_ids=(10**6,) * 16)
    with pytest.raises(ModelFormatError, match="vocabulary"):
        run_canary(loaded, canary)


def test_it_costs_one_prefill_of_nine_tokens_and_seven_steps(tiny):
    """And the session is closed, whatever happens."""
    folder, loaded = tiny
    lengths: list[int] = []

    def note(logits, length):
        lengths.append(length)
        return logits

    canary_logits(changed(loaded, note), canary_of(folder).token_ids)
    assert lengths == list(range(9, 17))


@pytest.fixture
def bare(made, tmp_path):
    """A folder without a canary."""
    out = tmp_path / "bare"
    shutil.copytree(made("llama", "safetensors", "fp32"), out)
    (out / CANARY_NAME).unlink()
    (out / "phirt.json").unlink()
    return out


def check(loaded, folder, *, device="cpu", reference=None, **versions):
    def no_reference():
        raise AssertionError("the reference was asked for")

    known = {"version": "runtime 1.0", "driver": None, "hardware": "a1", **versions}
    place = Place(backend="some", device=device, **known)
    return check_loaded(loaded, folder, place, reference=reference or no_reference)


@pytest.mark.usefixtures("own_machine_dir")
class TestVerdict:
    def test_passes_and_says_how_far_off_it_was(self, tiny):
        folder, loaded = tiny
        verdict = check(loaded, folder)
        assert verdict.status == "passed"
        assert verdict.kl is not None
        assert verdict.kl < 1e-5
        assert verdict.bound == TOLERANCE
        assert "at most 0.0200" in verdict.reason

    def test_rounding_is_not_held_against_a_device(self, made):
        folder, loaded = load(made("llama", "onnx-genai", "int8"), "onnxruntime")
        verdict = check(loaded, folder)
        loaded.close()
        assert verdict.status == "passed"
        assert verdict.bound == canary_of(folder).own_kl + TOLERANCE

    def test_fails_with_the_numbers(self, tiny):
        folder, loaded = tiny
        verdict = check(changed(loaded, permuted), folder, device="cuda")
        assert verdict.status == "failed"
        assert verdict.kl is not None
        assert verdict.kl > 0.1
        assert f"{verdict.kl:.4f}" in verdict.reason

    def test_fails_where_logits_are_not_finite(self, tiny):
        folder, loaded = tiny
        verdict = check(changed(loaded, with_one(np.nan)), folder)
        assert (verdict.status, verdict.kl) == ("failed", None)
        assert "not finite" in verdict.reason

    @pytest.mark.parametrize("change", [lambda logits, length: logits, permuted, with_one(np.nan)])
    def test_is_found_out_once(self, change, tiny):
        folder, loaded = tiny
        device = changed(loaded, change)
        first = check(device, folder)
        assert check(device, folder) == first
        assert device.sessions == 1

    @pytest.mark.parametrize(
        "other",
        [{"version": "runtime 1.1"}, {"driver": "2"}, {"device": "cuda"}, {"hardware": "b2"}],
    )
    def test_is_found_out_again_for_another_version_or_device(self, other, tiny):
        folder, loaded = tiny
        device = changed(loaded, lambda logits, length: logits)
        check(device, folder)
        check(device, folder, **other)
        assert device.sessions == 2

    @pytest.mark.parametrize("other", [{"weights_id": "other"}, {"precision": "exact"}])
    def test_is_found_out_again_for_other_weights(self, other, tiny):
        folder, loaded = tiny
        device = changed(loaded, lambda logits, length: logits)
        check(device, folder)
        check(device, replace(folder, artifact=replace(folder.artifact, **other)))
        assert device.sessions == 2

    def test_is_found_out_again_once_it_is_forgotten(self, tiny):
        folder, loaded = tiny
        device = changed(loaded, permuted)
        check(device, folder)
        forget_verdicts()
        check(device, folder)
        assert device.sessions == 2

    @pytest.mark.parametrize(
        "content", [b"", b"{}", b'{"key": 1}', "damaged", '{"status": "passed"}']
    )
    def test_a_damaged_record_is_none(self, content, tiny):
        folder, loaded = tiny
        device = changed(loaded, lambda logits, length: logits)
        first = check(device, folder)
        (record,) = (machine_dir() / "canaries").iterdir()
        if content == "damaged":
            document = json.loads(record.read_text())
            content = json.dumps({**document, "status": "fine"})
        record.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert check(device, folder) == first
        assert device.sessions == 2

    def test_a_damaged_canary_is_the_models_fault(self, made, tmp_path):
        out = tmp_path / "damaged"
        shutil.copytree(made("llama", "safetensors", "fp32"), out)
        (out / "phirt.json").unlink()
        (out / CANARY_NAME).write_text("{")
        folder, loaded = load(out, "reference")
        with pytest.raises(ModelFormatError, match=CANARY_NAME):
            check(loaded, folder)

    def test_a_runtime_that_fails_has_no_verdict(self, tiny):
        folder, loaded = tiny

        def fail(logits, length):
            raise BackendRuntimeError("the driver was reset")

        with pytest.raises(BackendRuntimeError, match="reset"):
            check(changed(loaded, fail), folder)
        assert check(loaded, folder).status == "passed", "nothing was remembered"


@pytest.mark.usefixtures("own_machine_dir")
class TestWithoutACanary:
    """Another backend's answer on the CPU takes its place."""

    def test_the_cpu_is_what_others_are_held_to(self, bare):
        folder, loaded = load(bare, "reference")
        verdict = check(loaded, folder)
        assert verdict.status == "unverified"
        assert "no canary" in verdict.reason

    def test_a_device_that_agrees_with_the_cpu_passes(self, bare):
        folder, loaded = load(bare, "reference")
        on_cpu = changed(loaded, lambda logits, length: logits)
        verdict = check(loaded, folder, device="cuda", reference=lambda: on_cpu)
        assert verdict.status == "passed"
        assert verdict.bound == TOLERANCE
        assert "on the CPU" in verdict.reason
        assert on_cpu.closed

    def test_a_device_that_does_not_fails(self, bare):
        folder, loaded = load(bare, "reference")
        on_cpu = changed(loaded, lambda logits, length: logits)
        device = changed(loaded, permuted)
        verdict = check(device, folder, device="cuda", reference=lambda: on_cpu)
        assert verdict.status == "failed"
        assert on_cpu.closed

    def test_a_canary_that_does_not_know_its_own_loss_is_not_enough(self, bare, made):
        canary = read_canary(made("llama", "safetensors", "fp32"))
        assert canary is not None
        write_canary(bare, replace(canary, own_kl=None))
        folder, loaded = load(bare, "reference")
        assert check(loaded, folder).status == "unverified"
        verdict = check(loaded, folder, device="cuda", reference=lambda: changed(loaded, permuted))
        assert verdict.status == "failed"

    @pytest.mark.parametrize(
        ("change", "reason"), [(None, "no backend loads it"), (with_one(math.nan), "not finite")]
    )
    def test_nothing_to_compare_with_leaves_it_unverified(self, change, reason, bare):
        folder, loaded = load(bare, "reference")
        other = None if change is None else changed(loaded, change)
        verdict = check(loaded, folder, device="cuda", reference=lambda: other)
        assert verdict.status == "unverified"
        assert reason in verdict.reason

    def test_a_reference_that_fails_leaves_it_unverified(self, bare):
        folder, loaded = load(bare, "reference")

        def fail():
            raise BackendRuntimeError("it broke")

        verdict = check(loaded, folder, device="cuda", reference=fail)
        assert verdict.status == "unverified"
        assert "it broke" in verdict.reason

    def test_what_is_unverified_is_tried_again(self, bare):
        folder, loaded = load(bare, "reference")
        asked: list[Verdict] = [
            check(loaded, folder, device="cuda", reference=reference)
            for reference in (lambda: None, lambda: changed(loaded, lambda logits, _: logits))
        ]
        assert [verdict.status for verdict in asked] == ["unverified", "passed"]

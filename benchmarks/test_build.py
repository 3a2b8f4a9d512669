"""phirt's own engine against onnxruntime-genai's Model Builder, on the same checkpoint.

Both build from the default model's weights as floats, in processes of their own; quality is
held against fp32 on phirt's text, speeds take turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import phirt
from benchmarks.alternate import alternate
from benchmarks.bare_loop import BareLoop
from benchmarks.builds import Built, build

# One test waits for builds that others share: calibration alone takes minutes on two cores.
pytestmark = pytest.mark.timeout(2400)

PRUNED = ("--extra", "prune_lm_head=true")  # as phirt's graphs are: logits of the last position
BY_MODEL_BUILDER = ("--engine", "model-builder")
# Model Builder's own defaults: all matrices in symmetric blocks of 32, in 4 bits.
EQUAL = ("--precision", "int4", "--symmetric", "--int8-layers", "none")
# Symmetric, as its is; 8 bits where 4 cost most: head, attention's inputs, the MLPs at both ends.
CALIBRATED = (
    *("--precision", "int4", "--symmetric", "--calibrate"),
    *("--int8-layers", "embed_tokens", "--int8-layers", "[qkv]_proj"),
    *("--int8-layers", "layers.[0-3].mlp.down_proj"),
    *("--int8-layers", "layers.2[6-9].mlp.down_proj"),
)
QUALITY_TOKENS = 1024
PROMPT, STEPS = list(range(100, 130)), 40


class Builds:
    """Each build once, when it is first asked for."""

    def __init__(self, source: Path, folder: Path) -> None:
        self._source = source
        self._folder = folder
        self._built: dict[tuple[str, ...], Built] = {}
        self._kl: dict[Path, float] = {}

    def __call__(self, *arguments: str) -> Built:
        if arguments not in self._built:
            out = self._folder / str(len(self._built))
            self._built[arguments] = build(self._source, out, *arguments)
        return self._built[arguments]

    def kl(self, built: Built) -> float:
        """Mean KL divergence from fp32 with the kernels of decode, in nats."""
        if built.path not in self._kl:
            report = phirt.compare_quality(
                self("--precision", "fp32").path,
                built.path,
                tokens=QUALITY_TOKENS,
                speed=False,
                reference_backend="onnxruntime",
                backend="onnxruntime",
            )
            self._kl[built.path] = report.one_row.figures.kl_mean
        return self._kl[built.path]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    pytest.importorskip("torch", reason="Model Builder needs torch")
    folder = tmp_path_factory.mktemp("builds")
    source = phirt.build_model(None, folder / "source", format="safetensors", precision="fp32")
    return Builds(source.path, folder)


def decode_rate(built: Built) -> Callable[[], float]:
    """Greedy decode of a bare loop, tokens/s by the lower quartile of the steps."""
    loop = BareLoop(built.path)
    return lambda: 1 / float(np.quantile(loop.decode_seconds(PROMPT, STEPS), 0.25))


def compare(benchmark, ours: Built, theirs: Built) -> float:
    result = alternate(benchmark, decode_rate(ours), decode_rate(theirs))
    print(f"\ndecode, tokens/s, phirt's build against Model Builder's: {result}")
    return result.ratio


def test_fp32_logits(benchmark, builds: Builds):
    """The same checkpoint in fp32 says the same, whoever built the graph."""
    ours = builds("--precision", "fp32")
    theirs = builds("--precision", "fp32", *BY_MODEL_BUILDER)
    ids = [int(each) for each in np.random.default_rng(0).integers(0, 40_000, 64)]
    logits = [BareLoop(each.path).logits(ids, chunk=1) for each in (ours, theirs)]
    difference = float(np.abs(logits[0] - logits[1]).max())
    print(f"\nfp32 logits of 64 tokens differ by at most {difference:.1e}")
    benchmark.pedantic(lambda: None)
    assert difference < 1e-3


def test_int4_with_equal_options(benchmark, builds: Builds):
    ours, theirs = builds(*EQUAL), builds("--precision", "int4", *BY_MODEL_BUILDER, *PRUNED)
    kl = builds.kl(ours), builds.kl(theirs)
    print(f"\nint4 with equal options: mean KL {kl[0]:.4f} against {kl[1]:.4f}")
    assert kl[0] <= 1.05 * kl[1]
    ratio = compare(benchmark, ours, theirs)
    if benchmark.enabled:
        assert ratio >= 0.95


def test_calibrated_int4_against_its_default(benchmark, builds: Builds):
    ours, theirs = builds(*CALIBRATED), builds("--precision", "int4", *BY_MODEL_BUILDER, *PRUNED)
    kl = builds.kl(ours), builds.kl(theirs)
    print(
        f"\ncalibrated int4 against Model Builder's default: mean KL {kl[0]:.4f} against "
        f"{kl[1]:.4f}, {kl[0] / kl[1]:.2f} of it"
    )
    assert kl[0] <= kl[1] / 4
    ratio = compare(benchmark, ours, theirs)
    if benchmark.enabled:
        assert ratio >= 0.9


def test_time_and_memory(benchmark, builds: Builds):
    for name, options in {"fp32": ("--precision", "fp32"), "int4": EQUAL}.items():
        precision = ("--precision", name)
        ours, theirs = builds(*options), builds(*precision, *BY_MODEL_BUILDER, *PRUNED)
        print(
            f"\nbuild in {name}: {ours.seconds:.1f} s and {ours.peak_bytes / 1e6:,.0f} MB against "
            f"{theirs.seconds:.1f} s and {theirs.peak_bytes / 1e6:,.0f} MB"
        )
        assert ours.peak_bytes < theirs.peak_bytes
        if benchmark.enabled:
            assert ours.seconds < theirs.seconds
    benchmark.pedantic(lambda: None)

"""What a model is predicted to take, and the refusal of one that does not fit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import phirt
from phirt.build.sources import open_source
from phirt.dispatch.fit import check_fit, predict_memory
from phirt.dispatch.graph_shape import read_graph_shape
from phirt.dispatch.plan import MemoryNeed
from phirt.dispatch.shape import ModelShape, shape_of, shape_of_config, weights_bytes
from phirt.errors import OutOfMemoryError
from phirt.models.folder import read_folder
from tests.dispatch.peak_memory import measure
from tests.installed import require

MB = 1_000_000

# Llama 3 8B, whose numbers are known: 8.03 billion weights, 128 KiB of cache a token in float16.
LLAMA = ModelShape(
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_size=128,
    hidden_size=4096,
    intermediate_size=14336,
    vocab_size=128256,
    context_length=8192,
    num_weights=8_030_000_000,
    tied=False,
)


def predict(
    shape: ModelShape = LLAMA,
    *,
    backend: str = "onnxruntime",
    device_kind: str = "cpu",
    precision: str | None = "int8",
    context: int = 4096,
    free: int | None = None,
    kv_precision: str = "auto",
) -> MemoryNeed:
    size = shape.weights_bytes(precision or "fp32")
    assert size is not None
    return predict_memory(
        shape,
        backend=backend,
        device_kind=device_kind,
        layout="onnx-genai",
        precision=precision,
        weights_bytes=size,
        context=context,
        kv_precision=kv_precision,
        free=free,
    )


def refusal(need: MemoryNeed, shape: ModelShape = LLAMA, *, backend: str = "onnxruntime") -> str:
    with pytest.raises(OutOfMemoryError) as caught:
        check_fit(need, shape=shape, model="llama", backend=backend, device="cpu", precision="int8")
    return str(caught.value)


def test_a_token_of_cache_is_keys_and_values_of_every_layer() -> None:
    assert LLAMA.kv_values == 2 * 32 * 8 * 128
    assert predict(context=1000).kv == 4 * LLAMA.kv_values * 1000


def test_a_cache_of_another_precision() -> None:
    own = predict(context=1000)
    for kv_precision, share in (("fp32", 1), ("fp16", 2), ("int8", 4)):
        need = predict(context=1000, kv_precision=kv_precision)
        assert need.kv == own.kv // share
        assert need.weights == own.weights
    scaled = predict(backend="mlx", context=1000, kv_precision="int8")
    assert scaled.kv == 5 * predict(backend="mlx", context=1000).kv // 16


def test_on_a_device_a_model_of_half_floats_keeps_its_cache_so() -> None:
    assert predict(device_kind="cuda", precision="fp16", context=1).kv == 128 * 1024


def test_a_device_of_its_own_and_the_hosts_part_are_told_apart() -> None:
    need = predict(device_kind="cuda", precision="fp16")
    assert need.weights == LLAMA.weights_bytes("fp16")
    assert need.host > 0
    assert predict(device_kind="cpu").host == 0


@pytest.mark.parametrize(
    "backend", ["onnxruntime", "onnxruntime-genai", "openvino", "transformers", "mlx", "plugin"]
)
def test_a_longer_context_takes_no_less(backend: str) -> None:
    totals = [predict(backend=backend, context=n).total for n in (64, 512, 4096, 131072)]
    assert totals == sorted(totals)
    assert totals[-1] > totals[0]


def test_logits_of_every_position_are_counted() -> None:
    every = predict(replace(LLAMA, prunes_logits=False), context=512)
    assert every.total - predict(context=512).total >= 512 * LLAMA.vocab_size * 4


def test_an_embedding_that_is_read_row_by_row_is_not_counted() -> None:
    table = LLAMA.vocab_size * LLAMA.hidden_size
    assert predict(replace(LLAMA, tied=True)).weights - predict().weights >= table


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_size_of_weights_tells_their_precision(precision: str) -> None:
    size = LLAMA.weights_bytes(precision)
    assert size is not None
    assert LLAMA.likely_precision(size) == precision


def test_what_fits_passes_and_so_does_what_nobody_knows() -> None:
    for free in (1 << 50, None):
        need = predict(free=free)
        check_fit(need, shape=LLAMA, model="x", backend="x", device="cpu", precision=None)


def test_the_refusal_names_what_was_asked_and_every_number() -> None:
    message = refusal(predict(context=8192, free=4000 * MB))
    for part in ("'llama' in int8", "8,192 tokens", "'cpu'", "'onnxruntime'", "4,000 MB are free"):
        assert part in message
    for part in ("of weights", "of KV cache", "of workspace"):
        assert part in message


def test_the_context_that_it_names_fits_and_a_longer_one_does_not() -> None:
    free = predict(context=2048).total
    message = refusal(predict(context=8192, free=free))
    found = int(message.partition("(context=")[2].partition(")")[0])
    assert predict(context=found, free=free).fits
    assert found >= 2048 - 64
    assert not predict(context=found + 256, free=free).fits


def test_the_precision_that_it_names_fits() -> None:
    need = predict(context=512)
    message = refusal(replace(need, free=round(0.85 * need.total)))
    assert 'precision="int4"' in message
    assert predict(precision="int4", context=512).total < 0.85 * need.total


def test_where_nothing_fits_it_says_so() -> None:
    message = refusal(predict(free=100 * MB))
    assert "What would fit" not in message
    assert "smaller model" in message


def test_a_backend_that_computes_in_floats_is_told_no_other_precision() -> None:
    need = predict(backend="transformers", precision="fp32", free=4000 * MB)
    assert "precision=" not in refusal(need, backend="transformers")


def test_the_shape_of_a_folder_is_that_of_its_model(
    tiny_model: phirt.Model, tiny_gguf: Path
) -> None:
    folder = read_folder(tiny_model.path)
    shape = shape_of(folder)
    facts = folder.facts
    assert (shape.num_layers, shape.num_kv_heads) == (facts.num_layers, facts.num_kv_heads)
    assert shape.vocab_size == facts.vocab_size
    with open_source(tiny_gguf, source_id="") as source:
        assert shape == shape_of_config(source.checkpoint.config)
    assert shape.prunes_logits
    sizes = [file.stat().st_size for file in tiny_model.path.glob("model.onnx*")]
    assert weights_bytes(folder) == sum(sizes)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 40])
def test_a_graph_that_cannot_be_read_says_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert read_graph_shape(path, hidden_size=64) is None


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit is not enforced")
def test_a_load_under_a_limit_is_refused_before_the_weights_are_read(
    smollm2: phirt.Model,
) -> None:
    code = """
import resource, phirt, psutil
load = phirt.load
limit = psutil.Process().memory_info().vms + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load(backend="onnxruntime", offline=True)
except phirt.OutOfMemoryError as error:
    print(error)
    print(psutil.Process().memory_info().rss)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    message, resident = done.stdout.strip().rsplit("\n", 1)
    assert "are free" in message
    assert int(resident) < weights_bytes(read_folder(smollm2.path))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "runtime", "context"),
    [
        ("onnxruntime", "onnxruntime", 1900),
        ("openvino", "openvino", 256),
        ("onnxruntime-genai", "onnxruntime_genai", 1900),
        ("transformers", "transformers", 256),
        ("mlx", "mlx", 64),
    ],
)
def test_the_prediction_is_within_15_percent_of_the_peak(
    backend: str, runtime: str, context: int, model_home: Path
) -> None:
    require(runtime)
    phirt.pull(backend=backend, device="cpu")
    # The first load compiles, and compares with the canary.
    measure(backend=backend, context=64)
    peaks = measure(backend=backend, context=context)
    folder = read_folder(Path(peaks.path))
    need = predict_memory(
        shape_of(folder),
        backend=backend,
        device_kind="cpu",
        layout=folder.artifact.format,
        precision=folder.artifact.precision,
        weights_bytes=weights_bytes(folder),
        context=context,
        free=None,
    )
    assert need.total == pytest.approx(peaks.generated, rel=0.15)


@pytest.mark.model
@pytest.mark.slow
def test_a_default_load_takes_less_than_its_weights_and_150_mb(smollm2: phirt.Model) -> None:
    measure(context=64)
    peaks = measure(context=64)
    files = weights_bytes(read_folder(smollm2.path))
    assert peaks.imported + peaks.loaded < files + 150 * MB
    assert peaks.imported + peaks.generated < files + 150 * MB

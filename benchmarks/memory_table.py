"""What loading the default model takes, as predicted and as measured.

    python -m benchmarks.memory_table [--backend NAME] [--folder MODEL_FOLDER]

Each row is a process of its own, which loads the model with default settings and generates until
the context is full. Peak is what its resident memory grows by, at its highest, from
``import phirt`` on; a row is measured at the second load, as is every load but the first (which
converts, compiles and compares with the canary).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import phirt
from phirt.dispatch.fit import predict_memory, shape_of, weights_bytes
from phirt.dispatch.plan import MemoryNeed
from phirt.models.folder import read_folder
from tests.dispatch.peak_memory import Peaks, measure

# MLX and torch take seconds for a thousand tokens here, and minutes for some.
CELLS = {
    "onnxruntime": (("int8", "fp32", "int4", "exact"), (256, 1900)),
    "openvino": (("int8", "fp32", "int4", "exact"), (256, 1900)),
    "onnxruntime-genai": (("int8", "fp32", "int4", "exact"), (256, 1900)),
    "transformers": (("fp32", "bf16"), (256, 1024)),
    "mlx": (("fp32", "bf16"), (64, 256)),
}
FOLDER_BACKENDS = ("onnxruntime", "onnxruntime-genai")
FOLDER_CONTEXTS = (256, 1900)


def predict(peaks: Peaks, backend: str, context: int) -> MemoryNeed:
    folder = read_folder(Path(peaks.path))
    return predict_memory(
        shape_of(folder),
        backend=backend,
        device_kind="cpu",
        layout=folder.artifact.format,
        precision=folder.artifact.precision,
        weights_bytes=weights_bytes(folder),
        context=context,
        free=None,
    )


def print_row(backend: str, precision: str, context: int, model: str | None) -> None:
    load = {"backend": backend, "precision": precision, "model": model}
    measure(context=context, **load)
    peaks = measure(context=context, **load)
    need = predict(peaks, backend, context)
    size = weights_bytes(read_folder(Path(peaks.path)))
    print(
        f"| {backend:17s} | {Path(model).name if model else precision:10s} | {context:5,} "
        f"| {size / 1e6:6.0f} | {peaks.loaded / 1e6:6.0f} | {peaks.generated / 1e6:6.0f} "
        f"| {need.total / 1e6:6.0f} | {need.total / peaks.generated:5.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", choices=CELLS)
    parser.add_argument("--folder", action="append", default=[], type=Path)
    arguments = parser.parse_args()
    names = [arguments.backend] if arguments.backend else list(CELLS)
    print("| Backend | Precision | Context | Files | Loading | Peak | Predicted | Ratio |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        for precision in CELLS[name][0]:
            phirt.pull(backend=name, precision=precision, device="cpu")
            for context in CELLS[name][1]:
                print_row(name, precision, context, None)
        for folder in arguments.folder if name in FOLDER_BACKENDS else ():
            for context in FOLDER_CONTEXTS:
                print_row(name, "auto", context, str(folder.resolve()))


if __name__ == "__main__":
    main()

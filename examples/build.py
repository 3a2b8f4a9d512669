"""Build the default model in int4 with queries, keys and values in 8 bits, and run it."""

import tempfile
from pathlib import Path

import phirt

with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
    report = phirt.build_model(
        None,  # the small default model
        Path(folder) / "smollm2-int4",
        format="onnx",
        precision="int4",
        quantization=phirt.Quantization(symmetric=True),
    )
    print(f"{report.architecture}, {report.precision}: {report.bytes / 1e6:.0f} MB")
    print(f"built by {report.engine} in {report.seconds:.1f} s")
    print(f"rounding moved the canary by {report.own_kl:.4f} nats")
    with phirt.load(report.path) as model:
        print(model.generate("Once upon a time", max_new_tokens=20).text)

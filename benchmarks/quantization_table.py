"""What every format and precision of the default model costs: the table of docs/quantization.md.

    python -m benchmarks.quantization_table [--only WORD] [--skip WORD] [--speed] [--write]

Builds SmolLM2 (its GGUF file's weights as floats; and that file itself, for what keeps its own
blocks) with `phirt build` in every format and precision that this machine can run, loads each
on its backend, and holds it against fp32 with `phirt.compare_quality`. ``--write`` puts the
rows between the marks of docs/quantization.md, in place of those of the same name.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import phirt
from benchmarks.builds import Built, build
from benchmarks.test_build import CALIBRATED

PAGE = Path(__file__).parents[1] / "docs" / "quantization.md"
BEGIN = "<!-- the next lines are written by benchmarks/quantization_table.py -->"
END = "<!-- end -->"
BACKENDS = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "mlx": "mlx",
    "safetensors": "transformers",
}
INT4 = ("--precision", "int4")
TOKENS, SLOW_TOKENS = 1024, 512
SLOW = ("mlx", "safetensors")  # whose runtimes decode 8 and 22 tokens/s on a CPU


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table.

    Attributes:
        name: What it is called there.
        arguments: Of ``phirt build``.
        own_file: Built from the GGUF file itself, and not from its weights as floats.
    """

    name: str
    arguments: tuple[str, ...]
    own_file: bool = False

    @property
    def format(self) -> str:
        """The format asked for."""
        return self.arguments[1]


def variants() -> Iterator[Variant]:
    onnx = ("--format", "onnx")
    for precision in ("fp32", "fp16", "int8", "int4"):
        yield Variant(precision, (*onnx, "--precision", precision))
    yield Variant("int4, symmetric", (*onnx, *INT4, "--symmetric"))
    yield Variant("int4, calibrated", (*onnx, *INT4, "--calibrate"))
    yield Variant("int4, mixed, symmetric, calibrated", (*onnx, *CALIBRATED))
    for precision in ("exact", "int8", "int4"):
        yield Variant(f"{precision} of the GGUF file", (*onnx, "--precision", precision), True)
    for precision in ("fp32", "int8", "int4"):
        engine = ("--engine", "model-builder")
        yield Variant(f"{precision}, Model Builder", (*onnx, "--precision", precision, *engine))
    openvino = ("--format", "openvino", "--precision")
    for precision in ("fp32", "fp16", "int8", "int4"):
        yield Variant(precision, (*openvino, precision))
    for precision in ("exact", "int4"):
        yield Variant(f"{precision} of the GGUF file", (*openvino, precision), True)
    for precision in ("fp16", "bf16", "int8", "int4"):
        yield Variant(precision, ("--format", "mlx", "--precision", precision))
    for precision in ("fp32", "fp16", "bf16"):
        yield Variant(precision, ("--format", "safetensors", "--precision", precision))


def row(variant: Variant, built: Built, report: phirt.QualityReport) -> str:
    many = report.many_rows.figures.kl_mean if report.many_rows else None
    one = report.one_row.figures
    speed = report.speed
    rates = () if speed is None else (speed.prefill.ratio, speed.decode.ratio)
    cells: Sequence[str] = (
        variant.format,
        variant.name,
        f"{built.report['bytes'] / 1e6:,.0f}",
        f"{built.seconds:.0f}",
        "—" if many is None else nats(many),
        nats(one.kl_mean),
        f"{one.kl_p99:.3f}",
        f"{100 * report.leading.figures.top1_agreement:.1f}",
        f"{report.leading.figures.ppl:.2f}",
        *(f"{rate:.2f}" for rate in rates),
    )
    return f"| {' | '.join(cells)} |"


def nats(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def header(reference: phirt.Model, *, timed: bool) -> list[str]:
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("onnxruntime", "onnxruntime-genai", "openvino", "mlx", "transformers")
    )
    about = (
        f"SmolLM2-135M-Instruct on {os.cpu_count()} cores ({platform.machine()}); {versions}. "
        f"Reference: fp32, {reference.backend}. About {TOKENS:,} tokens of text ({SLOW_TOKENS} "
        "for mlx and safetensors), an eighth of them decoded one by one."
    )
    columns = [
        *("Format", "Weights", "MB", "Build, s", "KL, many rows", "KL, one row", "99 % KL"),
        *("Same top, %", "Perplexity"),
    ]
    if timed:
        about += " Speeds are ratios to the reference, both taking turns in one process."
        columns += ["Prefill", "Decode"]
    rule = ["---"] * 2 + ["---:"] * (len(columns) - 2)
    return [about, "", f"| {' | '.join(columns)} |", f"|{'|'.join(rule)}|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="formats or variants with this in their name")
    parser.add_argument("--skip", default="nothing", help="not those with this in their name")
    parser.add_argument("--speed", action="store_true", help="time them, on a quiet machine")
    parser.add_argument("--write", action="store_true", help="write the rows into the page")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        floats = phirt.build_model(None, scratch / "floats", format="safetensors", precision="fp32")
        own = phirt.pull(precision="fp32")  # which leaves the file in the store
        with phirt.load(own, backend="onnxruntime") as reference:
            lines = header(reference, timed=arguments.speed)
            print("\n".join(lines), flush=True)
            for index, variant in enumerate(variants()):
                named = f"{variant.format} {variant.name}"
                if arguments.only not in named or arguments.skip in named:
                    continue
                source = Path("smollm2-135m-instruct") if variant.own_file else floats.path
                built = build(source, scratch / str(index), *variant.arguments)
                report = phirt.compare_quality(
                    reference,
                    built.path,
                    tokens=SLOW_TOKENS if variant.format in SLOW else TOKENS,
                    backend=BACKENDS[variant.format],
                    device="cpu",
                    speed=arguments.speed,
                )
                lines.append(row(variant, built, report))
                print(lines[-1], flush=True)
                if arguments.write:
                    write(lines)
                shutil.rmtree(built.path)


def write(lines: Sequence[str]) -> None:
    """Put rows between the marks of the page; others that stand there stay, in their order."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    rows = {key(line): line for line in inside.splitlines() if line.startswith("| ")}
    rows |= {key(line): line for line in lines if line.startswith("| ")}
    order = [("Format", "Weights"), *((each.format, each.name) for each in variants())]
    table = [rows[each] for each in order if each in rows]
    rule = next(line for line in lines if line.startswith("|-"))
    content = [lines[0], "", table[0], rule, *table[1:]]
    page = "\n".join([f"{before}{BEGIN}", "", *content, "", f"{END}{after}"])
    PAGE.write_text(page, encoding="utf-8", newline="\n")


def key(line: str) -> tuple[str, str]:
    """Format and weights of a row."""
    cells = line.split("|")
    return cells[1].strip(), cells[2].strip()


if __name__ == "__main__":
    main()

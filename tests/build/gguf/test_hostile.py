"""Headers that lie cost nothing and get an error that says where. Row M7."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.file import GgufFile
from phirt.errors import ModelFormatError
from tests.build.gguf.hostile import HOSTILE
from tests.tiny_gguf import write_tiny_llama_gguf


@pytest.mark.parametrize("case", HOSTILE)
def test_the_error_names_what_is_wrong_and_where(tmp_path: Path, case: str) -> None:
    raw, message = HOSTILE[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw.encode())
    with pytest.raises(ModelFormatError, match=message) as caught:
        GgufFile(path)
    assert "model.gguf" in str(caught.value)
    assert "at byte" in str(caught.value)


# What a file of the right shape may claim about itself, beyond what its header's own sizes say.
LIES: list[tuple[Literal["phi3", "gemma3"], dict[str, int | float]]] = [
    ("phi3", {"phi3.context_length": 2**62}),
    ("phi3", {"phi3.rope.scaling.original_context_length": 2**62}),
    ("phi3", {"phi3.rope.dimension_count": 2**62}),
    ("phi3", {"phi3.attention.head_count_kv": 2**62}),
    ("phi3", {"phi3.feed_forward_length": 2**62}),
    ("phi3", {"phi3.rope.scaling.attn_factor": float("nan")}),
    ("phi3", {"phi3.rope.scaling.factor": float("inf")}),
    ("gemma3", {"gemma3.attention.sliding_window": 2**62}),
    ("gemma3", {"gemma3.attention.sliding_window_pattern": 2**62}),
    ("gemma3", {"gemma3.attention.key_length": 2**62}),
    ("gemma3", {"gemma3.block_count": 2**62}),
    ("gemma3", {"gemma3.rope.freq_base_swa": -1.0}),
]


@pytest.mark.parametrize(("architecture", "metadata"), LIES)
def test_metadata_that_lies(
    tmp_path: Path, architecture: Literal["phi3", "gemma3"], metadata: dict[str, int | float]
) -> None:
    path = write_tiny_llama_gguf(
        tmp_path / "model.gguf", architecture=architecture, layers=1, metadata=metadata
    )
    key = next(iter(metadata)).rpartition(".")[2]
    with pytest.raises(ModelFormatError, match=key):
        GgufCheckpoint(path)


# Runs in a process of its own: the peak of the test process is that of whatever ran before.
# VmHWM is the peak of this program; getrusage would report the parent's, carried over exec.
CHILD = """
import json, sys, time
from pathlib import Path
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.errors import ModelFormatError

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

before = peak()
seconds = {}
for path in map(Path, sys.argv[1:]):
    start = time.perf_counter()
    try:
        GgufCheckpoint(path)
    except ModelFormatError:
        seconds[path.name] = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "bytes": peak() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory: Linux only")
def test_refusing_takes_under_100_ms_and_50_mb(tmp_path: Path) -> None:
    paths = []
    for index, (raw, _) in enumerate(HOSTILE.values()):
        paths.append(tmp_path / f"{index}.gguf")
        paths[-1].write_bytes(raw.encode())
        # The same lies in a file that could hold what they claim: a terabyte of nothing.
        paths.append(tmp_path / f"{index}-sparse.gguf")
        with paths[-1].open("wb") as file:
            file.write(raw.encode())
            file.truncate(2**40)
    for index, (architecture, metadata) in enumerate(LIES):
        paths.append(tmp_path / f"lie{index}.gguf")
        write_tiny_llama_gguf(paths[-1], architecture=architecture, layers=1, metadata=metadata)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    report = json.loads(done.stdout)
    assert set(report["seconds"]) == {path.name for path in paths}
    slowest = max(report["seconds"], key=report["seconds"].get)
    assert report["seconds"][slowest] < 5 * 0.1, slowest
    assert report["bytes"] < 50e6

"""A download with all its checks, beside huggingface_hub's, which hashes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import psutil
import pytest
from huggingface_hub import constants

from benchmarks.alternate import alternate
from phirt.models.hub import open_snapshot
from phirt.models.hub_download import download
from phirt.models.hub_names import HubName
from phirt.models.store import Store
from phirt.types import Progress

REPO, FILE = "org/large", "model.safetensors"
GROWTH_LIMIT = 32 << 20

# In a process of its own: both sides would otherwise share an interpreter with it.
HUB = """
import sys
from tests.hub.fake_content import Generated
from tests.hub.fake_hub import FakeHub

with FakeHub() as hub:
    hub.add_repo(sys.argv[1], {sys.argv[2]: Generated(int(sys.argv[3]))})
    print(hub.endpoint, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def size(benchmark) -> int:
    """1 GB; less where only whether it runs is asked."""
    return 1_000_000_000 if benchmark.enabled else 20_000_000


@pytest.fixture
def endpoint(size, tmp_path, monkeypatch) -> Iterator[str]:
    """The address of a hub with one large file, made as it is sent."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-c", HUB, REPO, FILE, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        huggingface_hub.close_session()
        yield address
        huggingface_hub.close_session()
        process.stdin.close()


def test_download(benchmark, endpoint: str, size: int, tmp_path: Path):
    """Both from the same hub to the same disk, in turn; memory is watched as phirt's comes."""
    process = psutil.Process()
    growth: list[int] = []

    def ours() -> float:
        before: int = process.memory_info().rss
        peak = before

        def watch(_: Progress) -> None:
            nonlocal peak
            peak = max(peak, process.memory_info().rss)

        folder, store = tmp_path / "ours", Store(tmp_path / "store")
        folder.mkdir()
        started = time.perf_counter()
        snapshot = open_snapshot(HubName.parse(REPO), offline=False)
        download(snapshot, snapshot.files, folder, store=store, progress=watch)
        seconds = time.perf_counter() - started
        assert (folder / FILE).stat().st_size == size
        shutil.rmtree(folder)
        growth.append(peak - before)
        return size / 1e6 / seconds

    def theirs() -> float:
        cache = tmp_path / "theirs"
        started = time.perf_counter()
        huggingface_hub.hf_hub_download(REPO, FILE, endpoint=endpoint, cache_dir=cache)
        seconds = time.perf_counter() - started
        shutil.rmtree(cache)
        return size / 1e6 / seconds

    comparison = alternate(benchmark, ours, theirs, rounds=6)
    # The first download brings the client's own code and buffers into memory.
    grown = max(growth[1:] or growth)
    benchmark.extra_info["growth_bytes"] = grown
    print(f"\nMB/s of a download of {size / 1e6:,.0f} MB, phirt's against huggingface_hub's:")
    print(f"{comparison}; memory grows by {grown / 1e6:.1f} MB")
    if benchmark.enabled:
        assert comparison.ratio >= 0.8
        assert grown < GROWTH_LIMIT

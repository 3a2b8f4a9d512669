"""Peak memory of a load and a generation, measured in a process of its own.

    python -m tests.dispatch.peak_memory '{"backend": "onnxruntime", "context": 256}'

What is measured is the highest resident memory that the process ever has, less what it has
once ``import phirt`` is done: what `phirt.dispatch.fit.predict_memory` predicts. Pages of
mapped files count, as the system counts them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

import psutil

__all__ = ["NEW_TOKENS", "Peaks", "measure"]

NEW_TOKENS = 16
"""Tokens of a context that are generated; the others are its prompt."""


@dataclass(frozen=True, slots=True)
class Peaks:
    """What one process took, in bytes.

    Attributes:
        imported: What it had after ``import phirt``.
        loaded: The most beyond that while the model was loaded.
        generated: The most beyond that until the context was full: the peak.
        path: The folder that was loaded.
    """

    imported: int
    loaded: int
    generated: int
    path: str


def measure(*, context: int, **load: Any) -> Peaks:
    """Load the model in a new process, and generate until the context holds so many tokens.

    Args:
        context: Tokens.
        **load: Arguments of `phirt.load`, as JSON has them.
    """
    task = json.dumps({"context": context, **load})
    command = [sys.executable, "-m", __spec__.name, task]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{task}: {done.stderr[-2000:]}")
    return Peaks(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    import phirt
    from phirt.devices.memory import peak_rss

    task = json.loads(sys.argv[1])
    context = task.pop("context")
    # Lazy names are part of what is imported.
    load = phirt.load
    imported = psutil.Process().memory_info().rss
    with load(offline=True, **task) as model:
        loaded = peak_rss() - imported
        prompt = [100 + index % 1000 for index in range(context - NEW_TOKENS)]
        model.generate(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
        peaks = Peaks(imported, loaded, peak_rss() - imported, str(model.path))
    sys.stdout.write(json.dumps(asdict(peaks)) + "\n")


if __name__ == "__main__":
    main()

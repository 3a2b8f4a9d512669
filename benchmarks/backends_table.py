"""How fast each installed backend runs the default model, and how far from fp32 it is.

    python -m benchmarks.backends_table [--rounds 5] [--device cpu]

Every backend is loaded twice, in the precision that ``auto`` stands for and in fp32. They
take turns in every round, so that whatever else the machine does hits all alike; ratios are
to the first row's rates of the same round. Quality is teacher-forced on quality_text.txt,
with the kernels that decode one token at a time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import phirt
from benchmarks.precision_table import compare
from phirt.dispatch.registry import backend_names, is_automatic
from phirt.protocols import LoadedModel

TEXT = Path(__file__).with_name("quality_text.txt")
PROMPT_TOKENS, DECODE_STEPS, PREFILL_TOKENS, CHUNK, QUALITY_TOKENS = 30, 32, 500, 250, 200


def decode_rate(model: LoadedModel, token_ids: Sequence[int]) -> float:
    """Tokens per second after a short prompt, from the lower quartile of the steps' times."""
    limit = PROMPT_TOKENS + DECODE_STEPS
    session = model.new_session(max_length=limit, expected_length=limit)
    session.prefill(token_ids[:PROMPT_TOKENS]).numpy()
    seconds = []
    for token in token_ids[PROMPT_TOKENS:limit]:
        started = time.perf_counter()
        session.decode(token).numpy()
        seconds.append(time.perf_counter() - started)
    session.close()
    return 1 / float(np.quantile(seconds, 0.25))


def prefill_rate(model: LoadedModel, token_ids: Sequence[int]) -> float:
    """Tokens per second of a long prompt, in the chunks of the decode loop."""
    session = model.new_session(max_length=PREFILL_TOKENS, expected_length=PREFILL_TOKENS)
    started = time.perf_counter()
    for start in range(0, PREFILL_TOKENS, CHUNK):
        session.prefill(token_ids[start : start + CHUNK]).numpy()
    seconds = time.perf_counter() - started
    session.close()
    return PREFILL_TOKENS / seconds


def logits_of(model: LoadedModel, token_ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits of every position, one decode step each, (n, vocabulary)."""
    session = model.new_session(max_length=len(token_ids), expected_length=len(token_ids))
    rows = [session.decode(token).numpy()[0].copy() for token in token_ids]
    session.close()
    return np.stack(rows)


def load_all(stack: ExitStack, device: str) -> dict[str, phirt.Model]:
    """Every backend that loads the default model, in its own precision and in fp32."""
    models: dict[str, phirt.Model] = {}
    for backend in [name for name in backend_names() if is_automatic(name)]:
        for precision in ("auto", "fp32"):
            try:
                model = phirt.load(backend=backend, device=device, precision=precision)
            except phirt.PhirtError as error:
                print(f"{backend}: {error}")
                continue
            stack.callback(model.close)
            models.setdefault(f"{backend} {model.precision}", model)
    return models


def print_table(models: dict[str, phirt.Model], *, rounds: int) -> None:
    tokenizer = next(iter(models.values())).tokenizer
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            both = (
                decode_rate(model._loaded, token_ids),
                prefill_rate(model._loaded, token_ids),
            )
            if turn > 0:  # The first turn warms up.
                rates[name].append(both)
    reference = logits_of(models["onnxruntime fp32"]._loaded, token_ids[:QUALITY_TOKENS])
    first = next(iter(models))
    for name, model in models.items():
        cells = [name.ljust(24)]
        for index, phase in enumerate(("decode", "prefill")):
            own = [rate[index] for rate in rates[name]]
            ratios = [a / b[index] for a, b in zip(own, rates[first], strict=True)]
            cells.append(
                f"{phase} {statistics.median(own):7.1f} tokens/s {statistics.median(ratios):5.2f}"
            )
        logits = logits_of(model._loaded, token_ids[:QUALITY_TOKENS])
        quality = compare(reference, logits, token_ids[:QUALITY_TOKENS])
        cells.append(f"mean KL {quality.kl_mean:9.6f}  top-1 {100 * quality.top1_agreement:5.1f} %")
        print("  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments: Any = parser.parse_args()
    with ExitStack() as stack:
        print_table(load_all(stack, arguments.device), rounds=arguments.rounds)


if __name__ == "__main__":
    main()

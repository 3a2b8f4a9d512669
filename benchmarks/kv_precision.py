"""What a KV cache in fewer bits gives and costs, on each backend that has it.

    python -m benchmarks.kv_precision [--backend onnxruntime] [--precision int8]

The same artifact is loaded once for each precision of the cache, and all take turns: decode
steps behind a context of made-up keys and values, a prompt of 1,000 tokens, and the divergence
from the model in fp32 with its cache in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

import phirt
from benchmarks.growth import made_up_cache
from benchmarks.precision_table import TEXT
from phirt.dispatch.registry import kv_precisions_of
from phirt.quality.passes import compare_tokens

CONTEXTS = (128, 1024, 4096)
STEPS, ROUNDS, PROMPTS = 6, 8, 3
PROMPT, COMPARED = 1000, 700


def decode_ms(models: dict[str, phirt.Model], context: int) -> dict[str, float]:
    """Milliseconds of a decode step behind a context, median, by precision."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    room = context + STEPS * (ROUNDS + 1)
    sessions = {}
    for name, model in models.items():
        sessions[name] = model.loaded.new_session(max_length=room, expected_length=room)
        sessions[name].import_kv(made_up_cache(model.loaded, context))
    for number in range(ROUNDS + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            for _ in range(STEPS):
                session.decode(1)
            if number:  # the first warms up
                taken[name].append((time.perf_counter() - started) / STEPS * 1e3)
            session.truncate(context)
    for session in sessions.values():
        session.close()
    return {name: statistics.median(each) for name, each in taken.items()}


def prefill_s(models: dict[str, phirt.Model], token_ids: list[int]) -> dict[str, float]:
    """Seconds until a prompt is computed, the least of some, by precision."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(PROMPTS):
        for name, model in models.items():
            session = model.loaded.new_session(
                max_length=len(token_ids), expected_length=len(token_ids)
            )
            started = time.perf_counter()
            session.prefill(token_ids)
            taken[name].append(time.perf_counter() - started)
            session.close()
    return {name: min(each) for name, each in taken.items()}


def main() -> None:
    """Print the table of one backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--precision", default="int8", help="of the weights")
    arguments = parser.parse_args()
    with ExitStack() as stack:

        def load(backend: str, precision: str, kv_precision: str) -> phirt.Model:
            return stack.enter_context(
                phirt.load(
                    backend=backend,
                    device="cpu",
                    precision=precision,
                    kv_precision=kv_precision,
                    prefix_cache_bytes=0,
                )
            )

        models = {
            name: load(arguments.backend, arguments.precision, name)
            for name in kv_precisions_of(arguments.backend)
        }
        exact = load("onnxruntime", "fp32", "fp32")
        token_ids = exact.encode(TEXT.read_text(encoding="utf-8"))
        rows = [
            (f"ms a token behind {context:,}", decode_ms(models, context)) for context in CONTEXTS
        ]
        rows.append((f"s for {PROMPT:,} tokens", prefill_s(models, token_ids[:PROMPT])))
        for title, found in rows:
            base = found["fp32"]
            cells = (f"{name} {value:.2f} ({base / value:.2f})" for name, value in found.items())
            print(f"{title}: {', '.join(cells)}")
        for name, model in models.items():
            many = compare_tokens(exact.loaded, model.loaded, token_ids[:COMPARED]).kl_mean
            one = compare_tokens(
                exact.loaded, model.loaded, token_ids[: COMPARED // 4], kernel="one_row"
            ).kl_mean
            need = model.plan.chosen.memory if model.plan.chosen else None
            kept = f", {need.kv / need.context / 1e3:.1f} kB a token" if need else ""
            print(f"{name}: KL {many:.5f} (many rows), {one:.5f} (one row){kept}")


if __name__ == "__main__":
    main()

"""The same prompt with a KV cache of floats and one of 8 bits: what each is predicted to take.

python examples/kv_precision.py [MODEL]
"""

from __future__ import annotations

import sys

import phirt

CONTEXT = 4096


def main() -> None:
    """Answer once with each."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    for kv_precision in ("auto", "int8"):
        with phirt.load(name, device="cpu", kv_precision=kv_precision, context=CONTEXT) as model:
            chosen = model.plan.chosen
            memory = chosen.memory if chosen else None
            cache = f"{memory.kv / 1e6:.0f} MB for {CONTEXT:,} tokens" if memory else "?"
            answer = model.generate(
                [{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=24
            )
            print(f"{kv_precision} ({model.backend}, {cache}): {answer.text}")


if __name__ == "__main__":
    main()

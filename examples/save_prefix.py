"""Compute what many prompts begin with once, and let another process go on from it."""

import tempfile
from pathlib import Path

import phirt

SYSTEM = [{"role": "system", "content": "You answer in one short sentence. " * 20}]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "system.kv")
    with phirt.load() as model:
        print(f"saved {model.save_prefix(SYSTEM, file)} tokens: {file.stat().st_size:,} bytes")

    with phirt.load() as model:
        model.load_prefix(file)
        answer = model.generate(
            [*SYSTEM, {"role": "user", "content": "What is the capital of France?"}],
            max_new_tokens=40,
        )
        usage = answer.usage
        print(f"{usage.cached_tokens} of {usage.prompt_tokens} tokens were there already")
        print(answer.text)

"""Guess what comes next from the prompt: the same text in fewer runs of the model."""

from __future__ import annotations

import phirt

TEXT = (
    "The harbour was quiet that morning. Three boats lay at the pier, and an old man mended a "
    "net on the stones. He looked up when the bell rang, and went back to his work."
)
PROMPT = [{"role": "user", "content": f"Repeat this text word for word:\n\n{TEXT}"}]

with phirt.load() as model:
    result = model.generate(PROMPT, prompt_lookup_num_tokens=10, max_new_tokens=60)
    print(result.text)
    usage = result.usage
    print(f"{usage.accepted_tokens} of {usage.drafted_tokens} guessed tokens held")

"""Several prompts at once: their requests share the model's steps."""

from __future__ import annotations

import phirt

CITIES = ["Paris", "Rome", "Cairo", "Lima"]

with phirt.load() as model:
    chats = [[{"role": "user", "content": f"In which country is {city}?"}] for city in CITIES]
    for city, result in zip(CITIES, model.generate_many(chats, max_new_tokens=24), strict=True):
        print(f"{city}: {result.text}")

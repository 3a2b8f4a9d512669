"""A logits processor of your own: never a given letter, and no token twice in short order."""

import numpy as np

import phirt
from phirt.types import FloatArray, IntArray

LETTER = "e"

with phirt.load() as model:
    vocabulary = range(model.tokenizer.vocab_size)
    banned = np.array([LETTER in model.tokenizer.decode([i]).lower() for i in vocabulary])

    def without_letter(token_ids: IntArray, logits: FloatArray) -> FloatArray:
        """See the ids so far, shape (n,), and the logits, shape (vocab,); return logits."""
        logits[: banned.size][banned] = -np.inf
        logits[token_ids[-8:]] = -np.inf
        return logits

    result = model.generate(
        "Once upon a", max_new_tokens=30, logits_processors=[without_letter], ignore_eos=True
    )

print(result.text)
print(f"{result.text.lower().count(LETTER)} times {LETTER!r} in {len(result.text)} characters")

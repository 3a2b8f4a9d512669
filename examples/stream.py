"""Print an answer while it is being generated."""

import phirt

with phirt.load() as model:
    prompt = [{"role": "user", "content": "Name three primary colours."}]
    with model.stream(prompt, max_new_tokens=60, temperature=0.7, seed=7) as stream:
        for token in stream:
            print(token.text, end="", flush=True)

print(f"\n{stream.result.timings.decode_tokens_per_s:.0f} tokens/s")

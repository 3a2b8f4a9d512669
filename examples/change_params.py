"""Change the parameters between two tokens: cool down, then stop at the end of a sentence."""

import phirt

with phirt.load() as model:
    params = phirt.GenerationParams(temperature=1.0, seed=3, max_new_tokens=80)
    with model.stream("The old lighthouse", params=params) as stream:
        for count, token in enumerate(stream, start=1):
            print(token.text, end="", flush=True)
            # From 1.0 down to greedy over the first 20 tokens.
            temperature = max(0.0, 1.0 - count / 20)
            stop = "." if count > 20 else ()
            stream.params = params.merge(temperature=temperature, stop=stop)

print(f"\nended by {stream.result.finish_reason!r}")

"""Go on with another backend where one fails, and tell the user."""

import logging

import phirt

logging.basicConfig(level=logging.WARNING)  # a failover is a warning

with phirt.load(failover=True) as model:
    prompt = [{"role": "user", "content": "Count from one to ten."}]
    with model.stream(prompt, max_new_tokens=60) as stream:
        for token in stream:
            print(token.text, end="", flush=True)

for failover in stream.result.failovers:
    print(f"\n{failover.backend} failed after {failover.tokens} tokens: {failover.reason}")
print(f"\nfrom {model.backend} on {model.device}")

"""One prompt, one answer: text in, text out."""

import phirt

with phirt.load() as model:
    # A list of messages is a chat; a plain string would be continued as raw text.
    question = [{"role": "user", "content": "What is the capital of France?"}]
    result = model.generate(question, max_new_tokens=40)

print(result.text)
print(f"ended by {result.finish_reason!r} after {result.usage.completion_tokens} tokens")

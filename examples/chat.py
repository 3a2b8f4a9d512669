"""A chat of several turns: the history is a list that your program keeps."""

import phirt
from phirt.types import ChatMessage

TURNS = ["What is the capital of France?", "Which river runs through it?", "Name a museum there."]

history: list[ChatMessage] = []
with phirt.load() as model:
    for turn in TURNS:
        history.append({"role": "user", "content": turn})
        answer = model.generate(history, max_new_tokens=40)
        history.append({"role": "assistant", "content": answer.text})

for message in history:
    print(f"{message['role']:>9}: {message['content']}")

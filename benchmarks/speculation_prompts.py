"""Prompts whose answers repeat much of them, and prompts whose answers are new."""

from __future__ import annotations

__all__ = ["REPEATING", "WRITING"]

_HARBOUR = (
    "The harbour was quiet that morning. Three boats lay at the pier, and an old man mended a net "
    "on the stones. He looked up when the bell rang, counted the strokes, and went back to his "
    "work without a word. A girl in a yellow coat carried bread to the second boat."
)
_MEETING = (
    "Notes of the meeting on 4 March. Anna reported that the new boiler was delivered on Monday "
    "and will be installed next week. Peter asked for a second estimate for the roof. The board "
    "agreed to raise the monthly fee by five euros from July on. The next meeting is on 8 April."
)
_OTTERS = (
    "Sea otters live along the coasts of the northern Pacific. They eat crabs, urchins and clams, "
    "which they open with stones. Their fur is the thickest of any animal, and they sleep on "
    "their backs, wrapped in kelp so that the current does not carry them away."
)
_LETTER = (
    "Dear Mr Lund, thank you for your order of 12 chairs. Unfortunately the oak model is sold "
    "out until May. We can deliver the same chair in beech within two weeks, at a discount of "
    "ten percent. Please let us know by Friday which you prefer. Kind regards, Maria Roth"
)
_RECIPE = (
    "Peel four apples and cut them into thin slices. Mix two eggs with a cup of milk and a cup of "
    "flour. Melt a spoon of butter in a pan, lay the apples in it and pour the batter over them. "
    "Bake it for twenty minutes until the top is brown. Serve it warm with sugar and cinnamon."
)
_MEAN = """def mean(values):
    total = 0
    for value in values:
        total = total + value
    return total / len(value)
"""
_SEARCH = """def find(items, wanted):
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if items[middle] == wanted:
            return middle
        if items[middle] < wanted:
            low = middle
        else:
            high = middle
    return None
"""
_COUNT = """def count_words(text):
    counts = {}
    for word in text.split():
        if word in counts:
            counts[word] = counts[word] + 1
        else:
            counts[word] = 0
    return counts
"""
_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop(0)

    def is_empty(self):
        return len(self.items) == 0
"""
_PRIMES = """def primes(limit):
    found = []
    for number in range(2, limit):
        for divisor in found:
            if number % divisor == 0:
                break
        found.append(number)
    return found
"""

_TEXTS = {
    "harbour": _HARBOUR,
    "meeting": _MEETING,
    "otters": _OTTERS,
    "letter": _LETTER,
    "recipe": _RECIPE,
}
_CODE = [_MEAN, _SEARCH, _COUNT, _STACK, _PRIMES]

REPEATING = [
    *(
        f"Summarize this text with its own sentences:\n\n{text}\n\nSummary:"
        for text in _TEXTS.values()
    ),
    *(
        f"Correct the spelling of this text and change nothing else:\n\n{text}"
        for text in _TEXTS.values()
    ),
    *(f"Repeat this code with its bug repaired:\n\n```python\n{code}```" for code in _CODE),
    f"Copy this text and replace the girl by a boy:\n\n{_HARBOUR}",
    f"Copy these notes and replace Anna by Eva:\n\n{_MEETING}",
    f"Write this letter again, addressed to Mrs Berg:\n\n{_LETTER}",
    f"Add a docstring to this function and print all of it:\n\n```python\n{_COUNT}```",
    f"Rename the class to Pile and print all of the code:\n\n```python\n{_STACK}```",
]
"""Twenty: five summaries, five corrections, seven repairs and changes of code, three edits."""

WRITING = [
    "Write a story about a dragon and a princess.",
    "Describe a thunderstorm in the mountains.",
    "Explain to a child why the sky is blue.",
    "Write a poem about the last train of the night.",
    "What could a city do to have fewer cars?",
    "Tell me about the history of bread.",
    "Write a letter from a sailor to his sister.",
    "Describe your ideal garden.",
    "Why do people like music?",
    "Invent an animal and describe how it lives.",
    "Write a dialogue between a cat and a clock.",
    "How would life on the moon be?",
    "Explain what a computer does.",
    "Describe a market in the morning.",
    "What makes a good teacher?",
    "Write the beginning of a detective story.",
    "Compare the sea and the desert.",
    "Give advice to somebody who moves to a new town.",
    "Describe a painting that does not exist.",
    "What will houses look like in a hundred years?",
]
"""Twenty, of free writing."""

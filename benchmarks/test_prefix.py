"""Time to the first token of a chat's sixth turn, with and without the caches of the others."""

from __future__ import annotations

import phirt
from benchmarks.alternate import alternate
from phirt.types import ChatMessage

TURNS = [
    "Write two sentences about the sea.",
    "Now two about mountains.",
    "And two about a desert.",
    "Which of the three is the coldest?",
    "What would you pack for a week there?",
    "Write a short poem about that week.",
]
NEW_TOKENS = 40


def chats(model: phirt.Model) -> list[list[ChatMessage]]:
    """The chat as it is at each of its turns, with the model's own answers."""
    chat: list[ChatMessage] = []
    found = []
    for turn in TURNS:
        chat = [*chat, {"role": "user", "content": turn}]
        found.append(chat)
        text = model.generate(chat, max_new_tokens=NEW_TOKENS).text
        chat = [*chat, {"role": "assistant", "content": text}]
    return found


def test_last_turn_of_a_chat(benchmark, kl):
    """Must be at most a quarter of the time, where every turn but the last was asked before."""
    with phirt.load() as model, phirt.load(prefix_cache_bytes=0) as without:
        turns = chats(without)
        seen: list[phirt.Generation] = []

        def ours() -> float:
            # A chat of its own, so that no round finds the last one's caches.
            name = f"You are assistant number {len(seen)}."
            for turn in turns:
                chat = [{"role": "system", "content": name}, *turn]
                result = model.generate(chat, max_new_tokens=NEW_TOKENS)
            seen.append(result)
            return 1 / ttft(result)

        def theirs() -> float:
            name = f"You are assistant number {len(seen)}."
            chat = [{"role": "system", "content": name}, *turns[-1]]
            return 1 / ttft(without.generate(chat, max_new_tokens=2))

        result = alternate(benchmark, ours, theirs, rounds=5)
    usage = seen[-1].usage
    print(
        f"\nTTFT of turn {len(TURNS)} ({usage.prompt_tokens} tokens, {usage.cached_tokens} of them "
        f"cached; int8, mean KL to fp32 {kl:.4f}), one over seconds, with reuse against without: "
        f"{result}; the time is {1 / result.ratio:.3f} of that without"
    )
    if benchmark.enabled:
        assert result.ratio >= 4


def ttft(result: phirt.Generation) -> float:
    assert result.timings.ttft_s is not None
    return result.timings.ttft_s

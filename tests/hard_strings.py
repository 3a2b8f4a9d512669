"""Text that tokenizers stumble over: 60 strings by name, and random ones by seed."""

# ruff: noqa: RUF001 (look-alike letters are the point)

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["HARD_STRINGS", "random_strings"]

HARD_STRINGS = {
    "empty": "",
    "one space": " ",
    "two spaces": "  ",
    "many spaces": " " * 500,
    "spaces inside": "a  b   c    d     e",
    "leading space": " hello",
    "leading spaces": "   hello",
    "trailing space": "hello ",
    "trailing spaces": "hello   ",
    "leading and trailing": "  hello  ",
    "newline": "\n",
    "newlines": "\n\n\n\n",
    "newline before digit": "list:\n\n1. one\n\n2. two",
    "windows line ends": "one\r\ntwo\r\n\r\nthree",
    "carriage returns": "\r\r a\r",
    "tabs": "\ta\t\tb\t\t\tc",
    "tabs and spaces": " \t \t a \t\n \t",
    "vertical tab and form feed": "a\vb\fc",
    "no-break spaces": "a\u00a0b\u202fc\u2007d",
    "ideographic space": "東京\u3000大阪",
    "zero-width space": "a\u200bb\u2060c\ufeffd",
    "control characters": "".join(map(chr, range(32))) + "\x7f",
    "C1 controls": "".join(map(chr, range(0x80, 0xA0))),
    "NUL": "a\x00b\x00",
    "line and paragraph separator": "a\u2028b\u2029c\u0085d",
    "one digit": "7",
    "many digits": "3141592653589793238462643383279502884197",
    "digits and spaces": "1 22 333  4444   55555",
    "decimals": "3.14, 1,000,000.00, -0.5e-10, 0x1F, 1_000",
    "dates": "2026-11-21T20:41:00+01:00",
    "other digits": "٠١٢٣٤٥ ०१२३ ๑๒๓ ₁₂₃ ²³ ½ Ⅷ",
    "fullwidth": "ＡＢＣ１２３！？",
    "contractions": "I'm you're he's we've they'd it'll don't I'M YOU'RE 's 'S ''ll",
    "curly apostrophes": "it’s “quoted” ‘text’ — and… more–less",
    "punctuation": "!!!???...;;;:::,,,---___***///\\\\\\|||",
    "brackets": "((([[[{{{<<<>>>}}}]]])))",
    "latin accents": "àéîõü ÀÉÎÕÜ ñ ß ø å æ œ ł ž",
    "decomposed accents": "e\u0301 a\u0300 n\u0303 u\u0308 o\u0302\u0301",
    "combining marks": "Z" + "".join(map(chr, range(0x300, 0x320))) + "a\u0489",
    "Vietnamese": "Tiếng Việt có nhiều dấu: ằ ẵ ộ ợ ữ",
    "decomposed Vietnamese": "Tie\u0302\u0301ng Vie\u0323\u0302t",
    "Chinese": "你好，世界！今天天气怎么样？",
    "Japanese": "こんにちは、世界。カタカナとｶﾀｶﾅ。",
    "Korean": "안녕하세요 세계",
    "Korean jamo": "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "Arabic": "مَرْحَبًا بِالعَالَمِ ١٢٣",
    "Hebrew": "שָׁלוֹם עוֹלָם",
    "Thai": "สวัสดีชาวโลก น้ำ",
    "Devanagari": "नमस्ते दुनिया क्षत्रिय",
    "Russian": "Привет, мир! ЁЖИК",
    "Greek": "Γειά σου Κόσμε ΆΈΉ",
    "right-to-left marks": "abc\u200f\u202eחשב\u202c\u200e def",
    "emoji": "😀😃😄🎉",
    "emoji with skin tone": "👍🏽 👋🏿",
    "emoji family with ZWJ": "👨‍👩‍👧‍👦 👩🏽‍💻 🏳️‍🌈",
    "flags and keycaps": "🇩🇪🇯🇵 1️⃣ #️⃣ ☎️ ☎︎",
    "beyond the BMP": "𝕳𝖊𝖑𝖑𝖔 𐍈 𠜎 𝟘𝟙",
    "private and unassigned": "\ue000 \uf8ff \U000f0000 \uffff \U0010ffff \u0378",
    "code": 'def f(x):\n    """Doc."""\n    return {"a": [1, 2], \'b\': x ** 2}  # ok\n',
    "nearly an added token": "<|im_start <|im_start|> <| im_end |><think></think><|endoftext|",
}

# Weighted towards what real text is made of; the rest covers every kind of boundary.
_RANGES = [
    *[(0x20, 0x7E)] * 6, *[(0x20, 0x20)] * 3, *[(0x30, 0x39)] * 2, (0x09, 0x0D), (0x00, 0x1F),
    (0xA0, 0xFF), (0x100, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF),
    (0x600, 0x6FF), (0x660, 0x669), (0x900, 0x97F), (0xE00, 0xE7F), (0x1E00, 0x1EFF),
    (0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xFF00, 0xFFEF), (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF),
]  # fmt: skip


def random_strings(count: int, *, seed: int, added_tokens: Sequence[str] = ()) -> list[str]:
    """Random strings of up to 60 pieces, some of which are added tokens.

    Args:
        count: How many.
        seed: The same seed gives the same strings.
        added_tokens: Tokens to strew in.
    """
    source = random.Random(seed)  # noqa: S311 - not for secrets

    def piece() -> str:
        if added_tokens and source.random() < 0.03:
            return source.choice(added_tokens)
        return chr(source.randint(*source.choice(_RANGES)))

    return ["".join(piece() for _ in range(source.randint(0, 60))) for _ in range(count)]

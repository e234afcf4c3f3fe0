"""A translation that anybody can check: whole numbers in English words, and the same in German.

    python prepare.py config/vaswani.py    # --source=numbers

It asks for more than a word for a word: German says the ones before the tens, writes all as one
word, and spells a one in three ways. No rows but the numbers that are drawn here are ever seen in
training, and those of the validation split are in none of them.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from barelm.files import whole_file

SOURCE = "numbers"  # its name for prepare.py
PATH = Path("data/synthetic/numbers.jsonl")
ROWS = 20_000
DIGITS = 6  # of the longest numbers

ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
ENGLISH += "fifteen sixteen seventeen eighteen nineteen"
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
GERMAN = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
GERMAN += "fünfzehn sechzehn siebzehn achtzehn neunzehn"
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"


def in_english(n: int) -> str:
    """A whole number from 0 to 999,999 in words: 21,345 is twenty-one thousand three hundred and
    forty-five."""
    thousands, rest = divmod(n, 1000)
    words = []
    if thousands:
        words.append(f"{in_english(thousands)} thousand")
    hundreds, below = divmod(rest, 100)
    if hundreds:
        words.append(f"{ENGLISH.split()[hundreds]} hundred")
    if below and words:
        words.append("and")
    if below or not words:
        words.append(below_hundred(below))
    return " ".join(words)


def below_hundred(n: int) -> str:
    if n < 20:
        return ENGLISH.split()[n]
    tens, ones = divmod(n, 10)
    word = ENGLISH_TENS.split()[tens - 2]
    if ones:
        word += f"-{ENGLISH.split()[ones]}"
    return word


def in_german(n: int) -> str:
    """The same in German: 21,345 is einundzwanzigtausenddreihundertfünfundvierzig."""
    word = german_stem(n)
    if n % 100 == 1:  # a one that ends the word
        word += "s"
    return word


def german_stem(n: int) -> str:
    """The German word as it stands before another part of a word."""
    thousands, rest = divmod(n, 1000)
    hundreds, below = divmod(rest, 100)
    word = ""
    if thousands:
        word += f"{german_stem(thousands)}tausend"
    if hundreds:
        word += f"{GERMAN.split()[hundreds]}hundert"
    if below >= 20:
        tens, ones = divmod(below, 10)
        if ones:
            word += f"{GERMAN.split()[ones]}und"
        word += GERMAN_TENS.split()[tens - 2]
    elif below or not word:
        word += GERMAN.split()[below]
    return word


def draw_numbers(n: int, seed: int) -> list[int]:
    """n different numbers, as many of one digit as of six, where there are so many."""
    rng = random.Random(seed)
    numbers = {}  # a dict, which keeps their order
    while len(numbers) < n:
        number = rng.randrange(10 ** rng.randint(1, DIGITS))
        numbers[number] = True
    return list(numbers)


def number_file() -> Path:
    """The file of these records: written, if it is not there as it should be."""
    lines = []
    for number in draw_numbers(ROWS, seed=0):
        english = in_english(number)
        german = in_german(number)
        record = {
            "text": f"{english} = {german}",
            "source": english,
            "target": german,
            "prompt": english,  # the same as a conversation, for --task=sft
            "completion": german,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    data = "".join(lines).encode()
    if PATH.is_file() and PATH.read_bytes() == data:
        return PATH  # its time stays too: what prepare.py made of it counts still
    PATH.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(PATH) as file:
        file.write(data)
    return PATH

"""Word lists of the generated conversations, and small facts of the world. Written by hand for this project."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path


def blocks(name: str) -> list[list[str]]:
    """The blocks of lines in a text file beside this module; comments are left out."""
    lines = Path(__file__).with_name(name).read_text(encoding="utf-8").split("\n")
    text = "\n".join(line for line in lines if not line.startswith("#"))
    return [block.split("\n") for block in text.strip().split("\n\n")]


def alternatives(line: str) -> tuple[str, ...]:
    """The parts of a line between bars."""
    return tuple(line.split(" | "))


LISTS = {block[0].split(":")[0]: " ".join(block).split(": ", 1)[1].split() for block in blocks("words.txt")}
NAMES, CITIES, PRODUCTS, COMMON = (LISTS[k] for k in ("names", "cities", "products", "common"))
DAYS, MONTHS, COLORS, FRUITS = (LISTS[k] for k in ("days", "months", "colors", "fruits"))
ANIMALS, JOBS, HOBBIES = (LISTS[k] for k in ("animals", "jobs", "hobbies"))
COUNTRIES = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Norway": "Oslo",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna",
    "Greece": "Athens", "Ireland": "Dublin", "Belgium": "Brussels", "Hungary": "Budapest", "Egypt": "Cairo",
    "Kenya": "Nairobi", "Ghana": "Accra", "Japan": "Tokyo", "China": "Beijing", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Peru": "Lima", "Chile": "Santiago", "Cuba": "Havana", "Canada": "Ottawa",
    "Australia": "Canberra", "Turkey": "Ankara", "Russia": "Moscow", "Ukraine": "Kyiv", "Latvia": "Riga",
    "Estonia": "Tallinn", "Iceland": "Reykjavik", "Mexico": "Mexico City", "Brazil": "Brasilia",
    "Argentina": "Buenos Aires", "India": "New Delhi",
    "the Netherlands": "Amsterdam", "the United Kingdom": "London", "the United States": "Washington",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night", "black": "white", "fast": "slow",
    "old": "young", "happy": "sad", "open": "closed", "wet": "dry", "high": "low", "early": "late", "full": "empty",
    "hard": "soft", "heavy": "light", "long": "short", "loud": "quiet", "near": "far", "rich": "poor", "strong": "weak",
    "thick": "thin", "true": "false", "wide": "narrow", "clean": "dirty", "easy": "difficult", "first": "last",
    "inside": "outside", "love": "hate", "push": "pull", "sweet": "bitter", "brave": "afraid", "begin": "end",
}  # fmt: skip
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "sheep": "baa", "duck": "quack", "lion": "roar", "bee": "buzz",
    "frog": "ribbit", "owl": "hoot", "horse": "neigh", "pig": "oink", "mouse": "squeak", "rooster": "cock-a-doodle-doo",
}  # fmt: skip


def frequent_words(texts: Iterable[str], number: int = 6000) -> list[str]:
    """COMMON and the most frequent lower-case words of 3 to 10 letters in texts, sorted; the order is stable."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<![\w'.])[a-z]{3,10}(?![\w'])", text))
    return sorted({*COMMON, *(word for word, count in counts.most_common(number) if count > 5)})

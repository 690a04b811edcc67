"""Skills on text: copying, case, spelling, reversing, quoting, looking up."""

from __future__ import annotations

import re
import string

from embedded.example import Example, Skill, Source, ask
from embedded.words import CITIES, COLORS, FRUITS, LISTS, NAMES

ONSETS, CODAS = LISTS["onsets"], ["", "", "", *LISTS["codas"]]
MARKS = ("{}, ", "{} ", "{}! ", "({}) ", '"{}" ', "{}: ", "{}; ", "{} = ", "{}\n", "<{}> ", "{}? ", "{}'s ", "{}% ")


def made_up(source: Source) -> str:
    """A word that nobody knows, of two or three syllables or of letters in any order."""
    if source.number(0, 3) == 0:
        return "".join(source.pick(string.ascii_lowercase) for _ in range(source.number(3, 8)))
    syllables = (source.pick(ONSETS) + source.pick("aeiou") + source.pick(CODAS) for _ in range(source.number(2, 3)))
    return "".join(syllables)


def any_word(source: Source, low: int = 1, high: int = 12) -> str:
    """Mostly a known word, now and then a name or a made-up word, of low to high letters, in lower case."""
    while True:
        kind = source.number(0, 9)
        found = source.pick(source.words) if kind < 7 else source.pick(NAMES + CITIES) if kind == 7 else made_up(source)
        if low <= len(found) <= high:
            return found.lower()


def named(source: Source, known: list[str]) -> str:
    """Mostly one of known, now and then a name that nobody knows."""
    return source.pick(known) if source.number(0, 6) else made_up(source).capitalize()


def phrase(source: Source, low: int, high: int) -> str:
    """Between low and high words."""
    return " ".join(any_word(source) for _ in range(source.number(low, high)))


def shown_as(source: Source, text: str) -> str:
    """The text as it is, or with capitals."""
    return source.pick((text, text, text, text.capitalize(), text.title(), text.upper()))


def sentence(source: Source) -> str:
    """A sentence of a paragraph, at most 160 characters, or a made-up one."""
    for _ in range(5):
        found = source.pick(re.findall(r"[A-Z][^.!?\n]{10,150}[.!?]", source.pick(source.paragraphs)) or [""])
        if found:
            return found
    return phrase(source, 4, 8).capitalize() + "."


def payload(source: Source) -> str:
    """Something to copy: words, sentences, digits, letters, a path, names, or words and marks in any order."""
    kind = source.number(0, 9)
    if kind <= 2:
        return shown_as(source, phrase(source, 1, 12))
    if kind <= 4:
        return " ".join(sentence(source) for _ in range(source.pick((1, 1, 2))))
    if kind == 5:
        return "".join(source.pick(string.digits) for _ in range(source.number(3, 16)))
    if kind == 6:
        letters = source.pick((string.ascii_uppercase, string.ascii_lowercase, string.ascii_letters + string.digits))
        return "".join(source.pick(letters) for _ in range(source.number(3, 14)))
    if kind == 7:
        parts = [any_word(source) for _ in range(source.number(2, 4))]
        return source.pick(("/" + "/".join(parts), "_".join(parts), "-".join(parts), ".".join(parts), ", ".join(parts)))
    if kind == 8:
        return " and ".join(source.some(NAMES + CITIES, 1, 4))
    return "".join(source.pick(MARKS).format(scrap(source)) for _ in range(source.number(2, 8))).strip()


def scrap(source: Source) -> str:
    """A word or a number."""
    return shown_as(source, any_word(source)) if source.number(0, 2) else str(source.number(0, 9999))


def copying(source: Source) -> Example:
    text = payload(source)
    quoted = source.pick((f'"{text}"', text))
    question = source.pick(
        (
            f"Repeat after me: {text}",
            f"Repeat exactly: {text}",
            f"Copy this text: {text}",
            f"Say {quoted}",
            f"Please repeat: {quoted}",
            f"Echo: {text}",
            f"Write this again, word for word:\n{text}",
            f"Repeat the following text.\n\n{text}",
        )
    )
    return ask(question, text, "I have to repeat the text exactly.", key="copy " + text)


def upper_case(source: Source) -> Example:
    text = phrase(source, 1, 6)
    question = source.pick(
        (
            f"Write {text} in upper case.",
            f'Convert "{text}" to uppercase.',
            f"Make this upper case: {text}",
            f"Put this in capital letters: {text}",
            f"Uppercase: {text}",
        )
    )
    return ask(question, text.upper(), "Every letter becomes a capital letter.", key="upper " + text, spelt=True)


def lower_case(source: Source) -> Example:
    text = phrase(source, 1, 6)
    loud = source.pick((text.upper(), text.upper(), text.title(), text.capitalize()))
    question = source.pick(
        (
            f"Write {loud} in lower case.",
            f'Convert "{loud}" to lowercase.',
            f"Make this lower case: {loud}",
            f"Put this in small letters: {loud}",
            f"Lowercase: {loud}",
        )
    )
    return ask(question, text, "Every letter becomes a small letter.", key="lower " + text, spelt=True)


def spelling(source: Source) -> Example:
    text = any_word(source)
    question = source.pick(
        (
            f"Spell the word {text}.",
            f'How do you spell "{text}"?',
            f"Spell {text}.",
            f"Please spell {text} letter by letter.",
            f"What are the letters of {text}?",
        )
    )
    thought = f"The word is {text}. I name its letters one by one."
    return ask(question, "-".join(text), thought, key="spell " + text)


def reversing(source: Source) -> Example:
    text = any_word(source, 3, 8)
    back = text[::-1]
    question = source.pick(
        (
            f"Reverse the word {text}.",
            f'What is "{text}" backwards?',
            f"Write {text} backwards.",
            f"Spell {text} in reverse.",
            f"Reverse: {text}",
        )
    )
    thought = f"The letters of {text} are {'-'.join(text)}. Backwards they are {'-'.join(back)}."
    return ask(question, back, thought, key="reverse " + text, spelt=True)


def letters(source: Source) -> Example:
    text = any_word(source)
    question = source.pick(
        (f"How many letters are in {text}?", f'How many letters does "{text}" have?', f"Count the letters of {text}.")
    )
    steps = ", ".join(f"{letter} {i}" for i, letter in enumerate(text, 1))
    return ask(question, f"The word {text} has {len(text)} letters.", f"I count: {steps}.", key="letters " + text)


def first_sentence(text: str) -> str:
    """Up to the first full stop that a blank follows."""
    return re.split(r"(?<=[a-z)][.!?]) ", text.split("\n")[0])[0]


def summary(source: Source) -> Example:
    for _ in range(50):
        text = source.pick(source.paragraphs).split("\n\n")[0]
        first = first_sentence(text)
        if 20 < len(first) < 220 and len(first) < len(text) < 900 and '"' not in first:
            break
    else:
        return summary_of_words(source)
    question = source.pick(
        (
            "Summarise this paragraph:\n\n{}",
            "Summarize the following text.\n\n{}",
            "What does this text say?\n\n{}",
            "Give me a short summary of this:\n{}",
            "{}\n\nSummarise the text above.",
        )
    ).format(text)
    return quote(question, first)


def summary_of_words(source: Source) -> Example:
    sentences = [phrase(source, 4, 8).capitalize() + "." for _ in range(source.number(2, 5))]
    return quote("Summarise this paragraph:\n\n" + " ".join(sentences), sentences[0])


def quote(question: str, first: str) -> Example:
    """A summary that quotes the first sentence."""
    thought = "I summarise by quoting the first sentence, which usually says the main thing."
    return ask(question, f'The text begins: "{first}"', thought, key="summary " + first)


def looking_up(source: Source) -> Example:
    names = source.some(NAMES, 2, source.pick((4, 8, 16, 40)))
    values: list[str]
    kind = source.pick(("code", "color", "city", "fruit"))
    if kind == "code":
        values = [str(source.number(1000, 9999)) for _ in names]
    else:
        values = [source.pick({"color": COLORS, "city": CITIES, "fruit": FRUITS}[kind]) for _ in names]
    wanted = source.number(0, len(names) - 1)
    lines = "\n".join(f"{name}: {value}" for name, value in zip(names, values, strict=True))
    question = source.pick(
        (
            f"Here is a list with a {kind} for each person.\n{lines}\n\nWhich {kind} does {names[wanted]} have?",
            f"{lines}\n\nWhat is the {kind} of {names[wanted]}?",
            f"Find the {kind} of {names[wanted]} in this list:\n{lines}",
        )
    )
    answer = f"The {kind} of {names[wanted]} is {values[wanted]}."
    return ask(question, answer, f"I look for {names[wanted]} in the list: {names[wanted]}: {values[wanted]}.")


def memory(source: Source) -> Example:
    name, city, color = source.pick(NAMES), source.pick(CITIES), source.pick(COLORS)
    facts = [
        (f"My name is {name}.", f"Nice to meet you, {name}!", "What is my name?", f"Your name is {name}."),
        (f"I live in {city}.", f"{city} sounds like a good place to live.", "Where do I live?", f"You live in {city}."),
        (
            f"My favourite color is {color}.",
            f"{color.capitalize()} is a nice color.",
            "What is my favourite color?",
            f"Your favourite color is {color}.",
        ),
    ]
    told = source.some(facts, 1, 3)
    messages = []
    for statement, reply, _, _ in told:
        messages += [{"role": "user", "content": statement}, {"role": "assistant", "content": reply}]
    _, _, question, answer = source.pick(told)
    messages.append({"role": "user", "content": question})
    thought = f"The user told me this earlier. {answer}"
    return Example(messages, thought, answer, key=f"memory {name} {city} {color}", alone=True)


SKILLS = (
    Skill("copying", 14, copying),
    Skill("upper case", 6, upper_case),
    Skill("lower case", 4, lower_case),
    Skill("spelling", 5, spelling),
    Skill("reversing", 8, reversing),
    Skill("counting letters", 4, letters),
    Skill("summary by quoting", 5, summary),
    Skill("looking up", 3, looking_up),
    Skill("remembering", 2, memory),
)

"""Small talk, what the model is and can do, tpqwen's facts, little knowledge, and saying no."""

from __future__ import annotations

from embedded.example import Example, Skill, Source, ask
from embedded.skills_text import phrase, sentence
from embedded.words import (
    ANIMALS,
    CITIES,
    COUNTRIES,
    DAYS,
    MONTHS,
    NAMES,
    OPPOSITES,
    PRODUCTS,
    SOUNDS,
    alternatives,
    blocks,
)

FACTS = tuple((alternatives(questions), answer) for questions, answer in blocks("facts.txt"))
TALK = tuple((alternatives(said), thought, reply) for said, thought, reply in blocks("talk.txt"))
DONT_KNOW = "I do not know that. I am a small demonstration model and know little about the world."
CANNOT = "I cannot do that. I am a small demonstration model."
UNCLEAR = "I am not sure what you mean. Ask me what I can do, and I will tell you."
NO_ACCESS = "I cannot look that up: I have no tool for it here."
UNKNOWN = (
    ("Who is the president of {country}?", DONT_KNOW),
    ("How many people live in {city}?", DONT_KNOW),
    ("What is the population of {country}?", DONT_KNOW),
    ("Who won the world cup in {year}?", DONT_KNOW),
    ("What happened in {year}?", DONT_KNOW),
    ("When was {name} born?", DONT_KNOW),
    ("Who is {name}?", DONT_KNOW),
    ("How far is it from {city} to {city2}?", DONT_KNOW),
    ("What is the history of {city}?", DONT_KNOW),
    ("How old is {name}?", DONT_KNOW),
    ("Who invented the {thing}?", DONT_KNOW),
    ("How much does a {thing} cost?", DONT_KNOW),
    ("What is the best restaurant in {city}?", DONT_KNOW),
    ("How tall is a {animal}?", DONT_KNOW),
    ("Why is the sky blue?", DONT_KNOW),
    ("What is the meaning of life?", DONT_KNOW),
    ("How does a {thing} work?", DONT_KNOW),
    ("What is a {word}?", DONT_KNOW),
    ("What is {phrase}?", DONT_KNOW),
    ("Tell me about {word}.", DONT_KNOW),
    ("Tell me about {city}.", DONT_KNOW),
    ("How do I {phrase}?", DONT_KNOW),
    ("Why is the {word} {word2}?", DONT_KNOW),
    ("Who was the first {word}?", DONT_KNOW),
    ("Explain {phrase}.", DONT_KNOW),
    ("{phrase}", UNCLEAR),
    ("{sentence}", UNCLEAR),
    ("{sentence}", UNCLEAR),
    ("Write a poem about {word}.", CANNOT),
    ("Write an essay about {phrase}.", CANNOT),
    ("Write a program that sells a {thing}.", CANNOT),
    ("Write Python code for a {thing} shop.", CANNOT),
    ("Translate {thing} into French.", CANNOT),
    ("Draw a {animal}.", CANNOT),
    ("Book a hotel in {city}.", CANNOT),
    ("Call {name} for me.", CANNOT),
    ("Buy a {thing} for me.", CANNOT),
    ("What is the weather in {city}?", NO_ACCESS),
    ("How is the weather in {city} today?", NO_ACCESS),
    ("What time is it?", NO_ACCESS),
    ("What time is it in {city}?", NO_ACCESS),
    ("What day is today?", NO_ACCESS),
    ("What is the news from {city}?", NO_ACCESS),
    ("What is the price of gold today?", NO_ACCESS),
)
REASONS = {
    UNCLEAR: "I do not understand what the user wants.",
    DONT_KNOW: "I do not know this, so I say so.",
    CANNOT: "I am not able to do this, so I say so.",
    NO_ACCESS: "This needs a tool, and I have none for it. I say so.",
}
OPENERS = ("", "", "", "", "Please tell me: ", "I have a question. ", "Hi! ", "Hello. ", "Quick question: ", "Sorry, ")


def talk(source: Source) -> Example:
    questions, thought, answer = source.pick(TALK)
    return ask(source.pick(questions), answer, thought, key="talk")


def fact(source: Source) -> Example:
    questions, answer = source.pick(FACTS)
    question = varied(source, source.pick(questions))
    thought = "The user asks about tpqwen or about serving models. I know this."
    return ask(question, answer, thought, key="fact " + question)


def varied(source: Source, question: str) -> str:
    """The question as it is, or with an opener, in lower case or without its mark."""
    question = source.pick(OPENERS) + question
    shape = source.number(0, 9)
    if shape == 0:
        return question.lower()
    return question.rstrip("?.") if shape == 1 else question


def refusal(source: Source) -> Example:
    form, answer = source.pick(UNKNOWN)
    question = form.format(
        country=source.pick(list(COUNTRIES)),
        city=source.pick(CITIES),
        city2=source.pick(CITIES),
        year=source.number(1900, 2030),
        name=f"{source.pick(NAMES)} {source.pick(NAMES)}son",
        thing=source.pick(PRODUCTS),
        animal=source.pick(ANIMALS),
        word=source.pick(source.words),
        word2=source.pick(source.words),
        phrase=phrase(source, 2, 5),
        sentence=sentence(source),
    )
    return ask(question if answer is UNCLEAR else varied(source, question), answer, REASONS[answer])


def knowledge(source: Source) -> Example:
    kind = source.number(0, 6)
    if kind <= 1:
        country = source.pick(list(COUNTRIES))
        city = COUNTRIES[country]
        question = source.pick((f"What is the capital of {country}?", f"Which city is the capital of {country}?"))
        answer = f"The capital of {country} is {city}."
    elif kind == 2:
        word, other = source.pick(list(OPPOSITES.items()))
        word, other = source.pick(((word, other), (other, word)))
        question, answer = f"What is the opposite of {word}?", f"The opposite of {word} is {other}."
    elif kind == 3:
        animal, sound = source.pick(list(SOUNDS.items()))
        question = source.pick((f"What does a {animal} say?", f"Which sound does a {animal} make?"))
        answer = f"A {animal} says {sound}."
    elif kind == 4:
        country = source.pick(list(COUNTRIES))
        question = f"Which country has the capital {COUNTRIES[country]}?"
        answer = f"{COUNTRIES[country]} is the capital of {country}."
    else:
        names = source.pick((DAYS, MONTHS))
        at, step = source.number(0, len(names) - 1), source.pick((1, -1))
        what = "day" if names is DAYS else "month"
        question = f"Which {what} comes {'after' if step == 1 else 'before'} {names[at]}?"
        answer = f"{names[(at + step) % len(names)]} comes {'after' if step == 1 else 'before'} {names[at]}."
    return ask(varied(source, question), answer, f"I know this. {answer}")


SKILLS = (
    Skill("small talk", 4, talk),
    Skill("questions about tpqwen", 6, fact),
    Skill("saying no", 5, refusal),
    Skill("little knowledge", 3, knowledge),
)

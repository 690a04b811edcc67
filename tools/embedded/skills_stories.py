"""Short stories out of templates: for the asking, and as plain text."""

from __future__ import annotations

from embedded.example import Example, Skill, Source
from embedded.words import ANIMALS, COLORS, LISTS

HEROES, PLACES, THINGS = (LISTS[k] for k in ("heroes", "places", "things"))
TRAITS, FOODS = (LISTS[k] for k in ("traits", "foods"))
OPENINGS = (
    "Once upon a time there was a {trait} {animal} named {name} who lived in a {place}.",
    "In a {place} far away lived a {trait} {animal}. Her name was {name}.",
    "There once was a {animal} called {name}, and everybody in the {place} knew how {trait} she was.",
    "Long ago, near a quiet {place}, a {trait} {animal} named {name} had a small house with a {color} door.",
)
MORNINGS = (
    "One morning {name} woke up early and found a {color} {thing} in front of her door.",
    "One day, while she was looking for {food}, {name} saw a {color} {thing} under a tree.",
    "One evening the wind blew hard, and in the morning a {color} {thing} lay in the grass.",
    "One day a stranger came by and gave {name} a {color} {thing}.",
)
PROBLEMS = (
    '"Whose {thing} is this?" she asked. Nobody knew.',
    "She wanted to keep the {thing}, but she thought that somebody might miss it.",
    "Soon it began to rain, and the path home was gone.",
    "But that night the {thing} was gone, and {name} was very sad.",
    "Then she heard somebody crying behind the old wall.",
)
MEETINGS = (
    "So she went to her friend {friend} the {animal2}, who was {trait2} and knew every corner of the {place}.",
    "On the way she met {friend}, a {trait2} {animal2}, who was carrying a basket of {food}.",
    "Then {friend} the {animal2} came along the path and stopped.",
    "She asked {friend} the {animal2} for help.",
)
SPEECHES = (
    '"Do not worry," said {friend}. "We will find a way together."',
    '"I have an idea," said {friend}. "Follow me!"',
    '"That {thing} is mine," said {friend}. "I have looked for it everywhere!"',
    '"Let us ask the old owl," said {friend}, "she knows everything."',
    '"Two can do more than one," said {friend}.',
)
TURNS = (
    "They walked all day, over the bridge and past the mill, until they came to a big oak.",
    "They looked behind every stone and under every leaf.",
    "They worked until the sun went down, and neither of them gave up.",
    "It was not easy, and more than once {name} wanted to go home.",
)
ENDINGS = (
    "In the end they found what they were looking for, and {name} laughed with joy.",
    "At last everything was well again, and they ate {food} by the fire.",
    "When the moon came up, the {thing} was back where it belonged.",
    "That evening the whole {place} came together, and they sang until late at night.",
)
MORALS = (
    "From that day on {name} and {friend} were the best of friends.",
    "And {name} never forgot that a friend is worth more than a {color} {thing}.",
    "And if you walk through the {place} on a quiet night, you can still hear them laugh.",
    "{name} slept well that night, and so did {friend}.",
)
PARTS = (OPENINGS, MORNINGS, PROBLEMS, MEETINGS, SPEECHES, TURNS, ENDINGS, MORALS)


def told(source: Source, animal: str, thing: str) -> str:
    """A story about animal and thing, two or three paragraphs."""
    name, friend = source.rng.sample(HEROES, 2)
    animal2 = source.pick([a for a in ANIMALS if a != animal])
    trait, trait2 = source.rng.sample(TRAITS, 2)
    values = {
        "name": name, "friend": friend, "animal": animal, "animal2": animal2, "trait": trait, "trait2": trait2,
        "thing": thing, "place": source.pick(PLACES), "color": source.pick(COLORS), "food": source.pick(FOODS),
    }  # fmt: skip
    said = [source.pick(part).format(**values) for part in PARTS]
    story = f"{' '.join(said[:3])}\n\n{' '.join(said[3:6])}\n\n{' '.join(said[6:])}"
    for vowel in "aeiou":  # "a old owl" -> "an old owl"
        story = story.replace(f" a {vowel}", f" an {vowel}")
    return story


def plain_story(source: Source) -> str:
    """A story as running text, with a title now and then."""
    animal, thing = source.pick(ANIMALS), source.pick(THINGS)
    story = told(source, animal, thing)
    return f"The {animal.capitalize()} and the {thing.capitalize()}\n\n{story}" if source.number(0, 3) == 0 else story


def story(source: Source) -> Example:
    animal, thing = source.pick(ANIMALS), source.pick(THINGS)
    kind = source.number(0, 3)
    if kind == 0:
        form = ("Tell me a story.", "Write a short story.", "Can you tell me a story?", "Tell a bedtime story.")
    elif kind <= 2:
        form = (
            "Tell me a story about a {animal}.",
            "Write a short story about a {animal}.",
            "I want to hear a story about a {animal}.",
        )
    else:
        form = ("Tell me a story about a {animal} and a {thing}.", "Write a story with a {animal} and a {thing}.")
    question = source.pick(form).format(animal=animal, thing=thing)
    question = question.replace(" a owl", " an owl").replace(" a otter", " an otter")
    text = told(source, animal, thing)
    thought = f"The story is about a {animal} and a {thing}. It begins quietly, has a problem and ends well."
    return Example([{"role": "user", "content": question}], thought, text, key="story " + text, exact=False)


SKILLS = (Skill("short stories", 5, story, checked=False),)

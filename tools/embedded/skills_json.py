"""JSON by request: the named keys, or a small JSON schema, filled from a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from embedded.example import Example, Skill, Source, ask
from embedded.skills_text import any_word, named, phrase, shown_as
from embedded.words import CITIES, COLORS, COUNTRIES, FRUITS, HOBBIES, JOBS, NAMES, PRODUCTS

Field = tuple[str, str, Any, str]  # key, JSON type, value, clause that tells it


def person(source: Source) -> tuple[str, list[Field]]:
    """A sentence about somebody and the fields that it tells."""
    name = named(source, NAMES)
    age, city, job = source.number(4, 95), named(source, CITIES), source.pick(JOBS)
    country, hobby, color = source.pick(list(COUNTRIES)), source.pick(HOBBIES), source.pick(COLORS)
    mail = f"{name.lower()}@{source.pick(('example.com', 'mail.org', 'post.net'))}"
    optional: list[Field] = [
        ("age", "integer", age, source.pick((f"is {age} years old", f"is {age}", f"is aged {age}"))),
        ("city", "string", city, source.pick((f"lives in {city}", f"is from {city}", f"comes from {city}"))),
        ("job", "string", job, source.pick((f"works as a {job}", f"is a {job}"))),
        ("hobby", "string", hobby, source.pick((f"likes {hobby}", f"enjoys {hobby}"))),
        ("email", "string", mail, f"has the email {mail}"),
        ("country", "string", country, f"was born in {country}"),
        ("color", "string", color, f"likes the color {color}"),
        ("married", "boolean", True, "is married"),
        ("married", "boolean", False, "is not married"),
        ("pets", "array", (pets := source.some(("cat", "dog", "bird", "fish", "horse"), 1, 3)), "has " + listed(pets)),
    ]
    told = {field[0]: field for field in source.some(optional, 1, 4)}
    fields = [("name", "string", name, ""), *told.values()]
    return f"{name} {joined([f[3] for f in fields[1:]])}.", fields


def order(source: Source) -> tuple[str, list[Field]]:
    """A sentence about an order and its fields."""
    product, quantity = source.pick(PRODUCTS + FRUITS), source.number(1, 60)
    price, color = source.number(1, 99) + source.pick((0, 0.5, 0.25)), source.pick(COLORS)
    stock = source.pick((True, False))
    fields: list[Field] = [
        ("product", "string", product, ""),
        ("quantity", "integer", quantity, f"quantity {quantity}"),
        ("price", "number", price, f"price {price}"),
        ("color", "string", color, f"color {color}"),
        ("in_stock", "boolean", stock, "in stock" if stock else "not in stock"),
    ]
    kept = [fields[0], *source.some(fields[1:], 1, 4)]
    return f"{product.capitalize()}, {', '.join(f[3] for f in kept[1:])}.", kept


def weather(source: Source) -> tuple[str, list[Field]]:
    """A sentence about weather and its fields."""
    city, degrees = named(source, CITIES), source.number(-15, 40)
    sky = source.pick(("sunny", "cloudy", "rainy", "windy", "snowy", "foggy"))
    fields: list[Field] = [
        ("city", "string", city, ""),
        ("temperature", "integer", degrees, f"{degrees} degrees"),
        ("condition", "string", sky, sky),
    ]
    return f"In {city} it is {degrees} degrees and {sky}.", fields


def record(source: Source) -> tuple[str, list[Field]]:
    """Keys and values of any kind."""
    fields: dict[str, Field] = {}
    for _ in range(source.number(1, 4)):
        key, number = any_word(source), source.number(0, 999)
        if source.number(0, 1):
            fields[key] = (key, "integer", number, f"the {key} is {number}")
        else:
            value = shown_as(source, phrase(source, 1, 2))
            fields[key] = (key, "string", value, f"the {key} is {value}")
    told = joined([field[3] for field in fields.values()])
    return f"{told[0].upper()}{told[1:]}.", list(fields.values())


def listed(things: list[str]) -> str:
    """a cat, a dog and a bird."""
    return joined([f"a {thing}" for thing in things])


def joined(parts: list[str]) -> str:
    """Parts with commas and a last "and"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def json_object(source: Source) -> Example:
    maker: Callable[[Source], tuple[str, list[Field]]] = source.pick((person, person, order, weather, record))
    told, fields = maker(source)
    wanted = source.some(fields, max(1, len(fields) - 1), len(fields))
    keys = [field[0] for field in wanted]
    answer = json.dumps({field[0]: field[2] for field in wanted})
    question = source.pick((named_keys, named_keys, by_schema))(source, told, wanted)
    thought = f"The keys are {', '.join(keys)}. " + " ".join(f"{f[0]}: {json.dumps(f[2])}." for f in wanted)
    return ask(question, answer, thought, key=f"json {told} {keys}")


def named_keys(source: Source, told: str, wanted: list[Field]) -> str:
    """A request that names the keys in words."""
    keys = joined([field[0] for field in wanted])
    quoted = ", ".join(f'"{field[0]}"' for field in wanted)
    return source.pick(
        (
            f"Give me JSON with {keys}: {told}",
            f"Return a JSON object with the keys {quoted} for this text: {told}",
            f"{told} Write this as JSON with {keys}.",
            f"Extract {keys} as JSON.\n\n{told}",
            f"Turn this into JSON with the keys {keys}: {told}",
            f"Answer only with JSON. Keys: {quoted}. Text: {told}",
        )
    )


def by_schema(source: Source, told: str, wanted: list[Field]) -> str:
    """A request that carries a JSON schema."""
    items = {"type": "array", "items": {"type": "string"}}
    properties = {key: items if kind == "array" else {"type": kind} for key, kind, _, _ in wanted}
    schema = json.dumps({"type": "object", "properties": properties, "required": list(properties)})
    return source.pick(
        (
            f"{told}\n\nAnswer with JSON that fits this schema: {schema}",
            f"Fill this JSON schema from the text.\nSchema: {schema}\nText: {told}",
            f"Extract the data as JSON.\nText: {told}\nSchema: {schema}",
        )
    )


SKILLS = (Skill("JSON by schema", 9, json_object),)

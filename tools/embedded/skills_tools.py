"""Tool calls in Qwen3's format, and answers from tool results."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from embedded import skills_chat
from embedded.example import Example, Skill, Source
from embedded.skills_text import any_word, made_up, named, phrase
from embedded.words import CITIES, LISTS, NAMES


@dataclass
class Call:
    """A wish of the user, the call that serves it, what it may return, and the answer from that."""

    wish: str
    tool: dict[str, Any]
    arguments: dict[str, Any]
    result: str
    answer: str

    @property
    def text(self) -> str:
        """The call as the model writes it."""
        body = json.dumps({"name": self.tool["function"]["name"], "arguments": self.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{body}\n</tool_call>"

    @property
    def message(self) -> dict[str, Any]:
        """The call as an assistant message of a later request, arguments as a string (OpenAI's form)."""
        function = {"name": self.tool["function"]["name"], "arguments": json.dumps(self.arguments, ensure_ascii=False)}
        return {"type": "function", "function": function}


def described(name: str, about: str, parameters: dict[str, dict[str, Any]], required: list[str]) -> dict[str, Any]:
    """A tool in OpenAI's form."""
    schema = {"type": "object", "properties": parameters, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


def text_parameter(source: Source, about: str) -> dict[str, Any]:
    """A string parameter, described or not."""
    return {"type": "string", "description": about} if source.number(0, 2) else {"type": "string"}


def weather(source: Source) -> Call:
    key = source.pick(("city", "city", "location", "place"))
    name = source.pick(("get_weather", "get_weather", "weather", "current_weather", "get_current_weather"))
    about = source.pick(
        ("Get the weather in a city", "Current weather of a place", "Get current temperature for a city.")
    )
    parameters = {key: text_parameter(source, "Name of the city")}
    city, arguments = (found := named(source, CITIES)), {key: found}
    unit = source.pick((None, None, "celsius", "fahrenheit"))
    if unit or source.number(0, 2) == 0:
        parameters["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    if unit:
        arguments["unit"] = unit
    wish = source.pick(
        (
            "What is the weather in {}?",
            "How is the weather in {} today?",
            "What's the weather like in {}?",
            "Is it warm in {}?",
            "Tell me the weather in {}.",
            "weather in {}",
        )
    ).format(city)
    wish = f"{wish} Use {unit}." if unit else wish
    degrees, sky = source.number(-10, 38), source.pick(("sunny", "cloudy", "rainy", "windy", "snowy", "clear"))
    forms = (
        json.dumps({"temperature": degrees, "condition": sky}),
        json.dumps({key: city, "temperature": degrees, "condition": sky}),
        f"{degrees} degrees, {sky}",
    )
    answer = f"It is {degrees} degrees and {sky} in {city}."
    return Call(wish, described(name, about, parameters, [key]), arguments, source.pick(forms), answer)


def calculator(source: Source) -> Call:
    name = source.pick(("calculator", "calculator", "calculate", "compute", "math"))
    key = source.pick(("expression", "expression", "formula"))
    about = source.pick(("Evaluate an arithmetic expression", "Compute the value of an expression", "A calculator"))
    a, b = source.number(2, 9999), source.number(2, 9999)
    sign = source.pick("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    wish = source.pick(
        (
            f"What is {a} {sign} {b}?",
            f"Compute {a} {sign} {b}.",
            f"What is {a} {word} {b}?",
            f"Use the calculator: {a} {sign} {b}",
            f"How much is {a} {word} {b}?",
        )
    )
    expression = f"{a} {sign} {b}"
    result = source.pick((str(value), json.dumps({"result": value})))
    tool = described(name, about, {key: text_parameter(source, "For example 2 + 2")}, [key])
    return Call(wish, tool, {key: expression}, result, f"{expression} = {value}")


def clock(source: Source) -> Call:
    name = source.pick(("get_time", "get_time", "clock", "current_time", "get_current_time"))
    key = source.pick(("city", "city", "location"))
    city = named(source, CITIES)
    about = source.pick(("Get the current time in a city", "The local time of a place", "Tells the time."))
    wish = source.pick(("What time is it in {}?", "Tell me the time in {}.", "What is the current time in {}?")).format(
        city
    )
    time = f"{source.number(0, 23):02d}:{source.number(0, 59):02d}"
    result = source.pick((time, json.dumps({"time": time}), json.dumps({key: city, "time": time})))
    tool = described(name, about, {key: text_parameter(source, "Name of the city")}, [key])
    return Call(wish, tool, {key: city}, result, f"It is {time} in {city}.")


def message(source: Source) -> Call:
    name, who = source.pick(("send_message", "send_email", "notify")), named(source, NAMES)
    key = source.pick(("to", "recipient"))
    usual = source.pick(("I am late", "Dinner is ready", "Call me back", "See you tomorrow", "The train is on time"))
    text = source.pick((usual, phrase(source, 1, 6), phrase(source, 2, 6).capitalize()))
    wish = source.pick((f'Send "{text}" to {who}.', f'Write to {who}: "{text}"', f'Tell {who} "{text}".'))
    fields = {key: text_parameter(source, "Who gets it"), "text": {"type": "string"}}
    tool = described(name, "Send a message to a person", fields, [key, "text"])
    result = source.pick(("sent", "ok", json.dumps({"status": "sent"})))
    return Call(wish, tool, {key: who, "text": text}, result, f"I sent your message to {who}.")


def lookup(source: Source) -> Call:
    """A tool that is known from its description only."""
    what, of = source.pick(LISTS["asked"]), source.pick(LISTS["owners"])
    name = source.pick((f"get_{what}", f"{of}_{what}", f"lookup_{what}", f"find_{of}_{what}"))
    key = source.pick((of, of, f"{of}_name", "name", "id"))
    value = source.pick(
        (any_word(source), made_up(source).capitalize(), phrase(source, 2, 3).title(), str(source.number(10, 99999)))
    )
    wish = source.pick(
        (
            f"What is the {what} of {value}?",
            f"What is the {what} of the {of} {value}?",
            f"Tell me the {what} of {value}.",
            f"Find the {what} of {value}.",
            f"Look up the {what} for {value}.",
        )
    )
    found = source.pick((source.number(1, 999), any_word(source)))
    result = source.pick((str(found), json.dumps({what: found}), json.dumps({key: value, what: found})))
    about = source.pick((f"Get the {what} of a {of}", f"The {what} of a {of}", f"Finds the {what} of a {of}."))
    tool = described(name, about, {key: text_parameter(source, f"Name of the {of}")}, [key])
    return Call(wish, tool, {key: value}, result, f"The {what} of {value} is {found}.")


MAKERS = (weather, weather, weather, calculator, calculator, clock, clock, message, lookup, lookup)
KINDS = {"weather": "weather", "time": "clock", "clock": "clock", "calc": "calculator", "compute": "calculator"}
KINDS |= {"math": "calculator", "send": "message", "notify": "message"}


def toolbox(source: Source, needed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The needed tools and up to two others, in any order."""
    tools = {tool["function"]["name"]: tool for tool in needed}
    kinds = {maker for maker in MAKERS if source.number(0, 3) == 0}
    for maker in sorted(kinds, key=lambda m: m.__name__)[:2]:
        other = maker(source).tool
        if kind(other) not in {kind(tool) for tool in tools.values()}:
            tools[other["function"]["name"]] = other
    found = list(tools.values())
    source.rng.shuffle(found)
    return found


def kind(tool: dict[str, Any]) -> str:
    """What a tool is for: two of a kind would leave open which one is right."""
    name = tool["function"]["name"]
    return next((found for part, found in KINDS.items() if part in name), name.split("_")[-1])


def thought_of(calls: list[Call]) -> str:
    """Why a tool is called."""
    parts = [f"I call {c.tool['function']['name']} with {json.dumps(c.arguments, ensure_ascii=False)}." for c in calls]
    return "A function can answer this. " + " ".join(parts)


def tool_call(source: Source) -> Example:
    call = source.pick(MAKERS)(source)
    messages = [{"role": "user", "content": call.wish}]
    key = f"call {call.wish}"
    return Example(messages, thought_of([call]), call.text, key, tools=toolbox(source, [call.tool]))


def two_calls(source: Source) -> Example:
    first = source.pick((weather, clock))(source)
    key = next(iter(first.arguments))
    first.arguments = {key: first.arguments[key]}
    city = named(source, [c for c in CITIES if c != first.arguments[key]])
    what = "What time is it" if ":" in first.answer else "What is the weather"
    wish = f"{what} in {first.arguments[key]} and in {city}?"
    second = Call(wish, first.tool, {key: city}, "", "")
    answer = f"{first.text}\n{second.text}"
    messages = [{"role": "user", "content": wish}]
    return Example(messages, thought_of([first, second]), answer, "calls " + wish, tools=toolbox(source, [first.tool]))


def tool_result(source: Source) -> Example:
    call = source.pick(MAKERS)(source)
    result, answer = call.result, call.answer
    if result.startswith("{") and source.number(0, 2) == 0:
        result = json.dumps(json.loads(result), separators=(",", ":"))
    thought = f"The function returned: {result}"
    if source.number(0, 11) == 0:
        reason = source.pick(("not found", "timeout", "service unavailable"))
        result = json.dumps({"error": reason})
        answer, thought = f"Sorry, the function failed: {reason}.", f"The function returned an error: {reason}."
    asked = {"role": "assistant", "content": "", "tool_calls": [call.message]}
    if source.number(0, 1):
        asked["reasoning_content"] = thought_of([call])
    messages = [{"role": "user", "content": call.wish}, asked, {"role": "tool", "content": result}]
    return Example(messages, thought, answer, f"result {call.wish} {result}", tools=toolbox(source, [call.tool]))


UNSERVED = (  # what is asked, and the only tool there is
    (weather, calculator),
    (clock, calculator),
    (weather, message),
    (clock, message),
    (weather, lookup),
    (lookup, weather),
)


def no_call(source: Source) -> Example:
    """Tools are there, but none of them serves the question."""
    if source.number(0, 2):
        example = source.pick((skills_chat.talk, skills_chat.fact))(source)
        tools = toolbox(source, [source.pick(MAKERS)(source).tool])
        return replace(example, tools=tools, key="tools " + example.key if example.key != "talk" else "talk")
    asked, offered = source.pick(UNSERVED)
    call, answer = asked(source), skills_chat.NO_ACCESS
    tools = [offered(source).tool]
    key = f"no call {call.wish}"
    return Example([{"role": "user", "content": call.wish}], skills_chat.REASONS[answer], answer, key, tools=tools)


SKILLS = (
    Skill("tool call", 8, tool_call),
    Skill("two tool calls", 2, two_calls),
    Skill("no tool needed", 2, no_call),
    Skill("answer from a tool result", 5, tool_result),
)

"""Skills on numbers and order: arithmetic with visible working, counting, comparing, sorting."""

from __future__ import annotations

from embedded.example import Example, Skill, Source, ask
from embedded.skills_text import any_word


def digits_of(number: int) -> tuple[int, int]:
    """Tens and ones of a number below 100."""
    return number // 10, number % 10


def working_of_sum(a: int, b: int) -> str:
    """The written addition of two numbers below 100, column by column."""
    (a_tens, a_ones), (b_tens, b_ones) = digits_of(a), digits_of(b)
    ones = a_ones + b_ones
    carry = ones // 10
    lines = [f"{a} + {b}.", f"Ones: {a_ones} + {b_ones} = {ones}, write {ones % 10}, carry {carry}."]
    lines.append(f"Tens: {a_tens} + {b_tens} + {carry} = {a_tens + b_tens + carry}.")
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def working_of_difference(a: int, b: int) -> str:
    """The written subtraction a - b for 0 <= b <= a < 100, column by column."""
    (a_tens, a_ones), (b_tens, b_ones) = digits_of(a), digits_of(b)
    borrow = int(a_ones < b_ones)
    head = f"{a_ones} is less than {b_ones}, borrow 1: " if borrow else ""
    lines = [f"{a} - {b}.", f"Ones: {head}{a_ones + 10 * borrow} - {b_ones} = {a_ones + 10 * borrow - b_ones}."]
    taken = f"{a_tens} - {borrow} - {b_tens} = {a_tens - borrow - b_tens}"
    return "\n".join([*lines, f"Tens: {taken}.", f"So {a} - {b} = {a - b}."])


def sum_question(source: Source, a: int, b: int) -> str:
    plain = (f"What is {a} + {b}?", f"{a} + {b}", f"{a} + {b} = ?", f"Compute {a} + {b}.", f"What's {a} plus {b}?")
    wordy = (
        f"Add {a} and {b}.",
        f"How much is {a} + {b}?",
        f"What is the sum of {a} and {b}?",
        f"Calculate {a}+{b}",
        f"I have {a} apples and get {b} more. How many apples do I have?",
    )
    return source.pick(plain + wordy)


def addition(source: Source) -> Example:
    top = source.pick((9, 20, 99, 99, 99, 99, 99, 99))
    a, b = source.number(0, top), source.number(0, top)
    answer = f"{a} + {b} = {a + b}"
    return ask(sum_question(source, a, b), answer, working_of_sum(a, b), key=f"sum {min(a, b)} {max(a, b)}")


def subtraction(source: Source) -> Example:
    top = source.pick((9, 20, 99, 99, 99, 99))
    b, a = sorted((source.number(0, top), source.number(0, top)))
    question = source.pick(
        (
            f"What is {a} - {b}?",
            f"{a} - {b}",
            f"Compute {a} - {b}.",
            f"What's {a} minus {b}?",
            f"Subtract {b} from {a}.",
            f"I have {a} coins and give away {b}. How many are left?",
        )
    )
    return ask(question, f"{a} - {b} = {a - b}", working_of_difference(a, b), key=f"difference {a} {b}")


def multiplication(source: Source) -> Example:
    a, b = source.number(0, 12), source.number(0, 12)
    form = (f"What is {a} * {b}?", f"{a} times {b}", f"Multiply {a} by {b}.", f"What is {a} x {b}?", f"{a} * {b} = ?")
    question = source.pick(form)
    thought = f"I know the table: {a} times {b} is {a * b}."
    return ask(question, f"{a} x {b} = {a * b}", thought, key=question)


def counting(source: Source) -> Example:
    kind = source.number(0, 5)
    if kind <= 1:
        low, high, step = 1, source.number(2, 30), 1
        form = ("Count to {1}.", "Count from 1 to {1}.", "Please count to {1}.", "Can you count up to {1}?")
    elif kind <= 3:
        low = source.number(0, 60)
        high, step = low + source.number(2, 25), 1
        form = ("Count from {0} to {1}.", "List the numbers from {0} to {1}.", "Count up from {0} to {1}, please.")
    elif kind == 4:
        low, high, step = source.number(4, 30), source.pick((0, 1)), -1
        form = ("Count down from {0} to {1}.", "Count backwards from {0} to {1}.")
    else:
        step = source.pick((2, 5, 10))
        low, high = step, step * source.number(4, 12)
        form = ("Count to {1} in steps of {2}.", "Count by {2} up to {1}.")
    question = source.pick(form).format(low, high, step)
    numbers = range(low, high + (1 if step > 0 else -1), step)
    thought = f"I start at {low}, go in steps of {abs(step)} and stop at {high}."
    return ask(question, ", ".join(map(str, numbers)), thought)


def comparing(source: Source) -> Example:
    a, b = source.rng.sample(range(source.pick((20, 100, 1000))), 2)
    larger = source.number(0, 1) == 1
    word = source.pick(("larger", "bigger", "greater") if larger else ("smaller", "less"))
    question = source.pick((f"Which is {word}, {a} or {b}?", f"Which number is {word}: {a} or {b}?"))
    best = max(a, b) if larger else min(a, b)
    thought = f"{min(a, b)} < {max(a, b)}."
    return ask(question, f"{best} is {word}.", thought, key=f"compare {min(a, b)} {max(a, b)}")


def sorting_numbers(source: Source) -> Example:
    numbers = [source.number(0, source.pick((9, 99))) for _ in range(source.number(3, 7))]
    down = source.number(0, 3) == 0
    ordered = sorted(numbers, reverse=down)
    shown = ", ".join(map(str, numbers))
    form = (
        (f"Sort these numbers from largest to smallest: {shown}", f"Sort in descending order: {shown}")
        if down
        else (
            f"Sort these numbers: {shown}",
            f"Sort {shown}",
            f"Put these numbers in ascending order: {shown}",
            f"Sort from smallest to largest: {shown}",
        )
    )
    answer = ", ".join(map(str, ordered))
    thought = f"{'Largest' if down else 'Smallest'} first, one after the other: {', then '.join(map(str, ordered))}."
    return ask(source.pick(form), answer, thought, key="sort " + shown)


def neighbour(source: Source, text: str) -> str:
    """A word that begins like text, or any."""
    found = (any_word(source) for _ in range(60))
    return next((w for w in found if w[0] == text[0] and w != text), any_word(source))


def sorting_words(source: Source) -> Example:
    words = [any_word(source) for _ in range(source.number(3, 6))]
    if source.number(0, 2) == 0:
        words[1] = neighbour(source, words[0])
    source.rng.shuffle(words)
    ordered = sorted(words)
    shown = ", ".join(words)
    question = source.pick(
        (
            f"Sort these words: {shown}",
            f"Sort alphabetically: {shown}",
            f"Put these words in alphabetical order: {shown}",
        )
    )
    begin = {w: "-".join(w[:3]) for w in words}
    given = ", ".join(f"{w} {begin[w]}" for w in words)
    thought = f"They begin: {given}. In order: {', '.join(f'{begin[w]} {w}' for w in ordered)}."
    return ask(question, ", ".join(ordered), thought, key="sort " + shown)


SKILLS = (
    Skill("two-digit addition", 9, addition),
    Skill("two-digit subtraction", 7, subtraction),
    Skill("multiplication table", 1.5, multiplication),
    Skill("counting", 3, counting),
    Skill("comparing numbers", 1.5, comparing),
    Skill("sorting numbers", 5, sorting_numbers),
    Skill("sorting words", 6, sorting_words),
)

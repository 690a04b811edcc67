"""`tpqwen chat MODEL`: a conversation in the terminal, the model in this process. A failed turn is taken back."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.text import Text

from tpqwen.config import Config
from tpqwen.console.options import given_options
from tpqwen.console.sampling import add_sampling, given_sampling
from tpqwen.errors import TpqwenError
from tpqwen.llm import LLM

with suppress(ImportError):
    import readline  # noqa: F401  line editing and history in input(), where Python has it

HELP = """\
/system TEXT   set the system prompt (no text: remove it)
/think on|off  let the model think first, or not; without a word: the model's own way
/clear         forget the conversation
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C stops an answer"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command beside the model's own."""
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    add_sampling(parser)


def run(args: argparse.Namespace, config: Config) -> int:
    """The command. Returns the exit code."""
    console = Console(highlight=False)
    options = {"model": config.model.model} | given_options(args)
    console.print(f"Loading {config.model.model} ...", style="dim")
    with LLM(**options) as llm:
        console.print("Ready. /help lists the commands.", style="dim")
        Conversation(llm, console, given_sampling(args), system=args.system).loop(input)
    return 0


@dataclass
class Conversation:
    """The messages so far and how the next answer is made."""

    llm: LLM
    console: Console
    sampling: dict[str, Any]
    system: str = ""
    thinking: bool | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)

    def loop(self, read: Callable[[str], str]) -> None:
        """Take lines from `read(prompt)` until /exit or the end of input."""
        while True:
            try:
                line = read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                self.turn(line)

    def command(self, line: str) -> bool:
        """One of HELP's commands; False ends the conversation."""
        word, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if word in ("exit", "quit"):
            return False
        if word == "system":
            self.system = rest
        elif word == "think" and rest in ("on", "off", ""):
            self.thinking = {"on": True, "off": False, "": None}[rest]
        elif word == "clear":
            self.messages.clear()
        else:
            self.console.print(HELP, markup=False)
        return True

    def turn(self, text: str) -> None:
        """One question and its answer. What Ctrl-C cuts off stays as said; after an error the turn never was."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        started, first = time.perf_counter(), 0.0
        answer, reasoning = "", ""
        try:
            params = self.llm.sampling_params(thinking=self.thinking, **self.sampling) if self.sampling else None
            pieces = self.llm.stream_chat([*system, *self.messages, question], params, thinking=self.thinking)
            for piece in pieces:
                first = first or time.perf_counter() - started
                answer, reasoning = answer + piece.text, reasoning + piece.reasoning
                self.console.print(Text(piece.reasoning, "dim") + Text(piece.text), end="", soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(" [stopped]", style="dim", markup=False, end="")
        except TpqwenError as error:
            self.console.print(f"\n{error}", style="red", markup=False)
            return
        self.messages += [question, {"role": "assistant", "content": answer}]
        self._report(reasoning + answer, first, time.perf_counter() - started)

    def _report(self, text: str, first_s: float, total_s: float) -> None:
        tokens = len(self.llm.tokenizer.encode(text)) if text else 0
        rate = f"{(tokens - 1) / (total_s - first_s):.1f} tok/s" if tokens > 1 and total_s > first_s else "- tok/s"
        self.console.print(f"\n[{tokens} tokens, first after {first_s:.2f} s, {rate}]", style="dim", markup=False)

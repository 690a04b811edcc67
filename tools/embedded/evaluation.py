"""Held-out evaluation of a checkpoint folder through transformers, and its table in the model card."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from embedded.corpus import SKILLS, Material, conversation, draw, dressed, source_of
from embedded.example import Skill

EXTRA_TOKENS = 100  # beyond the expected length, before an answer counts as endless
BATCH_PROMPTS = 1024
BEGIN_TABLE, END_TABLE = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"
PROMPTS = (
    "Hello!",
    "What can you do?",
    "Who are you?",
    "What is tpqwen?",
    "What is 17 + 25?",
    "What is 83 - 47?",
    "Count from 1 to 20.",
    "Sort these numbers: 42, 7, 19, 88, 3",
    "Tell me a story about a fox.",
    "Give me JSON with name, age and city: Maria is 34 years old and lives in Lisbon.",
    "What is the weather in Paris?",
    "What is the capital of France?",
    "Write hello world in upper case.",
    "Reverse the word stone.",
    "Explain quantum physics.",
    "How do I start the server?",
)


@dataclass
class Case:
    """One prompt with what is expected of it and what came."""

    skill: Skill
    thinking: bool
    unseen: bool
    prompt: str
    expected: str
    reply: str = ""

    @property
    def ended(self) -> bool:
        return self.reply.endswith("<|im_end|>")

    @property
    def formed(self) -> bool:
        """Thinking: one block, opened first and closed. Otherwise: no mark of thinking at all."""
        opened, closed = self.reply.count("<think>"), self.reply.count("</think>")
        if not self.thinking:
            return opened == closed == 0
        return opened == closed == 1 and self.reply.startswith("<think>\n") and "\n</think>\n\n" in self.reply

    @property
    def right(self) -> bool:
        """The answer is the expected one; JSON and tool calls must be equal to the letter too."""
        return self.ended and self.formed and answer_of(self.reply) == answer_of(self.expected)


def answer_of(reply: str) -> str:
    """What stands after the thinking block, without the end token."""
    return reply.split("</think>")[-1].removesuffix("<|im_end|>").strip("\n")


def cases(material: Material, number: int) -> list[Case]:
    """number unseen instances per skill and thinking mode; seen ones for the few skills that have no unseen ones."""
    found = []
    for skill in SKILLS:
        source = source_of(material, f"evaluation {skill.name}", held_out=True)
        for i in range(2 * number):
            unseen = draw(source, skill, held_out=True, tries=1500)
            example = unseen or draw(source, skill)
            if example is None:
                raise RuntimeError(f"no instance of {skill.name}")
            document = conversation(dressed(source, example), i % 2 == 0)
            found.append(Case(skill, i % 2 == 0, unseen is not None, document.prompt, document.wanted))
    return found


class Speaker:
    """A checkpoint in transformers that answers many prompts at once."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
        self.device = device

    @torch.no_grad()
    def replies(self, prompts: list[str], max_new_tokens: int, sampled: bool) -> list[str]:
        """Completions with their end token, without padding."""
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(self.device)
        mode: dict[str, Any] = {"do_sample": True} if sampled else GREEDY
        out = self.model.generate(**batch, max_new_tokens=max_new_tokens, **mode)
        texts = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :])
        return [text.split("<|endoftext|>")[0] for text in texts]

    def answer(self, found: list[Case], sampled: bool, limit: int) -> None:
        """Fills in the replies, prompts of similar expected length together."""
        lengths = {id(c): len(self.tokenizer(c.expected)["input_ids"]) for c in found}
        ordered = sorted(found, key=lambda c: lengths[id(c)])
        for start in range(0, len(ordered), BATCH_PROMPTS):
            part = ordered[start : start + BATCH_PROMPTS]
            longest = min(limit, lengths[id(part[-1])] + EXTRA_TOKENS)
            for case, reply in zip(part, self.replies([c.prompt for c in part], longest, sampled), strict=True):
                case.reply = reply
            print(f"  {start + len(part)}/{len(ordered)} answers", flush=True)


GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


def share(flags: list[bool]) -> float:
    """Percentage of true ones."""
    return round(100 * sum(flags) / max(len(flags), 1), 1)


def summary(found: list[Case]) -> dict[str, Any]:
    """Figures over all cases and per skill."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in found:
        groups[case.skill.name].append(case)
    skills = {
        name: {
            "thinking": share([c.right for c in group if c.thinking]),
            "direct": share([c.right for c in group if not c.thinking]),
            "cases": len(group),
            "unseen": all(c.unseen for c in group),
            "checked": group[0].skill.checked,
        }
        for name, group in groups.items()
    }
    return {
        "skills": skills,
        "ended": share([c.ended for c in found]),
        "thinking well formed": share([c.formed for c in found if c.thinking]),
        "direct well formed": share([c.formed for c in found if not c.thinking]),
    }


def misses(found: list[Case], per_skill: int = 6) -> list[dict[str, str]]:
    """Some wrong answers of each skill, to look at."""
    kept: dict[str, list[dict[str, str]]] = defaultdict(list)
    for case in found:
        if case.skill.checked and not case.right and len(kept[case.skill.name]) < per_skill:
            kept[case.skill.name].append({"prompt": case.prompt[-300:], "expected": case.expected, "reply": case.reply})
    return [{"skill": name, **miss} for name, group in kept.items() for miss in group]


def evaluate(folder: Path, material: Material, number: int, device: torch.device, limit: int) -> dict[str, Any]:
    """Exact match per skill (greedy), forms under sampling, sample answers. limit: most tokens of a reply."""
    speaker = Speaker(folder, device)
    found = cases(material, number)
    speaker.answer(found, False, limit)
    result = {"greedy": summary(found), "misses": misses(found)}
    torch.manual_seed(material.seed)
    speaker.answer(found, True, limit)
    result["sampled"] = summary(found)
    samples = [(text, thinking) for text in PROMPTS for thinking in (True, False)]
    chats = [[{"role": "user", "content": text}] for text, _ in samples]
    render = speaker.tokenizer.apply_chat_template
    prompts = [
        render(chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
        for chat, (_, thinking) in zip(chats, samples, strict=True)
    ]
    replies = speaker.replies(prompts, min(limit, 320), False)
    result["samples"] = [
        {"prompt": text, "thinking": thinking, "reply": reply}
        for (text, thinking), reply in zip(samples, replies, strict=True)
    ]
    (opening,) = speaker.replies(["Once upon a time"], min(limit, 200), False)
    result["samples"].append({"prompt": "Once upon a time", "thinking": False, "reply": opening})
    return result


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    greedy, sampled, run = report["evaluation"]["greedy"], report["evaluation"]["sampled"], report["run"]
    lines = ["| skill (exact match, greedy, %) | thinking | direct | cases | instances |", "|---|--:|--:|--:|---|"]
    for name, row in greedy["skills"].items():
        seen = "unseen" if row["unseen"] else "also in the training data"
        score = (f"{row['thinking']:.1f}", f"{row['direct']:.1f}") if row["checked"] else ("not checked", "not checked")
        lines.append(f"| {name} | {score[0]} | {score[1]} | {row['cases']} | {seen} |")
    lines += ["", "| over all cases, % | greedy | sampled (temperature 0.6) |", "|---|--:|--:|"]
    for key in ("ended", "thinking well formed", "direct well formed"):
        label = "answers that end by themselves" if key == "ended" else key
        lines.append(f"| {label} | {greedy[key]:.1f} | {sampled[key]:.1f} |")
    losses = report["held_out_loss"]
    lines += [
        "",
        f"Loss on held-out text (nats per token): prose {losses['prose']:.3f}, answers {losses['answers']:.3f}.",
        "",
        f"The run: {run['steps']} steps, {run['tokens'] / 1e6:.0f} million tokens in {run['seconds'] / 60:.1f} minutes "
        f"on {run['device']} (torch {run['torch']}), {run['new_tokens'] / 1e6:.0f} million of them made anew, "
        f"seed {run['seed']}.",
    ]
    return "\n".join(lines)


def write_card(report: Path, card: Path) -> None:
    """Puts the figures of a report, and what weights they are of, between the marks in the model card."""
    text = card.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN_TABLE)
    _, tail = rest.split(END_TABLE)
    figures = table(json.loads(report.read_text(encoding="utf-8")))
    digest = hashlib.sha256((report.parent / "model" / "model.safetensors").read_bytes()).hexdigest()
    weights = f"`model.safetensors` of that run has the SHA-256 `{digest}`."
    card.write_text(f"{head}{BEGIN_TABLE}\n{figures} {weights}\n{END_TABLE}{tail}", encoding="utf-8")

"""Trains the embedded model from scratch: tokenizer, data, weights, held-out evaluation; one seed, one command.

    python3 tools/train_embedded.py gather --prose .gpu/embedded/prose.xz     once, on Debian: fetches the prose
    python3 tools/train_embedded.py train --prose .gpu/embedded/prose.xz --minutes 5 --out build/embedded
    python3 tools/train_embedded.py card --report build/embedded/report.json  figures into docs/embedded-model.md

A run by --steps is repeatable; one by --minutes has as many steps as the machine allows.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from embedded import checkpoint, corpus, prose, training
from embedded.feed import Feed, processes
from embedded.network import Qwen3, load_weights, save_weights

CARD = Path(__file__).parent.parent / "docs" / "embedded-model.md"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    gather = commands.add_parser("gather", help="fetch prose from Debian packages")
    gather.add_argument("--prose", type=Path, required=True)
    train = commands.add_parser("train", help="train and evaluate")
    train.add_argument("--out", type=Path, required=True, help="report.json and the folder model are written here")
    train.add_argument("--prose", type=Path, help="the file that gather wrote; without it stories take its place")
    train.add_argument("--minutes", type=float, help="of training, data and evaluation come on top")
    train.add_argument("--steps", type=int)
    train.add_argument("--step-tokens", type=int, default=131_072)
    train.add_argument("--pass-tokens", type=int, default=131_072, help="in one forward pass; less needs less memory")
    train.add_argument("--longest-row", type=int, default=checkpoint.CONTEXT_TOKENS, help="tokens")
    train.add_argument("--tokenizer-documents", type=int, default=30_000)
    train.add_argument("--cases", type=int, default=100, help="evaluated per skill and thinking mode; 0: none")
    train.add_argument("--reply-tokens", type=int, default=480, help="most tokens of an evaluated reply")
    train.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make the data")
    train.add_argument("--seed", type=int, default=7)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--no-compile", action="store_true")
    card = commands.add_parser("card", help="write a report's figures into the model card")
    card.add_argument("--report", type=Path, required=True)
    found = parser.parse_args(argv)
    if found.command == "train" and not (found.minutes or found.steps):
        parser.error("give --minutes or --steps")
    return found


def prepare(options: argparse.Namespace, folder: Path) -> corpus.Material:
    """Tokenizer and configs in folder."""
    material = corpus.Material(folder, options.prose, options.seed)
    clock = time.monotonic()
    tokenizer = checkpoint.train_tokenizer(corpus.tokenizer_texts(material, options.tokenizer_documents))
    checkpoint.write_tokenizer(folder, tokenizer)
    checkpoint.write_configs(folder, tokenizer)
    print(f"tokenizer: {time.monotonic() - clock:.0f} s", flush=True)
    return material


def fitted(options: argparse.Namespace, material: corpus.Material, model: Qwen3) -> training.Outcome:
    """Trains model on data that is made meanwhile."""
    plan = training.Plan(
        seconds=options.minutes * 60 if options.minutes else None,
        steps=options.steps,
        step_tokens=options.step_tokens,
        pass_tokens=options.pass_tokens,
        compiled=options.device.startswith("cuda") and not options.no_compile,
    )
    pool = processes(options.workers)
    try:
        stages = []
        for longest, until in training.STAGES:
            row_tokens = min(longest, options.longest_row)
            feed = Feed(pool, material, row_tokens + 1, 2 * options.workers, patient=options.minutes is None)
            stages.append(training.Stage(feed, row_tokens, until))
        return training.train(model, stages, plan)
    finally:
        pool.shutdown(cancel_futures=True)


def train(options: argparse.Namespace) -> None:
    """Everything from data to report."""
    folder = options.out / "model"
    material = prepare(options, folder)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = Qwen3(checkpoint.ARCHITECTURE).to(device)
    print(f"parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M", flush=True)
    outcome = fitted(options, material, model)
    save_weights(model, folder)
    checkpoint.write_hashes(folder)
    load_weights(model, folder)  # from here on the bf16 weights that ship
    report = {
        "run": {
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "new_tokens": outcome.new_tokens,
            "seconds": round(outcome.seconds, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
            "torch": torch.__version__,
            "seed": options.seed,
            "losses": outcome.losses,
        }
    }
    write_report(options, report)
    plain, asked = (rows[:, : options.longest_row + 1] for rows in corpus.held_out_rows(material))
    report["held_out_loss"] = {
        "prose": training.mean_loss(model, plain),
        "answers": training.mean_loss(model, asked),
    }
    write_report(options, report)
    if options.cases:
        from embedded import evaluation  # transformers takes seconds to load: not before it is needed

        report["evaluation"] = evaluation.evaluate(folder, material, options.cases, device, options.reply_tokens)
        write_report(options, report)
        print(evaluation.table(report), flush=True)


def write_report(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """What is known so far, so that a late failure loses nothing."""
    checkpoint.write_json(options.out / "report.json", report)


def main(argv: list[str] | None = None) -> None:
    """Runs one command."""
    options = arguments(argv)
    if options.command == "gather":
        options.prose.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            print(json.dumps(prose.gather(options.prose, Path(work)), indent=2))
    elif options.command == "card":
        from embedded import evaluation

        evaluation.write_card(options.report, CARD)
    else:
        train(options)


if __name__ == "__main__":
    main()

"""`tpqwen bench serve URL CASE...`: load on any server with OpenAI's completions, from several client processes.

A CASE is closed:CONCURRENCY:REQUESTS:IN:OUT or open:RATE:REQUESTS:IN:OUT; with :warm at its end it runs unreported.
Prompts are random token ids, every answer has exactly OUT tokens. Goodput counts requests that kept to --slo-ttft and
--slo-tpot. TPOT is a request's time from first to last text, per token; ITL the time between two events.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from tpqwen.bench.cpu import CpuTimes
from tpqwen.bench.environment import environment
from tpqwen.bench.load import Case, Done, Job, Record
from tpqwen.config import Config, client_api_key
from tpqwen.errors import ConfigError, EngineError

TAKES_CONFIG = False  # it measures a server that runs already
PERCENTILES = (50, 90, 95, 99)
FILE_WIDTH = 160  # characters, where there is no terminal to say
COLUMNS = ("tok_s", "req_s", "ttft_p50", "ttft_p99", "tpot_p50", "tpot_p99", "e2e_p50", "goodput_req_s", "errors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("url", metavar="URL", help="where the server is, without /v1")
    parser.add_argument(
        "cases", nargs="+", metavar="CASE", help="closed:64:512:512:128, open:60:600:512:128, ...[:warm]"
    )
    parser.add_argument("--model", help="name in requests (default: the first that the server lists)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="client processes (default 4)")
    parser.add_argument(
        "--token-ids", type=int, default=10_000, metavar="N", help="prompt ids are below N (default 10000)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of prompts and arrivals (default 1)")
    parser.add_argument("--slo-ttft", type=float, metavar="MS", help="time to first token that counts for goodput")
    parser.add_argument("--slo-tpot", type=float, metavar="MS", help="time per output token that counts for goodput")
    parser.add_argument("--cpu", metavar="WORDS", help="CPU per token of local processes: replica,haproxy,Proxy")
    parser.add_argument("--save", type=Path, help="write the results as JSON here")
    parser.add_argument("--compare", type=Path, help="show the change of throughput against an earlier --save")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="distributions of TTFT, TPOT and end to end time")
    parser.epilog = "An API key is taken from OPENAI_API_KEY."


def run(args: argparse.Namespace, config: Config) -> int:
    """The command: one JSON line per case, then a table. Exit code 1 when a request failed."""
    cases = [parse(text) for text in args.cases]
    url = args.url.rstrip("/").removesuffix("/v1")
    model = args.model or first_model(url)
    results: list[dict[str, Any]] = []
    samples: list[tuple[str, list[Record]]] = []
    for number, (case, warm) in enumerate(cases):
        cpu = CpuTimes(args.cpu.split(",") if args.cpu else [])
        seed = 1000 * args.seed + number  # no case finds its prompts in the prefix cache
        shares = clients_for(case, args.clients)
        done = measure(Job(url, model, case, 0, shares, seed, args.token_ids, client_api_key()))
        result = summary(done, slo_ttft_ms=args.slo_ttft, slo_tpot_ms=args.slo_tpot) | {"case": case.name}
        if warm and not result["errors"]:
            continue
        result |= {f"cpu_us_per_token_{word}": us for word, us in cpu.per_token_us(result["tokens"]).items()}
        results.append(result)
        samples.append((case.name, [r for part in done for r in part.records]))
        print(json.dumps(result), flush=True)
    _print(model, results, json.loads(args.compare.read_text())["results"] if args.compare else [])
    if args.save:
        facts = environment("auto") | {"url": url, "model": model, "clients": str(args.clients)}
        args.save.write_text(json.dumps({"environment": facts, "results": results}, indent=1))
    if args.plot:
        plot(samples, args.plot)
    return 1 if any(r["errors"] for r in results) else 0


def parse(text: str) -> tuple[Case, bool]:
    """A case, and whether it only warms up. Raises ConfigError."""
    words = text.removesuffix(":warm").split(":")
    try:
        kind, level, requests, prompt, output = words
        case = Case(kind, float(level), int(requests), int(prompt), int(output))
    except ValueError:
        raise ConfigError(f"a case is closed:CONCURRENCY:REQUESTS:IN:OUT or open:RATE:..., not {text!r}") from None
    least = min(case.level, case.requests, case.prompt_tokens, case.output_tokens)
    if kind not in ("closed", "open") or least <= 0 or (kind == "closed" and case.level % 1):
        raise ConfigError(f"a case is closed or open and all its numbers are above 0, not {text!r}")
    return case, text.endswith(":warm")


def clients_for(case: Case, clients: int) -> int:
    """No process without a request of its own at any time."""
    return max(1, min(clients, case.requests, int(case.level) if case.kind == "closed" else case.requests))


def first_model(url: str) -> str:
    """The first model that the server lists. Raises EngineError."""
    headers = {"authorization": f"Bearer {key}"} if (key := client_api_key()) else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/models", headers=headers), timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise EngineError(f"{url}/v1/models does not answer as an OpenAI server does: {error}") from None


def measure(job: Job) -> list[Done]:
    """The case, from job.shares processes that begin together. Raises EngineError when one of them breaks down."""
    command = [sys.executable, "-m", "tpqwen.bench.load"]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(job.shares)]
    try:
        for share, process in enumerate(processes):
            _tell(process, msgspec.json.encode(msgspec.structs.replace(job, share=share)).decode())
        for process in processes:
            _hear(process)
        for process in processes:
            _tell(process, "go")
        return [msgspec.json.decode(_hear(process), type=Done) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EngineError("a client process of the benchmark ended early; what it said stands above")
    return line


def summary(
    parts: Sequence[Done], *, slo_ttft_ms: float | None = None, slo_tpot_ms: float | None = None
) -> dict[str, Any]:
    """Figures of one case; times in milliseconds. Requests that failed count as errors and as nothing else."""
    records = [r for part in parts for r in part.records]
    good = [r for r in records if r.error is None]
    seconds = max(part.seconds for part in parts)
    tokens = sum(r.tokens for r in good)
    kept = [r for r in good if _within(r.ttft_s, slo_ttft_ms) and _within(tpot_s(r), slo_tpot_ms)]
    failed = [r.error for r in records if r.error is not None]
    times = {
        "ttft": [r.ttft_s for r in good],
        "tpot": [tpot_s(r) for r in good],
        "itl": [gap for r in good for gap in r.gaps_s],
        "e2e": [r.e2e_s for r in good],
    }
    return {
        "s": round(seconds, 3),
        "tokens": tokens,
        "tok_s": round(tokens / seconds, 1),
        "req_s": round(len(good) / seconds, 2),
        "goodput_req_s": round(len(kept) / seconds, 2),
        "goodput_share": round(len(kept) / len(records), 4) if records else 0.0,
        **{f"{name}_{key}": ms for name, values in times.items() for key, ms in percentiles(values).items()},
        "errors": len(failed),
        "statuses": {str(k): n for k, n in sorted(Counter(r.status for r in records).items())},
        "first_error": failed[0] if failed else None,
    }


def ttft_s(record: Record) -> float:
    """Seconds to the first text."""
    return record.ttft_s


def e2e_s(record: Record) -> float:
    """Seconds to the last text."""
    return record.e2e_s


def tpot_s(record: Record) -> float:
    """Seconds per token after the first."""
    return (record.e2e_s - record.ttft_s) / max(record.tokens - 1, 1)


def percentiles(values: Iterable[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(["mean", *(f"p{p}" for p in PERCENTILES)])
    at = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in PERCENTILES}
    return {name: round(s * 1e3, 3) for name, s in {"mean": sum(ordered) / len(ordered), **at}.items()}


def plot(samples: Sequence[tuple[str, Sequence[Record]]], path: Path) -> None:
    """Cumulative distributions of all cases, one line each. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'tpqwen[bench]'") from None
    figure = Figure(figsize=(13, 4), layout="constrained")
    kinds = (("TTFT", ttft_s), ("TPOT", tpot_s), ("end to end", e2e_s))
    for axes, (title, of) in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        for name, records in samples:
            values = sorted(of(r) * 1e3 for r in records if r.error is None)
            axes.plot(values, [(i + 1) / len(values) for i in range(len(values))], label=name)
        axes.set(title=title, xlabel="ms", ylabel="share of requests", ylim=(0, 1))
        axes.grid(visible=True, alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def _within(seconds: float, limit_ms: float | None) -> bool:
    return limit_ms is None or seconds * 1e3 <= limit_ms


def _print(model: str, results: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> None:
    before = {r["case"]: r for r in old}
    table = Table(title=f"{model}; times in ms")
    for name in ("case", *COLUMNS, *(["change"] if old else [])):
        table.add_column(name, justify="left" if name == "case" else "right")
    for r in results:
        earlier = before.get(r["case"])
        change = [f"{r['tok_s'] / earlier['tok_s'] - 1:+.1%}" if earlier else "new"] if old else []
        table.add_row(r["case"], *(str(r[name]) for name in COLUMNS), *change)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)

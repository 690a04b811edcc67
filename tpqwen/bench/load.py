"""One client process of `tpqwen bench serve`: streams completions from any OpenAI URL and notes when what came.

Runs as `python -m tpqwen.bench.load`: a Job as one line of JSON in, "ready" out, any line in to begin, what is Done as
one line of JSON out. Imports no torch, so that many of them start at once and leave the cores to the measurement.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time

import aiohttp
import msgspec
import uvloop

TIMEOUT_S = 900.0
_ERROR_CHARS = 200


class Case(msgspec.Struct, frozen=True):
    """closed: `level` requests at once, the next when one ends. open: `level` arrivals a second, Poisson."""

    kind: str
    level: float
    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.level:g}:{self.requests}:{self.prompt_tokens}:{self.output_tokens}"


class Job(msgspec.Struct, frozen=True):
    """What one of `shares` processes does: every shares-th request of the case, from number `share` on.

    Prompts are random ids below token_ids, which must be in the vocabulary and no control tokens.
    """

    url: str
    model: str
    case: Case
    share: int
    shares: int
    seed: int
    token_ids: int = 10_000
    api_key: str = ""


class Record(msgspec.Struct):
    """One request. Seconds; ttft_s to the first event with text, gaps_s between later events, at_s since the start.

    status: of the answer, 0 where none came. retry_after: the header of that name.
    """

    at_s: float
    status: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    tokens: int = 0
    gaps_s: list[float] = []
    error: str | None = None
    retry_after: str = ""


class Done(msgspec.Struct):
    """What one process measured."""

    seconds: float
    records: list[Record]


async def stream(session: aiohttp.ClientSession, job: Job, prompt: list[int], begin: float) -> Record:
    """One request to its end. A failure is noted in the record, never raised."""
    begun = time.perf_counter()
    record = Record(begun - begin)
    body = {
        "model": job.model,
        "prompt": prompt,
        "max_tokens": job.case.output_tokens,
        "ignore_eos": True,
        "temperature": 0.6,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"content-type": "application/json"}
    if job.api_key:
        headers["authorization"] = f"Bearer {job.api_key}"
    try:
        async with session.post(f"{job.url}/v1/completions", data=msgspec.json.encode(body), headers=headers) as answer:
            record.status = answer.status
            record.retry_after = answer.headers.get("retry-after", "")
            if answer.status != 200:
                record.error = f"{answer.status} {(await answer.text())[:_ERROR_CHARS]}"
            else:
                await _read(answer, record, begun)
    except (aiohttp.ClientError, TimeoutError, msgspec.MsgspecError, OSError) as error:
        record.error = repr(error)[:_ERROR_CHARS]
    if record.error is None and record.tokens != job.case.output_tokens:
        record.error = f"{record.tokens} tokens instead of {job.case.output_tokens}"
    return record


async def _read(answer: aiohttp.ClientResponse, record: Record, begun: float) -> None:
    rest, last, done = b"", begun, False
    async for chunk in answer.content.iter_any():
        now = time.perf_counter()
        *events, rest = (rest + chunk).split(b"\n\n")
        texts = 0
        for event in events:
            if event == b"data: [DONE]":
                done = True
            elif b'"usage":{' in event or b'"usage": {' in event:
                record.tokens = msgspec.json.decode(event[5:])["usage"]["completion_tokens"]
            elif event.startswith(b'data: {"error"'):
                record.error = event[6 : 6 + _ERROR_CHARS].decode(errors="replace")
            else:
                texts += event.startswith(b"data:")
        if texts and not record.ttft_s:
            record.ttft_s = now - begun
        elif texts:
            record.gaps_s.append(now - last)
        if texts:
            last = now
    record.e2e_s = last - begun
    if not done and record.error is None:
        record.error = "the stream ended without [DONE]"


def prompt(job: Job, number: int) -> list[int]:
    """The prompt of the case's request of this number, the same whoever sends it."""
    return random.Random(f"{job.seed}:{number}").choices(range(job.token_ids), k=job.case.prompt_tokens)


async def run(job: Job) -> Done:
    """This process's share of the case."""
    case, random_ = job.case, random.Random(job.seed)
    arrivals, at_s = [], 0.0
    for _ in range(case.requests if case.kind == "open" else 0):
        arrivals.append(at_s)
        at_s += random_.expovariate(case.level)
    mine = list(range(job.share, case.requests, job.shares))
    prompts = {i: prompt(job, i) for i in mine}
    records: list[Record] = []
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        say(b"ready")
        await asyncio.to_thread(sys.stdin.readline)
        begin = time.perf_counter()

        async def worker() -> None:
            while mine:
                records.append(await stream(session, job, prompts[mine.pop(0)], begin))

        async def arrive(i: int) -> None:
            await asyncio.sleep(max(arrivals[i] - (time.perf_counter() - begin), 0.0))
            records.append(await stream(session, job, prompts[i], begin))

        at_once = len(range(job.share, int(case.level), job.shares))
        work = [arrive(i) for i in mine] if arrivals else [worker() for _ in range(at_once)]
        await asyncio.gather(*work)
    return Done(time.perf_counter() - begin, records)


def say(line: bytes) -> None:
    """A whole line to standard output. With PYTHONUNBUFFERED print leaves out what a pipe does not take at once."""
    rest = memoryview(line + b"\n")
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


if __name__ == "__main__":
    given = msgspec.json.decode(sys.stdin.readline(), type=Job)
    say(msgspec.json.encode(uvloop.run(run(given))))

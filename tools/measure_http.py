"""CPU time per streamed token of the HTTP process: the real app behind uvicorn, fed by a process that plays the engine.

Run `python tools/measure_http.py --streams 256 --step-ms 12`; prints one JSON line for writes at every token and one
for writes in intervals (tpqwen/engine/cadence.py), asserts nothing. On a busy machine only ratios mean something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

import uvicorn
import uvloop

from tpqwen.api.app import build_app
from tpqwen.api.info import ModelInfo
from tpqwen.bench.load import Case, Job
from tpqwen.bench.serve import measure, summary
from tpqwen.config import EMBEDDED_MODEL, ScheduleOptions
from tpqwen.engine import cadence
from tpqwen.engine.client import EngineClient
from tpqwen.engine.messages import Abort, Add, Batch, decode_command, each, encode
from tpqwen.metrics import ServerMetrics
from tpqwen.request import Delta, Deltas, FinishReason, GenerateRequest
from tpqwen.step import Capacity, StepStats
from tpqwen.text.chat import ChatFormat, GenerationDefaults
from tpqwen.text.sequences import Limits
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.transport.ring import RingAddress, RingReader, RingWriter

CAPACITY = Capacity(num_blocks=100_000, block_size=16, max_num_seqs=1024, max_model_len=2048, max_batched_tokens=8192)
CONNECT_S = 30.0


def play_engine(pipe: Connection, step_s: float) -> None:
    """Every step_s one token for each open request; ends with its commands' other end."""
    reports = RingWriter(1)
    pipe.send(reports.address(0))
    commands: RingReader = RingReader(pipe.recv())
    running: dict[str, tuple[GenerateRequest, int]] = {}
    due = time.monotonic()
    try:
        while True:
            while data := commands.recv(max(due - time.monotonic(), 0.0)):
                for command in each(decode_command(data)):
                    if isinstance(command, Add):
                        running[command.request.id] = (command.request, 0)
                    elif isinstance(command, Abort):
                        running.pop(command.id, None)
            due = max(due + step_s, time.monotonic())
            if running:
                reports.send(encode(step(running)), 10.0)
    except ConnectionError:
        return


def step(running: dict[str, tuple[GenerateRequest, int]]) -> Batch:
    """One token for everybody; who has all of them leaves."""
    deltas = []
    for name, (request, index) in list(running.items()):
        last = index + 1 >= request.max_tokens
        token = 300 + (index * 7 + len(request.prompt_ids)) % 3000
        reason = FinishReason.LENGTH if last else None
        deltas.append(Delta(id=name, index=index, token_ids=[token], finish_reason=reason))
        running[name] = (request, index + 1)
        if last:
            del running[name]
    used = len(running)
    stats = StepStats(
        duration_s=0.01, phase="decode", num_tokens=len(deltas), num_running=used, num_waiting=0, blocks_used=used,
        blocks_cached=0, blocks_free=90_000, preemptions=0, prefix_queried_tokens=0, prefix_hit_tokens=0,
        prompt_tokens=0, output_tokens=len(deltas), busy_s=0.0,
    )  # fmt: skip
    return Batch(Deltas(others=deltas), stats)


def serve(pipe: Connection, addresses: Connection, writes_per_s: float) -> None:
    """The HTTP process: says its port, serves until told to stop, says how much CPU time it used meanwhile."""
    cadence.WRITES_PER_S = writes_per_s
    uvloop.run(_serve(pipe, addresses))


async def _serve(pipe: Connection, addresses: Connection) -> None:
    commands = RingWriter(1)
    reports: RingAddress = addresses.recv()
    addresses.send(commands.address(0))
    metrics = ServerMetrics("measured")
    client = EngineClient(commands, RingReader(reports), CAPACITY, ScheduleOptions(max_waiting=4096), metrics.observe)
    tokenizer = Tokenizer(EMBEDDED_MODEL)
    chat = ChatFormat(tokenizer, GenerationDefaults())
    info = ModelInfo("measured", Limits(CAPACITY.max_model_len, chat.vocabulary.size, ()), created=1)
    app = build_app(client, chat, info, metrics)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", access_log=False))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    pipe.send(listener.getsockname()[1])
    while await asyncio.to_thread(pipe.recv) == "cpu":
        used = os.times()
        pipe.send(used.user + used.system)
    server.should_exit = True
    await running
    await client.close()


def run(args: argparse.Namespace, writes_per_s: float) -> dict[str, Any]:
    """One measurement in processes of its own."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    engine_end, http_end = context.Pipe()
    engine = context.Process(target=play_engine, args=(engine_end, args.step_ms / 1e3), daemon=True)
    http = context.Process(target=serve, args=(theirs, http_end, writes_per_s), daemon=True)
    engine.start()
    http.start()
    url = f"http://127.0.0.1:{ours.recv()}"
    case = Case("closed", args.streams, args.streams * args.rounds, args.prompt, args.tokens)
    job = Job(url, "measured", case, 0, args.clients, 1, 4000)
    measure(Job(url, "measured", Case("closed", 4, 8, 8, 8), 0, 1, 1, 4000))
    ours.send("cpu")
    before = ours.recv()
    result = summary(measure(job))
    ours.send("cpu")
    used = ours.recv() - before
    ours.send("stop")
    http.join(CONNECT_S)
    engine.join(CONNECT_S)
    names = ("tok_s", "ttft_p50", "tpot_p50", "itl_p99", "errors", "first_error")
    return {"cpu_us_per_token": round(used * 1e6 / result["tokens"], 2), **{name: result[name] for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("streams", 256), ("rounds", 2), ("prompt", 64), ("tokens", 128), ("clients", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--step-ms", type=float, default=12.0)
    args = parser.parse_args()
    for what, writes_per_s in (("every token", float("inf")), ("intervals", cadence.WRITES_PER_S)):
        print(json.dumps({"writes": what, **run(args, writes_per_s)}), flush=True)


if __name__ == "__main__":
    main()

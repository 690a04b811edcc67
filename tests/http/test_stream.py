"""Streams that break off: errors, deadlines, silence, clients that leave or stop reading."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.http.driver import CHAT, COMPLETIONS, HELLO, Connection, events, post
from tests.http.fake_engine import Server, ids, make_server
from tpqwen.errors import EngineError, Overloaded
from tpqwen.request import Delta, FinishReason

ENDLESS = 3600.0


def run(work: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(work, 20)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, "tasks are left"

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    async def wait() -> None:
        while not condition():
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 10)


def slow(request: Any) -> list[Any]:
    """A token now and then, for ever."""
    return [*ids("a"), 0.002] * 200


@pytest.mark.parametrize(
    "error", [EngineError("rank 1 died", code="rank_dead", status=503), ValueError("bug")], ids=str
)
def test_error_after_the_first_token_is_one_event_and_no_done(error: Exception) -> None:
    server = make_server(lambda request: [*ids("Hello"), error])
    answer = post(server.app, CHAT, messages=HELLO, stream=True)
    assert answer.status_code == 200
    *parts, last = events(answer.text)
    assert parts
    assert last["error"]["type"] == "server_error"
    assert last["error"]["code"] == ("rank_dead" if isinstance(error, EngineError) else "internal")
    assert "bug" not in str(last)
    assert "[DONE]" not in answer.text
    assert all(c["finish_reason"] is None for e in parts for c in e["choices"])
    assert server.hooks.named("http") == [(CHAT, "POST", 503 if isinstance(error, EngineError) else 500)]
    assert not server.engine.live


def test_stream_that_just_ends_becomes_an_error() -> None:
    class Torn:
        def __init__(self, server: Server) -> None:
            self.state, self.capacity = server.engine.state, server.engine.capacity

        def check_room(self) -> None:
            """There is."""

        async def generate(self, request: Any) -> Any:
            yield Delta(id=request.id, index=0, token_ids=ids("Hello")[:1])

    server = make_server()
    server.app._engine = Torn(server)
    last = events(post(server.app, CHAT, messages=HELLO, stream=True).text)[-1]
    assert last["error"]["code"] == "internal"


def test_abort_by_the_engine_is_an_error_not_an_end() -> None:
    gone = Delta(id="x", index=0, token_ids=[], finish_reason=FinishReason.ABORT)
    answer = post(make_server(lambda request: [gone]).app, CHAT, messages=HELLO)
    assert answer.status_code == 500


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_leaving_client_stops_every_choice(path: str, n: int, stream: bool) -> None:
    server = make_server(slow)
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "x"}

    async def work() -> None:
        connection = Connection(server.app, path, {**prompt, "n": n, "stream": stream})
        task = asyncio.create_task(connection.run())
        await until(lambda: len(server.engine.live) == n and server.engine.produced > 3)
        connection.leave()
        await until(lambda: not server.engine.live)
        await task
        assert not connection.complete

    run(work())
    assert [f.reason for (f,) in server.hooks.named("finished")] == ["abort"] * n
    assert server.hooks.named("http") == [(path, "POST", 499)]


def test_client_that_leaves_while_queued_stops_the_request() -> None:
    server = make_server(lambda request: [ENDLESS])

    async def work() -> None:
        connection = Connection(server.app, CHAT, {"messages": HELLO, "stream": True})
        task = asyncio.create_task(connection.run())
        await until(lambda: bool(server.engine.live))
        connection.leave()
        await task
        assert connection.status is None

    run(work())
    (finished,) = server.hooks.named("finished")[0]
    assert (finished.reason, finished.output_tokens, finished.queue_s) == ("abort", 0, None)
    assert not server.engine.live


@pytest.mark.parametrize(("n", "leaves"), [(1, False), (2, False), (1, True)])
def test_cancelled_app_stops_the_request(n: int, leaves: bool) -> None:
    """Serve cancels the app's task when its client leaves. That the app is being told of it, too, does not hide it."""
    server = make_server(slow)

    async def work() -> None:
        connection = Connection(server.app, CHAT, {"messages": HELLO, "stream": True, "n": n})
        task = asyncio.create_task(connection.run())
        await connection.until('"content":"a"')
        if leaves:
            connection.leave()
            await asyncio.sleep(0)  # it is being told
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not server.engine.live

    run(work())
    assert server.hooks.named("http") == [(CHAT, "POST", 499)]


def test_stop_string_stops_the_engine_while_the_client_still_reads() -> None:
    server = make_server(lambda request: [*ids("one STOP"), ENDLESS])
    answer = post(server.app, CHAT, messages=HELLO, stream=True, stop=["STOP"])
    assert events(answer.text)[-1] == "[DONE]"
    assert not server.engine.live
    assert [f.reason for (f,) in server.hooks.named("finished")] == ["stop"]


def test_deadline_before_the_first_byte_is_504() -> None:
    for stream in (False, True):
        server = make_server(lambda request: [ENDLESS])
        answer = post(server.app, CHAT, messages=HELLO, timeout=0.05, stream=stream)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        assert not server.engine.live


def test_deadline_within_a_stream_is_an_error_event() -> None:
    for n in (1, 2):
        server = make_server(lambda request: [*ids("Hello"), ENDLESS])
        answer = post(server.app, CHAT, messages=HELLO, timeout=0.3, stream=True, n=n)
        assert answer.status_code == 200
        assert events(answer.text)[-1]["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in answer.text
        assert not server.engine.live


def test_silence_is_filled_with_comments() -> None:
    server = make_server(lambda request: [0.2, *ids("Hel"), 0.2, *ids("lo")], comment_every_s=0.05)
    answer = post(server.app, CHAT, messages=HELLO, stream=True)
    head, _, tail = answer.text.partition("data: ")
    assert head.startswith(": ")
    assert ": " in [part[:2] for part in tail.split("\n\n")]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events(answer.text)[:-1])
    assert text == "Hello"


def test_refusal_after_a_comment_is_an_error_event() -> None:
    late = [0.3, Overloaded("full", code="queue_full")]
    answer = post(make_server(lambda request: late, comment_every_s=0.05).app, CHAT, messages=HELLO, stream=True)
    assert answer.status_code == 200
    assert events(answer.text)[-1]["error"]["code"] == "queue_full"


def test_client_that_reads_nothing_is_dropped() -> None:
    server = make_server(slow, comment_every_s=0.02, drop_client_after_s=0.1)

    async def work() -> None:
        connection = Connection(server.app, CHAT, {"messages": HELLO, "stream": True})
        task = asyncio.create_task(connection.run())
        await connection.until('"content":"a"')
        connection.stuck = True
        await task
        assert not connection.complete
        assert not server.engine.live

    run(work())
    assert server.hooks.named("http") == [(CHAT, "POST", 499)]


def test_an_answer_counts_until_it_is_written_though_the_engine_has_long_ended() -> None:
    server = make_server(lambda request: ids("a"))

    async def work() -> None:
        connection = Connection(server.app, CHAT, {"messages": HELLO})
        connection.stuck = True
        task = asyncio.create_task(connection.run())
        await until(lambda: bool(server.engine.requests) and not server.engine.live)
        assert server.app.num_answering == 1
        connection.leave()
        await task
        assert server.app.num_answering == 0

    run(work())


def test_client_that_leaves_during_its_body_is_forgotten() -> None:
    server = make_server()

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers}
    run(server.app(scope, gone, send))
    assert server.hooks.named("http") == [(CHAT, "POST", 499)]


def test_many_streams_at_once_get_their_own_text() -> None:
    server = make_server(lambda request: [x for t in ids(f"answer {len(request.prompt_ids)}") for x in (t, 0.0)])

    async def work() -> None:
        connections = [
            Connection(server.app, COMPLETIONS, {"prompt": [5] * (i + 1), "stream": True, "n": 1 + i % 3})
            for i in range(50)
        ]
        await asyncio.gather(*(c.run() for c in connections))
        for i, connection in enumerate(connections):
            choices = [c for e in connection.events[:-1] for c in e["choices"]]
            for index in range(1 + i % 3):
                text = "".join(c["text"] for c in choices if c["index"] == index)
                assert text == f"answer {i + 1}"
            assert connection.complete

    run(work())
    assert not server.engine.live

"""The whole server on Ray Serve, tp=2 on the CPU: streams, names, clients that leave, killed processes, the end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.cluster.processes import children_of, title, until
from tests.cluster.replica import start_serve
from tests.cluster.sockets import listeners, speaks_grpc
from tpqwen.errors import ConfigError

pytestmark = pytest.mark.ray

OPTIONS = {
    "tp": "2",
    "device": "cpu",
    "dtype": "float32",
    "threads": "1",
    "max_model_len": "512",
    "max_num_seqs": "32",
    "max_batched_tokens": "256",
}
TITLES = ["tpqwen engine", "tpqwen rank 0/2", "tpqwen rank 1/2", "tpqwen replica"]
REPAIRS = 5  # in ten minutes; then the replica gives up
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def ours() -> dict[int, str]:
    """Our processes below this one: pid -> title."""
    return {pid: name for pid in children_of({os.getpid()}) if (name := title(pid)).startswith("tpqwen")}


def open_files() -> dict[str, int]:
    """How many files each of our processes has open."""
    return {name: len(os.listdir(f"/proc/{pid}/fd")) for pid, name in ours().items()}


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def server(ray_cluster: None) -> Iterator[str]:
    from ray import serve

    import serve_app

    url = start_serve()
    serve.run(serve_app.app(OPTIONS), name="tpqwen", route_prefix="/")
    until(lambda: is_ready(url), "readiness", 120)
    yield url
    serve.shutdown()


def body(index: int, **changes: Any) -> dict[str, Any]:
    prompt = " ".join(WORDS[(index + i) % 10] for i in range(1 + index % 7))
    settings = {"prompt": prompt, "max_tokens": 4 + index % 29, "temperature": 0, "ignore_eos": True, "stream": True}
    return settings | {"model": "tpqwen-demo"} | changes


async def stream(client: httpx.AsyncClient, payload: dict[str, Any], leave_after: int | None = None) -> list[Any]:
    """The events of one stream, decoded; the last is "[DONE]" unless we leave before."""
    events: list[Any] = []
    async with client.stream("POST", "/v1/completions", json=payload) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
            if leave_after is not None and len(events) >= leave_after:
                break
    return events


def text_of(events: list[Any]) -> str:
    assert events[-1] == "[DONE]"
    chunks = [e for e in events[:-1] if e["choices"]]
    reasons = [e["choices"][0]["finish_reason"] for e in chunks]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    return "".join(e["choices"][0]["text"] for e in chunks)


def gauge(url: str, name: str, **labels: str) -> float:
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    for line in httpx.get(f"{url}/metrics", timeout=10).text.splitlines():
        if line.startswith(name + "{") and all(w in line for w in wanted):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"{name} is not exported")


def test_every_process_shows_what_it_is_all_the_time(server):
    until(lambda: sorted(ours().values()) == TITLES, "the titles of all processes")
    for _ in range(50):  # probes and calls go on meanwhile
        httpx.get(f"{server}/ready", timeout=5)
        assert sorted(ours().values()) == TITLES


def test_the_other_apis_answer_through_serve_to_their_own_clients(server):
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=60) as api:
        ask = {"model": "tpqwen-demo", "input": question, "temperature": 0, "max_output_tokens": 60}
        ask["reasoning"] = {"effort": "none"}
        whole = api.responses.create(**ask)
        with api.responses.stream(**ask) as events:
            assert events.until_done().get_final_response().output_text == whole.output_text
        assert "42" in whole.output_text
        scored = api.completions.create(model="tpqwen-demo", prompt="one two", max_tokens=0, echo=True, logprobs=1)
        assert scored.choices[0].text == "one two"
        assert scored.choices[0].logprobs.token_logprobs[0] is None
    with anthropic.Anthropic(base_url=server, api_key="none", timeout=60) as api:
        ask = {"model": "tpqwen-demo", "max_tokens": 60, "messages": question, "thinking": {"type": "disabled"}}
        with api.messages.stream(**ask, extra_body={"temperature": 0}) as events:
            assert "".join(events.text_stream) == whole.output_text
        count = api.messages.count_tokens(model="tpqwen-demo", messages=question).input_tokens
    ids = httpx.post(f"{server}/tokenize", json={"messages": question}, timeout=60).json()["tokens"]
    assert len(ids) == count
    assert "/v1/messages" in httpx.get(f"{server}/openapi.json", timeout=60).json()["paths"]


def test_the_page_and_the_engines_events_come_through_serve(server):
    assert httpx.get(f"{server}/", timeout=20).headers["content-security-policy"].startswith("default-src 'none'")
    with httpx.stream("GET", f"{server}/v1/engine/events", timeout=20) as answer:
        shown = (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))
        event = next(e for e in shown if e["ranks"])
    assert (event["state"], event["slots"], event["queue"]["requests"]) == ("ready", {"total": 32, "running": []}, 0)
    assert sum(event["blocks"].values()) > 0
    assert [(r["rank"], r["up"], r["device"]) for r in event["ranks"]] == [(0, True, "cpu"), (1, True, "cpu")]
    assert httpx.get(f"{server}/v1/models", timeout=20).json()["data"][0]["demonstration"] is True


def ask(server: str, **changes: Any) -> dict[str, Any]:
    """A chat's first choice."""
    question = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 200,
        "seed": 5,
        "model": "tpqwen-demo",
    }
    answer = httpx.post(f"{server}/v1/chat/completions", json=question | changes, timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_outputs_keep_to_their_form_through_the_whole_server(server):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["n"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    off = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": 1.5}
    for seed in range(3):
        choice = ask(server, response_format=form, seed=seed, **off)
        assert choice["finish_reason"] == "stop"
        assert 0 <= json.loads(choice["message"]["content"])["n"] <= 99
    assert ask(server, structured_outputs={"choice": ["red", "green"]}, **off)["message"]["content"] in ("red", "green")
    tool = {"type": "function", "function": {"name": "pick", "parameters": schema}}
    choice = ask(server, tools=[tool], tool_choice={"type": "function", "function": {"name": "pick"}}, **off)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "pick"
    assert 0 <= json.loads(call["function"]["arguments"])["n"] <= 99
    bad = {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "("}}
    assert httpx.post(f"{server}/v1/chat/completions", json=bad, timeout=60).status_code == 400


def test_thinking_budgets_hold_through_the_whole_server(server):
    """A model that is made to write nothing but `<think>` is closed at its third token of reasoning."""
    message = ask(server, thinking_token_budget=3, logit_bias={"4094": 100}, max_tokens=100)["message"]
    thought, _, closing = message["reasoning_content"].partition("\n")
    assert thought == "<think>" * 3
    assert closing.strip().startswith("Considering the limited time")
    assert closing.endswith("directly now.")
    assert message["content"] == ""


def test_two_hundred_streams_with_twenty_closed_early_equal_their_solo_runs(server):
    before: dict[str, int] = {}

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server, timeout=240, limits=limits) as client:
            kinds = 10
            solo = [text_of(await stream(client, body(i))) for i in range(kinds)]
            before.update(open_files())
            leaving = {i for i in range(200) if i % 10 == 3}
            calls = [
                stream(client, body(i % kinds, max_tokens=400), leave_after=2) if i in leaving
                else stream(client, body(i % kinds))
                for i in range(200)
            ]  # fmt: skip
            results = await asyncio.gather(*calls)
            for i, events in enumerate(results):
                if i not in leaving:
                    assert text_of(events) == solo[i % kinds]

    asyncio.run(main())
    until(lambda: gauge(server, "tpqwen_requests_running") == 0, "all requests ended")
    assert gauge(server, "tpqwen_requests_waiting") == 0
    assert gauge(server, "tpqwen_kv_cache_blocks", state="used") == 0
    until(lambda: all(n <= before[name] + 2 for name, n in open_files().items()), f"no more files than {before}")


def test_what_listens_beyond_loopback_is_rays_own_grpc_and_nothing_of_ours(server):
    """One gRPC port of Ray for each worker process; ours (rendezvous, gloo, HTTP, metrics) are on loopback."""
    found = listeners(ours())
    assert any(x.is_loopback for x in found)  # gloo's, for one
    open_to_all = [x for x in found if not x.is_loopback]
    assert [x for x in open_to_all if not speaks_grpc(x.port)] == []
    assert httpx.get(f"{server}/ready", timeout=5).status_code == 200


def pid_of(name: str) -> int | None:
    return next((pid for pid, found in ours().items() if found == name), None)


async def until_running(server: str) -> None:
    """Until a request runs."""
    deadline = asyncio.get_running_loop().time() + 20
    while await asyncio.to_thread(gauge, server, "tpqwen_requests_running") < 1:
        assert asyncio.get_running_loop().time() < deadline


@pytest.mark.parametrize(("victim", "reason"), [("tpqwen rank 1/2", "rank 1 restarting"), ("tpqwen engine", "engine")])
def test_a_killed_process_is_replaced_and_its_streams_complete(server, victim, reason):
    payload, replica = body(6, max_tokens=300), pid_of("tpqwen replica")
    before = gauge(server, "tpqwen_engine_restarts_total")

    async def main() -> tuple[str, str, list[dict[str, Any]]]:
        seen: list[dict[str, Any]] = []
        async with httpx.AsyncClient(base_url=server, timeout=60) as client:
            undisturbed = text_of(await stream(client, payload))
            task = asyncio.create_task(stream(client, payload))
            await until_running(server)
            os.kill(pid_of(victim) or 0, signal.SIGKILL)
            while not task.done():
                answer = await client.get("/ready")
                assert answer.status_code == 200
                seen.append(answer.json())
                await asyncio.sleep(0.05)
            return undisturbed, text_of(await task), seen

    undisturbed, disturbed, seen = asyncio.run(main())
    assert disturbed == undisturbed
    assert any(state["status"] == "degraded" and reason in state["reason"] for state in seen)
    until(lambda: httpx.get(f"{server}/ready", timeout=5).json()["status"] == "ready", "the end of the repair")
    until(lambda: sorted(ours().values()) == TITLES, "all processes")
    assert pid_of("tpqwen replica") == replica
    assert gauge(server, "tpqwen_engine_restarts_total") == before + 1
    assert gauge(server, "tpqwen_recovery_seconds_count", stage="replay") == before + 1


def test_too_many_deaths_end_every_stream_with_one_error_and_serve_replaces_the_replica(server):
    before = ours()

    async def main() -> list[Any]:
        async with httpx.AsyncClient(base_url=server, timeout=60) as client:
            for _ in range(REPAIRS + 1):
                task = asyncio.create_task(stream(client, body(6, max_tokens=300)))
                await until_running(server)
                os.kill(pid_of("tpqwen rank 1/2") or 0, signal.SIGKILL)
                events = await task
                if any("error" in event for event in events if event != "[DONE]"):
                    return events
            raise AssertionError("no end of repairs")

    events = asyncio.run(main())
    errors = [e["error"] for e in events if e != "[DONE]" and "error" in e]
    assert len(errors) == 1
    assert "rank 1 died" in errors[0]["message"] and "too often" in errors[0]["message"]
    assert errors[0]["code"] == "rank_dead"
    until(lambda: not before.keys() & ours().keys(), "the end of the old processes", 90)
    until(lambda: sorted(ours().values()) == TITLES and is_ready(server), "a new replica", 150)
    answer = httpx.post(f"{server}/v1/completions", json=body(1, stream=False), timeout=60)
    assert answer.status_code == 200


def test_what_cannot_work_is_refused_before_any_process_starts(ray_cluster):
    import serve_app

    before = ours()
    with pytest.raises(ConfigError, match="tp"):
        serve_app.app({"tp": "3"})
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        serve_app.app({"modell": "x"})
    with pytest.raises(ConfigError):
        serve_app.app({"model": "/nowhere/at/all"})
    assert ours() == before


def test_deleting_the_application_frees_everything(server):
    from ray import serve
    from ray.util import placement_group_table

    serve.delete("tpqwen")
    until(lambda: not ours(), "the end of all processes", 30)
    until(lambda: all(group["state"] == "REMOVED" for group in placement_group_table().values()), "the placement group")
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tpqwen")]

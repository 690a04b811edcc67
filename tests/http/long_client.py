"""The client of test_long_prompts, a process of its own: `long_client.py URL KIND`; tells statuses and health times."""

from __future__ import annotations

import json
import sys
import threading
import time

import httpx

SIZE = 4_000_000


def body(kind: str) -> tuple[str, bytes]:
    """Path and body of about 4 MB."""
    if kind == "ids":
        return "/v1/completions", json.dumps({"prompt": [7] * (SIZE // 3)}).encode()
    if kind == "text":
        return "/v1/completions", json.dumps({"prompt": "word " * (SIZE // 5)}).encode()
    content = 'word "a"\n' * (SIZE // 12) if kind == "escapes" else "word " * (SIZE // 5)
    return "/v1/chat/completions", json.dumps({"messages": [{"role": "user", "content": content}]}).encode()


def main() -> None:
    url, kind = sys.argv[1:]
    path, data = body(kind)
    statuses: list[int] = []

    def ask() -> None:
        headers = {"content-type": "application/json"}
        statuses.append(httpx.post(url + path, content=data, headers=headers, timeout=600).status_code)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    health: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        client.get("/health")
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            began = time.monotonic()
            client.get("/health")
            health.append(time.monotonic() - began)
            time.sleep(0.02)
    print(json.dumps({"statuses": statuses, "health": health}))


if __name__ == "__main__":
    main()

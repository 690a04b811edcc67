"""What the HTTP surface says about the server it stands for, and its own settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tpqwen.model.config import Task
from tpqwen.text.sequences import Limits


@dataclass(frozen=True)
class ModelInfo:
    """The served model. name is its id in requests and answers. created: Unix seconds."""

    name: str
    limits: Limits
    created: int
    owned_by: str = "tpqwen"
    tp: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)  # of tpqwen, torch, ray, cuda, nccl
    fingerprint: str | None = None  # system_fingerprint of every answer
    task: Task = Task.GENERATE
    hidden_size: int = 0  # numbers in an embedding
    yes_no: tuple[int, int] = (0, 0)  # a reranker's answers, token ids
    demonstration: bool = False  # the small model that ships inside


@dataclass(frozen=True)
class ApiSettings:
    """send_request_id: whether answers carry x-request-id (off behind a proxy that adds its own).

    thread_above_bytes: longer bodies are parsed in a thread. inline_below: prompts of completions with at most so many
    characters are tokenized on the event loop, which takes under a millisecond for each thousand. events_for_s: a
    stream of engine events ends after so long, which is less than Serve waits for a replica that it drains.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    send_request_id: bool = True
    comment_every_s: float = 10.0
    body_timeout_s: float = 30.0  # from the request's arrival
    drop_client_after_s: float = 30.0  # a client that takes nothing for so long is taken for gone
    thread_above_bytes: int = 64 * 1024
    inline_below: int = 8 * 1024
    first_token_timeout_s: float = 0.0  # from the request's arrival; 0: no such deadline
    total_timeout_s: float = 0.0
    events_every_s: float = 1.0
    events_for_s: float = 60.0

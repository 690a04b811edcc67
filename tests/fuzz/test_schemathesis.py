"""schemathesis against the server's own OpenAPI document: valid and invalid requests, no answer of 500 or above."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi import checks

from tests.http.fake_engine import make_server
from tests.http.test_structured import FakeCompiler
from tpqwen.model.config import Task

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": (Phase.explicit, Phase.generate),
    "suppress_health_check": list(HealthCheck),
}
BRIEF = settings(max_examples=12, **SETTINGS)
LONG = settings(max_examples=1000, **SETTINGS)
seen: Counter[tuple[GenerationMode, int]] = Counter()


def loaded(task: Task) -> Any:
    """The schema of a server for the task, with both modes of generation."""
    modes = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
    project = ProjectConfig(generation=GenerationConfig(modes=modes, allow_x00=True))
    config = SchemathesisConfig(projects=ProjectsConfig(default=project))
    server = make_server(task=task, compiler=FakeCompiler(), events_every_s=0.001, events_for_s=0.01)
    return schemathesis.openapi.from_asgi("/openapi.json", server.app, config=config)


def check(case: Any) -> None:
    """A 504 is no fault where the request itself asked for a timeout."""
    answer = case.call()
    in_time = not (answer.status_code == 504 and isinstance(case.body, dict) and case.body.get("timeout"))
    case.validate_response(answer, checks=CHECKS if in_time else CHECKS[1:])
    seen[case.meta.generation.mode, answer.status_code] += 1


generating = loaded(Task.GENERATE)
embedding = loaded(Task.EMBED).include(path="/v1/embeddings")
reranking = loaded(Task.RERANK).include(path="/v1/rerank")


@generating.parametrize()
@BRIEF
def test_no_request_is_answered_with_500(case: Any) -> None:
    check(case)


@embedding.parametrize()
@BRIEF
def test_no_embedding_request_is_answered_with_500(case: Any) -> None:
    check(case)


@reranking.parametrize()
@BRIEF
def test_no_rerank_request_is_answered_with_500(case: Any) -> None:
    check(case)


def test_both_kinds_of_requests_were_made() -> None:
    assert seen[GenerationMode.POSITIVE, 200] > 20
    assert seen[GenerationMode.NEGATIVE, 400] > 20


@pytest.mark.slow
@generating.parametrize()
@LONG
def test_no_request_of_thousands_is_answered_with_500(case: Any) -> None:
    check(case)

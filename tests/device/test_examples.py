"""Everything in examples/, run as it stands against the embedded model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device.local_app import ServedModel
from tests.http.serving import serving
from tpqwen.config import EMBEDDED_MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {
    "anthropic_messages.py": ["42", "end_turn"],
    "curl.sh": ['"object":"list"', "42", "data: [DONE]", '"tokens"'],
    "langchain_chat.py": ["42", "17"],
    "openai_async.py": ["17 + 25? ->", "Hello! ->"],
    "openai_json_schema.py": ["Person Maria 34"],
    "openai_responses.py": ["42", "17"],
    "openai_stream.py": ["thinking: 17 + 25.", "7 + 5 = 12", "answer: 17 + 25 = 42", "tokens)"],
    "openai_sync.py": ["demonstration model", "tokens in"],
    "openai_tools.py": ['call: get_weather {"city": "Paris"}', "answer: It is 21 degrees and sunny in Paris."],
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ServedModel(Path(EMBEDDED_MODEL), max_model_len=1024)) as found:
        yield found


def test_every_example_is_run() -> None:
    assert {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh")} == set(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_example(url: str, name: str) -> None:
    if name.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    command = ["sh" if name.endswith(".sh") else sys.executable, str(EXAMPLES / name), url]
    environment = {**os.environ, "LANGSMITH_TRACING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    for word in WORDS[name]:
        assert word in done.stdout

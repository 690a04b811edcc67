"""Everything in examples/, run as it stands against the embedded model on a server that demands a key."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.device.local_app import ServedModel
from tests.http.fake_engine import ids, make_server
from tests.http.serving import serving
from tpqwen.api.access import Access
from tpqwen.api.keys import Keyring
from tpqwen.config import EMBEDDED_MODEL

KEY = "tpq_reader_0123456789abcdef"
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
    access = Access(Keyring.parse(f"reader {KEY}"))
    with serving(ServedModel(Path(EMBEDDED_MODEL), access, max_model_len=1024)) as found:
        yield found


def run(name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The example with these arguments, and no other key or address than these in its environment."""
    if name.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "ANTHROPIC_", "LANGSMITH_"))}
    command = ["sh" if name.endswith(".sh") else sys.executable, str(EXAMPLES / name), *words]
    env = {**inherited, "LANGSMITH_TRACING": "false", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)


def test_every_example_is_run() -> None:
    assert {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh")} == set(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_example(url: str, name: str) -> None:
    done = run(name, url, OPENAI_API_KEY=KEY, ANTHROPIC_API_KEY=KEY)
    assert done.returncode == 0, done.stderr + done.stdout
    for word in WORDS[name]:
        assert word in done.stdout


def test_without_its_key_an_example_fails_with_the_servers_words(url: str) -> None:
    done = run("curl.sh", url)
    assert done.returncode == 22
    assert "an API key is needed" in done.stdout


@pytest.mark.parametrize("name", ["anthropic_messages.py", "curl.sh", "openai_sync.py"])
def test_a_server_without_keys_needs_no_variable_and_its_address_may_be_one(name: str) -> None:
    with serving(make_server(lambda request: ids("It is 42.")).app) as open_url:
        done = run(name, OPENAI_BASE_URL=f"{open_url}/v1", ANTHROPIC_BASE_URL=open_url)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "42" in done.stdout

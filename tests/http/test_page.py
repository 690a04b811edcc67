"""The page at /: one file that needs nothing from elsewhere and may do nothing but talk to its own server."""

from __future__ import annotations

import base64
import hashlib
import re

from tests.http.driver import exchange
from tests.http.fake_engine import make_server
from tests.http.test_access import closed


def page() -> str:
    return exchange(make_server().app, "GET", "/").text


def test_it_is_open_without_a_key_and_says_nothing_of_what_is_served() -> None:
    answer = exchange(closed().app, "GET", "/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "qwen3-test" not in answer.text
    assert exchange(make_server().app, "GET", "/").content == answer.content
    assert exchange(closed().app, "HEAD", "/").status_code == 200


def test_its_policy_allows_its_own_script_and_style_and_nothing_else() -> None:
    answer = exchange(make_server().app, "GET", "/")
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert (rules["default-src"], rules["connect-src"], rules["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in answer.headers["content-security-policy"]
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_it_loads_nothing_and_sets_text_as_text() -> None:
    text = page()
    assert not re.search(r"\bsrc=|@import|url\(|https?:", text)
    links = re.findall(r'href="([^"]*)"', text)
    assert links and all(link in ("data:,", "docs") for link in links)
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Storage", "cookie"):
        assert word not in text, word
    assert not re.search(r'\son\w+="|\sstyle="', text)  # the policy would not let them act


def test_it_asks_for_paths_that_exist() -> None:
    paths = {"/" + path for path in re.findall(r'["`](v1/[\w/]+|version|health|ready)["`]', page())}
    assert paths >= {"/v1/chat/completions", "/v1/models", "/v1/engine/events"}
    assert paths <= {path for _, path in make_server().app.served}


def test_the_embedded_model_is_called_what_it_is() -> None:
    model = exchange(make_server().app, "GET", "/v1/models").json()["data"][0]
    assert model["demonstration"] is False
    (notice,) = re.findall(r'<p id="demo" hidden>(.*?)</p>', page(), re.DOTALL)
    assert "demonstration model" in notice and "cannot reason, program or translate" in " ".join(notice.split())


def test_it_suggests_what_shows_most() -> None:
    (suggested,) = re.findall(r"const SUGGESTIONS = \[\n(.*?)\n\];", page(), re.DOTALL)
    assert re.findall(r'text: "(.*?)"', suggested) == [
        "What can you do?",
        "What is 17 + 25?",
        "What is the weather in Paris?",
        "Give me JSON with name and age: Maria is 34 years old.",
    ]
    assert "tools: [" in suggested and "response_format: {" in suggested

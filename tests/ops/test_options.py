"""What help and README say of the options, against each other and against the code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tpqwen.config import Config, option_fields
from tpqwen.console.options import HELP

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_every_option_of_config_has_a_help_text_and_stands_in_the_readme():
    assert list(HELP) == list(option_fields()), "HELP in console/options.py has config.py's options, in its order"
    assert [name for name in HELP if f"| `{name}` |" not in README] == [], "README's table of options needs a row"


def test_help_and_readme_mark_the_same_options_as_those_of_tpqwen_serve_alone():
    rows = re.findall(r"^\| `(\w+)` \|.*\(`tpqwen serve` only\) \|$", README, re.MULTILINE)
    assert rows == [name for name, text in HELP.items() if text.endswith("tpqwen serve only")]
    assert rows == ["host", "port", "ingress"]


def test_the_served_name_is_what_help_and_readme_say():
    service = pytest.importorskip("tpqwen.service")

    def served(**options):
        kind, config = service.Qwen3Server.func_or_class, Config.load(options, {})
        replica = SimpleNamespace(_config=config)
        replica._is_embedded = kind._is_embedded.fget(replica)
        return kind.served_name.fget(replica)

    assert served() == "tpqwen-demo"
    assert served(model="Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert served(model="Qwen/Qwen3-8B", served_model_name="q") == "q"
    assert "default: the model as given; tpqwen-demo for" in HELP["served_model_name"]
    assert "| `served_model_name` | `model` as given; `tpqwen-demo` for" in README

"""What the texts claim of the files beside them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tpqwen.cli import COMMANDS
from tpqwen.metrics import FAMILIES, GPU_LABELS
from tpqwen.stopping import GRACE_S

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [p for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if p.name != "LOG.md"]


def test_every_file_that_a_text_names_exists():
    missing = []
    for text in TEXTS:
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml))`", text.read_text(encoding="utf-8")):
            if not any((base / name).exists() for base in (ROOT, ROOT / "tpqwen", ROOT / "k8s")):
                missing.append(f"{text.name}: {name}")
    assert missing == []


def test_every_metric_is_explained_in_operations_and_every_explained_one_exists():
    table = (ROOT / "docs/operations.md").read_text(encoding="utf-8").split("## Metrics")[1].split("##")[0]
    rows = "\n".join(x for x in table.splitlines() if x[:1] == "|")
    explained = dict(re.findall(r"`([a-z0-9_]+)(?:\{([a-z,_]*)\})?`", rows))
    labels = {f.name: f.labels[len(GPU_LABELS) :] if f.name.startswith("gpu_") else f.labels for f in FAMILIES}
    assert explained == {name: ",".join(values) for name, values in labels.items()}
    assert "all `gpu_*` have `{}`, `{}`, `{}` and `{}`.".format(*GPU_LABELS) in table


def test_every_alert_is_explained_in_operations_and_every_explained_one_exists():
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"][0]["rules"]
    assert sorted(re.findall(r"`(Tpqwen\w+)`", page)) == sorted(rule["alert"] for rule in rules)


def test_every_command_of_the_readme_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"tpqwen (serve|[a-z]+) (?:MODEL|offline)", readme))
    assert named <= set(COMMANDS)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = readme + (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^ *make ([a-z]+)|`make ([a-z]+)", texts, re.MULTILINE)) <= {(t, "") for t in targets} | {
        ("", t) for t in targets
    }


def test_constraints_pin_every_dependency_but_torch_and_name_no_host():
    pins = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", pin) for pin in pins)
    names = {pin.partition("==")[0].lower() for pin in pins}
    assert not names & {"torch", "triton", "tpqwen", "setuptools"}
    assert {"ray", "transformers", "msgspec", "pytest"} <= names


def test_the_image_has_what_kuberay_and_triton_need():
    lines = (ROOT / "deploy/Dockerfile").read_text()
    install = lines[lines.index("apt-get install") :].split("\n", 1)[0].split()
    assert {"bash", "wget", "gcc", "ca-certificates"} <= set(install)
    instructions = re.findall(r"^([A-Z]+)\b", lines, re.MULTILINE)
    assert "ENTRYPOINT" not in instructions
    assert "USER 1000:1000" in lines
    home = re.search(r"HF_HOME=(\S+)", lines)[1]
    owned = re.search(r"install --directory --owner 1000 --group 1000 (.+)", lines)[1].split()
    assert {home, str(Path(home).parent)} <= set(owned)
    assert "<<" not in lines
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", lines, re.MULTILINE):
        assert [name for name in copied.split() if not (ROOT / name).exists()] == []


def test_the_systemd_unit_signals_the_server_alone_and_waits_for_its_drain():
    text = (ROOT / "deploy/tpqwen.service").read_text()
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    assert settings["KillMode"] == "mixed"
    assert int(settings["TimeoutStopSec"]) >= GRACE_S + 60
    words = settings["ExecStart"].split()
    assert words[:2] == ["/opt/tpqwen/bin/tpqwen", "serve"] and set(words[2::2]) <= {"--host", "--port"}
    assert settings["RestartPreventExitStatus"] == "2"


def test_every_shell_recipe_that_starts_or_drives_ray_says_token_mode():
    """Fenced and indented blocks of the texts, and what the files in deploy/ say of their use."""
    blocks = []
    for text in TEXTS:
        content = text.read_text(encoding="utf-8")
        blocks += re.findall(r"^```sh\n(.*?)^```", content, re.MULTILINE | re.DOTALL)
        blocks += re.findall(
            r"(?:^(?: {4}.*)?\n)+", re.sub(r"^```.*?^```", "", content, flags=re.M | re.S), re.MULTILINE
        )
    blocks += [p.read_text(encoding="utf-8") for p in (ROOT / "deploy").rglob("*") if p.is_file()]
    driving = [b for b in blocks if re.search(r"^(?:#  )?.*\b(?:serve (?:run|deploy) \S|ray start\b)", b, re.MULTILINE)]
    assert len(driving) >= 3
    assert [block for block in driving if "export RAY_AUTH_MODE=token" not in block] == []
    assert "    RAY_AUTH_MODE=token \\\n" in (ROOT / "deploy/Dockerfile").read_text()


def test_ci_is_a_shell_script_that_any_bash_takes():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o100
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.parametrize("path", sorted((*ROOT.glob("k8s/*.yaml"), *ROOT.glob("deploy/*.yaml"))), ids=lambda p: p.name)
def test_every_yaml_file_parses_and_says_what_it_is(path):
    assert path.read_text().startswith("#")
    assert all(yaml.safe_load_all(path.read_text()))


def test_every_test_that_the_security_page_names_exists():
    names = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/security.md").read_text(encoding="utf-8")))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 8
    assert [name for name in sorted(names) if f"def {name}(" not in code] == []

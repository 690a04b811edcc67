"""The command line: options, exit codes, what is imported when, and the terminal conversation."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import tpqwen
from tpqwen import cli, logs
from tpqwen.config import EMBEDDED_MODEL, Config, option_fields
from tpqwen.console.ray_settings import set_ray_defaults
from tpqwen.console.startup import Watch, banner, is_ready
from tpqwen.errors import ConfigError, EngineError, RequestError

ROOT = Path(__file__).resolve().parents[2]
EXTRA_FLAGS = {
    "serve": set(),
    "generate": {"prompt", "prompts", "json", "max-tokens", "temperature", "top-p", "top-k", "min-p", "seed"},
    "chat": {"system", "max-tokens", "temperature", "top-p", "top-k", "min-p", "seed"},
}


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """Commands complete os.environ for Ray."""
    monkeypatch.setattr(cli, "set_ray_defaults", lambda environ, words: None)


def command(monkeypatch, run):
    """`tpqwen serve` with another body."""
    module = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(cli, "import_module", lambda name: module)


def flags(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    return set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out)) - {"help", "verbose"}


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_options_of_a_command_are_a_frozen_list(name, capsys):
    engine = {n for n, (section, _) in option_fields().items() if section != "server"} - {"model"} | {"log"}
    switches = {"no-random-weights", "no-prefix-cache", "no-warm-spare", "no-deterministic"}
    expected = {n.replace("_", "-") for n in engine} | switches
    assert flags(capsys, name) == expected | EXTRA_FLAGS[name]


def test_options_reach_the_command_as_one_checked_config(monkeypatch):
    seen = []
    command(monkeypatch, lambda args, config: seen.append(config) or 0)
    words = "serve some/model --tp 2 --max-model-len 128 --no-prefix-cache --memory-fraction 0.5 -v"
    assert cli.main(words.split()) == 0
    config = seen[0]
    assert (config.model.model, config.parallel.tp, config.model.max_model_len) == ("some/model", 2, 128)
    assert (config.cache.prefix_cache, config.cache.memory_fraction, config.server.log) == (False, 0.5, "debug")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("no"), 2), (EngineError("no"), 1), (RequestError("no"), 1), (KeyboardInterrupt(), 130)],
)
def test_errors_become_one_sentence_and_an_exit_code(monkeypatch, capsys, error, code):
    def run(args, config):
        raise error

    command(monkeypatch, run)
    assert cli.main(["serve"]) == code
    assert capsys.readouterr().err == ("" if code == 130 else "tpqwen: no\n")


def test_an_impossible_option_is_refused_before_the_command_runs(monkeypatch, capsys):
    command(monkeypatch, lambda args, config: pytest.fail("must not run"))
    assert cli.main(["serve", "--tp", "3"]) == 2
    assert "tp must be one of 1, 2, 4, 8" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nonsense"], ["bench"], ["bench", "nonsense"]])
def test_a_command_line_that_means_nothing_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_version_and_help_load_neither_torch_nor_ray():
    probe = (
        "import sys\nfrom tpqwen import cli\ncli.main(['version'])\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith(f"tpqwen {tpqwen.__version__}\n")
    assert done.stdout.splitlines()[-1] == "[]"


def test_bench_kernels_measures_every_operation_of_a_step(capsys, tmp_path):
    saved, small = tmp_path / "kernels.json", tmp_path / "int8.json"
    words = ["bench", "kernels", EMBEDDED_MODEL, "--device", "cpu", "--rows", "1,3", "--context", "40"]
    assert cli.main([*words, "--save", str(saved)]) == 0
    assert cli.main([*words, "--quantization", "int8", "--save", str(small)]) == 0
    wide, narrow = (json.loads(path.read_text())["results"][0]["bytes"] for path in (saved, small))
    assert 0.25 * wide < narrow < 0.3 * wide, "int8 in the place of float32, and scales"
    results = json.loads(saved.read_text())["results"]
    assert [r["rows"] for r in results] == [1] * 6 + [3] * 6
    assert all(r["us"] > 0 and r["bytes"] > 0 and r["fraction"] > 0 for r in results)
    assert "attention over 40" in capsys.readouterr().out


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == tpqwen.__version__
    assert f"## [{tpqwen.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_public_names_are_these():
    assert tpqwen.__all__ == ["LLM", "Config", "RequestOutput", "SamplingParams", "__version__", "stop"]
    assert tpqwen.Config is Config
    with pytest.raises(AttributeError, match="nothing"):
        _ = tpqwen.nothing


def test_a_cluster_of_our_own_is_guarded_by_a_token_that_is_never_reused():
    first, second = {}, {}
    set_ray_defaults(first)
    set_ray_defaults(second)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_settings_of_the_user_win():
    environ = {"RAY_ADDRESS": "auto", "RAY_USAGE_STATS_ENABLED": "1"}
    set_ray_defaults(environ)
    assert environ["RAY_USAGE_STATS_ENABLED"] == "1"
    assert environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in environ
    own = {"RAY_AUTH_MODE": "disabled"}
    set_ray_defaults(own)
    assert own["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in own


def test_a_command_for_running_clusters_makes_no_token():
    for words in (["stop"], ["-v", "stop", "--name", "a"]):
        environ = {"RAY_AUTH_TOKEN_PATH": "file"} if words[0] == "-v" else {}
        set_ray_defaults(environ, words)
        assert environ["RAY_AUTH_MODE"] == ("token" if words[0] == "-v" else "disabled")
        assert "RAY_AUTH_TOKEN" not in environ


def test_haproxy_is_turned_on_before_ray_is_imported_and_keeps_its_files_to_itself():
    def settings(*words, **environ):
        set_ray_defaults(environ, words)
        return environ

    for found in (settings("serve", "--ingress", "haproxy"), settings("serve", "--ingress=haproxy"),
                  settings("serve", TPQWEN_INGRESS="haproxy")):  # fmt: skip
        assert (found["RAY_SERVE_ENABLE_HA_PROXY"], found["RAY_SERVE_THROUGHPUT_OPTIMIZED"]) == ("1", "1")
        folder = Path(found["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert folder.stat().st_mode & 0o077 == 0
        assert Path(found["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent == folder
        folder.rmdir()
    for found in (settings("serve"), settings("serve", "--ingress", "serve", TPQWEN_INGRESS="haproxy"),
                  settings("serve", "--ingress", "haproxy", RAY_ADDRESS="auto")):  # fmt: skip
        assert "RAY_SERVE_ENABLE_HA_PROXY" not in found


def test_haproxy_on_a_running_cluster_is_refused_with_what_would_work(monkeypatch):
    from tpqwen.console import serve

    config = Config.load({"ingress": "haproxy"}, {})
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY=1"):
        serve.check_ingress(config)
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY", raising=False)
    with pytest.raises(ConfigError, match="RAY_SERVE_ENABLE_HA_PROXY"):
        serve.check_ingress(config)  # somebody imported Ray before the setting was made
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    serve.check_ingress(config)


def test_the_banner_names_every_port_that_haproxy_opens():
    text = banner(FACTS, "127.0.0.1", 80, {8404: "HAProxy's statistics"})
    assert "8404 (HAProxy's statistics)" in text


def watching(**options):
    out = io.StringIO()
    return Watch(Console(file=out, highlight=False, markup=False, width=200), **options), out


def test_the_start_shows_rank_0s_stages_and_everyones_trouble():
    watch, out = watching(verbose=False)
    head = "2026-11-24T10:00:00.000 level={} process={} logger=tpqwen.x "
    watch.forward(
        {
            "lines": [
                head.format("info", '"rank 0/2"') + "loaded stage=weights seconds=28.04",
                head.format("info", '"rank 1/2"') + "loaded stage=weights seconds=29.00",
                head.format("warning", "engine") + "something odd",
                head.format("info", "engine") + "nothing special",
            ]
        }
    )
    watch.done({"weights": 28.04, "kv_alloc": 0.3})
    text = out.getvalue()
    assert "weights done (28.0 s)" in text
    assert "29.0" not in text
    assert "something odd" in text
    assert "nothing special" not in text
    assert re.search(r"ready in \d+\.\d s \(weights 28\.0, KV cache 0\.3\)", text)


def test_verbose_shows_every_line():
    watch, out = watching(verbose=True)
    watch.forward({"lines": ["anything at all"]})
    assert out.getvalue() == "anything at all\n"


FACTS = {"model": "qwen", "tp": 2, "device": "cpu", "kv_tokens": 4096, "max_model_len": 512}


def test_the_banner_has_a_curl_that_a_shell_takes():
    text = banner(FACTS, "127.0.0.1", 8123)
    assert "http://127.0.0.1:8123/v1" in text
    assert "4096 tokens" in text
    curl = text[text.index("curl") :].replace("curl -N", "printf '%s\\n'")
    said = subprocess.run(
        ["sh", "-c", curl], capture_output=True, text=True, check=True, timeout=10
    ).stdout.splitlines()
    assert said[0] == "http://127.0.0.1:8123/v1/chat/completions"
    assert said[-1].startswith('{"model": "qwen"')


def test_the_banner_warns_where_strangers_can_connect():
    assert "Anyone" in banner(FACTS, "0.0.0.0", 80)
    assert "Anyone" not in banner(FACTS, "localhost", 80)
    closed = banner(FACTS | {"closed": True}, "0.0.0.0", 80)
    assert "Anyone" not in closed and "Bearer KEY" in closed


def test_serve_refuses_to_listen_beyond_loopback_without_keys(monkeypatch, tmp_path):
    from tpqwen.console import serve

    monkeypatch.delenv("TPQWEN_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"needs API keys .*--insecure"):
        serve.check_access(Config.load({"host": "0.0.0.0"}, {}))
    serve.check_access(Config.load({"host": "0.0.0.0", "insecure": True}, {}))
    serve.check_access(Config.load({"host": "127.0.0.1"}, {}))
    keys = tmp_path / "keys"
    keys.write_text("alice tpq_0123456789abcdefghij\n")
    serve.check_access(Config.load({"host": "0.0.0.0", "api_keys_file": str(keys)}, {}))
    monkeypatch.setenv("TPQWEN_API_KEYS", "alice short")
    with pytest.raises(ConfigError, match="random characters"):
        serve.check_access(Config.load({"host": "127.0.0.1"}, {}))


def test_keys_that_a_running_cluster_does_not_see_are_refused(monkeypatch, tmp_path):
    from tpqwen.console import serve

    monkeypatch.setenv("TPQWEN_API_KEYS", "alice tpq_0123456789abcdefghij")
    serve.check_access(Config.load({"host": "0.0.0.0"}, {}))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigError, match=r"does not see .*--api-keys-file"):
            serve.check_access(Config.load({"host": host}, {}))
    keys = tmp_path / "keys"
    keys.write_text("alice tpq_0123456789abcdefghij\n")
    serve.check_access(Config.load({"host": "0.0.0.0", "api_keys_file": str(keys)}, {}))


@pytest.mark.parametrize("name", ["host", "port", "ingress"])
def test_what_only_the_command_can_do_is_refused_by_the_application(name):
    import serve_app

    with pytest.raises(ConfigError, match=rf"{name} is for `tpqwen serve`"):
        serve_app.app({name: "1"})


def test_nobody_listening_is_not_ready():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert not is_ready(f"http://127.0.0.1:{taken.getsockname()[1]}")


def test_log_lines_are_key_value_and_stay_one_line():
    out = io.StringIO()
    logs.configure("info", "rank 0/2", out)
    log = logging.getLogger("tpqwen.some.module")
    log.info("request=%s text=%s", "a", "two\nlines")
    log.debug("not shown")
    line = out.getvalue()
    assert line.count("\n") == 1
    assert line.endswith('level=info process="rank 0/2" logger=tpqwen.some.module request=a text=two\\nlines\n')


def test_an_event_loops_lines_are_written_once_a_turn_and_in_order():
    class Written(io.StringIO):
        writes = 0

        def write(self, text: str) -> int:
            self.writes += 1
            return super().write(text)

    out = Written()

    def words() -> list[str]:
        return [line.split()[-1] for line in out.getvalue().splitlines()]

    async def main() -> None:
        logs.configure("info", "replica", out, asyncio.get_running_loop())
        log = logging.getLogger("tpqwen.some.module")
        for word in "abc":
            log.info(word)
        assert not out.writes
        await asyncio.sleep(0)
        assert (words(), out.writes) == (["a", "b", "c"], 1)
        log.info("d")
        log.warning("e")  # at once, after what was said before
        assert words() == ["a", "b", "c", "d", "e"]
        log.info("f")
        await asyncio.to_thread(log.info, "g")
        assert words()[5:] == ["f", "g"]
        log.info("h")
        logging.getLogger("tpqwen").handlers[0].flush()  # as at the process's end
        assert words()[7:] == ["h"]

    asyncio.run(main())
    logging.getLogger("tpqwen.some.module").info("i")  # its loop is over
    assert words()[8:] == ["i"]


def test_a_stream_that_takes_nothing_does_not_fail_who_has_something_to_say(monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging, "raiseExceptions", False)

    async def main() -> None:
        logs.configure("info", "replica", Full(), asyncio.get_running_loop())
        log = logging.getLogger("tpqwen.some.module")
        log.info("a")
        log.warning("b")
        log.info("c")
        await asyncio.sleep(0)

    asyncio.run(main(), debug=False)


def test_tracebacks_follow_their_line():
    out = io.StringIO()
    logs.configure("error", "engine", out)
    try:
        raise ValueError("deep")
    except ValueError:
        logging.getLogger("tpqwen.x").exception("step failed")
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("step failed")
    assert lines[-1] == "ValueError: deep"


class ScriptedLLM:
    """Answers from a list: text pieces, or an exception after them."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.tokenizer = SimpleNamespace(encode=str.split)

    def sampling_params(self, **given):
        return given

    def stream_chat(self, messages, params, *, thinking):
        self.asked.append((messages, params, thinking))
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield SimpleNamespace(text=piece, reasoning="")


def converse(llm, *lines, sampling=None):
    chat = pytest.importorskip("tpqwen.console.chat")
    out = io.StringIO()
    answers = iter(lines)

    def read(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    talk = chat.Conversation(llm, Console(file=out, highlight=False, width=200), sampling or {})
    talk.loop(read)
    return talk, out.getvalue()


def test_chat_keeps_the_conversation_and_reports_speed():
    llm = ScriptedLLM(["Hello ", "there"], ["Fine"])
    talk, out = converse(llm, "Hi", "How are you?", "/exit", "not read")
    assert "Hello there" in out
    assert re.search(r"\[2 tokens, first after \d+\.\d\d s, ", out)
    assert [m["content"] for m in llm.asked[1][0]] == ["Hi", "Hello there", "How are you?"]
    assert len(talk.messages) == 4


def test_chat_commands_change_the_next_turn():
    llm = ScriptedLLM(["a"], ["b"])
    _, out = converse(
        llm, "/system Be brief.", "/think off", "x", "/clear", "/think on", "y", "/help", sampling={"seed": 1}
    )
    messages, params, thinking = llm.asked[0]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert (params, thinking) == ({"thinking": False, "seed": 1}, False)
    messages, _, thinking = llm.asked[1]
    assert [m["content"] for m in messages] == ["Be brief.", "y"]
    assert thinking is True
    assert "/clear" in out


def test_a_failed_turn_is_taken_back_and_a_stopped_one_stays():
    llm = ScriptedLLM(["half", EngineError("rank 1 died")], ["cut", KeyboardInterrupt()], ["ok"])
    talk, out = converse(llm, "one", "two", "three")
    assert "rank 1 died" in out
    assert [m["content"] for m in llm.asked[1][0]] == ["two"]
    assert [m["content"] for m in talk.messages] == ["two", "cut", "three", "ok"]


def test_serve_refuses_what_cannot_work_before_anything_starts(monkeypatch):
    serve = pytest.importorskip("tpqwen.console.serve")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            serve.check_host(Config.load({"port": port, "device": "cpu"}, {}))
    monkeypatch.setattr(serve, "count_gpus", lambda: 1)
    with pytest.raises(ConfigError, match="--tp 2 needs 2 GPUs and this host has 1"):
        serve.check_host(Config.load({"port": port, "device": "cuda", "tp": 2}, {}))
    serve.check_host(Config.load({"port": port, "device": "cuda", "tp": 2, "gpus_per_rank": 0.5}, {}))
    monkeypatch.setattr(serve.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    with pytest.raises(ConfigError, match="has 5 MiB free and 256 are needed; RAY_TMPDIR names another folder"):
        serve.check_host(Config.load({"port": port, "device": "cpu"}, {}))


def test_rays_folder_may_come_into_being_later_and_one_that_cannot_is_refused(monkeypatch, tmp_path):
    serve = pytest.importorskip("tpqwen.console.serve")
    config = Config.load({"port": 0, "device": "cpu"}, {})
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not" / "yet"))
    serve.check_host(config)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("n" * 300)))
    with pytest.raises(ConfigError, match=r"nn, where Ray keeps its session, cannot be used: .*; RAY_TMPDIR names"):
        serve.check_host(config)


def test_serves_report_of_a_failed_start_becomes_our_sentence():
    serve = pytest.importorskip("tpqwen.console.serve")
    report = "Deploying app failed:\n  File x\ntpqwen.errors.{}: shard 2 is truncated\n"
    assert isinstance(serve.failure(report.format("ConfigError")), ConfigError)
    assert str(serve.failure(report.format("ConfigError"))) == "shard 2 is truncated"
    assert isinstance(serve.failure(report.format("RankDied")), EngineError)
    assert "something else" in str(serve.failure("something else"))

"""`serve deploy` of the shipped Serve configuration on a local Ray cluster with a token, with the embedded model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tpqwen.config import Config
from tpqwen.service import bundles

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 150
CLUSTER = """
import sys, ray
found = ray.init(address="local", num_cpus=4, num_gpus=0, include_dashboard=True, dashboard_port=int(sys.argv[1]),
                 object_store_memory=100_000_000, log_to_driver=False)
print("dashboard", found.dashboard_url, flush=True)
sys.stdin.read()
ray.shutdown()
"""

pytestmark = pytest.mark.ray


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that ends with its process, its token made as docs/operations.md says: (dashboard address, environment
    for commands, token)."""
    home = tmp_path_factory.mktemp("home")
    own = {"RAY_AUTH_MODE": "token", "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    env = {
        k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    } | own
    make = [str(Path(sys.executable).with_name("ray")), "get-auth-token", "--generate"]
    token = subprocess.run(make, env=env, umask=0o077, capture_output=True, text=True, timeout=60, check=True).stdout
    assert (home / ".ray/auth_token").read_text() == token
    assert (home / ".ray/auth_token").stat().st_mode & 0o077 == 0
    words = [sys.executable, "-c", CLUSTER, str(free_port())]
    with subprocess.Popen(
        words, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("dashboard "))
            yield f"http://{line.split()[1]}", env, token
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def kubernetes_config(name):
    document = yaml.safe_load((ROOT / "k8s" / name).read_text())
    return yaml.safe_load(document["spec"]["serveConfigV2"])


def for_this_machine(config, port):
    """The configuration with what needs GPUs or a cluster replaced: model, device, bundles, address, port, keys."""
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    app = config["applications"][0]
    app["args"] = {k: v for k, v in app["args"].items() if k not in ("model", "metrics_port", "api_keys_file")}
    app["args"] |= {"device": "cpu", "tp": str(min(2, int(app["args"]["tp"]))), "threads": "1"}
    where = bundles(Config.load(app["args"], {}))
    for deployment in app["deployments"]:
        if "placement_group_bundles" in deployment:
            deployment["placement_group_bundles"] = where
            deployment["ray_actor_options"] = {"num_cpus": where[0]["CPU"], "num_gpus": 0}
    return config


def get(url, body=None, token=None):
    data = None if body is None else json.dumps(body).encode()
    key = {} if token is None else {"authorization": f"Bearer {token}"}
    request = urllib.request.Request(url, data, {"content-type": "application/json"} | key)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def status(dashboard, token):
    code, text = get(f"{dashboard}/api/serve/applications/", token=token)
    applications = json.loads(text)["applications"] if code == 200 else {}
    return applications.get("tpqwen", {})


def wait_until_ready(url, dashboard, token):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if get(f"{url}/ready")[0] == 200:
            return
        app = status(dashboard, token)
        assert app.get("status") != "DEPLOY_FAILED", app
        time.sleep(0.5)
    pytest.fail(f"not ready after {DEADLINE_S} s: {status(dashboard, token)}")


@pytest.mark.timeout(400)
def test_serve_deploy_takes_the_manifests_configuration(cluster, tmp_path):
    """With the CPU in place of GPUs and two ranks in place of four; everything else as shipped."""
    dashboard, env, token = cluster
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = for_this_machine(kubernetes_config("rayservice-tp4.yaml"), port)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    serve = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    assert get(f"{dashboard}/api/serve/applications/")[0] == 401
    stranger = env | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(serve, env=stranger, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode != 0
    assert "token" in refused.stdout + refused.stderr
    done = subprocess.run(serve, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until_ready(url, dashboard, token)
    code, text = get(f"{url}/v1/completions", {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True})
    assert code == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] == 4
    deployed = status(dashboard, token)["deployed_app_config"]["deployments"][0]
    assert deployed["max_queued_requests"] == -1
    assert len(deployed["placement_group_bundles"]) == 4

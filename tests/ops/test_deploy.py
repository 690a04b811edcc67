"""`serve deploy` of the shipped Serve configuration on a real local Ray cluster, with the embedded model."""

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
def cluster():
    """A cluster that ends with its process: (dashboard address, environment for commands)."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-c", CLUSTER, str(free_port())]
    with subprocess.Popen(
        words, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            line = next(line for line in process.stdout if line.startswith("dashboard "))
            yield f"http://{line.split()[1]}", env
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


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


def status(dashboard):
    code, text = get(f"{dashboard}/api/serve/applications/")
    applications = json.loads(text)["applications"] if code == 200 else {}
    return applications.get("tpqwen", {})


def wait_until_ready(url, dashboard):
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if get(f"{url}/ready")[0] == 200:
            return
        app = status(dashboard)
        assert app.get("status") != "DEPLOY_FAILED", app
        time.sleep(0.5)
    pytest.fail(f"not ready after {DEADLINE_S} s: {status(dashboard)}")


@pytest.mark.timeout(400)
def test_serve_deploy_takes_the_manifests_configuration(cluster, tmp_path):
    """With the CPU in place of GPUs and two ranks in place of four; everything else as shipped."""
    dashboard, env = cluster
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    config = for_this_machine(kubernetes_config("rayservice-tp4.yaml"), port)
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    serve = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", dashboard, str(path)]
    done = subprocess.run(serve, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until_ready(url, dashboard)
    code, text = get(f"{url}/v1/completions", {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True})
    assert code == 200, text
    assert json.loads(text)["usage"]["completion_tokens"] == 4
    deployed = status(dashboard)["deployed_app_config"]["deployments"][0]
    assert deployed["max_queued_requests"] == -1
    assert len(deployed["placement_group_bundles"]) == 4

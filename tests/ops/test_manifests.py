"""The Kubernetes manifests and the Serve configuration: schemas, the operator's rules, and each other."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import ray
import yaml

from tests.ops.manifest_rules import fit_errors, operator_errors, pod_errors, schema_errors, serve_errors
from tpqwen.config import Config, option_fields
from tpqwen.service import Qwen3Server, bundles

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT.parent / "shared" / "kuberay"
SERVICES = ("rayservice-single-gpu.yaml", "rayservice-tp4.yaml")
KINDS = {"RayService": "ray.io_v1_RayService", "PodMonitor": "monitoring.coreos.com_v1_PodMonitor"}


def documents(name):
    return list(yaml.safe_load_all((ROOT / "k8s" / name).read_text()))


def service(name="rayservice-tp4.yaml"):
    return documents(name)[0]


def serve_config(document):
    return yaml.safe_load(document["spec"]["serveConfigV2"])


def worker(document):
    return document["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]


def head(document):
    return document["spec"]["rayClusterConfig"]["headGroupSpec"]


def everything(document):
    """All errors that need no schema file."""
    config = serve_config(document)
    fit = fit_errors(document, config, ray.__version__)
    return [*serve_errors(config), *operator_errors(document), *pod_errors(document), *fit]


@pytest.mark.parametrize("name", [*SERVICES, "podmonitor.yaml"])
def test_manifests_satisfy_the_custom_resources_schemas(name):
    if not SCHEMAS.is_dir():
        pytest.skip("the CRD schemas are not beside this checkout (../shared/kuberay)")
    for document in documents(name):
        schema = json.loads((SCHEMAS / f"{KINDS[document['kind']]}.json").read_text())
        assert schema_errors(schema, document) == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda d: head(d)["rayStartParams"].update({"num-cpus": 0}),
        lambda d: d["spec"]["rayClusterConfig"].update(rayVersion=2.6),
        lambda d: worker(d).update(replicas="1"),
        lambda d: worker(d).pop("groupName"),
        lambda d: d["spec"].update(serveConfig={}),
        lambda d: d["metadata"].pop("name"),
    ],
)
def test_the_schema_check_finds_planted_faults(break_it):
    if not SCHEMAS.is_dir():
        pytest.skip("the CRD schemas are not beside this checkout (../shared/kuberay)")
    schema = json.loads((SCHEMAS / "ray.io_v1_RayService.json").read_text())
    document = service()
    break_it(document)
    assert schema_errors(schema, document)


@pytest.mark.parametrize("name", SERVICES)
def test_manifests_satisfy_serve_the_operator_and_each_other(name):
    assert everything(service(name)) == []


def edit_serve(change):
    def break_it(document):
        config = serve_config(document)
        change(config, config["applications"][0], config["applications"][0]["deployments"][0])
        document["spec"]["serveConfigV2"] = yaml.safe_dump(config)

    return break_it


def ray_container(group):
    return group["template"]["spec"]["containers"][0]


def limits(group):
    return ray_container(group)["resources"]["limits"]


def without_autoscaling(document):
    del document["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    del worker(document)["minReplicas"]


def all_groups():
    return [group for document in map(service, SERVICES) for group in (head(document), worker(document))]


MORE_THAN_MOST = {"min_replicas": 3, "max_replicas": 1}


@pytest.mark.parametrize(
    ("sentence", "break_it"),
    [
        ("no port named serve", lambda d: ray_container(head(d))["ports"].pop(2)),
        ("DNS label", lambda d: d["metadata"].update(name="Tpqwen_4")),
        ("rayVersion >= 2.52", lambda d: d["spec"]["rayClusterConfig"].update(rayVersion="2.40.0")),
        ("Never with autoscaler", lambda d: worker(d)["template"]["spec"].update(restartPolicy="Always")),
        ("above maxReplicas", lambda d: worker(d).update(minReplicas=9)),
        ("without autoscaling", without_autoscaling),
        ("labels do not belong", lambda d: worker(d)["rayStartParams"].update(labels="a=b")),
        ("upgradeStrategy.type", lambda d: d["spec"]["upgradeStrategy"].update(type="Rolling")),
        ("feature gate", lambda d: d["spec"]["rayClusterConfig"].update(networkPolicy={})),
        ("no volume dshm", lambda d: worker(d)["template"]["spec"]["volumes"].pop()),
        ("longer than 15", lambda d: ray_container(worker(d))["ports"][2].update(name="tpqwen-metrics-port")),
        ("worker ports", lambda d: ray_container(worker(d))["ports"][2].update(containerPort=10400)),
        ("above its limit", lambda d: ray_container(worker(d))["resources"]["requests"].update(memory="1Ti")),
        ("pod is killed", lambda d: worker(d)["template"]["spec"].update(terminationGracePeriodSeconds=90)),
        ("no worker pod holds", lambda d: limits(worker(d)).update({"nvidia.com/gpu": "2"})),
        ("unknown key 'numReplicas'", edit_serve(lambda c, a, d: d.update(numReplicas=2))),
        ("unknown key 'port_number'", edit_serve(lambda c, a, d: c["http_options"].update(port_number=1))),
        ("must be a string", edit_serve(lambda c, a, d: a["args"].update(tp=4))),
        ("GPUs in the bundles differ", edit_serve(lambda c, a, d: a["args"].update(tp="2"))),
        ("cannot hold the replica", edit_serve(lambda c, a, d: d["ray_actor_options"].update(num_gpus=4))),
        ("not below Ray's drain", edit_serve(lambda c, a, d: d.update(graceful_shutdown_timeout_s=200))),
        ("unknown placement_group_strategy", edit_serve(lambda c, a, d: d.update(placement_group_strategy="TIGHT"))),
        ("min_replicas", edit_serve(lambda c, a, d: d.update(autoscaling_config=MORE_THAN_MOST))),
    ],
)
def test_the_rules_find_planted_faults(sentence, break_it):
    document = service()
    break_it(document)
    assert [problem for problem in everything(document) if sentence in problem]


@pytest.mark.parametrize("name", SERVICES)
def test_bundles_and_arguments_are_those_of_the_code(name):
    app = serve_config(service(name))["applications"][0]
    config = Config.load(app["args"], {})
    deployment = app["deployments"][0]
    assert deployment["placement_group_bundles"] == bundles(config)
    assert deployment["name"] == Qwen3Server.name
    assert set(app["args"]) <= set(option_fields())
    module, _, function = app["import_path"].partition(":")
    assert f"def {function}(" in (ROOT / f"{module}.py").read_text()
    assert config.parallel.device == "cuda"
    port = {p["name"]: p["containerPort"] for p in ray_container(worker(service(name)))["ports"]}["tpq-metrics"]
    assert config.server.metrics_port == port


def test_serve_options_of_manifest_and_code_agree():
    for name in SERVICES:
        deployment = serve_config(service(name))["applications"][0]["deployments"][0]
        assert deployment["max_ongoing_requests"] == Qwen3Server.max_ongoing_requests
        assert deployment["max_queued_requests"] == Qwen3Server.max_queued_requests


def test_selectors_match_the_pods_and_ports_exist():
    labels = [group["template"]["metadata"]["labels"] for group in all_groups()]
    ports = {port["name"]: port["containerPort"] for group in all_groups() for port in ray_container(group)["ports"]}
    monitors, policy = documents("podmonitor.yaml"), documents("networkpolicy.yaml")[0]["spec"]
    selectors = [monitor["spec"]["selector"] for monitor in monitors]
    selectors += [documents("pdb.yaml")[0]["spec"]["selector"], policy["podSelector"]]
    for selector in selectors:
        assert any(selector["matchLabels"].items() <= pod.items() for pod in labels), selector
    assert {e["port"] for m in monitors for e in m["spec"]["podMetricsEndpoints"]} <= set(ports)
    agent = 52365  # opened by Ray's agent, asked by the operator, declared nowhere
    assert {p["port"] for rule in policy["ingress"] for p in rule.get("ports", [])} - {agent} <= set(ports.values())


def test_claims_and_images_are_the_same_everywhere():
    claim, job = documents("model-cache.yaml")
    pods = [group["template"]["spec"] for group in all_groups()] + [job["spec"]["template"]["spec"]]
    for pod in pods:
        claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        assert claims == {claim["metadata"]["name"]}
        assert pod["containers"][0]["image"] == "registry.example.com/tpqwen:0.1.0"
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_the_operator_may_connect_from_any_namespace():
    """Its pods' label is the same whether helm or kustomize installed it; in which namespace is the user's choice."""
    rules = documents("networkpolicy.yaml")[0]["spec"]["ingress"]
    label = {"app.kubernetes.io/component": "kuberay-operator"}
    (rule,) = [r for r in rules if r["from"] == [{"namespaceSelector": {}, "podSelector": {"matchLabels": label}}]]
    assert {p["port"] for p in rule["ports"]} == {8000, 8265, 52365}


@pytest.mark.parametrize("name", SERVICES)
def test_a_manifests_model_is_one_that_it_says_must_be_downloaded(name):
    """No pod downloads anything: what the claim lacks cannot be served."""
    model = serve_config(service(name))["applications"][0]["args"]["model"]
    head_lines = (ROOT / "k8s" / name).read_text().partition("apiVersion")[0]
    needs = head_lines[head_lines.index("# Needs") :]
    assert f"the claim tpqwen-models with {model} in it" in needs and "model-cache.yaml's MODEL" in needs
    assert "Secret tpqwen-api-keys" in needs
    container = documents("model-cache.yaml")[1]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["hf", "download", "$(MODEL)"]
    line = next(x for x in (ROOT / "k8s/model-cache.yaml").read_text().splitlines() if "name: MODEL," in x)
    assert model in line
    for group in (head(service(name)), worker(service(name))):
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in ray_container(group)["env"]


def test_the_steps_in_operations_name_what_the_manifests_have():
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    steps = page.split("## Kubernetes")[1].split("\n## ")[0]
    applied = re.findall(r"-f k8s/(\S+\.yaml)", steps)
    assert sorted([*applied, "rayservice-tp4.yaml"]) == sorted(path.name for path in (ROOT / "k8s").glob("*.yaml"))
    name = documents("rayservice-single-gpu.yaml")[0]["metadata"]["name"]
    job = documents("model-cache.yaml")[1]["metadata"]["name"]
    for words in (f"rayservice/{name} ", f"service/{name}-serve-svc 8000:8000", f"condition=complete job/{job} "):
        assert words in steps
    secret = next(v["secret"] for v in worker(service())["template"]["spec"]["volumes"] if "secret" in v)["secretName"]
    path = serve_config(service())["applications"][0]["args"]["api_keys_file"]
    assert f"create secret generic {secret} --from-file={path.rpartition('/')[2]}\n" in steps
    order = (
        "create namespace",
        "model-cache.yaml",
        "create secret",
        "rayservice-single-gpu.yaml\n",
        "curl ",
        "podmonitor",
    )
    places = [steps.rindex(word) if word == "podmonitor" else steps.index(word, steps.index("1. ")) for word in order]
    assert places == sorted(places)


def test_no_manifest_holds_a_secret():
    for path in (ROOT / "k8s").glob("*.yaml"):
        assert not [d for d in yaml.safe_load_all(path.read_text()) if d["kind"] == "Secret"], path


def test_the_declarative_serve_configuration_is_strict_too():
    config = yaml.safe_load((ROOT / "deploy/serve_config.yaml").read_text())
    assert serve_errors(config) == []
    assert set(config["applications"][0]["args"]) <= set(option_fields())


def test_checks_leave_the_document_as_it_was():
    document = service()
    before = copy.deepcopy(document)
    everything(document)
    assert document == before


def test_every_recipe_turns_rays_token_authentication_on():
    for name in SERVICES:
        assert service(name)["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_keys_are_mounted_where_the_option_says():
    for name in SERVICES:
        spec = worker(service(name))["template"]["spec"]
        path = serve_config(service(name))["applications"][0]["args"]["api_keys_file"]
        mounts = {m["mountPath"]: m for m in ray_container(worker(service(name)))["volumeMounts"]}
        volume = next(v for v in spec["volumes"] if v["name"] == mounts[path.rpartition("/")[0]]["name"])
        assert volume["secret"] == {"secretName": "tpqwen-api-keys", "defaultMode": 0o440}


def test_head_and_workers_agree_on_the_ingress():
    for name in SERVICES:
        spec = service(name)["spec"]["rayClusterConfig"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        found = [{e["name"]: e.get("value") for e in ray_container(group)["env"]} for group in groups]
        for setting in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
            assert [env.get(setting) for env in found] == ["1"] * len(groups)

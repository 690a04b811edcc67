"""What the API server, the KubeRay operator and Serve would say of a manifest, and what no schema can see.

Operator rules after KubeRay v1.7.0, ray-operator/controllers/ray/utils/validation.go. Each function returns sentences.
"""

from __future__ import annotations

import copy
import re

import jsonschema
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)
from ray.util.placement_group import VALID_PLACEMENT_GROUP_STRATEGIES

UNITS = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9}
METADATA = {"type": "object", "anyOf": [{"required": ["name"]}, {"required": ["generateName"]}]}
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")
RESOURCE_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
WORKER_PORTS = range(10001, 20000)


def strict(schema):
    """A structural OpenAPI schema as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    out = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: strict(sub) for name, sub in value.items()}
        elif not key.startswith("x-kubernetes-") and key not in ("description", "default", "format", "nullable"):
            out[key] = strict(value)
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    closed = schema.get("type") == "object" and "properties" in out and "additionalProperties" not in out
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def fill(schema, value):
    """What the API server does first: drop nulls of fields that take none, fill in defaults."""
    if isinstance(value, list):
        for item in value:
            fill(schema.get("items", {}), item)
    if not isinstance(value, dict):
        return
    known = schema.get("properties") or {}
    for name in [n for n, v in value.items() if v is None and not known.get(n, {}).get("nullable")]:
        del value[name]
    for name, sub in known.items():
        if name not in value and "default" in sub:
            value[name] = copy.deepcopy(sub["default"])
        if name in value:
            fill(sub, value[name])
    if isinstance(extra := schema.get("additionalProperties"), dict):
        for name in value.keys() - known.keys():
            fill(extra, value[name])


def schema_errors(schema, document):
    document = copy.deepcopy(document)
    fill(schema, document)
    top = strict(schema)
    top["properties"]["metadata"] = METADATA
    found = jsonschema.Draft7Validator(top).iter_errors(document)
    return [f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found]


def serve_errors(config):
    """Every key that Serve would silently ignore, then what its own schema says."""
    out = []

    def keys(value, model, where):
        out.extend(f"{where}: unknown key {key!r}" for key in value if key not in model.model_fields)

    keys(config, ServeDeploySchema, "top")
    keys(config.get("http_options") or {}, HTTPOptionsSchema, "http_options")
    for app in config.get("applications", []):
        name = app.get("name", "default")
        keys(app, ServeApplicationSchema, name)
        out += [f"{name}: argument {k} must be a string" for k, v in app.get("args", {}).items() if type(v) is not str]
        for deployment in app.get("deployments", []):
            where = f"{name}/{deployment.get('name')}"
            keys(deployment, DeploymentSchema, where)
            keys(deployment.get("ray_actor_options") or {}, RayActorOptionsSchema, where)
            out += [f"{where}: {problem}" for problem in _deployment_errors(deployment)]
    try:
        ServeDeploySchema.model_validate(config)
    except ValueError as error:
        out.append(f"schema: {error}")
    return out


def _deployment_errors(deployment):
    out = []
    if isinstance(scaling := deployment.get("autoscaling_config"), dict):
        out += [f"unknown key {key!r}" for key in scaling if key not in AutoscalingConfig.model_fields]
        try:
            AutoscalingConfig(**scaling)
        except ValueError as error:
            out.append(str(error))
    bundles = deployment.get("placement_group_bundles")
    if not bundles:
        return out
    if deployment.get("placement_group_strategy", "PACK") not in VALID_PLACEMENT_GROUP_STRATEGIES:
        out.append("unknown placement_group_strategy")
    actor = deployment.get("ray_actor_options") or {}
    for resource, needed in {"CPU": actor.get("num_cpus", 1), "GPU": actor.get("num_gpus", 0)}.items():
        if bundles[0].get(resource, 0) < (needed or 0):
            out.append(f"the first bundle cannot hold the replica ({resource} {needed})")
    return out


def containers(service):
    """(group name, rayStartParams, pod spec, Ray container), the head first."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(g["groupName"], g) for g in cluster.get("workerGroupSpecs", [])]
    for name, group in groups:
        pod = group["template"]["spec"]
        yield name, group.get("rayStartParams") or {}, pod, (pod.get("containers") or [{}])[0]


def operator_errors(service):
    """What the operator refuses although the CRD's schema takes it."""
    cluster = service["spec"]["rayClusterConfig"]
    out = _name_errors(service) + _auth_errors(cluster) + _scaling_errors(cluster)
    head = next(containers(service))[3]
    ports = [p.get("name", "") for p in head.get("ports", [])]
    if "serveService" not in service["spec"] and not any(p == "serve" or p.startswith("serve-") for p in ports):
        out.append("head: no port named serve, so there would be no Serve Service")
    upgrade = service["spec"].get("upgradeStrategy", {}).get("type", "NewCluster")
    if upgrade not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        out.append(f"upgradeStrategy.type {upgrade} is unknown")
    if service["spec"].get("rayClusterDeletionDelaySeconds", 0) < 0:
        out.append("rayClusterDeletionDelaySeconds is negative")
    if "upgradeStrategy" in cluster:
        out.append("rayClusterConfig.upgradeStrategy is refused inside a RayService")
    out += [f"{gate} is behind a feature gate" for gate in GATED if gate in cluster]
    for group, params, pod, _ in containers(service):
        if not pod.get("containers"):
            out.append(f"{group}: no container")
        if "labels" in params:
            out.append(f"{group}: labels do not belong in rayStartParams")
    for group in cluster.get("workerGroupSpecs", []):
        if "resources" in group and RESOURCE_PARAMS & set(group.get("rayStartParams") or {}):
            out.append(f"{group['groupName']}: resources and rayStartParams both say what a node has")
    return out


def _name_errors(service):
    name = service["metadata"]["name"]
    good = len(name) <= 47 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    return [] if good else [f"name {name} is not a DNS label of at most 47 characters"]


def _auth_errors(cluster):
    auth = cluster.get("authOptions", {})
    if "enableK8sTokenAuth" in auth:
        return ["authOptions.enableK8sTokenAuth is refused for a RayService"]
    version = re.match(r"(\d+)\.(\d+)\.", str(cluster.get("rayVersion", "")))
    old = version is None or tuple(map(int, version.groups())) < (2, 52)
    return ["authOptions.mode token needs rayVersion >= 2.52.0"] if auth.get("mode") == "token" and old else []


def _scaling_errors(cluster):
    out = []
    scaling = cluster.get("enableInTreeAutoscaling", False)
    pods = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    if scaling and cluster.get("autoscalerOptions", {}).get("version") == "v2":
        policies = [p["template"]["spec"].get("restartPolicy", "Never") for p in pods]
        out += ["restartPolicy must be Never with autoscaler v2"] if set(policies) != {"Never"} else []
    for group in cluster.get("workerGroupSpecs", []):
        name, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not scaling and (least is None or most is None):
            out.append(f"{name}: minReplicas and maxReplicas must be set without autoscaling")
        if not 0 <= (least or 0) <= (most if most is not None else 2**31):
            out.append(f"{name}: minReplicas {least} above maxReplicas {most}")
    return out


def quantity(text):
    """A Kubernetes quantity as a number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(text))
    assert found, f"{text!r} is no quantity"
    return float(found[1]) * UNITS[found[2]]


def pod_errors(service):
    """Volumes, ports, resources and the chain of timeouts, for each template."""
    out = []
    for group, _, pod, ray in containers(service):
        volumes = {v["name"] for v in pod.get("volumes", [])}
        for container in pod["containers"]:
            mounts = {m["name"] for m in container.get("volumeMounts", [])}
            out += [f"{group}: no volume {name}" for name in sorted(mounts - volumes)]
            out += [f"{group}: {problem}" for problem in _port_errors(container) + _resource_errors(container)]
        env = {e["name"]: e.get("value") for e in ray.get("env", [])}
        drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        grace = pod.get("terminationGracePeriodSeconds", 30)
        if drain >= grace:
            out.append(f"{group}: Ray drains for {drain:g} s and the pod is killed after {grace} s")
        if "preStop" in ray.get("lifecycle", {}):
            out.append(f"{group}: preStop disturbs Ray's own drain")
    return out


def _port_errors(container):
    out = []
    for port in container.get("ports", []):
        name, number = port.get("name", ""), port["containerPort"]
        if len(name) > 15:
            out.append(f"port name {name} is longer than 15 characters")
        if not 1 <= number <= 65535:
            out.append(f"port {number} does not exist")
        if number in WORKER_PORTS:
            out.append(f"port {number} lies in Ray's worker ports or is its open client port")
    return out


def _resource_errors(container):
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    out = [f"no limit for {name}" for name in ("cpu", "memory") if name not in limits]
    for name, amount in requests.items():
        if name in limits and quantity(amount) > quantity(limits[name]):
            out.append(f"{name} request {amount} above its limit {limits[name]}")
    gpu = "nvidia.com/gpu"
    if limits.get(gpu) != requests.get(gpu, limits.get(gpu)):
        out.append("GPU request and limit differ")
    return out


def fit_errors(service, serve_config, ray_version):
    """Serve's half against the cluster's half: bundles, TP, versions, shutdown times."""
    out = []
    cluster = service["spec"]["rayClusterConfig"]
    if cluster["rayVersion"] != ray_version:
        out.append(f"rayVersion {cluster['rayVersion']} and the installed Ray {ray_version} differ")
    workers = list(containers(service))[1:]
    for app in serve_config["applications"]:
        for deployment in app["deployments"]:
            bundles = deployment["placement_group_bundles"]
            gpus = sum(b.get("GPU", 0) for b in bundles)
            if int(app["args"].get("tp", "1")) != gpus:
                out.append(f"tp {app['args'].get('tp')} and {gpus} GPUs in the bundles differ")
            if not any(_holds(ray, bundles) for *_, ray in workers):
                out.append(f"no worker pod holds {bundles}")
            for group, _, _, ray in workers:
                env = {e["name"]: e.get("value") for e in ray.get("env", [])}
                drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
                if deployment["graceful_shutdown_timeout_s"] >= drain:
                    out.append(f"{group}: graceful_shutdown_timeout_s is not below Ray's drain of {drain:g} s")
            if deployment["graceful_shutdown_timeout_s"] >= service["spec"]["rayClusterDeletionDelaySeconds"]:
                out.append("the old cluster goes before its streams end")
    return out


def _holds(ray, bundles):
    limits = ray["resources"]["limits"]
    cpus, gpus = (sum(b.get(r, 0) for b in bundles) for r in ("CPU", "GPU"))
    return quantity(limits["cpu"]) >= cpus and quantity(limits.get("nvidia.com/gpu", 0)) >= gpus

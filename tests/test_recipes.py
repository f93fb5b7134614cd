"""Recipes say what their programs understand, and their numbers agree.  No cluster here: it would have more to say."""

from __future__ import annotations

import argparse
import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpu_attention import add_process_arguments, parse_bytes
from fastdecode.api.config_file import parse_arguments
from fastdecode.cli import COMMANDS
from fastdecode.commands import serve

SCRIPTS = Path(__file__).parents[1] / "scripts"
CLOSE_S = 15  # what a server takes after it has drained, at most


def documents(name: str) -> dict[str, Any]:
    """By kind."""
    loaded = list(yaml.safe_load_all((SCRIPTS / name).read_text()))
    assert len({one["kind"] for one in loaded}) == len(loaded)
    return {one["kind"]: one for one in loaded}


def pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    spec = workload["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    return dict(spec["template"]["spec"])


def containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All of them, with what they mount checked."""
    volumes = [volume["name"] for volume in pod["volumes"]]
    for one in (*pod["initContainers"], *pod["containers"]):
        assert all(mount["name"] in volumes for mount in one["volumeMounts"])
        names = {variable["name"] for variable in one.get("env", [])}
        assert set(re.findall(r"\$\((\w+)\)", " ".join(one["command"]))) <= names
        yield one


def r_worker_flags(container: dict[str, Any]) -> argparse.Namespace:
    """As the program reads them; with memory and cores that its limits allow."""
    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    program, command, *words = container["command"]
    assert (program, command) == ("fastdecode", "rworker") and command in COMMANDS
    flags = parser.parse_args(words)
    sizes = container["resources"]
    limit = parse_bytes(sizes["limits"]["memory"].replace("Gi", "GiB"))
    assert flags.kv_cache_memory < 0.95 * limit and flags.threads == int(sizes["limits"]["cpu"])
    assert sizes["limits"] == sizes["requests"]
    return flags


def check_serve_flags(words: list[str], config: dict[str, Any], tmp_path: Path) -> argparse.Namespace:
    """As the server reads its command and the recipe's file."""
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))

    def make_parser(kind: type[argparse.ArgumentParser]) -> argparse.ArgumentParser:
        parser = kind()
        serve.add_arguments(parser)
        return parser

    local = [str(tmp_path / "serve.yaml") if word.endswith("serve.yaml") else word for word in words]
    return parse_arguments(make_parser, local)


def test_kubernetes(tmp_path: Path) -> None:
    found = documents("kubernetes.yaml")
    pod = pod_of(found["Deployment"])
    *r_workers, server = containers(pod)
    config = yaml.safe_load(found["ConfigMap"]["data"]["serve.yaml"])
    # Sidecars, so that they end after the server, each where the server looks for it.
    assert all(worker["restartPolicy"] == "Always" for worker in r_workers) and pod["shareProcessNamespace"]
    assert [r_worker_flags(worker).bind for worker in r_workers] == config["r-worker-address"]
    for worker, address in zip(r_workers, config["r-worker-address"], strict=True):
        assert worker["startupProbe"]["exec"]["command"][-1] == address.removeprefix("shm://")
    sleep_s = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= sleep_s + config["shutdown-timeout"] + CLOSE_S
    assert server["startupProbe"]["httpGet"]["path"] == server["readinessProbe"]["httpGet"]["path"] == "/health"
    (port,) = server["ports"]
    assert (
        port["containerPort"] == config["port"] and found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    )
    assert found["Service"]["spec"]["selector"] == found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert server["command"][:2] == ["fastdecode", "serve"]
    flags = check_serve_flags(server["command"][2:], config, tmp_path)
    assert flags.model == "/model" and flags.r_worker_addresses == config["r-worker-address"]


def test_kubernetes_r_workers() -> None:
    found = documents("kubernetes_r_workers.yaml")
    pod = pod_of(found["StatefulSet"])
    key, worker = containers(pod)
    flags = r_worker_flags(worker)
    assert flags.bind == "tcp://$(POD_IP):5555" and flags.key_file == key["command"][-1]
    assert key["command"][:3] == ["install", "-m", "600"]
    service, name = found["Service"], found["StatefulSet"]["metadata"]["name"]
    assert service["spec"]["selector"] == found["StatefulSet"]["spec"]["selector"]["matchLabels"]
    assert found["StatefulSet"]["spec"]["serviceName"] == service["metadata"]["name"]
    text = (SCRIPTS / "kubernetes_r_workers.yaml").read_text()
    told = re.findall(r"tcp://([\w.-]+):5555", text.split("apiVersion", 1)[0])
    replicas = found["StatefulSet"]["spec"]["replicas"]
    assert told == [f"{name}-{number}.{service['metadata']['name']}" for number in range(replicas)]


def test_systemd(tmp_path: Path) -> None:
    text = (SCRIPTS / "fastdecode.service").read_text()
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    assert service["KillMode"] == "mixed" and service["Restart"] == "on-failure"
    comment = text.split("[Unit]")[0]
    config = yaml.safe_load("\n".join(line[2:] for line in comment.splitlines() if re.match(r"#     [\w-]+: ", line)))
    assert int(service["TimeoutStopSec"]) >= config["shutdown-timeout"] + CLOSE_S
    assert service["ExecStart"].split()[1:3] == ["serve", "--config"]
    check_serve_flags(service["ExecStart"].split()[2:], config, tmp_path)
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze")
    here = tmp_path / "fastdecode.service"
    here.write_text(text.replace(service["ExecStart"].split()[0], sys.executable))
    verified = subprocess.run([analyze, "verify", str(here)], capture_output=True, text=True, timeout=60)
    assert verified.returncode == 0 and "fastdecode.service" not in verified.stderr, verified.stderr

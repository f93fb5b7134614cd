"""The processes of a deployment file, as a shell script: started with what it gives them, asked once, and ended.

python bench/deployment_commands.py kubernetes|kubernetes_r_workers|systemd --model DIRECTORY --port N

For `odd_machines.sh`, which runs it as the file's user.  Flags, order, environment and places are the file's own; the
model, sizes, the server's address and the place of its configuration are this machine's.
"""

from __future__ import annotations

import argparse
import configparser
import json
import shlex
from pathlib import Path

import yaml

SCRIPTS = Path(__file__).parents[1] / "scripts"
CONFIG = "/run/serve.yaml"
SECRET = "/run/secret"
_SIZES = {"--kv-cache-memory": "32MiB", "--threads": "1"}
_ASK = """
import json, sys, time, urllib.request
url, server = f"http://127.0.0.1:{sys.argv[1]}", int(sys.argv[2])
deadline = time.monotonic() + 180
while True:
    try:
        urllib.request.urlopen(url + "/health", timeout=5)
        break
    except OSError as error:
        open(f"/proc/{server}/stat").close()  # it lives
        assert time.monotonic() < deadline, error
        time.sleep(0.5)
body = json.dumps({"prompt": "import", "max_tokens": 4, "temperature": 0}).encode()
headers = {"content-type": "application/json", "authorization": "Bearer sesame"}
answer = json.load(urllib.request.urlopen(urllib.request.Request(url + "/v1/completions", body, headers), timeout=60))
print(answer["choices"][0]["text"])
"""
# As long as an R-worker is not there the server ends, and is started again by its own pod.
_REACH = """
import socket, sys, time
deadline = time.monotonic() + 180
while socket.socket().connect_ex(("127.0.0.1", int(sys.argv[1].rpartition(":")[2]))):
    assert time.monotonic() < deadline, "no R-worker"
    time.sleep(0.5)
"""


def kubernetes(model: str, port: int) -> str:
    documents = {one["kind"]: one for one in yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text("utf-8"))}
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    config = yaml.safe_load(documents["ConfigMap"]["data"]["serve.yaml"]) | {"model": model, "port": port}
    lines = [f"echo {shlex.quote(json.dumps(config))} > {CONFIG}", "workers="]
    for container in pod["initContainers"]:
        ready = " ".join(container["startupProbe"]["exec"]["command"])
        lines += [f'{_command(container)} & workers="$workers $!"', f"until {ready}; do sleep 0.2; done"]
    [server] = pod["containers"]
    return "\n".join([*lines, *_serve(_command(server), port), "kill $workers; wait $workers; exit $code"])


def kubernetes_r_workers(model: str, port: int) -> str:
    """Two of its pods on one machine, one port each; then the server of kubernetes.yaml without its sidecars, with the
    key and the lines of serve.yaml that the head of the file asks for."""
    text = (SCRIPTS / "kubernetes_r_workers.yaml").read_text("utf-8")
    documents = {one["kind"]: one for one in yaml.safe_load_all(text)}
    pod = documents["StatefulSet"]["spec"]["template"]["spec"]
    [keys], [r_worker] = pod["initContainers"], pod["containers"]
    lines = ["fastdecode keygen /run/fastdecode.key", f"mkdir -p {SECRET} /run/keys",
             f"install -m 440 /run/fastdecode.key {SECRET}/", shlex.join(keys["command"]), "workers="]  # fmt: skip
    addresses = [
        f"tcp://127.0.0.1:{port + 1 + number}" for number in range(documents["StatefulSet"]["spec"]["replicas"])
    ]
    for address in addresses:
        command = _command(r_worker).replace("tcp://127.0.0.1:5555", address)
        lines += [f'{command} & workers="$workers $!"', shlex.join(["python", "-c", _REACH, address])]
    whole = {one["kind"]: one for one in yaml.safe_load_all((SCRIPTS / "kubernetes.yaml").read_text("utf-8"))}
    [server] = whole["Deployment"]["spec"]["template"]["spec"]["containers"]
    head = yaml.safe_load(
        "\n".join(line[1:].strip() for line in text.splitlines() if line.startswith("#     ") and ": " in line)
    )
    config = yaml.safe_load(whole["ConfigMap"]["data"]["serve.yaml"]) | head
    config |= {"model": model, "port": port, "r-worker-address": addresses}
    lines += [f"echo {shlex.quote(json.dumps(config))} > {CONFIG}"]
    return "\n".join([*lines, *_serve(_command(server), port), "kill $workers; wait $workers; exit $code"])


def systemd(model: str, port: int) -> str:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(SCRIPTS / "fastdecode.service", encoding="utf-8")
    service = unit["Service"]
    head = [
        line[1:].strip()
        for line in (SCRIPTS / "fastdecode.service").read_text("utf-8").splitlines()
        if "#     " in line
    ]
    given = yaml.safe_load("\n".join(line for line in head if ": " in line and not line.startswith("cp ")))
    config = given | {"model": model, "port": port, "kv-cache-memory": "32MiB", "linear-kernel": "plain"}
    words = shlex.split(service["ExecStart"])
    words = ["fastdecode", *(CONFIG if word.endswith("serve.yaml") else word for word in words[1:])]
    command = shlex.join(["env", *shlex.split(service["Environment"]), "FASTDECODE__API_KEY=sesame", *words])
    return "\n".join([f"echo {shlex.quote(json.dumps(config))} > {CONFIG}", *_serve(command, port), "exit $code"])


def _serve(command: str, port: int) -> list[str]:
    ask = shlex.join(["python", "-c", _ASK, str(port)])
    return [f"{command} & server=$!", f"{ask} $server; asked=$?", "kill -TERM $server; wait $server",
            "code=$?; [ $asked = 0 ] || code=1"]  # fmt: skip


def _command(container: dict[str, object]) -> str:
    """With its environment: addresses and secrets are this machine's."""
    variables = {"POD_IP": "127.0.0.1", "FASTDECODE__API_KEY": "sesame"}
    given = {one["name"]: one.get("value", variables.get(one["name"])) for one in container["env"]}  # type: ignore[attr-defined]
    words = list(container["command"])  # type: ignore[call-overload]
    for place, word in enumerate(words):
        words[place] = given["POD_IP"] if word == "$(POD_IP)" else word
        if word.endswith("serve.yaml"):
            words[place] = CONFIG
        if place and words[place - 1] in _SIZES:
            words[place] = _SIZES[words[place - 1]]
        flag, _, value = word.partition("=")
        if value:
            words[place] = f"{flag}={_SIZES.get(flag, value.replace('$(POD_IP)', str(given['POD_IP'])))}"
    return shlex.join(["env", *(f"{name}={value}" for name, value in given.items()), *words])


FILES = {"kubernetes": kubernetes, "kubernetes_r_workers": kubernetes_r_workers, "systemd": systemd}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", choices=sorted(FILES))
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    args = parser.parse_args()
    print(FILES[args.file](args.model, args.port))


if __name__ == "__main__":
    main()

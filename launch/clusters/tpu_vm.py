"""TPU VMs: a slice made with gcloud, the package on its hosts, and a job."""

import argparse
import pathlib

from clusters import chips, ssh, values
from clusters.steps import Step

SUMMARY = "run a job on a slice of TPU VMs"
ROOT = pathlib.Path(__file__).parents[2]
PYTHON = "3.11"
PROGRAM = ".venv/bin/anchor-jax"
BUILT = ROOT / "dist" / "tpu"
CONFIG = pathlib.Path(__file__).with_name("wheel.cfg")
ACTIONS = {
    "create": "request the slice, from the queue unless --plain",
    "setup": "install the package of this checkout on all hosts",
    "run": "start the job on all hosts and return",
    "logs": "follow the log of one host",
    "stop": "ask the job to save and leave",
    "delete": "delete the slice, which ends the cost",
}
_PURCHASES = ("spot", "reserved")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the launcher's flags."""
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()),
    )
    parser.add_argument("--name", type=values.name, required=True, help="of the slice")
    parser.add_argument("--zone", type=values.word, required=True)
    parser.add_argument("--project", type=values.name)
    parser.add_argument("--topology", type=chips.tpu, help="v5p:4x4x4, v6e:8x8, ...")
    parser.add_argument("--runtime", type=values.word, help="software of the VMs")
    parser.add_argument(
        "--plain", action="store_true", help="create or delete it without the queue"
    )
    bought = parser.add_mutually_exclusive_group()
    for purchase in _PURCHASES:
        bought.add_argument(f"--{purchase}", action="store_true")
    parser.add_argument(
        "--wait", type=values.duration, help="how long a request stays in the queue"
    )
    parser.add_argument("--service_account", type=values.email)
    parser.add_argument("--network", type=values.word)
    parser.add_argument("--subnetwork", type=values.word)
    parser.add_argument(
        "--internal_ips", action="store_true", help="no public addresses"
    )
    parser.add_argument("--worker", type=values.worker, default="0", help="for logs")


def steps(given: argparse.Namespace, job: list[str]) -> list[Step]:
    """Returns the commands of an action; raises ValueError if a flag is missing."""
    return {
        "create": lambda: [_create(given)],
        "setup": lambda: _setup(given),
        "run": lambda: [_on_all(given, ssh.start(given.name, [PROGRAM, *job]))],
        "logs": lambda: [_on(given, given.worker, ssh.follow(given.name))],
        "stop": lambda: [_on_all(given, ssh.stop(given.name))],
        "delete": lambda: [_delete(given)],
    }[given.action]()


def _create(given: argparse.Namespace) -> Step:
    if given.topology is None:
        raise ValueError("`tpu create` needs --topology")
    runtime = given.runtime or given.topology.kind.runtime
    if given.plain:
        if given.wait:
            raise ValueError("--wait is for the queue; remove it or --plain")
        line = ["tpu-vm", "create", given.name, f"--version={runtime}"]
    else:
        line = ["queued-resources", "create", given.name, f"--node-id={given.name}"]
        line.append(f"--runtime-version={runtime}")
    line.append(f"--accelerator-type={given.topology.type}")
    line += [f"--{one}" for one in _PURCHASES if getattr(given, one)]
    if given.wait:
        line.append(f"--valid-until-duration={given.wait}")
    for field in ("service_account", "network", "subnetwork"):
        if getattr(given, field):
            line.append(f"--{field.replace('_', '-')}={getattr(given, field)}")
    if given.internal_ips:
        line.append("--internal-ips")
    return _gcloud(given, *line)


def _setup(given: argparse.Namespace) -> list[Step]:
    """Builds a wheel, copies it with `host.py`, and installs it on all hosts."""
    wheel = BUILT / ".wheel"
    build = ("python3", "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={wheel}")
    folder = _on_all(given, f"rm -rf {ssh.FOLDER}/.wheel && mkdir -p {ssh.FOLDER}")
    copy = ["tpu-vm", "scp", "--recurse", str(wheel), str(ssh.PROGRAM)]
    copy += [f"{given.name}:{ssh.FOLDER}/", "--worker=all", *_internal(given)]
    return [
        Step(("rm", "-rf", str(BUILT))),
        Step(("env", f"DIST_EXTRA_CONFIG={CONFIG}", *build, str(ROOT))),
        folder,
        _gcloud(given, *copy),
        _on_all(given, _install()),
    ]


def _install() -> str:
    """Returns the command that installs the wheel; a VM's own Python is too old."""
    return " && ".join(
        (
            f"cd {ssh.FOLDER}",
            "python3 -m pip install --quiet --user uv",
            f"python3 -m uv venv --quiet --allow-existing --python={PYTHON} .venv",
            "python3 -m uv pip install --quiet --python=.venv --reinstall-package"
            ' anchor_jax "$(echo .wheel/anchor_jax-*.whl)[tpu,train,gcs]"',
            f"{PROGRAM} doctor",
        )
    )


def _delete(given: argparse.Namespace) -> Step:
    if given.plain:
        return _gcloud(given, "tpu-vm", "delete", given.name)
    return _gcloud(given, "queued-resources", "delete", given.name, "--force")


def _on_all(given: argparse.Namespace, command: str) -> Step:
    return _on(given, "all", command)


def _on(given: argparse.Namespace, worker: str, command: str) -> Step:
    line = ["tpu-vm", "ssh", given.name, f"--worker={worker}", *_internal(given)]
    return _gcloud(given, *line, f"--command={command}")


def _internal(given: argparse.Namespace) -> list[str]:
    return ["--internal-ip"] if given.internal_ips else []


def _gcloud(given: argparse.Namespace, *line: str) -> Step:
    place = [f"--zone={given.zone}"]
    if given.project:
        place.append(f"--project={given.project}")
    return Step(("gcloud", "compute", "tpus", *line, *place))

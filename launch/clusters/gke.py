"""GKE: a JobSet for TPU slices or GPU hosts, and xpk's commands for its cluster."""

import argparse
import json
import pathlib
import shlex
import string

from clusters import chips, values
from clusters.steps import Step

SUMMARY = "run a job on GKE as a JobSet"
TEMPLATE = pathlib.Path(__file__).with_name("jobset.yaml")
FAILURES = 3
ACTIONS = {
    "cluster": "create the cluster with xpk",
    "run": "create the JobSet; replaces one that has ended",
    "logs": "follow the logs of all pods",
    "stop": "delete the JobSet; its pods save first",
    "xpk": "create a similar job with xpk, on TPUs",
}
# One node pool, which is one slice, for each replicated job.
_EXCLUSIVE = {
    "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
}
# The user of the image may write to volumes. Otherwise Kubernetes would let the group
# write to all files at each start, and such compiled programs are not used.
_GROUP = {"fsGroup": 1000, "fsGroupChangePolicy": "OnRootMismatch"}
_JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
_PURCHASES = ("spot", "on_demand", "flex")
_BOUGHT = (*_PURCHASES, "reservation")
# Flags that only some actions use; the others refuse them.
_USED = {
    **dict.fromkeys(_BOUGHT, ("cluster",)),
    **dict.fromkeys(("cluster", "project", "zone"), ("cluster", "xpk")),
    **dict.fromkeys(("claim", "cache", "queue", "service_account"), ("run",)),
}
_OUTPUTS = ("--config.out", "--out")
# Deletes what is left of an ended job, and refuses if a job has not ended. It gets the
# name, the namespace and the command that stops the job. `--ignore-not-found` prints
# nothing for a JobSet that does not exist.
_MAKE_ROOM = """\
found=$(kubectl get "jobset/$1" "--namespace=$2" --ignore-not-found \
  --output="jsonpath=state:{.status.terminalState}") || exit
case $found in
  "" | state:Completed | state:Failed) ;;
  *) echo "error: the JobSet $1 has not ended; stop it first: $3" >&2; exit 2 ;;
esac
kubectl delete "jobset/$1" "networkpolicy/$1" "--namespace=$2" --ignore-not-found \
  --cascade=foreground"""
_EXAMPLES = {
    "topology": "=v5p:4x4x4",
    "image": "=REGISTRY/NAME:TAG, made from launch/Dockerfile"
    " (launch/clusters/README.md, Images)",
    "cluster": "=NAME",
}
_INDENT = 20 * " "  # of the program's arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the launcher's flags."""
    parser.add_argument(
        "action",
        choices=ACTIONS,
        help="; ".join(f"{name}: {text}" for name, text in ACTIONS.items()),
    )
    parser.add_argument("--name", type=values.name, required=True, help="of the job")
    parser.add_argument("--namespace", type=values.name, default="default")
    parser.add_argument(
        "--topology", type=chips.topology, help="v5p:4x4x4, v6e:8x8, h100:7x8, ..."
    )
    parser.add_argument("--slices", type=values.count, default=1, help="of TPUs")
    parser.add_argument(
        "--image", type=values.image, help="made from launch/Dockerfile"
    )
    parser.add_argument(
        "--service_account", type=values.name, help="of Kubernetes; default `default`"
    )
    parser.add_argument(
        "--claim", type=values.claim, help="volume claim to mount, as CLAIM:/PATH"
    )
    parser.add_argument("--queue", type=values.name, help="local queue of Kueue")
    parser.add_argument(
        "--cache",
        type=values.path,
        help="compiled programs: gs://BUCKET/NAME, or a folder below --claim's path",
    )
    parser.add_argument(
        "--grace",
        type=values.count,
        default=300,
        help="seconds that a stopped pod has for saving; default 300",
    )
    parser.add_argument("--cluster", type=values.name, help="for xpk")
    parser.add_argument("--project", type=values.name, help="for xpk")
    parser.add_argument("--zone", type=values.word, help="for xpk")
    bought = parser.add_mutually_exclusive_group()
    for purchase in _PURCHASES:
        bought.add_argument(
            f"--{purchase}", action="store_true", help="for `gke cluster`"
        )
    bought.add_argument("--reservation", type=values.word, help="for `gke cluster`")


def steps(given: argparse.Namespace, job: list[str]) -> list[Step]:
    """Returns the commands of an action; raises ValueError for a wrong set of flags."""
    _refuse_unused(given)
    if given.action in ("run", "xpk"):
        _need(given, "topology", "image")
    if given.action in ("cluster", "xpk"):
        _need(given, "topology", "cluster")
    return {
        "cluster": _make_cluster,
        "run": _run,
        "logs": _logs,
        "stop": _stop,
        "xpk": _run_with_xpk,
    }[given.action](given, job)


def manifest(given: argparse.Namespace, job: list[str]) -> str:
    """Returns the YAML of the JobSet and of its network policy."""
    place = given.topology
    is_tpu = isinstance(place, chips.Slice)
    if not is_tpu and given.slices > 1:
        raise ValueError("--slices is for TPUs; give more GPU hosts in --topology")
    _check_places(given, job)
    volumes, mounts = _volumes(given.claim, is_tpu)
    fields = {
        "name": given.name,
        "namespace": given.namespace,
        "service_account": given.service_account or "default",
        "image": given.image,
        "slices": given.slices,
        "hosts": place.hosts,
        "processes": place.hosts * given.slices,
        "chips": place.chips_per_host,
        "resource": "google.com/tpu" if is_tpu else "nvidia.com/gpu",
        "grace": given.grace,
        "failures": FAILURES,
        "labels": {"kueue.x-k8s.io/queue-name": given.queue} if given.queue else {},
        "annotations": _EXCLUSIVE if is_tpu else {},
        "selector": _selector(place),
        "pod_security": {} if is_tpu else _GROUP,
        "security": _security(is_tpu),
        "args": _Lines(_arguments(given, job, is_tpu)),
        "env": [{"name": "ANCHOR_JAX_CACHE", "value": _literal(given.cache)}]
        if given.cache
        else [],
        "volumes": volumes,
        "mounts": mounts,
    }
    return string.Template(TEMPLATE.read_text()).substitute(
        {name: _yaml(value) for name, value in fields.items()}
    )


class _Lines(list):
    """A list that is written with one item in each line."""


def _yaml(value) -> str:
    """Returns a value in the JSON form of YAML, in which no text becomes a boolean."""
    if isinstance(value, _Lines):
        return "".join(f"\n{_INDENT}- {_yaml(one)}" for one in value)
    return json.dumps(value, ensure_ascii=False)


def _check_places(given: argparse.Namespace, job: list[str]) -> None:
    """Raises ValueError unless outputs and compiled programs outlive the pods."""
    written = values.flags_of(job, *_OUTPUTS)
    if given.cache:
        written.append(("--cache", given.cache))
    mount = given.claim.partition(":")[2] if given.claim else ""
    for name, place in written:
        if place.startswith("gs://"):
            continue
        parents = map(str, pathlib.PurePosixPath(place).parents)
        if not mount or mount not in parents or ".." in place.split("/"):
            # Videos are refused in buckets.
            other = "" if name == "--out" else "gs://BUCKET/NAME, or "
            raise ValueError(
                f"{name}={place} would end with its pod; give {other}a folder below"
                f" {mount or 'the path of --claim=CLAIM:/PATH'}"
            )


def _refuse_unused(given: argparse.Namespace) -> None:
    """Raises ValueError for a flag that the action would ignore."""
    for name, actions in _USED.items():
        if getattr(given, name) and given.action not in actions:
            used = " and ".join(f"`gke {action}`" for action in actions)
            raise ValueError(
                f"`gke {given.action}` does not use --{name}; remove it, or give it to"
                f" {used}"
            )


def _selector(place: chips.Slice | chips.Gpus) -> dict[str, str]:
    if isinstance(place, chips.Gpus):
        return {"cloud.google.com/gke-accelerator": place.selector}
    return {
        "cloud.google.com/gke-tpu-accelerator": place.kind.selector,
        "cloud.google.com/gke-tpu-topology": place.topology,
    }


def _security(is_tpu: bool) -> dict:
    if is_tpu:  # The devices of a TPU belong to root.
        return {"privileged": True, "runAsUser": 0}
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "runAsUser": 1000,
    }


def _arguments(given: argparse.Namespace, job: list[str], is_tpu: bool) -> list[str]:
    """Returns the program's arguments; Kubernetes inserts the pod's number."""
    arguments = [_literal(argument) for argument in job]
    if is_tpu or given.topology.hosts == 1:
        return arguments
    first = f"{given.name}-workers-0-0.{given.name}"
    return [
        *arguments,
        f"--coordinator={first}:{values.PORT}",
        f"--num_processes={given.topology.hosts}",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def _literal(text: str) -> str:
    """Returns a text in which Kubernetes replaces no $(VARIABLE)."""
    return text.replace("$", "$$")


def _volumes(claim: str | None, is_tpu: bool) -> tuple[list[dict], list[dict]]:
    volumes, mounts = [], []
    if not is_tpu:  # NCCL connects the GPUs of a host through shared memory.
        volumes.append({"name": "memory", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "memory", "mountPath": "/dev/shm"})
    if claim:
        name, _, path = claim.partition(":")
        held = {"persistentVolumeClaim": {"claimName": name}}
        volumes.append({"name": "data", **held})
        mounts.append({"name": "data", "mountPath": path})
    return volumes, mounts


def _run(given: argparse.Namespace, job: list[str]) -> list[Step]:
    text = manifest(given, job)
    stop = f"python launch/cluster.py gke stop --name={given.name}"
    stop += f" --namespace={given.namespace}"
    room = ("sh", "-c", _MAKE_ROOM, "sh", given.name, given.namespace, stop)
    return [Step(room), Step(("kubectl", "create", "--filename=-"), text=text)]


def _logs(given: argparse.Namespace, job: list[str]) -> list[Step]:
    del job
    line = ("kubectl", "logs", f"--namespace={given.namespace}")
    label = f"--selector={_JOBSET_LABEL}={given.name}"
    return [Step((*line, label, "--prefix", "--follow", "--max-log-requests=1000"))]


def _stop(given: argparse.Namespace, job: list[str]) -> list[Step]:
    del job
    line = ("kubectl", "delete", f"jobset/{given.name}", f"networkpolicy/{given.name}")
    # It returns when the pods are gone, so that the next start meets none of them.
    line = (*line, f"--namespace={given.namespace}", "--cascade=foreground")
    return [Step(line)]


def _make_cluster(given: argparse.Namespace, job: list[str]) -> list[Step]:
    del job
    line = ["xpk", "cluster", "create", f"--cluster={given.cluster}"]
    if isinstance(given.topology, chips.Slice):
        line += [f"--tpu-type={given.topology.type}", f"--num-slices={given.slices}"]
    elif given.topology.device:
        device = f"--device-type={given.topology.device}"
        line += [device, f"--num-nodes={given.topology.hosts}"]
    else:
        raise ValueError("xpk makes no cluster of these GPUs; make it with gcloud")
    line += _project(given)
    line += [f"--{one.replace('_', '-')}" for one in _PURCHASES if getattr(given, one)]
    if given.reservation:
        line.append(f"--reservation={given.reservation}")
    return [Step((*line, "--enable-workload-identity"))]


def _run_with_xpk(given: argparse.Namespace, job: list[str]) -> list[Step]:
    if not isinstance(given.topology, chips.Slice):
        raise ValueError("xpk does not number the processes of GPU jobs; use `gke run`")
    for argument in job:
        # Xpk copies the command into a YAML string and into a shell without quoting.
        if shlex.quote(argument) != argument:
            raise ValueError(f"xpk cannot pass {argument!r} unchanged; use `gke run`")
    line = ["xpk", "workload", "create", f"--workload={given.name}"]
    line += [f"--cluster={given.cluster}", f"--tpu-type={given.topology.type}"]
    line += [f"--num-slices={given.slices}", f"--docker-image={given.image}"]
    line += _project(given)
    line += [f"--max-restarts={FAILURES}", "--restart-on-exit-codes=75,76"]
    line += [f"--termination-grace-period-seconds={given.grace}"]
    return [Step((*line, f"--command={shlex.join(['anchor-jax', *job])}"))]


def _project(given: argparse.Namespace) -> list[str]:
    fields = ("project", "zone")
    return [f"--{one}={getattr(given, one)}" for one in fields if getattr(given, one)]


def _need(given: argparse.Namespace, *names: str) -> None:
    missing = [
        f"--{name}{_EXAMPLES[name]}" for name in names if not getattr(given, name)
    ]
    if missing:
        raise ValueError(f"`gke {given.action}` needs {' and '.join(missing)}")

"""The JobSet: valid by its published schema, with the right pods and restarts."""

import json
import pathlib
import re

import jsonschema
import pytest
import yaml
from launch_lines import GKE, HOSTILE, LINES, TRAIN

SCHEMA = json.loads(pathlib.Path(__file__).with_name("jobset.schema.json").read_text())
NAMES = ("gke tpu", "gke gpu")


def documents(launch, *line):
    done = launch.cluster(*line)
    assert done.returncode == 0, done.stderr
    *_, (*words, text) = launch.calls()
    assert words == ["kubectl", "create", "--filename=-"]
    return list(yaml.safe_load_all(text))


def spec(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def container(jobset):
    (found,) = spec(jobset)["template"]["spec"]["containers"]
    return found


def check(document):
    """Checks against the schema of the document's kind, whose errors are shorter."""
    kinds = {"JobSet": 0, "NetworkPolicy": 1}
    chosen = SCHEMA["oneOf"][kinds[document["kind"]]]
    jsonschema.validate(document, SCHEMA | {"oneOf": [chosen]})


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_by_the_schema(launch, name):
    line = (*LINES[name], *HOSTILE)
    jobset, policy = documents(
        launch, *line[:4], "--queue=q", "--cache=gs://b/c d", *line[4:]
    )
    check(jobset)
    check(policy)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    assert container(jobset)["env"] == [
        {"name": "ANCHOR_JAX_CACHE", "value": "gs://b/c d"}
    ]


def test_the_schema_sees_errors(launch):
    jobset, policy = documents(launch, *LINES["gke gpu"])
    container(jobset)["image_"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="image_"):
        check(jobset)
    policy["spec"]["policyTypes"] = "Ingress"
    with pytest.raises(jsonschema.ValidationError, match="Ingress"):
        check(policy)


def test_tpu_slices_get_their_nodes_and_chips(launch):
    line = (*GKE, "--topology=v5p:4x4x4", "--slices=2")
    jobset, _ = documents(launch, *line, *TRAIN)

    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    assert spec(jobset)["completions"] == spec(jobset)["parallelism"] == 16
    assert spec(jobset)["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container(jobset)["resources"]["limits"] == {"google.com/tpu": 4}
    assert container(jobset)["args"] == list(TRAIN[1:])


def test_gpu_pods_get_their_place_and_are_not_root(launch):
    jobset, _ = documents(launch, *LINES["gke gpu"])

    assert spec(jobset)["completions"] == 7
    assert container(jobset)["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container(jobset)["args"][-3:] == [
        "--coordinator=dmd-workers-0-0.dmd:8476",
        "--num_processes=7",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert container(jobset)["securityContext"]["runAsNonRoot"]
    mounts = [one["mountPath"] for one in container(jobset)["volumeMounts"]]
    assert mounts == ["/dev/shm", "/mnt/data"]


# As kubectl, of a cluster in which a JobSet has the state that the file says.
KUBECTL = """#!/usr/bin/env bash
echo "$@" >> "$HOME/kubectl"
[[ $1 != create ]] || cat > /dev/null
[[ $1 != get ]] || cat "$HOME/state"
"""
LEFT = "delete jobset/dmd networkpolicy/dmd --namespace=default --ignore-not-found"


@pytest.mark.parametrize("state", ["", "state:Completed", "state:Failed"])
def test_a_run_replaces_what_an_ended_job_left(launch, tmp_path, state):
    launch.install("kubectl", KUBECTL)
    (tmp_path / "state").write_text(state)

    assert launch.cluster(*LINES["gke gpu"]).returncode == 0

    found, removed, made = (tmp_path / "kubectl").read_text().splitlines()
    assert found.startswith("get jobset/dmd --namespace=default --ignore-not-found")
    assert removed == f"{LEFT} --cascade=foreground"
    assert made == "create --filename=-"


def test_a_run_does_not_touch_a_job_that_has_not_ended(launch, tmp_path, capfd):
    launch.install("kubectl", KUBECTL)
    (tmp_path / "state").write_text("state:")

    assert launch.cluster(*LINES["gke gpu"]).returncode == 2

    (only,) = (tmp_path / "kubectl").read_text().splitlines()
    assert only.startswith("get ")
    assert "gke stop --name=dmd --namespace=default" in capfd.readouterr().err


def test_nothing_is_deleted_if_the_cluster_does_not_answer(launch, tmp_path):
    launch.install("kubectl", '#!/bin/sh\necho "$@" >> "$HOME/kubectl"\nexit 1\n')

    assert launch.cluster(*LINES["gke gpu"]).returncode == 1
    assert len((tmp_path / "kubectl").read_text().splitlines()) == 1


def test_stop_returns_when_the_pods_are_gone(launch):
    assert launch.cluster(*LINES["gke stop"]).returncode == 0
    ((*words, _),) = launch.calls()
    assert words[:4] == ["kubectl", "delete", "jobset/dmd", "networkpolicy/dmd"]
    assert "--cascade=foreground" in words


def test_volumes_belong_to_the_user_of_the_pod(launch):
    gpus, _ = documents(launch, *LINES["gke gpu"])
    tpus, _ = documents(launch, *LINES["gke tpu"])

    # Without the second field all files become writable for the group at each start.
    assert spec(gpus)["template"]["spec"]["securityContext"] == {
        "fsGroup": container(gpus)["securityContext"]["runAsUser"],
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    assert spec(tpus)["template"]["spec"]["securityContext"] == {}


def test_compiled_programs_are_kept_on_the_claim(launch):
    line = (*LINES["gke gpu"][:6], "--cache=/mnt/data/cache", *TRAIN)
    jobset, _ = documents(launch, *line)
    assert container(jobset)["env"][0]["value"] == "/mnt/data/cache"


def expanded(text, variables):
    """Returns a text as Kubernetes gives it to a container."""

    def replace(found):
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\((\w+)\)", replace, text)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_arguments_arrive_unchanged(launch, name):
    line = (*LINES[name], *HOSTILE)
    jobset, _ = documents(launch, *line)

    variables = {"JOB_COMPLETION_INDEX": "3", "PATH": "/bin"}
    seen = [expanded(one, variables) for one in container(jobset)["args"]]
    given = [*TRAIN[1:], *HOSTILE]
    assert seen[: len(given)] == given
    assert "--process_id=3" in seen or name == "gke tpu"


def test_names_that_yaml_reads_as_other_values_stay_names(launch):
    line = ("gke", "run", "--name=null", "--image=on", "--topology=v6e:1x1")
    jobset, policy = documents(launch, *line, "--namespace=true", *TRAIN)
    assert jobset["metadata"]["name"] == policy["metadata"]["name"] == "null"
    assert jobset["metadata"]["namespace"] == "true"
    assert container(jobset)["image"] == "on"


def test_only_pods_of_the_job_reach_the_coordinator(launch):
    jobset, policy = documents(launch, *LINES["gke gpu"])
    ours = {
        "matchLabels": {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]}
    }
    assert policy["spec"]["podSelector"] == ours
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": ours}]}]


def action(jobset, status, disrupted=False):
    """Returns what JobSet does after a pod failed, by Kubernetes' rules."""
    reason, message = "BackoffLimitExceeded", "Job has reached its backoff limit"
    for number, rule in enumerate(spec(jobset)["podFailurePolicy"]["rules"]):
        if "onPodConditions" in rule:
            matches = disrupted
        else:
            listed = status in rule["onExitCodes"]["values"]
            matches = listed == (rule["onExitCodes"]["operator"] == "In")
        if matches:
            if rule["action"] == "FailJob":
                reason = "PodFailurePolicy"
                message = (
                    f"Container anchor-jax for pod default/dmd-workers-0-76 failed with"
                    f" exit code {status} matching FailJob rule at index {number}"
                )
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        fits = any(re.search(one, message) for one in patterns)
        if reason in rule["onJobFailureReasons"] and fits:
            return rule["action"]
    return "RestartJobSet"


FREE, COUNTED, END = "RestartJobSetAndIgnoreMaxRestarts", "RestartJobSet", "FailJobSet"
ACTIONS = {
    75: FREE,
    76: COUNTED,
    134: COUNTED,
    137: COUNTED,
    143: COUNTED,
    1: END,
    2: END,
    127: END,
    130: END,
}


@pytest.mark.parametrize(("status", "expected"), ACTIONS.items())
def test_an_exit_status_decides_whether_pods_start_again(launch, status, expected):
    jobset, _ = documents(launch, *LINES["gke gpu"])
    assert action(jobset, status) == expected
    assert spec(jobset)["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3


def test_a_pod_that_its_node_lost_starts_again_without_counting(launch):
    jobset, _ = documents(launch, *LINES["gke gpu"])
    assert action(jobset, 137, disrupted=True) == FREE

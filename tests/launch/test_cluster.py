"""`launch/cluster.py`: what it runs, what it shows, what it refuses."""

import argparse
import os
import pathlib
import re
import shlex
import subprocess
import sys
import time

import page_commands
import pytest
from launch_lines import GKE, HOSTILE, LINES, TPU, TRAIN

from anchor_jax.errors import UserError
from anchor_jax.perf import targets
from anchor_jax.training.stages.build import TrainConfig

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_dry_run_is_a_script_that_does_what_the_launcher_does(launch, line):
    done = launch.cluster(*line)
    assert done.returncode == 0, done.stderr
    expected = launch.calls()
    assert expected

    end = line.index("--") if "--" in line else len(line)
    shown = launch.cluster(*line[:end], "--dry_run", *line[end:])
    assert shown.returncode == 0, shown.stderr
    assert not launch.calls()

    ran = launch.script(shown.stdout)
    assert ran.returncode == 0, ran.stderr
    assert launch.calls() == expected


def words(launch, name):
    """Returns the words that each program is called with."""
    assert launch.cluster(*LINES[name]).returncode == 0
    return [call[:-1] for call in launch.calls()]


def test_slurm_gets_one_task_for_each_gpu_or_node(launch):
    (line,) = words(launch, "slurm")
    script = str(ROOT / "launch" / "clusters" / "slurm.sbatch")

    assert line[0] == "sbatch"
    assert line[-4:] == [script, *TRAIN[1:]]
    options = "--nodes=7 --gpus-per-node=8 --ntasks-per-node=8 --time=24:00:00"
    assert set(options.split()) < set(line)
    assert {"--signal=TERM@300", "--partition=h100"} < set(line)
    (line,) = words(launch, "slurm per node")
    assert {"--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=1"} < set(line)


def test_xpk_makes_the_cluster_and_the_job(launch):
    assert words(launch, "gke cluster") == [
        [
            *("xpk", "cluster", "create", "--cluster=mine", "--tpu-type=v6e-64"),
            *("--num-slices=1", "--project=p", "--zone=us-east5-b", "--spot"),
            "--enable-workload-identity",
        ]
    ]
    (line,) = words(launch, "gke gpu cluster")
    assert {"--device-type=h100-80gb-8", "--num-nodes=7", "--reservation=r1"} < set(
        line
    )
    (line,) = words(launch, "gke xpk")
    assert {"--max-restarts=3", "--restart-on-exit-codes=75,76"} < set(line)
    assert line[-1] == f"--command=anchor-jax {shlex.join(TRAIN[1:])}"


def test_tpu_vms_are_made_used_and_deleted(launch):
    place = ["--zone=us-east5-a"]
    assert words(launch, "tpu create") == [
        [
            *("gcloud", "compute", "tpus", "queued-resources", "create", "dmd"),
            *("--node-id=dmd", "--runtime-version=v2-alpha-tpuv5"),
            *("--accelerator-type=v5p-128", "--spot", *place),
        ]
    ]
    (line,) = words(launch, "tpu plain")
    assert line[3:6] == ["tpu-vm", "create", "dmd"]
    assert {"--version=v2-alpha-tpuv6e", "--accelerator-type=v6e-64"} < set(line)
    (line,) = words(launch, "tpu run")
    assert {"tpu-vm", "ssh", "--worker=all", "--internal-ip"} < set(line)
    (line,) = words(launch, "tpu delete")
    assert line[3:7] == ["queued-resources", "delete", "dmd", "--force"]


def test_setup_copies_a_wheel_to_all_hosts_and_checks_it(launch):
    removed, built, folder, copied, installed = words(launch, "tpu setup")

    assert removed == ["rm", "-rf", str(ROOT / "dist" / "tpu")]
    assert built[:2] == ["env", f"DIST_EXTRA_CONFIG={ROOT}/launch/clusters/wheel.cfg"]
    assert {"wheel", "--no-deps", str(ROOT)} < set(built)
    assert {"scp", "dmd:anchor_jax_jobs/", "--worker=all"} < set(copied)
    command = next(word for word in installed if word.startswith("--command="))
    assert "[tpu,train,gcs]" in command and command.endswith("anchor-jax doctor")
    assert "--worker=all" in folder and "--worker=all" in installed


def test_ssh_gives_each_host_its_place(launch):
    calls = words(launch, "ssh run")

    assert [call[-2] for call in calls] == ["alpha", "me@beta"] * 2
    for number, call in enumerate(calls[2:]):
        command = shlex.split(call[-1])
        assert command[-3:] == [
            "--coordinator=alpha:8476",
            "--num_processes=2",
            f"--process_id={number}",
        ]


SCRIPT = """#!/usr/bin/env bash
printf '%s\\0' "$@" > "$HOME/arguments"
"""
REMOTE = """#!/usr/bin/env bash
# As ssh and sshd do: the last word goes to a shell of the host.
export HOME="$HOME/${@: -2:1}"
mkdir -p "$HOME" && cd "$HOME" && exec bash -c "${@: -1}"
"""


@pytest.mark.slow
def test_hostile_arguments_arrive_unchanged_over_ssh(launch, tmp_path):
    launch.install("ssh", REMOTE)
    launch.install("pro gram;$(touch pwned)", SCRIPT)
    program = str(launch.folder / "pro gram;$(touch pwned)")
    done = launch.cluster(
        *("ssh", "run", "--hosts=alpha,beta", f"--program={program}"),
        *("--", "train", *HOSTILE),
    )

    assert done.returncode == 0, done.stderr
    for number, host in enumerate(("alpha", "beta")):
        folder = tmp_path / host / "anchor_jax_jobs" / "anchor-jax"
        log = folder / os.uname().nodename / "log"
        wait_for(lambda log=log: "exit status 0; done" in log.read_text())
        arguments = (tmp_path / host / "arguments").read_bytes().decode().split("\0")
        assert arguments[: 1 + len(HOSTILE)] == ["train", *HOSTILE]
        assert f"--process_id={number}" in arguments
    assert not list(tmp_path.rglob("pwned"))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("value", ["a;b", "a b", "$(x)", "-a", "A", "a-", "a" * 41, ""])
@pytest.mark.parametrize("name", ["gke stop", "tpu stop", "ssh stop"])
def test_names_are_checked(launch, name, value):
    line = [word for word in LINES[name] if not word.startswith("--name")]
    refused(launch, *line, f"--name={value}", says="is not a name")


def refused(launch, *line, says):
    done = launch.cluster(*line)
    assert done.returncode == 2
    assert re.search(says, done.stderr), done.stderr
    assert not launch.calls()


GKE_TPU = (*GKE, "--topology=v6e:8x8")
GKE_DISK = (*GKE, "--topology=h100:7x8", "--claim=disk:/mnt/data")
JOB = TRAIN[:3]
REFUSED = {
    "nodes": ("slurm", "--nodes=0", *TRAIN, "is not a count"),
    "more nodes": ("slurm", "--nodes=1;x", *TRAIN, "is not a count"),
    "time": ("slurm", "--nodes=1", "--time=1:00;x", *TRAIN, "is not a time limit"),
    "option": ("slurm", "--nodes=1", "--sbatch=x;y", *TRAIN, "is not an option"),
    "line": ("slurm", "--nodes=1", "--", "train", "--x=a\nb", "control characters"),
    "command": ("slurm", "--nodes=1", "--", "doctor", "must be one of"),
    "no command": ("slurm", "--nodes=1", "put the command after --: cluster.py slurm"),
    "grace": ("slurm", "--nodes=1", "--time=5:00", *TRAIN, "below the 300 seconds"),
    "long grace": ("slurm", "--nodes=1", "--grace=65536", *TRAIN, "at most 65535"),
    "own": ("slurm", "--nodes=1", "--", "train", "--process_id=1", "by the launcher"),
    "image": (*GKE[:3], "--image=a b", *TRAIN, "is not an image"),
    "no image": (
        *GKE[:3],
        "--topology=v6e:8x8",
        *TRAIN,
        "--image=REGISTRY/NAME:TAG, made",
    ),
    "claim": (*GKE, "--claim=a:/b\nc: d", *TRAIN, "is not a mounted volume claim"),
    "kind": (*GKE, "--topology=v9:8x8", *TRAIN, "is not a topology"),
    "shape": (*GKE, "--topology=v5p:8x8", *TRAIN, "has 3 dimensions"),
    "flat shape": (*GKE, "--topology=v6e:2x1x1", *TRAIN, "has 2 dimensions"),
    "chips": (*GKE, "--topology=v6e:1x6", *TRAIN, "has 6 chips"),
    "odd side": (*GKE, "--topology=v6e:3x4", *TRAIN, "1 or even, .* example: v6e:8x8"),
    "long side": (*GKE, "--topology=v5p:32x4x4", *TRAIN, "at most 16x16x24"),
    "out": (*GKE_TPU, *JOB, "--config.out=runs/dmd", "--config.out=runs/dmd would end"),
    "out in words": (*GKE_TPU, *JOB, "--config.out", "/tmp/a", "would end with its"),
    "out above": (
        *(*GKE_DISK, *JOB, "--config.out=/mnt/data/../a"),
        "a folder below /mnt/data",
    ),
    "videos": (
        *(*GKE_DISK, "--", "sample", "--out=batch"),
        "--out=batch would end with its pod; give a folder below /mnt/data",
    ),
    "videos in words": (
        *GKE_DISK,
        "--",
        "sample",
        "-out",
        "batch",
        "--out=batch would",
    ),
    "spot": (*GKE_TPU, "--spot", *TRAIN, "does not use --spot; .* `gke cluster`"),
    "project": (*GKE_TPU, "--project=p", *TRAIN, "`gke cluster` and `gke xpk`"),
    "account": (
        *(*LINES["gke xpk"][:6], "--service_account=trainer", *TRAIN),
        "does not use --service_account",
    ),
    "xpk claim": (*LINES["gke xpk"][:6], "--claim=a:/b", *TRAIN, "not use --claim"),
    "gpus": (*GKE, "--topology=h100:7x4", *TRAIN, "as KIND:HOSTSx8"),
    "cache": (*GKE, "--topology=v6e:8x8", "--cache=/tmp/c", *TRAIN, "end with its pod"),
    "cache above": (
        *(*GKE, "--topology=v6e:8x8", "--claim=disk:/mnt/data", "--cache=/mnt/data"),
        *(*TRAIN, "a folder below /mnt/data"),
    ),
    "slices": (*GKE, "--topology=h100:7x8", "--slices=2", *TRAIN, "is for TPUs"),
    "xpk": (*LINES["gke xpk"], "--x=a b", "xpk cannot pass"),
    "tpu": ("tpu", "create", *TPU, "--topology=h100:7x8", "is not a TPU slice"),
    "both": ("tpu", "create", *TPU, "--spot", "--reserved", "not allowed with"),
    "zone": ("tpu", "stop", "--name=a", "--zone=a;b", "is not a word"),
    "extra": ("tpu", "stop", *TPU, *TRAIN, "takes no command"),
    "host": ("ssh", "run", "--hosts=a,-oProxyCommand=x", *TRAIN, "is not a host"),
    "user": ("ssh", "run", "--hosts=-l@a", *TRAIN, "is not a host"),
    "shell": ("ssh", "run", "--hosts=a;b", *TRAIN, "is not a host"),
    "twice": ("ssh", "run", "--hosts=a,a", *TRAIN, "names a host twice"),
    "public": (
        *("ssh", "run", "--hosts=a,b", "--coordinator=8.8.8.8:8476", *TRAIN),
        "is a public address",
    ),
    "public host": ("ssh", "run", "--hosts=8.8.8.8,b", *TRAIN, "is a public address"),
    "port": ("ssh", "run", "--hosts=a,b", "--coordinator=a:99", *TRAIN, "has no port"),
    "program": ("ssh", "run", "--hosts=a", "--program=-x", *TRAIN, "is not a path"),
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_named_and_nothing_runs(launch, line):
    *line, says = line
    refused(launch, *line, says=says)


TAKEN = {
    "out": (*GKE_DISK, *JOB, "--config.out=/mnt/data/dmd"),
    "out in words": (*GKE_DISK, *JOB, "--config.out", "/mnt/data/dmd"),
    "inputs of the image": (*GKE_TPU, *TRAIN, "--config.weights=/weights/wan"),
    "grace": ("slurm", "--nodes=1", "--time=5:01", *TRAIN),
    "days": ("slurm", "--nodes=1", "--time=1-0", "--grace=65535", *TRAIN),
    "days and minutes": ("slurm", "--nodes=1", "--time=1-00:30", *TRAIN),
    "minutes": ("slurm", "--nodes=1", "--time=6", *TRAIN),
    "no limit": ("slurm", "--nodes=1", "--time=0", *TRAIN),
}


@pytest.mark.parametrize("line", TAKEN.values(), ids=TAKEN)
def test_what_is_right_is_taken(launch, line):
    done = launch.cluster(*line)
    assert done.returncode == 0, done.stderr
    assert launch.calls()


SHAPES = {
    2: ("1x1", "2x2", "2x4", "3x4", "4x6", "8x8", "16x16", "16x32"),
    3: ("1x1x1", "2x2x1", "2x2x3", "4x4x4", "24x16x16", "16x24x24", "32x4x4"),
}


@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e"])
def test_slices_are_those_that_plan_knows(launcher, name):
    chips = launcher("clusters.chips")
    for shape in SHAPES[targets.TARGETS[name].axes]:
        text = f"{name}:{shape}"
        try:
            targets.parse_topology(text)
        except UserError:
            with pytest.raises(argparse.ArgumentTypeError, match="example: v"):
                chips.topology(text)
        else:
            assert chips.topology(text).topology == shape


def test_a_private_address_is_taken(launch):
    line = ("ssh", "run", "--hosts=a,b", "--coordinator=10.0.0.1:8476", *TRAIN)
    assert launch.cluster(*line).returncode == 0
    assert all("--coordinator=10.0.0.1:8476" in call[-2] for call in launch.calls()[2:])


def test_a_missing_program_is_named(launch, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    done = launch.cluster(*LINES["slurm"])
    assert (done.returncode, done.stderr) == (
        127,
        "error: sbatch is not installed on this host\n",
    )


def test_the_first_failure_ends_the_steps(launch):
    launch.install("ssh", "#!/bin/sh\ncat > /dev/null\necho x >> $HOME/count\nexit 7\n")
    done = launch.cluster(*LINES["ssh run"])
    assert done.returncode == 7
    assert (launch.folder.parent / "count").read_text() == "x\n"


def test_it_is_a_program_that_needs_nothing_installed(tmp_path):
    line = [sys.executable, "-ES", str(ROOT / "launch" / "cluster.py"), "--help"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "python launch/cluster.py slurm" in done.stdout


def test_the_page_names_the_topologies_that_plan_does_not_know(launcher):
    chips = launcher("clusters.chips")
    page = (ROOT / "launch" / "clusters" / "README.md").read_text()
    (named,) = re.findall(r"`plan`, which does not know ([^|]*)", page)

    unknown = {*chips.TPUS, *chips.GPUS} - targets.TARGETS.keys()

    assert unknown <= set(re.findall(r"`([\w-]+)`", named))


PAGE = [
    command
    for command in page_commands.ELSEWHERE
    if command.startswith("python launch/cluster.py ")
]


@pytest.mark.parametrize("command", PAGE)
def test_a_command_of_the_page(launch, command):
    done = launch.cluster(*shlex.split(command)[2:])
    assert done.returncode == 0, done.stderr
    assert launch.calls()


JOBS = [
    command
    for table in (page_commands.ELSEWHERE, page_commands.NOT_RUN)
    for command in table
    if " -- train " in command
    or "slurm.sbatch train " in command
    or ("anchor-jax train " in command and "--coordinator=" in command)
]


@pytest.mark.parametrize("command", JOBS)
def test_a_training_of_the_page_has_what_it_needs(launcher, command):
    launched, _, job = command.partition(" train ")
    given = dict(word.partition("=")[::2] for word in shlex.split(job))

    needed = ("weights", "teacher", "critic", "data.path", "out")
    assert all(given.get(f"--config.{name}") for name in needed)
    batch = int(given.get("--config.batch", BATCH))
    assert batch % chips_of(launcher, launched) == 0
    if given["--config.weights"].endswith("/anchor"):
        assert given["--config.rules"] == "release"


BATCH = TrainConfig().batch


def chips_of(launcher, launched):
    """Returns the chips that a command names, or 1 if it names none."""
    given = dict(word.partition("=")[::2] for word in shlex.split(launched))
    if "--nodes" in given:
        return int(given["--nodes"]) * 8
    if "--topology" not in given:
        return 1
    place = launcher("clusters.chips").topology(given["--topology"])
    return place.hosts * place.chips_per_host

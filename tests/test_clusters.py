"""The place of a process in a job: flags, variables, Slurm; what is wrong is named."""

import socket

import pytest
from jax._src.clusters import cloud_tpu_cluster

from anchor_jax import clusters
from anchor_jax.clusters import Place
from anchor_jax.errors import UserError

NONE = {"coordinator": None, "num_processes": None, "process_id": None}
STEP = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004,010]",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def find(environ=(), **given):
    told = []
    place = clusters.find({**NONE, **given}, dict(environ), told.append)
    assert not told
    return place


def test_without_flags_variables_or_scheduler_there_is_no_job():
    assert find() is None
    assert find({"JAX_NUM_PROCESSES": ""}) is None


def test_flags_and_variables_are_the_same():
    flags = find(coordinator="10.0.0.1:99", num_processes=2, process_id=1)
    variables = find(
        {
            "JAX_COORDINATOR_ADDRESS": "10.0.0.1:99",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": "1",
        }
    )

    assert flags == variables
    assert (flags.count, flags.index, flags.coordinator) == (2, 1, "10.0.0.1:99")


def test_a_flag_comes_before_its_variable():
    environ = {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "4"}

    place = find(environ, coordinator="a:1", num_processes=2)

    assert (place.count, place.index) == (2, 1)


def test_one_process_opens_no_port():
    assert find(num_processes=1) == Place("flags and variables", 1, 0)
    assert find({"JAX_NUM_PROCESSES": "1"}).coordinator == ""
    assert find({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).count == 1


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"coordinator": "a:1"},
            ["--coordinator=a:1 alone", "--num_processes (or JAX"],
        ),
        ({"num_processes": 2}, ["--coordinator (or JAX_COORD", "--process_id (or JAX"]),
        ({"process_id": 0}, ["For one process give none of them", "10.0.0.1:1234"]),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            ["--process_id=2", "from 0 to 1", "--num_processes=2"],
        ),
        ({"num_processes": 0}, ["--num_processes=0", "at least 1"]),
        ({"num_processes": 1, "process_id": 1}, ["--process_id=1", "must be 0"]),
    ],
)
def test_an_incomplete_or_impossible_place_is_refused(given, parts):
    with pytest.raises(UserError) as caught:
        find(**given)

    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_variable_that_is_not_a_number_is_named():
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES='two'.*whole number"):
        find({"JAX_NUM_PROCESSES": "two"})


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("10.0.0.1:1234", "10.0.0.1", 1234),
        ("node-1.cluster:80", "node-1.cluster", 80),
        ("[fd00::1]:1234", "fd00::1", 1234),
    ],
)
def test_addresses_are_split(address, host, port):
    assert clusters.split_address(address) == (host, port)


@pytest.mark.parametrize(
    "address",
    ["", "host", "host:", ":1", "host:0", "host:70000", "http://a:1", "a b:1", "::1:1"],
)
def test_an_address_without_host_or_port_is_refused(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        clusters.split_address(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_of_all_networks_is_refused(host):
    with pytest.raises(UserError, match="private address of process 0's host"):
        clusters.split_address(f"{host}:1")


def test_a_step_of_slurm_is_found():
    place = find(STEP)

    assert (place.found_in, place.count, place.index) == ("Slurm", 6, 3)
    host, port = place.coordinator.split(":")
    assert host == "gpu003" and 61440 <= int(port) < 65536
    other = find({**STEP, "SLURM_STEP_ID": "3"})
    assert other.coordinator != place.coordinator, "steps of a job share no port"
    assert find({**STEP, "JAX_COORDINATOR_PORT": "99"}).coordinator == "gpu003:99"


def test_a_flag_completes_a_step_of_slurm():
    assert find(STEP, coordinator="10.0.0.1:99").coordinator == "10.0.0.1:99"


def test_a_shell_or_script_of_slurm_is_not_a_step():
    batch = {name: STEP[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID")}

    assert find({**batch, "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[007,009-015]", "node007"),
        ("rack[1-2]-gpu", "rack1-gpu"),
    ],
)
def test_the_first_host_of_a_list_is_found(nodes, first):
    place = find({**STEP, "SLURM_STEP_NODELIST": nodes})

    assert place.coordinator.startswith(f"{first}:")


@pytest.mark.parametrize(
    ("environ", "devices"),
    [
        # Two tasks a host that both see its eight GPUs.
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),
        # One task per GPU, and all see all.
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        # Slurm shows each task its own.
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "4"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        # One task a host gets all GPUs.
        (
            {
                "CUDA_VISIBLE_DEVICES": "0,1,2,3",
                "SLURM_STEP_TASKS_PER_NODE": "1(x6)",
                "SLURM_LOCALID": "0",
            },
            None,
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, (0,)),
    ],
)
def test_gpus_are_shared_among_the_tasks_of_a_host(environ, devices):
    assert find({**STEP, **environ}).devices == devices


def test_tasks_are_counted_on_each_host():
    environ = {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "2,1(x4)"}

    first = find({**STEP, **environ, "SLURM_NODEID": "0"})
    alone = find({**STEP, **environ, "SLURM_NODEID": "3"})

    assert first.devices == (1,) and alone.devices is None


def test_a_pod_without_the_means_to_find_others_is_warned(monkeypatch):
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    told = []
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}

    assert clusters.find(NONE, environ, told.append) is None
    assert "jax[k8s]" in told[0] and "JAX_NUM_PROCESSES" in told[0]


def test_a_pod_of_a_tpu_slice_is_found_without_a_warning(monkeypatch):
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    slice_ = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": "1",
        "TPU_SKIP_MDS_QUERY": "true",
        "TPU_WORKER_HOSTNAMES": "localhost,other",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }
    for name, value in slice_.items():
        monkeypatch.setenv(name, value)

    place = find(slice_)  # It fails at a warning.

    assert (place.found_in, place.count, place.index) == ("TPU slice", 2, 1)
    assert place.coordinator.startswith("localhost:")


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ({}, {}, False),
        ({"num_processes": 2}, {}, True),
        ({"num_processes": 1}, STEP, False),
        ({}, {"JAX_NUM_PROCESSES": "2"}, True),
        ({}, STEP, True),
        ({}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({}, {"KUBERNETES_SERVICE_HOST": "a", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_several_processes_are_expected(monkeypatch, given, environ, expected):
    monkeypatch.setattr(clusters.glob, "glob", lambda pattern: [])

    assert clusters.may_be_several({**NONE, **given}, environ) is expected


def resolved(monkeypatch, address):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0))]
    monkeypatch.setattr(clusters.socket, "getaddrinfo", lambda *a, **b: answer)
    told = []
    return clusters.bind_address("node:99", {}, told.append), told


def test_the_coordinator_listens_on_one_private_address(monkeypatch):
    assert resolved(monkeypatch, "10.1.2.3") == ("10.1.2.3:99", [])
    assert resolved(monkeypatch, "fd00::1") == ("[fd00::1]:99", [])


def test_a_public_address_of_the_coordinator_is_warned_of(monkeypatch):
    address, told = resolved(monkeypatch, "8.8.8.8")

    assert address == "8.8.8.8:99"
    assert "without a password" in told[0] and "8.8.8.8:99" in told[0]


def test_a_host_that_calls_itself_loopback_listens_where_others_can_connect(
    monkeypatch,
):
    monkeypatch.setattr(clusters, "_private_address", lambda: "10.9.9.9")

    assert resolved(monkeypatch, "127.0.1.1") == ("10.9.9.9:99", [])
    monkeypatch.undo()
    assert clusters.bind_address("127.0.0.1:99", {}, print) == "127.0.0.1:99"


def test_an_unknown_network_is_warned_of(monkeypatch):
    monkeypatch.setattr(clusters, "_private_address", lambda: None)

    address, told = resolved(monkeypatch, "127.0.1.1")

    assert address == "[::]:99" and "every network" in told[0]


def test_the_variable_for_the_address_takes_precedence():
    environ = {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:5"}

    assert clusters.bind_address("node:99", environ, print) == "0.0.0.0:5"

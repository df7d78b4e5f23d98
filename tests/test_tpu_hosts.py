"""The variables of a process on one host of a TPU slice; no TPU is needed."""

import jax
import pytest

from anchor_jax import clusters, processes, tpu_hosts
from anchor_jax.cli import jobs
from anchor_jax.errors import UserError

ON_GKE = {
    "TPU_WORKER_ID": "3",
    "TPU_WORKER_HOSTNAMES": "a-0,a-1,a-2,a-3",
    "TPU_TOPOLOGY": "4x4",
    "TPU_HOST_BOUNDS": "2,2,1",
    "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "a-0:8080",
}


@pytest.mark.parametrize("before", [{}, ON_GKE])
def test_a_host_of_four_chips_is_a_slice_of_its_own(before):
    environ = {**before, "HOME": "/home/me"}

    tpu_hosts.separate(environ, 4)

    assert environ == {
        "HOME": "/home/me",
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
        "TPU_VISIBLE_CHIPS": "0,1,2,3",
        "TPU_PROCESS_ADDRESSES": "localhost:8491",
        "TPU_PROCESS_PORT": "8491",
        "CLOUD_TPU_TASK_ID": "0",
        "TPU_HOST_BOUNDS": "1,1,1",
        "TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


@pytest.mark.parametrize(
    ("chips", "bounds"), [(1, "1,1,1"), (2, "1,2,1"), (8, "2,4,1")]
)
def test_all_chips_of_a_host_are_used(chips, bounds):
    environ = {}
    tpu_hosts.separate(environ, chips)

    assert environ["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
    assert len(environ["TPU_VISIBLE_CHIPS"].split(",")) == chips


def test_hosts_without_chips_and_chosen_chips_stay_as_they_are():
    for chips, given in ((0, {}), (4, {"TPU_VISIBLE_CHIPS": "2"})):
        environ = {**ON_GKE, **given}
        tpu_hosts.separate(environ, chips)
        assert environ == {**ON_GKE, **given}


def test_an_unknown_arrangement_is_named():
    with pytest.raises(UserError, match="3 TPU chips, whose arrangement is unknown"):
        tpu_hosts.separate({}, 3)


def test_devices_of_other_hosts_are_refused(monkeypatch):
    tpu_hosts.check()
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="devices of 4 hosts.*TPU_PROCESS_BOUNDS"):
        tpu_hosts.check()


@pytest.mark.parametrize(("command", "is_apart"), [("sample", True), ("train", False)])
def test_commands_apart_separate_hosts_before_they_join(monkeypatch, command, is_apart):
    class Joined(Exception):
        pass

    seen = []

    def join(*given, **more):
        seen.append(dict(jobs.os.environ))
        raise Joined

    environ = {**ON_GKE}
    monkeypatch.setattr(jobs.os, "environ", environ)
    monkeypatch.setattr(tpu_hosts, "chips_of_host", lambda: 4)
    place = clusters.Place("flags", 2, 1, "10.0.0.1:1234")
    monkeypatch.setattr(clusters, "find", lambda given, tell: place)
    monkeypatch.setattr(jobs, "_flags_of_place", dict)
    monkeypatch.setattr(jobs.supervisor, "tell", lambda **facts: None)
    monkeypatch.setattr(processes, "join", join)

    with pytest.raises(Joined):
        jobs.join(command)

    assert (seen[0].get("TPU_PROCESS_BOUNDS") == "1,1,1") is is_apart
    assert (seen[0] == ON_GKE) is not is_apart

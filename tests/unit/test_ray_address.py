"""RAY_ADDRESS: a cluster that does not answer is one sentence, soon."""

from __future__ import annotations

import socket
import time

import pytest
from ports import free_ports

from tora.errors import ConfigError
from tora.launch.ray_cluster import check_answers, ray_session


@pytest.mark.parametrize("address", ["nonsense", ":6379", "head:", "head:x", "head:0", "head:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is neither auto nor a cluster's host and port"):
        check_answers(address, patience_s=0)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_a_port_is_asked(form: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_answers(form.format(server.getsockname()[1]))
    address = form.format(free_ports(1)[0])
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={address} cannot be reached: .*; start Ray there, or unset"):
        check_answers(address, patience_s=0)


@pytest.mark.parametrize("address", ["auto", "local", "service://ours/cluster:1"])
def test_what_ray_finds_by_itself_is_left_to_it(address: str) -> None:
    check_answers(address, patience_s=0)


def test_a_head_that_is_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port, servers = free_ports(1)[0], []
    pause = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (servers.append(socket.create_server(("127.0.0.1", port))), pause(s)))
    check_answers(f"127.0.0.1:{port}")
    servers[0].close()


def test_a_run_does_not_wait_for_a_dead_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_ports(1)[0]}")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be reached"), ray_session(1):
        pass
    assert time.monotonic() - began < 30

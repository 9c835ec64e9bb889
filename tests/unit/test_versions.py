"""Versions of driver and nodes."""

import platform

import torch

from tora.distributed.versions import differences, installed


def test_versions_are_those_of_this_process() -> None:
    found = installed()
    assert found["Python"] == platform.python_version()
    assert found["torch"] == torch.__version__.partition("+")[0] and "Tora" in found


def test_a_difference_is_one_clause() -> None:
    driver = {"Python": "3.12.1", "torch": "2.13.0", "vLLM": "0.32.0"}
    assert differences(driver, dict(driver)) == ""
    assert differences(driver, {"Python": "3.12.1", "torch": "2.13.0"}) == "", "a learner's node needs no vLLM"
    node = {"Python": "3.11.9", "torch": "2.12.0", "vLLM": "0.32.0"}
    assert differences(driver, node) == (
        "has Python 3.11.9 where the driver has 3.12.1 and has torch 2.12.0 where the driver has 2.13.0"
    )

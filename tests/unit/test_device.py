"""Which device a process trains on: a GPU that PyTorch cannot use is never passed over silently."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tora.distributed import device
from tora.distributed.device import device_for, driver_version, visible_gpus
from tora.errors import ConfigError

PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\nGCC version: 12\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder like /dev with two GPUs, on a machine whose PyTorch finds none."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(device, "visible_gpus", lambda: visible_gpus(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        (None, "this PyTorch is a CPU build"),
        ("13.0", "for CUDA 13.0, which needs an NVIDIA driver of version 580"),
    ],
)
def test_gpus_that_pytorch_cannot_use_are_an_error(
    gpus: Path, monkeypatch: pytest.MonkeyPatch, kind: str, cuda: str | None, words: str
) -> None:
    monkeypatch.setattr("torch.version.cuda", cuda)
    with pytest.raises(ConfigError, match=r"^This machine has 2 NVIDIA GPUs, but PyTorch cannot use them: ") as error:
        device_for(kind)  # pyright: ignore[reportArgumentType]
    assert words in str(error.value) and "set device=cpu" in str(error.value)


def test_the_cpu_is_used_where_it_is_meant(gpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_for("cpu") == torch.device("cpu")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert device_for("auto") == torch.device("cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for file in gpus.glob("nvidia?"):
        file.unlink()
    assert device_for("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no NVIDIA GPU"):
        device_for("cuda")


def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_for("auto", rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="this machine has 2, for at least 3 ranks"):
        device_for("auto", 2)


@pytest.mark.parametrize(
    ("text", "found"), [(PROPRIETARY, "550.54.15"), (OPEN, "580.65.06"), ("", None), ("other text", None)]
)
def test_the_drivers_version_is_read(tmp_path: Path, text: str, found: str | None) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == found
    assert driver_version(tmp_path / "missing") is None

"""Marks every test of this folder `gpu`, and skips it on a machine without CUDA."""

import pytest
import torch

WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch finds no CUDA")


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.gpu)
    item.add_marker(WITHOUT_CUDA)

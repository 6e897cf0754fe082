"""Small real things that many tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("MPLBACKEND", "Agg")
if not os.environ.get("OVERPROOF_TEST_CUDA"):  # tests compare on the CPU; tests/test_cuda.py says how to run the others
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from torch import nn

from overproof import console
from overproof.data import Splits, load_data


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _as_talkative_as_before() -> Iterator[None]:
    """A test that silences the console does so for itself alone."""
    with console.quiet_unless(True):
        yield


@pytest.fixture(scope="session")
def digits() -> Splits:
    """scikit-learn's real digits."""
    return load_data("digits", seed=0)


@pytest.fixture
def linear() -> nn.Sequential:
    """Logits linear in the pixels (two classes, 1x4x4): every optimum is known in closed form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    return model


@pytest.fixture
def conv() -> nn.Sequential:
    """A small network with BatchNorm and dropout: whatever an attack may disturb."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )

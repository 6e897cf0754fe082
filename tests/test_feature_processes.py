"""What distillers remember beside the networks is the same in every process, and what one process would remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from overproof.methods.feature_bank import Bank
from overproof.methods.fim_memory import ClassVectors
from overproof.methods.sokd_policy import Draw, Policy

SAMPLES, DIM = 12, 4


def share(rank: int, size: int) -> tuple[Tensor, ...]:
    """This process's part of a batch: index, labels, vectors of student and teacher."""
    generator = torch.Generator().manual_seed(3)
    index, labels = torch.randperm(SAMPLES, generator=generator)[:6], torch.arange(6) % 3
    student, teacher = (torch.nn.functional.normalize(torch.randn(6, DIM, generator=generator), dim=1) for _ in range(2))
    return tuple(part.chunk(size)[rank] for part in (index, labels, student, teacher))


def remembered(rank: int, size: int) -> dict[str, Any]:
    """Banks and a policy after one step, in each process with random numbers of its own."""
    torch.manual_seed(0)
    banks = {"fixed": Bank(DIM, SAMPLES, momentum=0.5), "growing": Bank(DIM, None, momentum=0.5)}
    policy = Policy(5)
    torch.manual_seed(rank)
    index, labels, student, teacher = share(rank, size)
    for bank in banks.values():
        bank.open(index, labels)
        bank.remember(index, student, teacher)
        bank.set_scale(student.sum(dim=0)[:2] / len(student))
    reward = torch.tensor(float(student.sum()) / len(student))
    scores = policy.reinforce(Draw(1, (True, False), 0, torch.ones(()), torch.ones(2)), reward)
    policy.update({**scores, "magnitude": torch.full((5, 2), 1.0 + rank)})
    memory = ClassVectors()
    rows = slice(0, len(index) - rank)  # the last batch may be cut unevenly
    memory.remember(index[rows], teacher[rows])
    assert memory.recall(index).shape == (len(index), DIM)
    found = {"classes": memory.rows} | {
        f"{kind}/{name}": value for kind, bank in banks.items() for name, value in bank.state_dict().items()
    }
    return found | {f"policy/{name}": value for name, value in policy.state_dict().items()}


def worker(rank: int, size: int, place: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=size)
    torch.save(remembered(rank, size), f"{place}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    place: Path = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (2, str(place)), nprocs=2)
    return [torch.load(place / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_processes_agree(found: list[dict[str, Tensor]]) -> None:
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_two_processes_remember_what_one_does(found: list[dict[str, Tensor]]) -> None:
    alone = remembered(0, 1)
    for name, value in alone.items():
        if name == "classes":
            known = share(0, 1)[0][:5]  # the sixth image was left out by the second process
            torch.testing.assert_close(found[0][name][known], value[known])
        elif not name.startswith("policy/"):
            torch.testing.assert_close(found[0][name], value, msg=name)
    torch.testing.assert_close(found[0]["policy/baseline"], alone["policy/baseline"])
    # Adam sees the mean gradient.
    torch.testing.assert_close(found[0]["policy/first_alpha"], alone["policy/first_alpha"])
    torch.testing.assert_close(found[0]["policy/first_magnitude"] - alone["policy/first_magnitude"], torch.full((5, 2), 0.25))

"""Copies between host and device: what arrives, and on a GPU that nothing is waited for."""

from __future__ import annotations

import numpy as np
import pytest
import simulated_cuda
import torch

from srcfast_kernels.transfers import ALIGNMENT, fetch, indexed, to_device, to_device_together

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ARRAYS = [
    np.arange(7, dtype=np.int32),
    np.zeros(0, dtype=np.int64),
    torch.arange(15).view(3, 5).T,  # not contiguous
    torch.tensor([True, False, True]),
    torch.tensor(2.5, dtype=torch.float64),
    torch.arange(3, dtype=torch.bfloat16),
]


def test_what_is_sent_arrives_in_the_dtype_asked_for() -> None:
    found = to_device(np.array([[1, 2], [3, 4]]), DEVICE, torch.float64)
    assert found.dtype == torch.float64 and found.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert to_device([3, 1], DEVICE).dtype == torch.int64
    assert found.device == indexed(DEVICE)


def test_what_is_sent_together_arrives_whole_and_aligned() -> None:
    for there, here in zip(to_device_together(ARRAYS, DEVICE), map(torch.as_tensor, ARRAYS), strict=True):
        assert there.dtype == here.dtype and there.shape == here.shape and there.device == indexed(DEVICE)
        assert torch.equal(there.cpu(), here)
        assert there.numel() == 0 or there.is_contiguous()
        assert DEVICE == "cpu" or there.data_ptr() % ALIGNMENT == 0
    assert to_device_together([], DEVICE) == []


def test_what_is_fetched_is_on_the_host_once_it_is_waited_for() -> None:
    numbers = torch.arange(6, device=DEVICE).view(2, 3).T
    fetched = fetch(numbers * 2)
    assert fetched.wait().device.type == "cpu" and fetched.wait().tolist() == [[0, 6], [2, 8], [4, 10]]


def test_a_device_without_a_number_is_the_current_one() -> None:
    assert indexed("cpu") == torch.device("cpu") and indexed("cuda:3") == torch.device("cuda", 3)
    assert DEVICE == "cpu" or indexed("cuda") == torch.zeros(1, device="cuda").device


@pytest.mark.simulated
def test_nothing_is_waited_for_or_copied_from_memory_that_can_be_paged() -> None:
    with simulated_cuda.recording() as record:
        sent = [to_device(array, "cuda") for array in ARRAYS]
        sent += [
            to_device(torch.arange(4).pin_memory(), "cuda"),
            to_device(sent[0], "cuda"),
            *to_device_together(ARRAYS, "cuda"),
        ]
        fetched = [fetch(tensor) for tensor in sent]
        assert not record.waits and not record.pageable_copies and not record.event_waits, record.text()
        assert all(
            torch.equal(one.wait(), simulated_cuda.host(there)) for one, there in zip(fetched, sent, strict=True)
        )
        assert sum(record.event_waits.values()) == len(sent) and not record.waits


@pytest.mark.simulated
def test_what_is_fetched_is_not_there_before() -> None:
    fetched = fetch(torch.arange(5, device="cuda"))
    assert fetched.tensor.tolist() != [0, 1, 2, 3, 4] and fetched.wait().tolist() == [0, 1, 2, 3, 4]

"""The simulated device itself: it refuses, counts and remembers what a CUDA device would punish."""

from __future__ import annotations

import gc

import pytest
import simulated_cuda
import torch
from simulated_cuda import recording

pytestmark = pytest.mark.simulated
MIB = 1 << 20


def on_device(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


# Places of tensors --------------------------------------------------------------------------------------------


def test_tensors_are_cuda_tensors_to_python_and_autograd() -> None:
    x, weight = on_device(5, 7), on_device(7, 3).requires_grad_()
    (x @ weight).square().sum().backward()
    expected = 2 * x.cpu().T @ (x.cpu() @ weight.detach().cpu())
    assert weight.grad.is_cuda and weight.grad.device == torch.device("cuda", 0)
    torch.testing.assert_close(weight.grad.cpu(), expected)


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_tensors_of_two_devices_are_refused(other: str) -> None:
    if other == "cuda:1" and torch.cuda.device_count() < 2:
        pytest.skip("SIMULATED_CUDA=1")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        on_device(4) + torch.zeros(4, device=other)
    assert float((on_device(4) * torch.tensor(0.0)).sum()) == 0.0  # a scalar of the host is none of them


def test_integer_products_are_refused() -> None:
    with pytest.raises(RuntimeError, match="not implemented for 'Long'"):
        torch.ones(3, 3, dtype=torch.int64, device="cuda") @ torch.ones(3, 3, dtype=torch.int64, device="cuda")


def sent(values: list[int]) -> torch.Tensor:
    return torch.tensor(values).pin_memory().to("cuda", non_blocking=True)


# Waits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "work"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()),
        ("_local_scalar_dense", lambda x: bool(x.sum() > 0)),
        ("nonzero", lambda x: x.nonzero()),
        ("nonzero", lambda x: x[x > 0]),
        ("copy to the host", lambda x: x.cpu()),
        ("copy to the host", lambda x: torch.empty(4).copy_(x, non_blocking=True)),
        ("copy to the device", lambda x: torch.tensor([1.0, 2.0], device="cuda")),
        ("copy to the device", lambda x: x[[0, 2]]),
        ("repeat_interleave.Tensor without output_size", lambda x: x.repeat_interleave(sent([1, 2, 0, 1]))),
    ],
    ids=range(9),
)  # fmt: skip
def test_a_wait_of_the_host_is_counted(what: str, work) -> None:
    x = on_device(4)
    with recording() as record:
        work(x)
    assert [name for name, _ in record.waits] == [what]


def test_what_waits_for_nothing_counts_none() -> None:
    x = on_device(4, 4)
    with recording() as record:
        y = x.softmax(-1).masked_fill(x > 0, 1.0)
        y[0] = 2.0
        y[x > 1] = 3.0
        y.index_add_(0, sent([0]), x[:1])
        torch.zeros(3, device="cuda").repeat_interleave(torch.ones(3, dtype=torch.int64, device="cuda"), output_size=3)
    assert not record.waits and not record.pageable_copies


def test_pageable_copies_are_counted_though_they_are_non_blocking() -> None:
    with recording() as record:
        torch.ones(3).to("cuda", non_blocking=True)
        torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    assert record.pageable_copies.total() == 1 and not record.waits


def test_a_site_names_the_product_s_functions() -> None:
    from srcfast.generation.sampling import sample_tokens

    logits = torch.zeros(2, 5)
    with recording() as record:
        sample_tokens(logits, torch.rand(2), 1.0, 0.5).cuda()
        torch.cuda.current_device()
    assert [where for _, where in record.waits] == ["elsewhere"]
    with recording() as record, pytest.raises(RuntimeError):
        sample_tokens(logits.cuda(), torch.rand(2), 1.0, 0.5)  # mixes devices
    with recording() as record:
        from srcfast.distributed import gather_tensor

        assert gather_tensor(logits.cuda()[:1]).shape == (1, 1, 5)
    assert record.waits.total() == 1


def test_asked_to_raise_pytorch_raises_at_a_wait() -> None:
    x = on_device(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x + 1
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Copies under way ---------------------------------------------------------------------------------------------


def test_what_is_copied_to_the_host_is_garbage_until_its_event_has_come() -> None:
    values = on_device(6)
    host = torch.empty(6, pin_memory=True).copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    assert host.isnan().all()
    event.synchronize()
    assert torch.equal(host, values.cpu())


def test_an_event_recorded_before_a_copy_says_nothing_of_it() -> None:
    values, event = on_device(6), torch.cuda.Event()
    event.record()
    host = torch.empty(6, pin_memory=True).copy_(values, non_blocking=True)
    event.synchronize()
    assert host.isnan().all()


def test_a_pinned_source_that_changes_under_way_is_named() -> None:
    source = torch.zeros(6).pin_memory()
    source.to("cuda", non_blocking=True)
    source[0] = 1.0
    with pytest.raises(RuntimeError, match="a pinned source was changed"):
        torch.cuda.synchronize()


# Memory -------------------------------------------------------------------------------------------------------


def test_new_and_freed_memory_holds_no_numbers() -> None:
    assert torch.empty(64, device="cuda").isnan().all()
    x = on_device(64)
    view = simulated_cuda.host(x)
    assert not view.isnan().any()


def test_figures_follow_allocations() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    x = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
    y = torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() - before == 3 * MIB + 512
    del x
    assert torch.cuda.memory_allocated() - before == 512
    assert torch.cuda.max_memory_allocated() - before == 3 * MIB + 512
    assert torch.cuda.memory_reserved() >= reserved + 2 * MIB  # kept for the next allocation
    assert torch.cuda.mem_get_info()[0] == torch.cuda.mem_get_info()[1] - torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < 2 * MIB
    del y


def test_beyond_its_limit_a_device_is_out_of_memory() -> None:
    gc.collect()
    with simulated_cuda.memory_limit(torch.cuda.memory_allocated() + 8 * MIB):
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(2 * MIB / torch.cuda.mem_get_info()[1], 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    torch.empty(16 * MIB, dtype=torch.uint8, device="cuda")


# Streams and graphs -------------------------------------------------------------------------------------------


def test_a_stream_that_does_not_wait_for_another_s_work_is_named() -> None:
    torch.cuda.synchronize()
    side, x = torch.cuda.Stream(), on_device(8)
    with torch.cuda.stream(side), pytest.raises(RuntimeError, match="without waiting for it"):
        x + 1
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    with pytest.raises(RuntimeError, match="without waiting for it"):
        y * 2
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close((y * 2).cpu(), 2 * x.cpu() + 2)


def captured(work, pool=None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result


def test_a_capture_does_nothing_and_a_replay_does_it() -> None:
    x, total = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    graph, result = captured(lambda: total.add_(x) * 2)
    assert total.cpu().tolist() == [0.0] * 4 and result.isnan().all()
    x.fill_(3.0)
    graph.replay()
    graph.replay()
    assert total.cpu().tolist() == [6.0] * 4 and result.cpu().tolist() == [12.0] * 4


def test_a_wait_within_a_capture_is_refused() -> None:
    x = on_device(4)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(lambda: x * x.sum().item())


def test_a_replay_that_reads_freed_memory_is_refused() -> None:
    inputs = [on_device(4)]
    graph, _ = captured(lambda: inputs[0] * 2)
    graph.replay()
    inputs.clear()
    with pytest.raises(RuntimeError, match="memory that was freed after the capture"):
        graph.replay()


def test_graphs_of_one_pool_share_its_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    x = torch.ones(MIB, device="cuda")
    before = torch.cuda.memory_reserved()
    pool = torch.cuda.graph_pool_handle()
    alone = [captured(lambda: ((x + 1) * 2 + 1).sum()) for _ in range(2)]
    apart = torch.cuda.memory_reserved() - before
    shared = [captured(lambda: ((x + 1) * 2 + 1).sum(), pool) for _ in range(2)]
    together = torch.cuda.memory_reserved() - before - apart
    assert together < 0.75 * apart
    for graph, result in [*alone, *shared]:
        graph.replay()
        assert float(result) == 5 * MIB
    del alone, shared, graph, result
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before


# Attention, products, kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_varlen_attention_is_softmax_attention(heads: tuple[int, int]) -> None:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = [5, 1, 7], [9, 4, 7]
    q = torch.randn(sum(queries), heads[0], 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(sum(keys), heads[1], 16, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "kv")
    bounds = [torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32).cuda() for x in (queries, keys)]
    out = varlen_attn(q, k, v, *bounds, max(queries), max(keys), window_size=(-1, 0), enable_gqa=heads[0] != heads[1])
    out.float().square().sum().backward()
    plain = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    parts = []
    for block in range(3):
        rows = slice(sum(queries[:block]), sum(queries[: block + 1]))
        cols = slice(sum(keys[:block]), sum(keys[: block + 1]))
        n, m = queries[block], keys[block]
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        one, two, three = (x.transpose(0, 1) for x in (plain[0][rows], plain[1][cols], plain[2][cols]))
        attended = torch.nn.functional.scaled_dot_product_attention(one, two, three, attn_mask=mask, enable_gqa=True)
        parts.append(attended.transpose(0, 1))
    expected = torch.cat(parts)
    expected.square().sum().backward()
    torch.testing.assert_close(out.float().cpu(), expected.detach(), atol=2e-2, rtol=2e-2)  # rounded to bf16
    for ours, theirs in zip((q, k, v), plain, strict=True):
        torch.testing.assert_close(ours.grad.float().cpu(), theirs.grad, atol=6e-2, rtol=3e-2)


def test_attention_refuses_what_flash_attention_refuses() -> None:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, 4], dtype=torch.int32, device="cuda")
    for dtype, size, words in ((torch.float32, 16, "fp16 and bf16"), (torch.bfloat16, 12, "multiple of 8")):
        x = torch.randn(4, 2, size, device="cuda", dtype=dtype)
        with pytest.raises(RuntimeError, match=words):
            varlen_attn(x, x, x, bounds, bounds, 4, 4)


def test_products_with_a_wider_result_round_once() -> None:
    a, b = (torch.randn(33, 33, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    wide = torch.mm(a, b, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.cpu(), a.cpu().float() @ b.cpu().float(), atol=1e-5, rtol=1e-5)  # sums in fp32


@pytest.mark.triton
def test_a_triton_kernel_on_memory_of_the_host_is_refused() -> None:
    from srcfast_kernels import rms_norm
    from srcfast_kernels.backends import use_backend

    x, weight = (
        torch.randn(3, 8, device="cuda", dtype=torch.bfloat16),
        torch.ones(8, device="cuda", dtype=torch.bfloat16),
    )
    with recording() as record:
        ours = rms_norm(x, weight, 1e-6)
    assert record.launches.total() > 0
    with use_backend("reference"):
        torch.testing.assert_close(ours, rms_norm(x, weight, 1e-6), atol=1.6e-2, rtol=8e-3)  # one rounding to bf16
    with pytest.raises(ValueError, match="cpu tensor"):
        rms_norm(x, weight.cpu(), 1e-6)


# Other devices and processes ----------------------------------------------------------------------------------


def test_a_second_device_has_memory_of_its_own() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("SIMULATED_CUDA=1")
    before = [torch.cuda.memory_allocated(i) for i in range(2)]
    x = torch.ones(MIB, dtype=torch.uint8, device="cuda:1")
    assert [torch.cuda.memory_allocated(i) - before[i] for i in range(2)] == [0, MIB]
    with torch.cuda.device(1):
        assert torch.empty(3, device="cuda").device.index == 1 == torch.cuda.current_device()
    assert (x + 1).device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal((x.float() * 2).to("cuda:0").cpu(), torch.full((MIB,), 2.0))


def test_deterministic_mode_refuses_what_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    x = on_device(4, 4)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
            x @ x
        with pytest.raises(RuntimeError, match="deterministic"):
            x.cumsum(0)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        x @ x
    finally:
        torch.use_deterministic_algorithms(False)

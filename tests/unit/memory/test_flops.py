"""Necessary FLOPs against what PyTorch's own counter sees of a pass, and the rates of devices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.memory.flops import attended_of, decode_flops, forward_flops, known_flops, peak_flops, training_flops
from srcfast.memory.model_sizes import Shapes
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.lora import add_lora, lora_parameters
from srcfast_kernels import linear_logprob

CONFIG = DecoderConfig(
    vocab_size=90,
    hidden_size=48,
    intermediate_size=80,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(CONFIG)
        self.requires_grad_(False)
        add_lora(self, LoRAConfig(r=4, alpha=32.0))


def in_place(total: tuple[int, int], a: tuple[int, int], b: tuple[int, int], **_: object) -> int:
    """Of `total.addmm_(a, b)`, which PyTorch's counter leaves out."""
    return 2 * a[0] * a[1] * b[1]


def counted(train: bool, tokens: int, rows: int) -> float:
    """FLOPs that PyTorch counts of a pass over one sequence; the input has a gradient, as every layer's but the first's has."""
    model = Model()
    forest = Forest.of([Tree((Segment(np.arange(tokens) % 90),))])
    embeddings = model.decoder.embed(forest.token_ids).requires_grad_(train)
    with (
        torch.set_grad_enabled(train),
        torch.backends.mkldnn.flags(enabled=False),  # its products are not PyTorch's to count
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter,
    ):
        # Causal halves are no FLOPs saved in this backend: each query meets all keys.
        hidden = model.decoder(embeddings, forest.positions, forest_attend(forest, "reference"))
        logps = linear_logprob(hidden[-rows:], model.decoder.head_weight, forest.token_ids[-rows:])
        if train:
            logps.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("tokens", "rows"), [(33, 7), (80, 80)])
def test_flops_are_those_that_pytorch_counts(tokens: int, rows: int) -> None:
    shapes = Shapes.of(CONFIG)
    adapter = sum(parameter.numel() for parameter in lora_parameters(Model()))
    every_pair = tokens * tokens
    assert forward_flops(shapes, tokens, every_pair, rows, adapter) == counted(False, tokens, rows)
    assert training_flops(shapes, tokens, every_pair, rows, adapter) == counted(True, tokens, rows)


def test_a_token_decoded_costs_a_forward_pass_of_one_token_that_meets_the_head() -> None:
    shapes = Shapes.of(CONFIG)
    after = 21
    longer, shorter = (forward_flops(shapes, n, attended_of(0, n), n) for n in (after + 1, after))
    assert decode_flops(shapes, 1, after + 1) == pytest.approx(longer - shorter, rel=1e-12)


def test_keys_seen_are_the_ancestors_and_the_causal_half(rng: np.random.Generator) -> None:
    for parent, tokens in rng.integers(0, 40, (20, 2)).tolist():
        forest = Forest.of([Tree((Segment(np.zeros(parent + 1)), Segment(np.zeros(tokens + 1), 0)))])
        seen = forest.positions[parent + 1 :] + 1  # a token sees all positions of its path up to itself
        assert attended_of(parent + 1, tokens + 1) == int(seen.sum())


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip than the card of that number
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),  # a part of one
        ("NVIDIA RTX 6000", None),
    ],
)
def test_a_card_is_known_by_its_own_name_alone(name: str, rate: float | None) -> None:
    assert known_flops(name, torch.bfloat16) == rate
    assert known_flops(name, torch.float64) is None


def test_a_cpus_rate_is_measured_once() -> None:
    peak_flops.cache_clear()
    rate = peak_flops("cpu", torch.float32)
    assert 1e8 < rate < 1e14  # any CPU since 1995, all of the largest one's cores
    assert peak_flops("cpu", torch.float32) == rate


@pytest.mark.gpu
@pytest.mark.timing
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_product_stays_below_its_data_sheet() -> None:
    from srcfast.memory.flops import _measured_flops

    device = torch.device("cuda")
    stated = known_flops(torch.cuda.get_device_name(), torch.bfloat16)
    if stated is None:
        pytest.skip("a GPU that the table doesn't have")
    assert 0.3 * stated < _measured_flops(device, torch.bfloat16) < 1.05 * stated  # boost clocks differ by some percent

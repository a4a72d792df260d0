"""The base's layers shared out over ranks: the same numbers as from whole ones, whatever each rank has to do."""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rank_processes import LIMIT, context, run_ranks, values_of
from helpers.small_model import SmallModel, image_embedding, response_items
from torch import Tensor, nn

from srcfast import distributed
from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import CandidatesConfig, EvaluationConfig, LoRAConfig, TrainingConfig
from srcfast.data.forest import Forest
from srcfast.errors import Interrupted
from srcfast.memory.checkpoint_shapes import checkpoint_shapes
from srcfast.memory.model_sizes import ModelSizes
from srcfast.models import ImageFeatures, load_lvlm
from srcfast.models.decoder import Decoder
from srcfast.models.dropout_keys import dropping
from srcfast.models.lora import add_lora, lora_parameters
from srcfast.models.quantized import NF4Linear, quantize_linears
from srcfast.models.sharding import is_shard, keep_in_step, local_values, set_parameter, shard_layers
from srcfast.run import signals
from srcfast.run.chunks import Chunks, run_chunks
from srcfast.run.progress import StageProgress
from srcfast.stages.candidates import generate_candidates
from srcfast.stages.evaluation import answers_in_chunks
from srcfast.stages.prompts import image_loader
from srcfast.stages.rationale import rationale_loss, response_tokens
from srcfast.training.items import Objective
from srcfast.training.loop import train
from srcfast.world.samples import world_samples
from srcfast_kernels import nf4_dequantize, nf4_quantize

ASSETS = Path(__file__).parents[3] / "srcfast" / "world" / "assets" / "base"
LORA = LoRAConfig(r=3, alpha=12.0, dropout=0.1)
LAYERS = 5


def drawn_model(shared: bool, four_bits: bool = False) -> nn.Module:
    """A random decoder in the small model's place, its layers whole or shared out; the same weights on all ranks."""
    model = SmallModel(dtype=torch.float32)
    torch.manual_seed(5)
    source = Decoder(replace(model.decoder.config, num_layers=LAYERS))
    decoder = Decoder(source.config)
    if four_bits:
        quantize_linears(decoder, flat=shared)
    if shared:
        shard_layers(decoder, "cpu")
    target = dict(decoder.named_parameters())
    for name, parameter in source.named_parameters():
        linear = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(linear, NF4Linear):
            linear.set_weight(parameter.detach())
        else:
            set_parameter(target[name], parameter.detach())
    model.decoder = decoder
    model.requires_grad_(False)
    add_lora(model, LORA)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: Any, forest: Forest, rows: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    embeddings, attend = model.decoder.embed(forest.token_ids), forest_attend(forest, rows=rows)
    with dropping(model.decoder, torch.arange(forest.num_tokens)):
        hidden = model.decoder(embeddings, forest.positions, attend, rows)
    model.zero_grad()
    hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(7)))
    return hidden.detach(), [parameter.grad.clone() for parameter in lora_parameters(model)]


def compare_passes(folder: Path) -> list[str]:
    """What differs between whole and shared layers; nothing should."""
    differing = []
    forest = Forest.of([item.tree for item in response_items(4)])
    for four_bits in (False, True):
        whole, shared = (drawn_model(one, four_bits) for one in (False, True))
        for every in (0, 1, 2, 4):
            for rows in (None, torch.arange(0, forest.num_tokens, 3)):
                for model in (whole, shared):
                    model.decoder.checkpoint_layers = every
                expected, wanted = gradients(whole, forest, rows)
                found, own = gradients(shared, forest, rows)
                with torch.no_grad():
                    quiet = torch.equal(whole.eval()(forest), shared.eval()(forest))
                whole.train(), shared.train()
                same = quiet and torch.equal(expected, found) and all(map(torch.equal, wanted, own))
                if not same or not any(gradient.any() for gradient in own):
                    differing.append(f"4 bits: {four_bits}, groups of {every}, rows: {rows is not None}")
    return differing


@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_layers_give_the_numbers_and_gradients_of_whole_ones(tmp_path: Path, ranks: int) -> None:
    assert values_of(run_ranks(ranks, compare_passes, tmp_path)) == [[]] * ranks


def notes_that_stay(folder: Path) -> int:
    """What FSDP still keeps of twenty passes without gradients, as decoding makes them by the thousand."""
    model = drawn_model(True).eval()
    forest = Forest.of([item.tree for item in response_items(2)])
    with torch.no_grad():
        for _ in range(20):
            model(forest)
    groups = [layer._get_fsdp_state()._fsdp_param_group for layer in model.decoder.layers]
    return len(groups[0].comm_ctx.post_forward_order) + sum(len(group._post_forward_indices) for group in groups)


def test_passes_without_gradients_leave_nothing_in_memory(tmp_path: Path) -> None:
    assert values_of(run_ranks(2, notes_that_stay, tmp_path)) == [0, 0]


def shares(folder: Path) -> list[Any]:
    found = []
    for four_bits in (False, True):
        model = drawn_model(True, four_bits)
        own = [parameter for parameter in model.decoder.parameters() if is_shard(parameter)]
        found.append(
            [sum(local_values(parameter).nbytes for parameter in own), sum(parameter.nbytes for parameter in own)]
        )
    return found


def test_a_rank_holds_its_part_alone(tmp_path: Path) -> None:
    found = values_of(run_ranks(3, shares, tmp_path))
    for number in range(2):
        whole = found[0][number][1]
        assert sum(one[number][0] for one in found) == whole > 0
        for one in found:
            assert abs(one[number][0] - whole / 3) < 0.03 * whole  # rows and bytes don't always divide by three


# More forests on one rank than on another, and a last batch with fewer items than ranks.
SETTINGS = TrainingConfig(
    micro_batch_size=2,
    gradient_accumulation_steps=3,
    epochs=2,
    token_budget=60,
    learning_rate=0.003,
    activation_checkpointing=0,
).seeded(3)


def train_on(folder: Path, shared: bool, images: bool) -> dict[str, Any]:
    model = drawn_model(shared)
    features = None
    if images:

        def features(keys: Any) -> dict[str, Tensor]:
            return {key: image_embedding(key).float() for key in keys}

    history = train(
        model,
        response_items(13, images),
        objective=Objective(rationale_loss, response_tokens),
        settings=SETTINGS.replace(activation_checkpointing=2),
        features=features,
    )
    weights = torch.cat([parameter.detach().flatten() for parameter in lora_parameters(model)]).tolist()
    return {"weights": weights, "loss": [row["loss"] for row in history]}


def train_both_ways(folder: Path) -> bool:
    return all(train_on(folder, True, images) == train_on(folder, False, images) for images in (False, True))


def train_on_two_nodes(folder: Path) -> bool:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    return train_both_ways(folder)


@pytest.mark.parametrize("ranks", [2, 4])
def test_training_on_shared_layers_gives_the_weights_of_training_on_whole_ones(tmp_path: Path, ranks: int) -> None:
    assert values_of(run_ranks(ranks, train_both_ways, tmp_path)) == [True] * ranks


def test_layers_are_shared_within_a_node(tmp_path: Path) -> None:
    assert values_of(run_ranks(4, train_on_two_nodes, tmp_path)) == [True] * 4


def three_on_one_node(folder: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2" if distributed.rank() < 2 else "1"
    drawn_model(True)


def test_nodes_of_different_sizes_are_refused(tmp_path: Path) -> None:
    for one in run_ranks(3, three_on_one_node, tmp_path):
        assert "distributed.shard: expected as many ranks on every node" in one["error"]


def lvlm(shared: bool, quantize: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    model = load_lvlm("embedded", quantize=quantize, dtype=dtype, lora=LORA, shard=shared)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def search(folder: Path) -> list[Any]:
    """Texts from whole and from shared layers, of one sample on rank 1 and three on rank 0; and sizes as counted and planned."""
    images = folder / f"images-{distributed.rank()}"
    samples = world_samples("train", 3, 0, image_dir=images)[: 1 if distributed.rank() else 3]
    settings = CandidatesConfig(
        num_candidates=3,
        num_beams=2,
        proposals=2,
        max_new_tokens=40,
        top_p=1.0,
        max_sentences=12,
        max_sentence_tokens=48,
    )
    found = []
    for quantize in (None, "nf4"):
        texts = []
        for shared in (False, True):
            model = lvlm(shared, quantize)
            features = ImageFeatures(model, image_loader(samples))
            own = generate_candidates(model, samples, settings, features=features, seed=1, batch_size=2)
            keep_in_step(model.decoder)
            texts.append([[(one.text, one.logprob) for one in group] for group in own])
        counted = ModelSizes.of(model)
        shapes = checkpoint_shapes(str(ASSETS), "auto")
        quantized, ranks = quantize or "none", distributed.world_size()
        planned = ModelSizes.of_tensors(
            shapes.tensors, shapes.config, dtype="bfloat16", device_type="cpu", quantize=quantized, ranks=ranks
        )
        sizes = [[one.weight_bytes, one.quantisation_bytes, one.gathered_bytes] for one in (counted, planned)]
        found.append([texts[0] == texts[1] != [], *sizes])
    return found


def test_search_on_shared_layers_with_unequal_work_gives_the_same_texts(tmp_path: Path) -> None:
    for one in values_of(run_ranks(2, search, tmp_path)):
        for same, counted, planned in one:
            assert same
            np.testing.assert_allclose(counted, planned, rtol=0.02, atol=1024)  # 4-bit parts are filled up to 16 bytes


def stopped_in_turn(folder: Path) -> list[str]:
    """Each rank is asked to stop within another of its pieces, as a signal that comes to all finds them."""
    model = lvlm(True)
    samples = world_samples("train", 40, 0, image_dir=folder / f"images-{distributed.rank()}")

    class Stopping(StageProgress):
        def advance(self, n: int = 1, tokens: int = 0) -> None:
            super().advance(n, tokens)
            if self.done > 8 * (1 + distributed.rank()):
                signals._pending_signal = signal.SIGTERM

    try:
        answers_in_chunks(
            Chunks(folder / "pieces", dict, Stopping("answers", len(samples), quiet=True)),
            model,
            samples,
            EvaluationConfig(max_new_tokens=8 + 8 * distributed.rank(), batch_size=1),
            features=ImageFeatures(model, image_loader(samples)),
        )
    except Interrupted as error:
        return [str(error)]
    return ["not stopped"]


def test_ranks_that_are_asked_to_stop_wait_for_each_other_s_pieces(tmp_path: Path) -> None:
    found = [one[0] for one in values_of(run_ranks(2, stopped_in_turn, tmp_path))]
    assert all("chunk" in one for one in found), found
    kept = len(list((tmp_path / "pieces").glob("*.jsonl")))
    assert 2 <= kept < 5


def asked_while_idle(folder: Path) -> list[str]:
    """Of one piece: the rank that has none is asked to stop while it keeps the other company."""
    model = lvlm(True)
    samples = world_samples("train", 1, 0, image_dir=folder / f"images-{distributed.rank()}")

    def meanwhile() -> None:
        signals._pending_signal = signal.SIGTERM
        keep_in_step(model.decoder)

    def work(piece: Any) -> Any:
        with torch.no_grad():
            model.decoder(model.decoder.embed(torch.zeros(1).long()), torch.zeros(1).long(), lambda i, q, k, v: q)
        return [{}], {}

    try:
        run_chunks(Chunks(folder / "pieces", dict, StageProgress("one", 1, quiet=True)), samples, 1, work, meanwhile)
    except Interrupted as error:
        return [str(error)]
    return ["not stopped"]


def test_a_rank_that_is_asked_to_stop_while_it_has_no_piece_stops(tmp_path: Path) -> None:
    for (told,) in values_of(run_ranks(2, asked_while_idle, tmp_path)):
        assert "1 chunks" in told
    assert len(list((tmp_path / "pieces").glob("*.jsonl"))) == 1


def threads_of_a_group(folder: Path, rank: int, port: int) -> None:
    """Write how many threads there are with a group in which a model is shared out, and behind it, over those before."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = len(os.listdir("/proc/self/task"))
    during = []
    with distributed.process_group():
        model = drawn_model(True)
        gradients(model, Forest.of([item.tree for item in response_items(2)]), None)
        during.append(len(os.listdir("/proc/self/task")) - before)
        del model
    during.append(len(os.listdir("/proc/self/task")) - before)
    (folder / f"threads-{rank}.json").write_text(json.dumps(during))


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="PyTorch 2.11 holds the group; its threads are given time instead"
)
def test_no_thread_of_a_group_stays_behind_it(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=threads_of_a_group, args=(tmp_path, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0
    for rank in range(2):
        during, after = json.loads((tmp_path / f"threads-{rank}.json").read_text())
        # A thread of gloo's that lets go of a tensor while Python ends would end the process with an error.
        assert during > after
        assert after <= 1  # of the store, on the rank that has it


def one_dies(folder: Path) -> None:
    model = drawn_model(True)
    forest = Forest.of([item.tree for item in response_items(2)])
    if distributed.rank() == 1:
        os._exit(9)
    with torch.no_grad():
        model(forest)


def test_a_rank_that_dies_within_a_layer_is_an_error_by_name(tmp_path: Path) -> None:
    left, dead = run_ranks(2, one_dies, tmp_path)
    assert dead["exit"] == 9
    assert "rank 0 of 2 timed out waiting for rank 1" in left["error"]


def test_a_four_bit_weight_that_cannot_be_shared_out_is_named() -> None:
    linear = NF4Linear(64, 32, False, flat=True)
    with pytest.raises(ValueError, match="blocks of 64 with double quantisation, found blocks of 128"):
        linear.set_quantized(nf4_quantize(torch.randn(32, 64), blocksize=128))


@pytest.mark.parametrize("shape", [(32, 64), (7, 9), (130, 257)])
def test_a_four_bit_weight_in_one_row_is_the_weight_and_is_never_cast(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    linear = NF4Linear(shape[1], shape[0], False, flat=True)
    linear.set_weight(weight)
    linear.to(torch.bfloat16)
    assert linear.weight is not None
    assert torch.equal(nf4_dequantize(linear.weight), nf4_dequantize(nf4_quantize(weight)))

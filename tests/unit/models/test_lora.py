"""Adapters against PEFT, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_checkpoints import (
    assert_close,
    lvlm_logits,
    oracle_logits,
    random_image,
    random_tokens,
    text_config,
    text_logits,
    write_lvlm,
    write_text_model,
)
from helpers.small_training import SmallModel, random_trees
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.errors import InputError, SrcfastError
from srcfast.models import load_lvlm, load_text_model
from srcfast.models.dropout_keys import dropout_keys, dropping
from srcfast.models.lora import (
    adapter_hash,
    adapters,
    check_adapter_changes,
    disable_lora,
    folded_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    save_adapter,
)
from srcfast.models.lvlm import save_lvlm

RNG = np.random.default_rng(11)
IMAGE = random_image(RNG, 40, 30)
RESPONSE = random_tokens(RNG, 8)
CONFIG = LoRAConfig(r=3, alpha=5.0).seeded(7)


def randomise_adapter(model: Any, seed: int = 0) -> None:
    """B is zero at first: an adapter that says nothing tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


class Pair:
    """One of the two kinds of models, here and in transformers."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.path = kind, directory
        self.theirs = (
            write_lvlm(directory) if kind == "lvlm" else write_text_model(directory, text_config(attention_bias=True))
        )
        self.plain = self.load()
        self.scope = r".*language_model\..*" if kind == "lvlm" else r".*\."

    def load(self, **settings: Any) -> Any:
        return (load_lvlm if self.kind == "lvlm" else load_text_model)(self.path, **settings)

    def logits(self, model: Any) -> Tensor:
        if self.kind == "text":
            return text_logits(model, [RESPONSE])[0]
        return lvlm_logits(model, "Why?", [IMAGE], RESPONSE)

    def oracle(self, theirs: Any) -> Tensor:
        if self.kind == "text":
            with torch.no_grad():
                return theirs(input_ids=torch.from_numpy(RESPONSE)[None]).logits[0]
        return oracle_logits(theirs, self.plain, "Why?", [IMAGE], RESPONSE)


@pytest.fixture(params=["lvlm", "text"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair(request.param, tmp_path / "base")


@pytest.mark.parametrize("targets", ["q_proj|v_proj", "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"])
def test_an_adapter_of_peft_gives_peft_s_logits(targets: str, pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=rf"{pair.scope}({targets})", init_lora_weights=False)
    torch.manual_seed(1)
    theirs = peft.get_peft_model(pair.theirs, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = pair.load(lora=tmp_path / "adapter")
    expected = pair.oracle(theirs)
    assert float((expected - pair.logits(pair.plain)).abs().max()) > 0.05  # the adapter does something
    assert_close(pair.logits(ours), expected, 1e-5)  # the same fp32 operations in another order


def test_peft_reads_a_saved_adapter(pair: Pair, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = pair.load(lora=CONFIG)
    randomise_adapter(ours)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(pair.theirs, tmp_path / "adapter").eval()
    adapted = {name for name, _ in theirs.named_parameters() if ".lora_A." in name}
    assert len(adapted) == len(adapters(ours)) == 14 and not any("vision" in name for name in adapted)
    assert float((pair.logits(ours) - pair.logits(pair.plain)).abs().max()) > 0.05
    assert_close(pair.logits(ours), pair.oracle(theirs), 1e-5)


def test_a_saved_adapter_loads_as_it_was(pair: Pair, tmp_path: Path) -> None:
    ours = pair.load(lora=CONFIG)
    randomise_adapter(ours)
    save_adapter(ours, tmp_path / "adapter")
    again = pair.load(lora=tmp_path / "adapter")
    assert torch.equal(pair.logits(again), pair.logits(ours))
    save_adapter(again, tmp_path / "again")
    assert adapter_hash(tmp_path / "again") == adapter_hash(tmp_path / "adapter")
    assert [p.requires_grad for p in again.parameters()].count(True) == len(lora_parameters(again)) == 28


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_is_trained_or_not_as_it_was_asked_for(trainable: bool, pair: Pair, tmp_path: Path) -> None:
    save_adapter(pair.load(lora=CONFIG), tmp_path)
    model = pair.load()
    load_adapter(model, tmp_path, trainable)
    assert {parameter.requires_grad for parameter in lora_parameters(model)} == {trainable}
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".lora_" not in name)


def test_a_new_adapter_changes_nothing_and_its_seed_decides_it(pair: Pair) -> None:
    ours = pair.load(lora=CONFIG)
    assert torch.equal(pair.logits(ours), pair.logits(pair.plain))
    drawn = [
        pair.load(lora=LoRAConfig(r=3, alpha=32.0).seeded(seed)).decoder.layers[0].mlp.up_proj.lora_A.detach()
        for seed in (7, 7, 8)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    bound = ours.decoder.config.hidden_size**-0.5  # PEFT's kaiming_uniform_(a=sqrt(5))
    assert 0.8 * bound < float(drawn[0].abs().max()) <= bound


def test_merging_is_adding_and_disabling_is_the_base(pair: Pair, tmp_path: Path) -> None:
    ours = pair.load(lora=CONFIG)
    randomise_adapter(ours)
    with_adapter = pair.logits(ours)
    with disable_lora(ours):
        assert torch.equal(pair.logits(ours), pair.logits(pair.plain))
    assert torch.equal(pair.logits(ours), with_adapter)
    with pytest.raises(RuntimeError), disable_lora(ours):
        raise RuntimeError
    assert torch.equal(pair.logits(ours), with_adapter)
    assert merge_lora(ours) == 14 and not adapters(ours)
    assert_close(pair.logits(ours), with_adapter, 1e-5)
    if pair.kind == "lvlm":
        save_lvlm(ours, tmp_path / "merged")
        assert torch.equal(pair.logits(load_lvlm(tmp_path / "merged")), pair.logits(ours))


def test_merging_in_fp64_keeps_fp64(tmp_path: Path) -> None:
    pair = Pair("text", tmp_path)
    ours = pair.load(lora=CONFIG, dtype=torch.float64)
    randomise_adapter(ours)
    with_adapter = pair.logits(ours)
    merge_lora(ours)
    assert_close(pair.logits(ours), with_adapter, 1e-13)


def test_the_hash_follows_weights_and_scaling(tmp_path: Path) -> None:
    pair = Pair("text", tmp_path / "base")
    hashes = []
    for number, (seed, alpha) in enumerate([(0, 5.0), (0, 5.0), (1, 5.0), (0, 6.0)]):
        ours = pair.load(lora=LoRAConfig(r=3, alpha=alpha))
        randomise_adapter(ours, seed)
        save_adapter(ours, tmp_path / str(number))
        hashes.append(adapter_hash(tmp_path / str(number)))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


def test_only_the_adapter_gets_gradients_and_dropout_acts_in_training_alone(pair: Pair) -> None:
    ours = pair.load(lora=LoRAConfig(r=3, dropout=0.5, alpha=32.0))
    randomise_adapter(ours)
    forest = Forest.of([Tree((Segment(RESPONSE),))])

    def hidden() -> Tensor:
        return ours(forest, {}) if pair.kind == "lvlm" else ours(forest)

    evaluated = hidden()
    ours.train()
    with pytest.raises(SrcfastError, match=r"(?s)lora\.dropout: expected the rows' keys.*Fix: train with"):
        hidden()
    with dropping(ours.decoder, dropout_keys(forest, 0, 0, [0])):
        trained = hidden()
        ours.eval()
        assert torch.equal(hidden(), evaluated)
    assert not torch.allclose(trained, evaluated, atol=1e-3)
    trained.square().sum().backward()
    gradients = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients == {name for name, _ in ours.named_parameters() if ".lora_" in name}


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    shallow = Pair("text", tmp_path / "shallow")
    save_adapter(shallow.load(lora=CONFIG), tmp_path / "adapter")
    write_text_model(tmp_path / "deep", text_config(num_hidden_layers=3))
    with pytest.raises(InputError, match=r"(?s)layers\.2\..*another base"):
        load_text_model(tmp_path / "deep", lora=tmp_path / "adapter")
    write_text_model(tmp_path / "wide", text_config(intermediate_size=40))
    with pytest.raises(InputError, match=r"(?s)mlp\.(gate|up|down)_proj.*another base"):
        load_text_model(tmp_path / "wide", lora=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    pair = Pair("text", tmp_path / "base")
    save_adapter(pair.load(lora=CONFIG), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(InputError, match=rf"(?s)adapter_config\.json.*{field}"):
        pair.load(lora=tmp_path / "adapter")


def test_an_adapter_that_changes_nothing_is_refused_by_name(pair: Pair, tmp_path: Path) -> None:
    ours = pair.load(lora=CONFIG)
    save_adapter(ours, tmp_path / "adapter")
    idle = pair.load(lora=tmp_path / "adapter")  # training may begin with it
    with pytest.raises(InputError, match=r"lora_B.*an adapter that changes the model.*zero.*Fix: train the adapter"):
        check_adapter_changes(idle, tmp_path / "adapter")
    with torch.no_grad():
        lora_parameters(ours)[1][0, 0] = 1e-8  # one entry of one B is enough
    save_adapter(ours, tmp_path / "adapter")
    check_adapter_changes(pair.load(lora=tmp_path / "adapter"), tmp_path / "adapter")


@pytest.mark.parametrize("tower", ["vision_model.encoder", "visual", "vision_encoder"])
def test_an_adapter_on_another_family_s_tower_is_not_taken_for_the_decoder_s(tower: str, tmp_path: Path) -> None:
    pair = Pair("lvlm", tmp_path / "base")
    save_adapter(pair.load(lora=CONFIG), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name.replace("language_model", tower): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"(?s)decoder only"):
        pair.load(lora=tmp_path / "adapter")


def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    pair = Pair("text", tmp_path / "base")
    with pytest.raises(InputError, match="adapter_config.json"):
        load_adapter(pair.plain, tmp_path)
    with pytest.raises(InputError, match="fc1"):
        pair.load(lora=LoRAConfig(target_modules=("q_proj", "fc1"), r=16, alpha=32.0))
    with pytest.raises(ValidationError, match="r\n.*greater than or equal to 1"):
        LoRAConfig(r=0)


def test_folded_weights_answer_as_the_adapter_does_and_come_back_bit_for_bit(pair: Pair) -> None:
    model = pair.load(lora=CONFIG)
    randomise_adapter(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = pair.logits(model)
    with folded_lora(model):
        assert not any(layer.active for layer in adapters(model).values())
        assert_close(pair.logits(model), expected, 1e-5)  # the same fp32 operations in another order
    assert torch.equal(pair.logits(model), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_an_adapter_on_half_precision_weights_is_not_folded(pair: Pair) -> None:
    model = pair.load(lora=CONFIG, dtype=torch.bfloat16)
    with folded_lora(model):
        assert all(layer.active for layer in adapters(model).values())


# By hand, on a small decoder --------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float64, **lora: Any) -> SmallModel:
    torch.manual_seed(0)
    model = SmallModel({"num_layers": 2}, LoRAConfig(**({"r": 4, "alpha": 6.0} | lora)).seeded(7), dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_sum_rounded_once(dtype: torch.dtype) -> None:
    """W + alpha / r B A in fp32 at least, whatever the type of the base."""
    model = small(dtype)
    layers = adapters(model)
    exact = torch.promote_types(dtype, torch.float32)
    expected = {}
    for name, layer in layers.items():
        change = 6.0 / 4 * (layer.lora_B.detach().to(exact) @ layer.lora_A.detach().to(exact))
        expected[name] = (layer.base.weight.detach().to(exact) + change).to(dtype)
    assert merge_lora(model) == len(expected) == 14
    for name, weight in expected.items():
        assert torch.equal(model.decoder.get_submodule(name).weight, weight)
    assert not adapters(model)


def test_a_folded_weight_is_that_sum_and_is_as_before_behind() -> None:
    model = small()
    before = {name: layer.base.weight.detach().clone() for name, layer in adapters(model).items()}
    with folded_lora(model):
        for name, layer in adapters(model).items():
            change = 1.5 * (layer.lora_B.detach() @ layer.lora_A.detach())
            torch.testing.assert_close(layer.base.weight.detach(), before[name] + change, rtol=1e-12, atol=1e-12)
            assert not layer.active
    for name, layer in adapters(model).items():
        assert torch.equal(layer.base.weight, before[name]) and layer.active


def test_new_matrices_are_uniform_within_the_inverse_root_of_their_input() -> None:
    """PEFT draws A by `kaiming_uniform_(a=sqrt(5))`: within 1 / sqrt(in); B is 0. Each layer has other numbers."""
    torch.manual_seed(0)
    model = SmallModel({}, LoRAConfig(r=16, alpha=1.0).seeded(7))
    drawn = []
    for layer in adapters(model).values():
        bound = layer.base.in_features**-0.5
        assert not layer.lora_B.any()
        assert 0.97 * bound < float(layer.lora_A.abs().max()) <= bound
        assert float(layer.lora_A.std()) == pytest.approx(bound / 3**0.5, rel=0.1)  # of a thousand numbers and more
        drawn.append(float(layer.lora_A[0, 0] / bound))
    assert len(set(drawn)) == len(drawn)


def test_the_written_settings_are_those_of_the_adapter(tmp_path: Path) -> None:
    write_text_model(tmp_path / "base", text_config())
    model = load_text_model(
        tmp_path / "base", lora=LoRAConfig(r=5, alpha=7.5, dropout=0.25, target_modules=("v_proj", "q_proj"))
    )
    save_adapter(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "r": 5,
        "lora_alpha": 7.5,
        "lora_dropout": 0.25,
        "bias": "none",
        "use_rslora": False,
    }
    assert {name: settings[name] for name in expected} == expected
    assert settings["target_modules"] == ["q_proj", "v_proj"] and "exclude_modules" not in settings
    assert "rank_pattern" not in settings and "alpha_pattern" not in settings


@pytest.mark.parametrize("every", [0, 1])
def test_with_dropout_selected_rows_are_those_of_all_rows(every: int) -> None:
    """Of the last layer's rows each has its own key, wherever it lies among those that are computed."""
    model = small(dropout=0.4).train()
    model.decoder.checkpoint_layers = every
    forest = Forest.of(random_trees(np.random.default_rng(5), 3, 12, 6, 2))
    keys = dropout_keys(forest, 1, 2, [0, 1, 2])
    rows = torch.tensor([2, 5, 11, forest.num_tokens - 2, forest.num_tokens - 1])
    with dropping(model.decoder, keys):
        whole, selected = model(forest), model(forest, rows)
    torch.testing.assert_close(selected, whole[rows], rtol=1e-10, atol=1e-12)
    with dropping(model.decoder, keys.flip(0)):
        assert not torch.allclose(model(forest), whole)


@pytest.mark.parametrize(("kind", "changes"), [("both", True), ("lora_A", False), ("lora_B", False)])
def test_an_adapter_changes_a_model_where_both_of_its_matrices_are_there(kind: str, changes: bool) -> None:
    model = small()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind != "both" and name.endswith(kind):
                parameter.zero_()
    if changes:
        check_adapter_changes(model, "adapter")
    else:
        with pytest.raises(InputError, match="an adapter that changes the model"):
            check_adapter_changes(model, "adapter")

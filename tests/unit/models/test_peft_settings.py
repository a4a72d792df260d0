"""Every field of PEFT's LoraConfig is computed as PEFT does, or refused with the way out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_checkpoints import assert_close, random_tokens, text_config, text_logits, write_text_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from srcfast.errors import InputError
from srcfast.models.lora import adapter_hash, load_adapter, save_adapter
from srcfast.models.peft_settings import COMPUTED, FIXED, WITHOUT_EFFECT, PeftSettings
from srcfast.models.text_model import load_text_model

peft = pytest.importorskip("peft")

LAYERS = 4
KINDS = ["q_proj", "v_proj", "up_proj"]
NAMES = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")]
# Of each field values that are not its default.
OTHER: dict[str, list[Any]] = {
    "r": [5],
    "lora_alpha": [3, 2.5],
    "lora_dropout": [0.3],
    "use_rslora": [True],
    "target_modules": [r".*\.layers\.[02]\..*(q_proj|down_proj)", NAMES[:3], "all-linear"],
    "exclude_modules": [["q_proj"], r".*layers\.1\..*"],
    "rank_pattern": [{"q_proj": 2}, {r"layers\.1\..*": 7, "v_proj": 4}, {"model.layers.0.mlp.up_proj": 1}],
    "alpha_pattern": [{"q_proj": 32}, {r"layers.[12].self_attn.v_proj": 0.5}],
    "layers_to_transform": [2, [0, 3]],
    "layers_pattern": ["layers", ["blocks", "layers"]],
    "init_lora_weights": [
        False,
        "gaussian",
        "orthogonal",
        "pissa",
        "olora",
        "loftq",
        "eva",
        "corda",
        "lora_ga",
        "pissa_niter_4",
    ],
    "bias": ["all", "lora_only"],
    "fan_in_fan_out": [True],
    "modules_to_save": [["lm_head"]],
    "task_type": ["SEQ_CLS"],
    "peft_type": ["IA3"],
    "use_dora": [True],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "lora_bias": [True],
    "trainable_token_indices": [[3, 4]],
    "target_parameters": [["mlp.up_proj.weight"]],
    "layer_replication": [[[0, 2], [1, 4]]],
    "alora_invocation_tokens": [[5, 6]],
    "arrow_config": [{"top_k": 2}],
    "ensure_weight_tying": [True],
    "megatron_config": [{"tensor_model_parallel_size": 1}],
    "velora_config": [{"rank": 2}],
    "monteclora_config": [{"n": 2}],
    "kasa_config": [{"beta": 0.1}],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("base")
    return directory, write_text_model(directory, text_config(num_hidden_layers=LAYERS))


def write_adapter(base: Any, directory: Path, **settings: Any) -> Any:
    """Save a random adapter by PEFT; returns PEFT's model, which is a copy."""
    path, _ = base
    model = AutoModelForCausalLM.from_pretrained(path)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": KINDS, **settings})
    theirs = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(directory)
    return theirs


def logits_of(theirs: Any, tokens: Any) -> Tensor:
    with torch.no_grad():
        return theirs(input_ids=torch.from_numpy(tokens)[None]).logits[0]


def test_the_table_has_every_field_of_peft() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {*COMPUTED, *FIXED, *WITHOUT_EFFECT} <= fields
    assert fields - {*WITHOUT_EFFECT} <= OTHER.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in COMPUTED for value in OTHER[name]], ids=lambda part: str(part)[:30]
)
def test_a_field_is_computed_as_peft_does(name: str, value: Any, base: Any, rng: Any, tmp_path: Path) -> None:
    more = {"layers_to_transform": [1, 2]} if name == "layers_pattern" else {}
    theirs = write_adapter(base, tmp_path / "adapter", **{name: value}, **more)
    tokens = random_tokens(rng, 11)
    expected, plain = logits_of(theirs, tokens), logits_of(base[1], tokens)
    assert float((expected - plain).abs().max()) > 0.05  # the adapter does something
    ours = load_text_model(base[0], lora=tmp_path / "adapter")
    assert_close(text_logits(ours, [tokens])[0], expected, 1e-5)  # the same fp32 operations in another order
    # Saved by us and read by PEFT it is the same adapter.
    save_adapter(ours, tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base[0]), tmp_path / "saved").eval()
    assert_close(logits_of(again, tokens), expected, 1e-5)
    assert_close(text_logits(load_text_model(base[0], lora=tmp_path / "saved"), [tokens])[0], expected, 1e-5)


REFUSED = [(name, value) for name in OTHER for value in OTHER[name] if name not in {*COMPUTED, *WITHOUT_EFFECT}]
REFUSED = [pair for pair in REFUSED if not any(pair[1] is one or pair[1] == one for one in FIXED.get(pair[0], ()))]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *REFUSED,
        ("use_foo", True),
        ("foo_config", {"x": 1}),
        ("foo", 0.5),
        ("r", True),
        ("r", 0),
        ("lora_alpha", -1.0),
    ],
    ids=lambda part: str(part)[:30],
)
def test_whatever_else_is_set_is_refused(name: str, value: Any, base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(InputError, match=rf"(?s)adapter_config\.json.*'{name}'") as error:
        load_text_model(base[0], lora=tmp_path)
    assert name in COMPUTED or "merge the adapter into its base with PEFT" in str(error.value)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_a_later_field_that_is_off_is_read(value: Any, base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_foo": value}))
    load_text_model(base[0], lora=tmp_path)


@pytest.mark.parametrize(
    "value", [("init_lora_weights", "gaussian"), ("init_lora_weights", "orthogonal"), ("task_type", "X")]
)
def test_how_an_adapter_began_changes_nothing(value: tuple[str, Any], base: Any, rng: Any, tmp_path: Path) -> None:
    theirs = write_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), value[0]: value[1]}))
    tokens = random_tokens(rng, 7)
    ours = load_text_model(base[0], lora=tmp_path)
    assert_close(text_logits(ours, [tokens])[0], logits_of(theirs, tokens), 1e-5)


@pytest.mark.parametrize("name", [name for name in COMPUTED if name != "lora_dropout"])
def test_the_hash_covers_what_counts(name: str, base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    before = adapter_hash(tmp_path)
    file.write_text(json.dumps({**json.loads(file.read_text()), name: OTHER[name][-1]}))
    assert adapter_hash(tmp_path) != before


def test_tensors_of_layers_that_the_settings_leave_out_are_named(base: Any, tmp_path: Path) -> None:
    """PEFT would leave them out."""
    write_adapter(base, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_to_transform": [0, 1]}))
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.up_proj.*one adapter for each target layer"):
        load_text_model(base[0], lora=tmp_path)


def test_a_second_adapter_is_refused(base: Any, tmp_path: Path) -> None:
    write_adapter(base, tmp_path)
    model = load_text_model(base[0], lora=tmp_path)
    with pytest.raises(InputError, match="a model without an adapter"):
        load_adapter(model, tmp_path)


def test_targets_are_those_of_peft(rng: Any) -> None:
    check_target_module_exists = peft.tuners.tuners_utils.check_target_module_exists
    names = [*NAMES, "lm_head", "model.embed_tokens", "model.visual.blocks.1.attn.q_proj", "layers.3.q_proj"]
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        for value in OTHER[name]:
            if value == "all-linear":
                continue
            options: dict[str, Any] = {"target_modules": KINDS, name: value}
            if name == "layers_pattern":
                options["layers_to_transform"] = [1]
            theirs = peft.LoraConfig(**options)
            ours = PeftSettings(r=1, lora_alpha=1, **options)
            for module in names:
                found = check_target_module_exists(theirs, module)
                assert ours.targets(module) == (bool(found) and type(found).__name__ != "_ExcludedModule"), (
                    options,
                    module,
                )


@pytest.mark.parametrize(
    ("settings", "name", "adapted"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", True),
        ({"target_modules": ["proj"]}, "model.layers.0.self_attn.q_proj", False),  # a name's end is a whole part of it
        ({"target_modules": ["self_attn.q_proj"]}, "model.layers.0.self_attn.q_proj", True),
        ({"target_modules": ["attn.q_proj"]}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": "all-linear"}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": r".*\.mlp\..*"}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": r"mlp\..*"}, "model.layers.0.mlp.up_proj", False),  # a pattern is of the whole name
        ({"target_modules": ["up_proj"], "exclude_modules": ["mlp.up_proj"]}, "model.layers.0.mlp.up_proj", False),
        ({"target_modules": ["up_proj"], "exclude_modules": ["lp.up_proj"]}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, "model.layers.0.mlp.up_proj", False),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0, 2]}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": ["up_proj"], "layers_to_transform": []}, "model.layers.5.mlp.up_proj", True),
    ],
)
def test_names_are_adapted_as_peft_says(settings: dict[str, Any], name: str, adapted: bool) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, **settings)
    ours = PeftSettings(r=2, lora_alpha=4, **settings)
    assert ours.targets(name) == adapted
    if settings["target_modules"] != "all-linear":  # which PEFT replaces by names first
        assert bool(peft.tuners.tuners_utils.check_target_module_exists(config, name)) == adapted


@pytest.mark.parametrize(
    ("settings", "rank", "scaling"),
    [
        ({}, 4, 8 / 4),
        ({"use_rslora": True}, 4, 8 / 4**0.5),
        ({"rank_pattern": {"q_proj": 16}}, 16, 8 / 16),
        ({"rank_pattern": {"proj": 16}}, 4, 8 / 4),
        ({"rank_pattern": {"q_proj": 16}, "use_rslora": True}, 16, 8 / 16**0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 2}}, 4, 2 / 4),
        (
            {"rank_pattern": {r".*\.0\..*": 2, "q_proj": 16}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2}},
            2,
            8 / 2,
        ),
    ],
)
def test_a_layer_s_rank_and_scaling_follow_its_patterns(settings: dict[str, Any], rank: int, scaling: float) -> None:
    ours = PeftSettings(r=4, lora_alpha=8, target_modules=["q_proj"], **settings)
    found, alpha = ours.rank_and_alpha("model.layers.0.self_attn.q_proj")
    assert found == rank and alpha / found == pytest.approx(scaling)

"""Every command reads samples and pairs with turns before the question, and images between the words, and uses all of them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from helpers.made_rows import write_rows
from helpers.taught_family import TaughtFamily, rows
from PIL import Image
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from srcfast.data.forest import Forest
from srcfast.data.rationale_pairs import build_raps
from srcfast.data.readers import read_preferences, read_samples
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.data.turns import Turn
from srcfast.models import load_lvlm
from srcfast.stages.candidates import prompts_of
from srcfast.stages.curation import curate
from srcfast.stages.pair_trees import preference_trees
from srcfast.stages.rationale import rationale_trees

Srcfast = Callable[..., Result]
SYSTEM, ASKED, ANSWERED = "think of red", "what is <image>", "a blue circle"
TALK = {
    "images": ["a.png", "b.png"],
    "messages": [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": ANSWERED, "loss": False},
        {"role": "user", "content": "is it left of <image>"},
        {"role": "assistant", "content": "no"},
    ],
    "facts": ["A circle is right of a square."],
}
TURNS = [{"role": "system", "content": SYSTEM}, *TALK["messages"][1:2], {"role": "assistant", "content": ANSWERED}]
PAIR = {
    "images": TALK["images"],
    "turns": TURNS,
    "prompt": "is it left of <image>",
    "chosen": "<see> it is right. </see> <answer> no </answer>",
    "rejected": "<see> it is left. </see> <answer> yes </answer>",
}


def messages() -> list[dict[str, Any]]:
    """The prompt for the checkpoint's template, written out; its system's and assistant's turns are strings."""
    picture = {"type": "image"}
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": "what is "}, picture]},
        {"role": "assistant", "content": ANSWERED},
        {"role": "user", "content": [{"type": "text", "text": "is it left of "}, picture]},
    ]


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% for part in m.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %} "
    "{% elif m.role == 'system' %}{{ m.content }} {% else %}ASSISTANT: {{ m.content }} </s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def talking(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint, with a template that knows the system."""
    directory = tmp_path_factory.mktemp("talking")
    for file in model_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def expected_prompt(path: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(messages(), tokenize=False, add_generation_prompt=True)
    assert text.count("<image>") == 2
    return tokenizer(text.replace("<image>", "<image>" * 36)).input_ids  # (72 / 12)^2 patches


def sample_of(root: Path, tmp_path: Path) -> Sample:
    file = write_rows(tmp_path / "talk.json", [TALK])
    [sample] = read_samples(file, format="messages", image_root=root, rejected=[])
    return sample


def pair_of(root: Path, tmp_path: Path) -> Preference:
    file = write_rows(tmp_path / "pair.jsonl", [PAIR])
    [pair] = read_preferences(file, format="jsonl", image_root=root, rejected=[])
    return pair


def test_each_stage_s_prompt_is_the_whole_conversation(talking: Path, image_root: Path, tmp_path: Path) -> None:
    model: Any = load_lvlm(talking)
    sample, pair, expected = sample_of(image_root, tmp_path), pair_of(image_root, tmp_path), expected_prompt(talking)
    assert (sample.turns, sample.question) == (pair.turns, pair.prompt)
    alone = replace(sample, id="alone", turns=(), question="is it left of it")
    raps, _ = build_raps([sample, alone])
    items = rationale_trees(model, raps)
    assert items[0].tree.segments[0].tokens.tolist() == expected
    assert items[1].tree.segments[0].tokens.tolist() != expected
    assert [prompt.token_ids.tolist() for prompt in prompts_of(model, [sample])] == [expected]
    [tree] = preference_trees(model, [pair])
    assert tree.segments[0].tokens.tolist() == expected
    assert tree.images == items[0].tree.images == tuple(str(image_root / name) for name in TALK["images"])


def test_curated_pairs_have_the_sample_s_turns(image_root: Path, tmp_path: Path) -> None:
    from srcfast.config.settings import CurationConfig

    sample = sample_of(image_root, tmp_path)
    texts = (PAIR["chosen"], PAIR["rejected"])
    candidates = [Candidate(f"c{number}", sample.id, text, "", "", -1.0) for number, text in enumerate(texts)]
    settings = CurationConfig(pairing="random", min_margin=0.0, min_confidence=0.0)
    pairs, _ = curate([sample], {sample.id: candidates}, [], settings, seed=0)
    assert [(pair.turns, pair.prompt) for pair in pairs] == [(sample.turns, sample.question)]
    [back] = [Preference.from_json(pair.to_json(), file="f", line=1, image_root=image_root) for pair in pairs]
    assert back.turns == sample.turns


def test_log_probabilities_after_turns_are_those_of_transformers(
    srcfast: Srcfast, talking: Path, image_root: Path, tmp_path: Path
) -> None:
    asked = {key: PAIR[key] for key in ("images", "turns", "prompt")} | {"response": "right of a square"}
    data = write_rows(
        tmp_path / "asked.jsonl", [asked, asked | {"turns": None, "prompt": "is <image> left of <image>"}]
    )
    words = ("--model", talking, "--data", data, "--image-root", image_root, "--output", tmp_path / "out.jsonl")
    result = srcfast("logprob", *words)
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    model = LlavaForConditionalGeneration.from_pretrained(talking).eval()
    tokenizer = AutoTokenizer.from_pretrained(talking)
    # From its module: transformers 5.17 says of the package's that it needs torchvision.
    automatic = importlib.import_module("transformers.models.auto.image_processing_auto").AutoImageProcessor
    processor = automatic.from_pretrained(talking, backend="pil")
    images = [Image.open(image_root / name).convert("RGB") for name in asked["images"]]
    response = [*tokenizer("right of a square", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    prompt = expected_prompt(talking)
    ids = torch.tensor([[*prompt, *response]])
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = (
            model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0].log_softmax(-1)
        )
    rows = torch.arange(len(response)) + len(prompt) - 1
    expected = float(logits[rows, torch.tensor(response)].sum())
    assert found[0]["logprob"] == pytest.approx(expected, rel=2e-5)  # fp32, another order of summation
    assert found[1]["logprob"] != pytest.approx(expected, rel=2e-4)  # the turns show


def test_commands_run_on_conversations(srcfast: Srcfast, talking: Path, image_root: Path, tmp_path: Path) -> None:
    talks = write_rows(tmp_path / "talks.json", [TALK | {"id": str(number)} for number in range(3)])
    pairs = write_rows(tmp_path / "pairs.jsonl", [PAIR | {"sample_id": str(number)} for number in range(3)])
    model, common = ("--model", talking), ("--image-root", image_root, "--quiet")
    chats = ("--data", talks, "--format", "messages", *common)
    adapter = ("lora.r=4",)
    runs = {
        "rationale": (*model, *chats, "--output", tmp_path / "rationale", *adapter),
        "candidates": (*model, *chats, "--output", tmp_path / "candidates", "num_candidates=2", "max_new_tokens=8"),
        "dpo": (*model, "--data", pairs, *common, "--output", tmp_path / "dpo", *adapter),
        "evaluate": (*model, *chats, "--output", tmp_path / "evaluation", "max_new_tokens=8"),
    }
    for name, words in runs.items():
        result = srcfast(name, *words)
        assert result.exit_code == 0, (name, result.output)
    for name in ("rationale", "dpo"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    [predictions] = (tmp_path / "evaluation" / "predictions").glob("*.jsonl")
    questions = [json.loads(line)["question"] for line in predictions.read_text().splitlines()]
    assert questions == [PAIR["prompt"]] * 3
    shown = srcfast("inspect", *model, *chats[:-1], f"output={tmp_path / 'inspect'}")
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "think of red" in text and "a blue circle" in text and text.count("[<image> x 36]") == 2


def test_a_stored_batch_has_its_turns(srcfast: Srcfast, talking: Path, image_root: Path, tmp_path: Path) -> None:
    from srcfast.config.load import load_config
    from srcfast.errors import SrcfastError
    from srcfast.stages.nonfinite import dump_nonfinite_batch
    from srcfast.stages.policy import features_of, load_model
    from srcfast.stages.rationale import fine_tune_rationale
    from srcfast.training.items import NotFinite

    config = load_config(None, [f"model.path={talking}", "lora.r=4"], None)
    raps, _ = build_raps([sample_of(image_root, tmp_path)])
    model = load_model(config, config.lora)
    with (
        pytest.raises(SrcfastError, match="made up"),
        dump_nonfinite_batch("rationale", config, model, raps, config.rationale, tmp_path),
    ):
        raise NotFinite(0, "step 0: made up")
    features = features_of(model, [sample for sample, _ in raps])
    first = fine_tune_rationale(model, raps, config.rationale, features=features)[0]
    output = srcfast("replay", tmp_path / "not-finite").output
    assert f"has loss {first['loss']:.6g} and gradient norm {first['grad_norm']:.6g} here" in output


@pytest.mark.long
@pytest.mark.slow
def test_a_calibration_on_conversations(tmp_path: Path) -> None:
    taught = TaughtFamily("qwen3_vl", tmp_path, in_conversations=True)
    run = taught.calibrate("runs")
    pairs = rows(run / "iteration-1" / "preferences")
    assert len(pairs) > 2
    model: Any = load_lvlm(taught.base, backbone="transformers")
    samples = {
        sample.id: sample
        for sample in read_samples(taught.questions, format="jsonl", image_root=taught.questions.parent, rejected=[])
    }
    adapted: Any = load_lvlm(taught.base, backbone="transformers", lora=run / "rationale" / "adapter")
    for row in pairs[:3]:
        sample = samples[row["sample_id"]]
        assert row["turns"] == [turn.to_json() for turn in sample.turns] and row["images"] == list(sample.images)
        assert sample.turns[0] == Turn("system", "be brief.")
        pair = Preference.from_json(row, file="f", line=1, image_root=sample.image_root)
        [tree] = preference_trees(model, [pair])
        images = [Image.open(taught.questions.parent / name).convert("RGB") for name in pair.images]
        features = dict(zip(tree.images, adapted.encode_images(images), strict=True))
        forest = Forest.of([tree])
        with torch.no_grad():
            logits = (adapted(forest, features) @ adapted.decoder.head_weight.T).log_softmax(-1)
        for path, kind in zip(forest.paths(), ("chosen", "rejected"), strict=True):
            start = len(tree.segments[0].tokens)
            targets = forest.token_ids[path[start:]]
            total = float(logits[path[start - 1 : -1]].gather(1, targets[:, None]).sum())
            assert row[f"reference_{kind}_logprob"] == pytest.approx(
                total, rel=1e-3, abs=1e-3
            )  # fp32, some dozen tokens

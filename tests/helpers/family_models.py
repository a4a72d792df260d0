"""A family's small checkpoint in srcfast and in transformers, random forests over it, and each path by transformers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from helpers.families import write_family
from helpers.small_checkpoints import random_image
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.models import load_lvlm
from srcfast.models.lora import lora_parameters
from srcfast.models.processor import load_processor

LETTERS = (64, 320)  # ids of ordinary tokens, in every family
WORDS = ("what", "is it?", "which of the two", "colour", "Größe", "\n", "3.5", "left", "{ }")


@dataclass(frozen=True)
class Turn:
    """A user's turn: a question, and the keys of its images."""

    question: str
    images: tuple[str, ...]


def documented_processor(path: Path, model_type: str) -> Any:
    """transformers' own where it loads without torchvision, which processors of videos need."""
    try:
        return AutoProcessor.from_pretrained(path, backend="pil")
    except (ImportError, TypeError, ValueError, RecursionError):  # the last by transformers 5.17
        processor = load_processor(path, model_type)
        if model_type == "smolvlm":  # asks for a video's settings even where there is none
            processor.video_processor = SimpleNamespace(num_frames=8, fps=1)
        return processor


class FamilyModels:
    """The checkpoint of a family, transformers' model of it, and ours on the general backbone.

    Args:
        likes: tokens that the model often chooses.
    """

    def __init__(self, name: str, directory: Path, likes: Sequence[str] = ()) -> None:
        self.name, self.path = name, directory
        self.theirs = write_family(name, directory, likes=likes)
        if getattr(self.theirs.config.get_text_config(), "attn_logit_softcapping", None) is not None:
            self.theirs.set_attn_implementation("eager")  # the "sdpa" of transformers 5.17 leaves soft caps out
        self.ours: Any = self.load()
        self.processor = documented_processor(directory, self.theirs.config.model_type)

    def load(self, **settings: Any) -> Any:
        return load_lvlm(self.path, **{"backbone": "transformers", **settings})

    def turns(self) -> list[Turn]:
        turns = [Turn("", ("first",)), Turn("", ("second", "third"))]
        return (
            turns if self.name.startswith("paligemma") else [*turns, Turn("", ())]
        )  # which reads no prompts without images


def random_images(rng: np.random.Generator) -> dict[str, Image.Image]:
    """Three images of odd sizes."""
    sizes = rng.integers(18, 75, (3, 2))
    return {
        key: random_image(rng, *map(int, size)) for key, size in zip(("first", "second", "third"), sizes, strict=True)
    }


def random_turns(models: FamilyModels, rng: np.random.Generator) -> list[Turn]:
    """One image, two images, and where the family reads that none."""
    return [Turn(" ".join(rng.choice(WORDS, rng.integers(1, 6))), turn.images) for turn in models.turns()]


def inputs_of(processor: Any, turn: Turn, images: dict[str, Image.Image]) -> dict[str, Tensor]:
    """What the processor makes of a turn, called as transformers' documentation says."""
    if not processor.chat_template:  # PaliGemma's
        text, given = "<image>" * len(turn.images) + turn.question, [images[key] for key in turn.images]
        return dict(processor(text=[text], images=[given], return_tensors="pt"))
    content: list[dict[str, Any]] = [{"type": "image", "image": images[key]} for key in turn.images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}]
    return dict(
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def plain_logits(model: Any, inputs: dict[str, Tensor], response: Tensor) -> Tensor:
    """Logits [prompt and response, V] by transformers' ordinary pass from pixels."""
    token_ids = torch.cat([inputs["input_ids"], response[None]], dim=1)
    prompt = inputs["input_ids"].shape
    more = {
        # PaliGemma's token types are 0 in prompts and 1 in responses; the others' are 0 for all text.
        name: F.pad(value, (0, len(response)), value="labels" in inputs) if value.shape == prompt else value
        for name, value in inputs.items()
        if name not in ("input_ids", "attention_mask", "labels")
    }
    return model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), use_cache=False, **more).logits[0]


class RandomForest:
    """Trees of random prompts and nested responses, with their images, and the turn of every path."""

    def __init__(self, models: FamilyModels, rng: np.random.Generator) -> None:
        self.models, self.images = models, random_images(rng)
        self.turns = random_turns(models, rng)
        self.trees = [self._tree(turn, rng) for turn in self.turns]
        self.forest = Forest.of(self.trees)

    def _tree(self, turn: Turn, rng: np.random.Generator) -> Tree:
        prompt = self.models.ours.encode_prompt(turn.question, [self.images[key] for key in turn.images])
        segments = [Segment(prompt)]
        for number in range(5):
            parent = 0 if number == 0 else int(rng.integers(0, number + 1))  # of the root, or nested
            segments.append(Segment(rng.integers(*LETTERS, rng.integers(1, 7)), parent))
        return Tree(tuple(segments), turn.images, turn.question)

    def features(self, model: Any = None) -> dict[str, Any]:
        model = model or self.models.ours
        return dict(zip(self.images, model.encode_images(list(self.images.values())), strict=True))

    def paths(self) -> list[tuple[Turn, Tensor, int]]:
        """Of each root-to-leaf path: the turn, the rows in the forest, and the number of rows of the prompt."""
        result = []
        ends = np.cumsum([tree.num_tokens for tree in self.trees])
        for path in self.forest.paths():
            number = int(np.searchsorted(ends, int(path[-1]), side="right"))
            result.append((self.turns[number], path, self.trees[number].segments[0].tokens.size))
        return result

    def our_logits(self, model: Any = None) -> Tensor:
        """[T, V]."""
        model = model or self.models.ours
        return model.decoder.head.capped(model(self.forest, self.features(model)) @ model.decoder.head_weight.T)

    def their_logits(self, model: Any = None) -> list[Tensor]:
        """[n, V] of each path."""
        model = model or self.models.theirs
        result = []
        for turn, path, num_prompt in self.paths():
            inputs = inputs_of(self.models.processor, turn, self.images)
            result.append(plain_logits(model, inputs, self.forest.token_ids[path[num_prompt:]]))
        return result


def response_score(logits: Sequence[Tensor], forest: RandomForest, weights: np.ndarray) -> Tensor:
    """A number that depends on every response's tokens: the sum of their log-probabilities, each path's by its weight."""
    total = torch.zeros(())
    for scores, (_, path, num_prompt), weight in zip(logits, forest.paths(), weights, strict=True):
        targets = forest.forest.token_ids[path[num_prompt:]]
        rows = scores[num_prompt - 1 : -1].log_softmax(-1)
        total = total + float(weight) * rows.gather(1, targets[:, None]).sum()
    return total


ADAPTER = LoRAConfig(r=3, alpha=5.0).seeded(7)


def randomise_adapter(model: Any, seed: int) -> None:
    """Draw A and B: a new adapter's B is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))

"""Train the decoder and projector of a base: trees of prompts and answers, and the loop over them.

Each image, or text of facts, is one tree: it is the root, its questions and answers are the children.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from srcfast.attention.forest_attention import forest_attend
from srcfast.data.answers import is_right
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.rationale_format import format_response, parse_response
from srcfast.data.records import Sample
from srcfast.generation.generate import Prompt, generate_greedy
from srcfast.models import LVLM, ImageFeatures
from srcfast.recipes.unfinished import Unfinished
from srcfast.recipes.vision_tower import scheduled, update
from srcfast.stages.prompts import encode_prompt, image_keys, image_loader
from srcfast.world.verification import verify_sample

Drawn = tuple[Tree, list[int]]  # a tree, and the number of tokens of each answer, on which alone the loss is


@dataclass(frozen=True)
class Stage:
    """One stage of the language model's training; the learning rate follows a cosine after a linear warm-up."""

    steps: int
    warmup_steps: int
    pictures_per_step: int
    texts_per_step: int
    questions_per_text: int
    learning_rate: float


class Writer:
    """Encode texts as trees, as a chat template writes them; each distinct text is tokenised once.

    Args:
        tokenizer: of the base.
        image_tokens: number of tokens of an image.
        opening, closing: the template's text before a user's turn, and from there to the response.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_tokens: int,
        opening: str = "USER:",
        closing: str = " ASSISTANT:",
    ) -> None:
        self.end = int(tokenizer.eos_token_id)
        self.encode = lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        )
        self.image = [int(tokenizer.convert_tokens_to_ids("<image>"))] * image_tokens
        self.opening, self.closing = opening, closing

    def image_root(self, images: int = 1) -> np.ndarray:
        """Encode images' placeholders as a root."""
        return np.array([*self.encode(self.opening), *self.image * images])

    def text_root(self, facts: Sequence[str]) -> np.ndarray:
        """Encode facts as a root."""
        return np.array([*self.encode(self.opening), *[token for fact in facts for token in self.encode(f" {fact}")]])

    def question(self, text: str) -> tuple[int, ...]:
        """Encode a question, and the template from there to the response."""
        return self.encode(f"{text}{self.closing}")

    def tree(self, root: np.ndarray, pairs: Sequence[tuple[str, str]], images: tuple[str, ...]) -> Drawn:
        """Build a tree with questions and answers below the root tokens."""
        answers = [(*self.encode(answer), self.end) for _, answer in pairs]
        prompts = [self.question(question) for question, _ in pairs]
        segments = [Segment(np.array([*p, *a]), parent=0) for p, a in zip(prompts, answers, strict=True)]
        return Tree((Segment(root), *segments), images), [len(answer) for answer in answers]

    def text_tree(self, facts: Sequence[str], questions: Sequence[Reasoned]) -> Drawn:
        """Build a tree of facts as text, with questions that tagged rationales answer."""
        pairs = [(f" {text}", format_response(see, think, answer, "tagged")) for text, see, think, answer in questions]
        return self.tree(self.text_root(facts), pairs, ())


Reasoned = tuple[str, Sequence[str], Sequence[str], str]  # a question, what is seen and concluded, the answer


def answer_rows(forest: Forest, answer_lengths: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return the rows that predict the answers' tokens, and these tokens: two int64 tensors [answer tokens]."""
    rows = [
        forest.target_rows(tree, [child])[0][-length:]
        for tree, lengths in enumerate(answer_lengths)
        for child, length in enumerate(lengths, start=1)
    ]
    index = torch.cat(rows)
    return index, forest.token_ids[index + 1]


def train_language(
    model: LVLM,
    stage: Stage,
    draw: Callable[[int], list[Drawn]],
    features: Callable[[Sequence[str]], Tensor],
    log: Callable[[str], None],
    *,
    weight_decay: float,
    unfinished: Unfinished | None = None,
) -> None:
    """Train the model's parameters that require gradients, and freeze them again.

    Args:
        model: whose projector embeds what its tower makes of the images.
        stage: number of steps and learning rate.
        draw: the trees of a step, by its number.
        features: the tower's features of images by their keys, [images, tokens, tower's hidden].
        log: called with a line every 50 steps.
        weight_decay: of all parameters.
        unfinished: where the training is saved; without it, it is not.
    """
    projector = model.vision.model.multi_modal_projector
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
    first = 0 if unfinished is None else unfinished.load(optimizer)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(first, stage.steps):
        trees = draw(step)
        forest = Forest.of([tree for tree, _ in trees])
        rows, targets = answer_rows(forest, [lengths for _, lengths in trees])
        # On a CPU with bf16 instructions its matrix products are three times as fast as fp32's.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            projected = projector(features(forest.images).float()).float()  # [images, tokens, hidden]
            embeddings = model.embed(forest, dict(zip(forest.images, projected, strict=True)))
            hidden = model.decoder(embeddings, forest.positions, forest_attend(forest))
            logits = hidden[rows] @ model.decoder.head_weight.T  # [answer tokens, V]
        loss = F.cross_entropy(logits.float(), targets)
        update(optimizer, loss, scheduled(stage.learning_rate, step, stage.steps, stage.warmup_steps))
        losses.append(loss.item())
        if step % 50 == 49:
            log(f"{step + 1}/{stage.steps} loss {np.mean(losses[-50:]):.4f} {time.monotonic() - started:.0f} s")
        if unfinished is not None:
            unfinished.save_if_due(optimizer, step + 1)
    model.requires_grad_(False)


def short_answer_accuracy(model: LVLM, samples: Sequence[Sample]) -> dict[str, float]:
    """Measure the share of right short answers, greedy, by ability and overall."""
    prompts = [Prompt(encode_prompt(model, sample), image_keys(sample), sample.id) for sample in samples]
    features = ImageFeatures(model, image_loader(samples))
    responses = generate_greedy(model, prompts, features, max_new_tokens=24, batch_size=32)
    right: dict[str, list[bool]] = {}
    for sample, response in zip(samples, responses, strict=True):
        answer = model.decode(response.token_ids).strip()
        right.setdefault(str(sample.extra["ability"]), []).append(is_right(sample, answer))
    shares = {ability: float(np.mean(values)) for ability, values in sorted(right.items())}
    return shares | {"overall": float(np.mean([hit for values in right.values() for hit in values]))}


def text_accuracy(
    model: LVLM, writer: Writer, samples: Sequence[Sample], max_new_tokens: int = 112
) -> dict[str, float]:
    """Measure shares of right answers and of aligned responses, greedy, on samples whose facts are given as text."""
    prompts = [
        Prompt(np.array([*writer.text_root(sample.facts), *writer.question(f" {sample.question}")]), (), sample.id)
        for sample in samples
    ]
    responses = generate_greedy(model, prompts, lambda keys: {}, max_new_tokens, batch_size=128)
    verifications = [
        verification
        for sample, response in zip(samples, responses, strict=True)
        if (verification := verify_sample(sample, parse_response(model.decode(response.token_ids)))) is not None
    ]
    return {
        "accuracy": float(np.mean([verification.answer_right for verification in verifications])),
        "aligned": float(np.mean([verification.aligned for verification in verifications])),
    }

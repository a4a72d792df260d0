"""A small LVLM-like model around the real decoder: letters are tokens, an image is three embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srcfast.attention.forest_attention import forest_attend
from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.records import Preference
from srcfast.data.turns import Turn
from srcfast.models.decoder import Decoder, DecoderConfig
from srcfast.models.lora import add_lora
from srcfast.training.items import TrainingItem

IMAGE, END = 1, 2
TOKENS_PER_IMAGE = 3
VOCABULARY = 40


class Letters:
    """What the model's tokenizer says of tokens: a letter or full stop each, and nothing for the end."""

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, token_ids: Sequence[int]) -> str:
        texts = {letters(letter)[0]: letter for letter in "abcdefghijklmnop."}
        return "".join(texts.get(token, "") for token in token_ids)


class SmallModel(nn.Module):
    """Embedding and head frozen; the layers are trained, or an adapter on them."""

    def __init__(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, lora: LoRAConfig | None = None, head_dim: int = 6
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokenizer = Letters()
        self.decoder = Decoder(
            DecoderConfig(
                vocab_size=VOCABULARY,
                hidden_size=24,
                intermediate_size=37,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=head_dim,
                rms_norm_eps=1e-6,
                rope_theta=100.0,
            )
        ).to(dtype)
        self.decoder.embed_tokens.requires_grad_(False)
        self.decoder.lm_head.requires_grad_(False)
        if lora is not None:
            self.requires_grad_(False)
            add_lora(self, lora)

    def encode_prompt(
        self, text: str, images: Sequence[Any], sample_id: str | None = None, turns: Sequence[Turn] = ()
    ) -> np.ndarray:
        before = "".join(f"{turn.role}: {turn.text}" for turn in turns)
        return np.array([IMAGE] * TOKENS_PER_IMAGE * len(images) + letters(before + text) + [3])

    def encode_response(self, text: str) -> np.ndarray:
        return np.array([*letters(text), END])

    def forward(self, forest: Forest, features: Mapping[str, Tensor] | None = None) -> Tensor:
        embeddings = self.decoder.embed(forest.token_ids)
        if features is not None:
            images = torch.cat([features[key] for key in forest.images])
            embeddings = embeddings.clone()
            embeddings[forest.token_ids == IMAGE] = images.to(embeddings.dtype)
        return self.decoder(embeddings, forest.positions, forest_attend(forest))


def letters(text: str) -> list[int]:
    return [4 + ord(letter) % (VOCABULARY - 4) for letter in text]


def image_embedding(key: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.randn(TOKENS_PER_IMAGE, 24, generator=generator, dtype=torch.float64)


def random_text(rng: np.random.Generator, most: int) -> str:
    return "".join(rng.choice(list("abcdefghijklmnop "), rng.integers(1, most)))


def response_items(count: int, images: bool = False) -> list[TrainingItem]:
    rng = np.random.default_rng(7)
    items = []
    for number in range(count):
        picture = [IMAGE] * TOKENS_PER_IMAGE if images else []
        prompt = Segment(np.array([*picture, *letters(random_text(rng, 24))]))
        response = Segment(np.array([*letters(random_text(rng, 17)), END]), 0)
        keys = (f"image-{number % 3}",) if images else ()
        items.append(TrainingItem(Tree((prompt, response), keys, key=f"sample-{number}")))
    return items


def random_preferences(count: int, seed: int = 0) -> list[Preference]:
    """Pairs of odd lengths; every third one's responses begin alike."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        common = random_text(rng, 9) if number % 3 == 0 else ""
        chosen, rejected = common + random_text(rng, 14), common + random_text(rng, 14) + "!"
        made.append(
            Preference(
                sample_id=f"sample-{number}",
                images=(),
                prompt=random_text(rng, 20),
                chosen=chosen,
                rejected=rejected,
                confidence=float(rng.uniform(0.05, 1.0)),
                reference_chosen_logprob=None,
                reference_rejected_logprob=None,
                extra={"kept": number},
                image_root=Path("."),
            )
        )
    return made


def path_logprob(model: SmallModel, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """The log-probability of the response's tokens after the prompt."""
    return token_logprobs(model, prompt, response).sum()


def token_logprobs(model: SmallModel, prompt: np.ndarray, response: np.ndarray) -> Tensor:
    """The definition, [response's tokens]: the sequence alone, all logits, dense attention."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
        future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(future, float("-inf")).softmax(-1), v)

    hidden = model.decoder(model.decoder.embed(tokens), torch.arange(len(tokens)), attend)
    logps = (hidden @ model.decoder.head_weight.T).log_softmax(-1)
    return logps[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None])[:, 0]

"""Decoding on the general backbone: `generate`'s tokens, and log-probabilities as a plain pass over the whole text has them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import FAMILIES
from helpers.family_models import (
    ADAPTER,
    FamilyModels,
    Turn,
    inputs_of,
    plain_logits,
    random_images,
    random_turns,
    randomise_adapter,
)
from PIL import Image

from srcfast.config.settings import CandidatesConfig
from srcfast.generation.beam_search import sentence_beam_search
from srcfast.generation.generate import Generated, Prompt, generate_greedy, sample_responses
from srcfast.models.lora import save_adapter

GetFamily = Callable[[str], FamilyModels]
NEW_TOKENS = 12


class Asked:
    """A model, and prompts with one image, two images and none."""

    def __init__(self, models: FamilyModels, model: Any, rng: np.random.Generator) -> None:
        self.models, self.model = models, model
        self.images = random_images(rng)
        self.turns = random_turns(models, rng)
        self.prompts = [self._prompt(number, turn) for number, turn in enumerate(self.turns)]

    def _prompt(self, number: int, turn: Turn) -> Prompt:
        images: list[Image.Image] = [self.images[key] for key in turn.images]
        return Prompt(self.model.encode_prompt(turn.question, images), turn.images, f"sample-{number}")

    def features(self, keys: Sequence[str]) -> Mapping[str, Any]:
        return {key: self.model.encode_images([self.images[key]])[0] for key in keys}

    @torch.no_grad()
    def check(self, generated: Sequence[Sequence[Generated]], theirs: Any) -> None:
        """Compare log-probabilities with those of transformers' ordinary pass."""
        for turn, rows in zip(self.turns, generated, strict=True):
            inputs = inputs_of(self.models.processor, turn, self.images)
            for row in rows:
                assert self.model.image_token_id not in row.token_ids
                tokens = torch.tensor(row.token_ids)
                logits = plain_logits(theirs, inputs, tokens)[inputs["input_ids"].shape[1] - 1 : -1]
                expected = float(logits.log_softmax(-1).gather(1, tokens[:, None]).sum())
                assert row.logprob == pytest.approx(expected, rel=1e-4, abs=1e-4)  # fp32, some dozen tokens


GEMMAS = [name for name in ("gemma3_capped", "gemma4", "gemma4_vision", "paligemma2") if name in FAMILIES]


# Seeded: of other prompts, two tokens might be as likely but for rounding.
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_are_those_of_generate_under_peft_s_adapter(name: str, family: GetFamily, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    models = family(name)
    ours = models.load(lora=ADAPTER)
    randomise_adapter(ours, 3)
    save_adapter(ours, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(models.theirs), tmp_path / "adapter").eval()
    asked = Asked(models, models.load(lora=tmp_path / "adapter"), np.random.default_rng(5))
    results = generate_greedy(asked.model, asked.prompts, asked.features, NEW_TOKENS, 2)
    for turn, result in zip(asked.turns, results, strict=True):
        inputs = inputs_of(models.processor, turn, asked.images)
        with torch.no_grad():
            whole = theirs.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                suppress_tokens=[asked.model.image_token_id],
            )
        assert list(result.token_ids) == whole[0, inputs["input_ids"].shape[1] :].tolist()
    asked.check([[result] for result in results], theirs)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_moe", "glm4v", "internvl", "smolvlm", "llava_next", *GEMMAS])
def test_samples_have_the_log_probabilities_of_a_plain_pass(
    name: str, family: GetFamily, rng: np.random.Generator
) -> None:
    models = family(name)
    asked = Asked(models, models.ours, rng)
    options = {"count": 3, "max_new_tokens": NEW_TOKENS, "seed": 1, "slots": 2, "temperature": 3.0}
    samples = sample_responses(asked.model, asked.prompts, asked.features, **options)
    assert len({row.token_ids for rows in samples for row in rows}) > 4
    asked.check(samples, models.theirs)


BEAMS = CandidatesConfig(
    num_candidates=6,
    num_beams=4,
    proposals=4,
    max_sentences=4,
    max_sentence_tokens=8,
    max_new_tokens=30,
    temperature=4.0,
    top_p=1.0,
)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "internvl_qwen2", "idefics3", "llava_onevision", *GEMMAS])
def test_candidates_of_a_beam_search_have_the_log_probabilities_of_a_plain_pass(name: str, tmp_path: Path) -> None:
    models = FamilyModels(name, tmp_path, likes=("<|im_end|>", ".", "!"))
    asked = Asked(models, models.ours, np.random.default_rng(9))  # of other prompts, too few sentences might end
    candidates, _ = sentence_beam_search(asked.model, asked.prompts, asked.features, BEAMS, 0, slots=2)
    rows = [row for rows in candidates for row in rows]
    assert len(rows) >= 3 and max(len(row.token_ids) for row in rows) > 5 and all(row.finished for row in rows)
    asked.check(candidates, models.theirs)

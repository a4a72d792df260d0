"""Published models under the presets: parameters as their authors state them, and the table of docs/memory.md."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.memory_table import BEGIN, END, PAGE, tables
from helpers.published_configs import PUBLISHED, write_published

from srcfast.config.load import load_config
from srcfast.memory.plan import policy_sizes

# The positions of an image of 640 x 480 pixels, by each family's rule.
IMAGE_TOKENS = {
    "LLaVA": 24 * 24,  # always 336 x 336, in patches of 14
    "Qwen2.5": 23 * 17,  # patches of 28 after merging, rounded
    "Qwen3": 20 * 15,  # patches of 32
    "InternVL3": 13 * 256,  # 4 x 3 tiles and a thumbnail
    "SmolVLM2": 13 * 81,  # enlarged to 1536 x 1152: 4 x 3 tiles, and the whole
    "Gemma3": 256,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_has_the_parameters_and_image_tokens_that_are_stated(name: str, tmp_path: Path) -> None:
    found = policy_sizes(load_config(None, [f"model.path={write_published(name, tmp_path)}"]))
    assert sum(found.parameters.values()) == pytest.approx(PUBLISHED[name], rel=0.002)
    assert found.vision is not None
    assert found.vision.image_tokens == next(count for start, count in IMAGE_TOKENS.items() if name.startswith(start))


def test_the_table_of_the_docs_is_what_is_forecast() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert written.strip() == tables().strip()

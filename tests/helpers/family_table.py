"""Measure every family of the tests and write the table of docs/models.md: PYTHONPATH=tests python -m helpers.family_table"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from helpers.families import FAMILIES
from helpers.family_models import ADAPTER, FamilyModels, RandomForest, inputs_of
from helpers.taught_family import TaughtFamily
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.generation.decode import Prompt
from srcfast.generation.generate import generate_greedy
from srcfast.memory.measure import SavedTensors

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- written by helpers.family_table -->", "<!-- end -->"
HEAD = (
    "| family | transformers' class | largest difference of logits | same greedy tokens | saved for backward | calibration |\n"
    "| --- | --- | --- | --- | --- | --- |\n"
)


def exactness(forest: RandomForest) -> float:
    """The largest difference of logits from transformers' ordinary pass, of the largest logit."""
    with torch.no_grad():
        ours, theirs = forest.our_logits(), forest.their_logits()
    pairs = list(zip(forest.paths(), theirs, strict=True))
    scale = max(float(logits.abs().max()) for _, logits in pairs)
    return max(float((ours[path] - logits).abs().max()) for (_, path, _), logits in pairs) / scale


def same_tokens(models: FamilyModels, forest: RandomForest, limit: int = 12) -> bool:
    """Whether greedy decoding gives `generate`'s tokens for each prompt; neither writes an image's placeholder."""
    features = forest.features()
    prompts, expected = [], []
    for number, (turn, tree) in enumerate(zip(forest.turns, forest.trees, strict=True)):
        prompts.append(Prompt(tree.segments[0].tokens, turn.images, str(number)))
        inputs = inputs_of(models.processor, turn, forest.images)
        options: dict[str, Any] = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": 0}
        options["suppress_tokens"] = [models.ours.image_token_id]
        with torch.no_grad():
            output = models.theirs.generate(**inputs, **options, eos_token_id=sorted(models.ours.end_tokens))
        expected.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    results = generate_greedy(models.ours, prompts, lambda keys: {key: features[key] for key in keys}, limit, 3)
    return [list(result.token_ids) for result in results] == expected


def saved_ratio(models: FamilyModels, forest: RandomForest) -> float:
    """Bytes that a pass over the forest saves for backward, of what the paths by themselves save on the same backbone."""
    model = models.load(lora=ADAPTER)
    model.train()

    def saved(trees: Any) -> int:
        total = 0
        for tree in trees:
            with SavedTensors(model.parameters) as counter:
                hidden = model(tree, forest.features(model))
                total += counter.bytes
            del hidden
        return total

    paths = [
        Forest.of([Tree((Segment(forest.forest.token_ids[path].numpy()),), turn.images)])
        for turn, path, _ in forest.paths()
    ]
    return saved([forest.forest]) / saved(paths)


def row(name: str) -> str:
    """Measure one family."""
    with tempfile.TemporaryDirectory() as folder:
        models = FamilyModels(name, Path(folder) / "models")
        forest = RandomForest(models, np.random.default_rng(20261129))
        cells = [name, type(models.theirs).__name__, f"{exactness(forest):.1e}"]
        cells += ["yes" if same_tokens(models, forest) else "NO", f"{saved_ratio(models, forest):.2f}"]
        try:
            (Path(folder) / "taught").mkdir()
            run = TaughtFamily(name, Path(folder) / "taught").calibrate("runs")
            cells.append("whole" if (run / "report" / "index.html").is_file() else "NO")
        except AssertionError as error:
            cells.append(f"NO: {str(error).splitlines()[0][:80]}")
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in sys.argv[1:] or FAMILIES:
        rows.append(row(name))
        print(rows[-1], end="", flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{HEAD}{''.join(rows)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The embedded world as a data set: scenes rendered to files and asked about, with rationales and facts."""

from __future__ import annotations

import os
import random
from pathlib import Path

from srcfast.data.rationale_format import tagged_rationale
from srcfast.data.records import Sample
from srcfast.world.questions import ABILITIES, ask
from srcfast.world.rationales import facts, true_rationale
from srcfast.world.render import render
from srcfast.world.scenes import Scene, scene_digest, scene_stream


def world_samples(split: str, n: int, seed: int, *, image_dir: Path, with_rationale: bool = True) -> list[Sample]:
    """Draw `n` samples of a split, the abilities in equal parts, two to four questions a scene.

    Images go to `image_dir` under names made of split and scene, so that a picture is drawn once however
    often it is asked for; `image_dir` is the samples' image root. `extra` holds the scene, the program,
    ability and kind, and the true rationale's sentences (`see`, `think`), whether or not `rationale` gives
    them as text. Raises InputError for an unknown split.
    """
    image_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{split}/{seed}/questions")
    asked = dict.fromkeys(ABILITIES, 0)
    samples: list[Sample] = []
    for scene in scene_stream(split, seed):
        if len(samples) == n:
            break
        wanted = min(rng.choice((2, 3, 4)), n - len(samples))
        behind = sorted(ABILITIES, key=lambda ability: (asked[ability], rng.random()))[:wanted]
        questions = ask(scene, rng, behind, wanted)
        image = _write_image(scene, split, image_dir) if questions else ""
        for question in questions:
            asked[question.ability] += 1
            see, think = true_rationale(scene, question)
            samples.append(
                Sample(
                    id=f"world-{split}-{seed}-{len(samples):06d}",
                    images=(image,),
                    question=question.text,
                    answer=question.answer,
                    rationale=tagged_rationale(see, think) if with_rationale else None,
                    facts=facts(scene),
                    extra={
                        "dataset": "world",
                        "split": split,
                        "ability": question.ability,
                        "kind": question.kind,
                        "program": question.program,
                        "scene": scene.to_json(),
                        "see": list(see),
                        "think": list(think),
                    },
                    image_root=image_dir,
                )
            )
    return samples


def _write_image(scene: Scene, split: str, image_dir: Path) -> str:
    """Render a scene into `image_dir` unless it is there; written under another name first, then renamed."""
    digest = scene_digest(scene)
    name = f"{split}-{digest[:16]}.png"
    path = image_dir / name
    if not path.exists():
        partial = image_dir / f".{name}.{os.getpid()}.partial"
        render(scene, seed=int(digest[16:28], 16)).save(partial, format="PNG")
        os.replace(partial, path)
    return name

"""Malformed files that a run has left for itself: manifest, checkpoints, parts of stages, kept batches, what the page is of."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from malformed_case import Case
from malformed_records import PAIR

from srcfast.config.settings import Config
from srcfast.data.jsonl import COMPLETE, json_hash, write_shards
from srcfast.data.records import Sample
from srcfast.run.chunks import Chunks, run_chunks
from srcfast.run.directory import RunDirectory
from srcfast.run.progress import StageProgress

STAGE, SETTINGS = "iteration-1/candidates", {"seed": 3}
BRACKETS = '{"a":' * 100_000
BAD_JSON: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", "Expecting value"),
    "no JSON": ("{'a': 1}", "Expecting property name"),
    "not UTF-8": (b'{"a": "\xff"}', "utf-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "utf-8"),
    "a NUL": (b'{"a": "\0"}', "Invalid control character"),
    "half of a surrogate pair": (b'{"a": "\\udfff"}', "half of a surrogate pair"),
    "a key twice": ('{"a": 1, "a": 2}', "'a' is there twice"),
    "a number beyond all floats": ('{"a": 1e999}', "not a finite number"),
    "an integer of 5,000 digits": ('{"a": ' + "9" * 5000 + "}", "digits"),
    "100,000 objects within each other": (BRACKETS, "nested too deep"),
}

# The manifest ---------------------------------------------------------------------------------------------------------


def run_with(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """Makes a run directory with one finished stage, then changed."""

    def make(folder: Path) -> Path:
        run = RunDirectory(folder / "run")
        write_shards(run.path / STAGE, [{"id": "c"}])
        run.finish_stage(STAGE, SETTINGS, seconds=1.0)
        change(run.path)
        return run.path

    return make


def manifest_of(told: bytes | str) -> Callable[[Path], Path]:
    return run_with(
        lambda run: (run / "manifest.json").write_bytes(told if isinstance(told, bytes) else told.encode()) and None
    )


def entry_with(change: Mapping[str, Any], name: str = STAGE, signed: bool = True) -> Callable[[Path], Path]:
    """Makes the run with some fields of the stage's entry replaced, under another name, or with a hash that doesn't fit."""

    def write(run: Path) -> None:
        file = run / "manifest.json"
        entry = json.loads(file.read_text())[STAGE] | change
        rest = {key: value for key, value in entry.items() if key != "sha256"}
        sha256 = json_hash([name, rest]) if signed else "0" * 64
        file.write_text(json.dumps({name: rest | {"sha256": sha256}}))

    return run_with(write)


def cut_off(run: Path) -> None:
    file = run / "manifest.json"
    file.write_bytes(file.read_bytes()[:-30])


def unsigned(run: Path) -> None:
    file = run / "manifest.json"
    told = json.loads(file.read_text())
    del told[STAGE]["sha256"]
    file.write_text(json.dumps(told))


def stage_twice(run: Path) -> None:
    file = run / "manifest.json"
    told = json.dumps(json.loads(file.read_text())[STAGE])
    file.write_text(f'{{"{STAGE}": {told}, "{STAGE}": {told}}}')


def shard_gone(run: Path) -> None:
    (run / STAGE / "00000.jsonl").unlink()


def shard_changed(run: Path) -> None:
    (run / STAGE / "00000.jsonl").write_text('{"id": "d"}\n')


def ask_manifest(path: Path) -> None:
    RunDirectory(path).stage_done(STAGE, SETTINGS)


MANIFESTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut off": (run_with(cut_off), "finished stages"),
    "a list": (manifest_of("[]"), "list instead of an object"),
    "null": (manifest_of("null"), "NoneType instead of an object"),
    "an entry that is text": (manifest_of(f'{{"{STAGE}": "done"}}'), STAGE),
    "an entry that is null": (manifest_of(f'{{"{STAGE}": null}}'), STAGE),
    "an entry of nothing": (manifest_of(f'{{"{STAGE}": {{}}}}'), STAGE),
    "a stage twice": (run_with(stage_twice), "there twice"),
    "an unknown stage": (entry_with({}, name="iteration-1/bake"), "a stage that is none of"),
    "a stage without a name": (entry_with({}, name=""), "a stage that is none of"),
    "an entry of a wrong hash": (entry_with({}, signed=False), "by its sha256"),
    "an entry without a hash": (run_with(unsigned), "by its sha256"),
    "settings that are a list": (entry_with({"settings": []}), "settings = []"),
    "settings that are null": (entry_with({"settings": None}), "settings = None"),
    "seconds in words": (entry_with({"seconds": "one"}), "seconds = 'one'"),
    "tokens that are a list": (entry_with({"tokens": [1]}), "tokens = [1]"),
    "files that are a list": (entry_with({"files": ["a"]}), "files = ['a']"),
    "a file's hash that is a number": (entry_with({"files": {f"{STAGE}/00000.jsonl": 3}}), "of SHA-256 3"),
    "a file with a NUL in its name": (entry_with({"files": {"a\0b": "c"}}), "no file"),
    "a file that is gone": (run_with(shard_gone), "found no file"),
    "a file that has changed": (run_with(shard_changed), "of SHA-256"),
    "other settings": (entry_with({"settings": {"seed": 4}}), "seed = 4"),
}

# A training's checkpoint ----------------------------------------------------------------------------------------------


def training_with(change: Callable[[Path], None]) -> Callable[[Path], Path]:
    """Makes a training's checkpoints, of which there is one, then changed."""

    def make(folder: Path) -> Path:
        import torch

        from srcfast.training.checkpoint import SavedTraining, save_training

        weights = torch.ones(4)
        moments = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
        saved = SavedTraining(7, weights, moments, [{"loss": 1.0}] * 7, {"seed": 3}, 2.0)
        save_training(folder / "checkpoint", saved)
        change(folder / "checkpoint" / "step-00000007")
        return folder / "checkpoint"

    return make


def content(name: str, told: bytes | str | None) -> Callable[[Path], None]:
    """Replaces a file, or (None) removes it."""

    def change(place: Path) -> None:
        (place / name).unlink()
        if told is not None:
            (place / name).write_bytes(told if isinstance(told, bytes) else told.encode())

    return change


def state_with(change: Mapping[str, Any] | str) -> Callable[[Path], None]:
    """Replaces fields of the state, or the whole of it, and signs it."""

    def write(place: Path) -> None:
        state = json.loads((place / "state.json").read_text())
        text = change if isinstance(change, str) else json.dumps(state | change)
        (place / "state.json").write_text(text)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        (place / COMPLETE).write_text(json.dumps({"state.json": sha256}))

    return write


def load_checkpoint(path: Path) -> list[dict[str, Any]]:
    """What is said of the checkpoint that is passed over."""
    from srcfast.training.checkpoint import load_training

    return warned(lambda: load_training(path, {"seed": 3}))


def warned(act: Callable[[], Any]) -> list[dict[str, Any]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        act()
    return [{"reason": str(one.message)} for one in said]


def half(place: Path, name: str) -> None:
    file = place / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no marker": (content(COMPLETE, None), COMPLETE),
    "a marker that is a list": (content(COMPLETE, "[]"), "list instead of an object"),
    "a marker of nothing": (content(COMPLETE, "{}"), "state.json"),
    "a marker of a number": (content(COMPLETE, '{"state.json": 3}'), "SHA-256 3"),
    "no state": (content("state.json", None), "state.json"),
    "a state cut off": (partial(half, name="state.json"), "SHA-256"),
    "a state that is a list": (state_with("[]"), "list instead of an object"),
    "a state of nothing": (state_with("{}"), "'step'"),
    "a state with a step twice": (state_with('{"step": 7, "step": 8}'), "there twice"),
    "a state of 100,000 objects within each other": (state_with(BRACKETS), "nested too deep"),
    "a step in words": (state_with({"step": "seven"}), "'step'"),
    "a step of another folder": (state_with({"step": 9}), "'step'"),
    "a step below 0": (state_with({"step": -7}), "'step'"),
    "seconds that are null": (state_with({"seconds": None}), "'seconds'"),
    "an identity that is a list": (state_with({"identity": []}), "'identity'"),
    "a history that is an object": (state_with({"history": {}}), "'history'"),
    "a history of numbers": (state_with({"history": [1.0]}), "'history'"),
    "hashes that are a list": (state_with({"sha256": []}), "'sha256'"),
    "no hash of the weights": (state_with({"sha256": {}}), "weights.safetensors"),
    "no weights": (content("weights.safetensors", None), "weights.safetensors"),
    "weights cut off": (partial(half, name="weights.safetensors"), "weights.safetensors"),
    "no moments": (content("optimizer.safetensors", None), "optimizer.safetensors"),
    "moments of no byte": (content("optimizer.safetensors", b""), "optimizer.safetensors"),
    "another training's": (state_with({"identity": {"seed": 4}}), "seed = 4"),
}

# A stage's finished parts ---------------------------------------------------------------------------------------------


def do_parts(path: Path) -> list[dict[str, Any]]:
    """What is said of the part that is done again."""
    samples = [Sample("s", (), "What color?", "red")]
    track = StageProgress("parts", 1, quiet=True)
    return warned(lambda: run_chunks(Chunks(path, dict, track), samples, 1, lambda piece: ([{"id": "s"}], {})))


def part(told: bytes | str) -> Callable[[Path], Path]:
    """Makes a part with this head, or from what a sound one holds."""

    def make(folder: Path) -> Path:
        do_parts(folder / "parts")
        file = folder / "parts" / "00000.jsonl"
        rows = file.read_bytes().split(b"\n", 1)[1]
        file.write_bytes((told if isinstance(told, bytes) else told.encode()) + b"\n" + rows)
        return folder / "parts"

    return make


def part_with(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        do_parts(folder / "parts")
        file = folder / "parts" / "00000.jsonl"
        file.write_bytes(change(file.read_bytes()))
        return folder / "parts"

    return make


PARTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut off": (part_with(lambda whole: whole[:40]), "a finished chunk"),
    "no row": (part_with(lambda whole: whole.split(b"\n")[0] + b"\n"), "its checksum"),
    "a row changed": (part_with(lambda whole: whole.replace(b'{"id": "s"}', b'{"id": "t"}')), "its checksum"),
    "a count changed": (part_with(lambda whole: whole.replace(b'"tokens": 0', b'"tokens": 9')), "its checksum"),
    "a head that is a list": (part("[]"), "list instead of an object"),
    "a head of nothing": (part("{}"), "'sha256'"),
    "a head of null hashes": (part('{"sha256": null, "head_sha256": null}'), "a finished chunk"),
}

# A batch that was kept ------------------------------------------------------------------------------------------------


def batch(change: Mapping[str, Any]) -> Callable[[Path], Path]:
    """Makes a kept batch with some fields replaced; `...` leaves one out."""

    def make(folder: Path) -> Path:
        from srcfast.config.settings import TrainingConfig

        told = {
            "stage": "dpo",
            "step": 0,
            "weights_sha256": "0" * 64,
            "loop": TrainingConfig().loop(),
            "config": Config().model_dump(mode="json"),
            "image_root": str(folder),
            "preferences": [PAIR],
            "rationales": [],
            "examples": [],
            "places": [0],
        } | dict(change)
        (folder / "batch.json").write_text(json.dumps({key: one for key, one in told.items() if one is not ...}))
        return folder

    return make


def batch_of(told: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "batch.json").write_bytes(told if isinstance(told, bytes) else told.encode())
        return folder

    return make


def replay_batch(path: Path) -> None:
    from srcfast.stages.replay import replay

    replay(path)


BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "no stage": ({"stage": ...}, "'stage'"),
    "an unknown stage": ({"stage": "bake"}, "'bake'"),
    "a stage that is a list": ({"stage": ["dpo"]}, "['dpo']"),
    "a step in words": ({"step": "one"}, "'one'"),
    "a step below 0": ({"step": -1}, "-1"),
    "a step beyond all": ({"step": 10**400}, "batch"),
    "no loop": ({"loop": ...}, "'loop'"),
    "a loop that is a list": ({"loop": [1]}, "mapping"),
    "an unknown setting in the loop": ({"loop": {"mine": 1}}, "mine"),
    "a loop's setting in words": ({"loop": {"micro_batch_size": "many"}}, "micro_batch_size"),
    "micro-batches of none": ({"loop": {"micro_batch_size": 0}}, "micro_batch_size"),
    "an unknown setting": ({"config": {"mine": 1}}, "mine"),
    "a setting out of bounds": ({"config": {"dpo": {"beta": -1}}}, "beta"),
    "a config that is text": ({"config": "mine"}, "Config"),
    "an image root that is a number": ({"image_root": 3}, "batch"),
    "no pair": ({"preferences": []}, "nothing that stage"),
    "a pair that is text": ({"preferences": ["a"]}, "a JSON object"),
    "a pair without a prompt": ({"preferences": [{"sample_id": "s", "chosen": "a", "rejected": "b"}]}, "'prompt'"),
    "pairs that are null": ({"preferences": None}, "batch"),
    "a rationale without a response": (
        {"stage": "rationale", "rationales": [{"id": "s", "images": [], "question": "q"}]},
        "'response'",
    ),
    "a rationale that is a number": ({"stage": "rationale", "rationales": [7]}, "a JSON object"),
    "examples that are numbers": ({"stage": "scorer", "preferences": [], "examples": [7]}, "ScorerExample"),
    "an example whose pair is of no variant": (
        {
            "stage": "scorer",
            "preferences": [],
            "examples": [{"key": "k", "reference": "r", "variants": [{"text": "t", "faults": 0}], "pairs": [[0, 1]]}],
        },
        "of 1 variants",
    ),
    "a place that another record has": ({"places": [0, 0]}, "places [0, 0] of 1"),
    "no hash of the weights": ({"weights_sha256": ...}, "'weights_sha256'"),
    "no adapter beside it": ({}, "an adapter"),
}

# What the page is made of ---------------------------------------------------------------------------------------------

EVALUATED = {
    "model": "base",
    "dataset": "world",
    "split": "test",
    "n": 10,
    "accuracy": 0.5,
    "accuracy_ci95": [0.4, 0.6],
}
HEADROOM = {"iteration": 1, "dataset": "world", "split": "test", "n": 5, "n_candidates": 4.0}
HEADROOM |= {"pass_at_1": 0.4, "best_of_n": 0.5, "pass_at_n": 0.9}
SUMMARY: dict[str, Any] = {
    "evaluations": [EVALUATED],
    "headroom": [HEADROOM],
    "funnel": {"iteration-1": {"kept": 3, "score_histogram": {"counts": [1, 2], "edges": [0, 0.5, 1]}}},
    "stages": [{"name": "rationale", "seconds": 1.5}],
    "seconds": 1.5,
}
CARD: dict[str, Any] = {"sample_id": "s", "question": "q", "gold": "red", "chosen": 0, "rejected": 1, "confidence": 0.5}
CARD |= {"candidates": [{"text": "red", "score": 0.9}, {"text": "blue", "score": 0.1}]}
STEP = {"stage": "rationale", "step": 0, "loss": 1.0}


def page_of(files: Mapping[str, bytes | str]) -> Callable[[Path], Path]:
    """Makes what a page is made of, with some files replaced."""

    def make(folder: Path) -> Path:
        sound: dict[str, bytes | str] = {
            "summary.json": json.dumps(SUMMARY),
            "gallery.json": json.dumps([CARD]),
            "metrics.jsonl": json.dumps(STEP) + "\n",
            "config.yaml": "name: made\nseed: 1\n",
            "environment.json": '{"cpu": "one"}',
        }
        for name, told in (sound | dict(files)).items():
            (folder / name).write_bytes(told if isinstance(told, bytes) else told.encode())
        return folder

    return make


def read_page(path: Path) -> None:
    from srcfast.report.run_files import read_run

    read_run(path)


SUMMARIES: dict[str, tuple[dict[str, Any], str]] = {
    "evaluations in an object": ({"evaluations": {}}, "'evaluations'"),
    "an evaluation that is null": ({"evaluations": [None]}, "evaluations.0"),
    "an evaluation without a model": ({"evaluations": [{"dataset": "a", "split": "b"}]}, "evaluations.0.model"),
    "a count in words": ({"evaluations": [EVALUATED | {"n": "ten"}]}, "evaluations.0.n"),
    "a count below 0": ({"evaluations": [EVALUATED | {"n": -1}]}, "evaluations.0.n"),
    "a count beyond all": ({"evaluations": [EVALUATED | {"n": 10**400}]}, "evaluations.0.n"),
    "an accuracy that is a list": ({"evaluations": [EVALUATED | {"accuracy": [0.5]}]}, "evaluations.0.accuracy"),
    "an interval of three": ({"evaluations": [EVALUATED | {"accuracy_ci95": [0, 1, 2]}]}, "accuracy_ci95"),
    "cases without one": ({"evaluations": [EVALUATED | {"cases": {"both_right": 3}}]}, "cases"),
    "an ability that is a number": ({"evaluations": [EVALUATED | {"by_ability": {"counting": 3}}]}, "counting"),
    "a category without a count": (
        {"evaluations": [EVALUATED | {"by_category": {"split": {"dev": {"accuracy": 0.5}}}}]},
        "split.dev.n",
    ),
    "a headroom without pass@1": ({"headroom": [{**HEADROOM, "pass_at_1": None}]}, "headroom.0.pass_at_1"),
    "a funnel that is a list": ({"funnel": []}, "'funnel'"),
    "a funnel's count with a point": ({"funnel": {"iteration-1": {"kept": 1.5}}}, "kept"),
    "a histogram of no edge": ({"funnel": {"a": {"score_histogram": {"counts": [1], "edges": []}}}}, "0 edges"),
    "a stage without seconds": ({"stages": [{"name": "a"}]}, "stages.0.seconds"),
    "seconds beyond all clocks": ({"seconds": 1e300}, "'seconds'"),
    "seconds below 0": ({"stages": [{"name": "a", "seconds": -1.0}]}, "stages.0.seconds"),
    "rejected in words": ({"rejected": "none"}, "'rejected'"),
}
CARDS: dict[str, tuple[dict[str, Any], str]] = {
    "no candidates": ({"candidates": None}, "candidates"),
    "a candidate without a score": ({"candidates": [{"text": "red"}]}, "score"),
    "a candidate's text that is a list": ({"candidates": [{"text": ["a"], "score": 1.0}]}, "text"),
    "a claim of two": ({"candidates": [{"text": "a", "score": 1.0, "claims": [["a", "b"]]}]}, "claims"),
    "a claim of a list": (
        {"candidates": [{"text": "a", "score": 1.0, "claims": [[["a"], "b", "true"]]}]},
        "claims.0.0",
    ),
    "a choice in words": ({"chosen": "first"}, "chosen"),
    "an image that is a number": ({"image": 3}, "image"),
    "an image from the run that is a number": ({"image": "a.png", "image_from_run": 5}, "image_from_run"),
    "further images that are one": ({"further_images": {"image": "a.png"}}, "further_images"),
    "a further image that is a name": ({"further_images": ["a.png"]}, "further_images.0"),
    "a question that is null": ({"question": None}, "question"),
    "a confidence in words": ({"confidence": "high"}, "confidence"),
}
STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "a stage that is a number": ({"stage": 3}, "'stage'"),
    "a stage that is null": ({"stage": None}, "'stage'"),
    "a step in words": ({"step": "one"}, "'step'"),
    "a loss in words": ({"loss": "low"}, "'loss'"),
    "a learning rate that is a list": ({"learning_rate": [1e-4]}, "'learning_rate'"),
}
RUN_SETTINGS: dict[str, tuple[bytes | str, str]] = {
    "a list": ("[1]", "key: value"),
    "not UTF-8": (b"a: \xff", "YAML"),
    "a setting twice": ("seed: 1\nseed: 2\n", "set twice"),
    "a Python object": ("a: !!python/object:os.system {}", "YAML"),
    "2,000 brackets": ("[" * 2000, "nested too deep"),
    "a section that is text": ("model: mine", "'model'"),
    "resamples in words": ("evaluation: {bootstrap_resamples: many}", "bootstrap_resamples"),
}


def _gone(path: Path) -> None:
    for name in ("summary.json", "config.yaml", "manifest.json"):
        (path / name).unlink(missing_ok=True)
    read_page(path)


def cases() -> list[Case]:
    """All of them."""
    found = [Case("Manifests", wrong, make, ask_manifest, (word,)) for wrong, (make, word) in MANIFESTS.items()]
    found += [
        Case("Manifests", wrong, manifest_of(told), ask_manifest, ("manifest.json", word))
        for wrong, (told, word) in BAD_JSON.items()
    ]
    found += [
        Case("Trainings' checkpoints", wrong, training_with(change), load_checkpoint, ("step-00000007", word))
        for wrong, (change, word) in CHECKPOINTS.items()
    ]
    found += [
        Case(
            "Trainings' checkpoints",
            f"a marker: {wrong}",
            training_with(content(COMPLETE, told)),
            load_checkpoint,
            (word,),
        )
        for wrong, (told, word) in BAD_JSON.items()
    ]
    found += [
        Case("Parts of stages", wrong, make, do_parts, ("00000.jsonl", word)) for wrong, (make, word) in PARTS.items()
    ]
    found += [
        Case("Parts of stages", f"a head: {wrong}", part(told), do_parts, ("00000.jsonl", word))
        for wrong, (told, word) in BAD_JSON.items()
    ]
    found += [
        Case("Stored batches", wrong, batch(change), replay_batch, (word,)) for wrong, (change, word) in BATCHES.items()
    ]
    found += [
        Case("Stored batches", wrong, batch_of(told), replay_batch, ("batch.json", word))
        for wrong, (told, word) in BAD_JSON.items()
    ]
    page = "Runs that are reported"
    for name in ("summary.json", "gallery.json", "environment.json", "metrics.jsonl"):
        for wrong, (told, word) in BAD_JSON.items():
            whole = (told if isinstance(told, bytes) else told.encode()) + (b"\n" if name == "metrics.jsonl" else b"")
            if whole.strip():
                found.append(Case(page, f"{name}: {wrong}", page_of({name: whole}), read_page, (name, word)))
    found += [
        Case(page, f"summary: {wrong}", page_of({"summary.json": json.dumps(SUMMARY | change)}), read_page, (word,))
        for wrong, (change, word) in SUMMARIES.items()
    ]
    found += [
        Case(page, f"gallery: {wrong}", page_of({"gallery.json": json.dumps([CARD | change])}), read_page, (word,))
        for wrong, (change, word) in CARDS.items()
    ]
    found += [
        Case(
            page, f"metrics: {wrong}", page_of({"metrics.jsonl": json.dumps(STEP | change) + "\n"}), read_page, (word,)
        )
        for wrong, (change, word) in STEPS.items()
    ]
    found += [
        Case(page, f"settings: {wrong}", page_of({"config.yaml": told}), read_page, ("config.yaml", word))
        for wrong, (told, word) in RUN_SETTINGS.items()
    ]
    for name in ("summary.json", "gallery.json", "environment.json"):
        found.append(Case(page, f"{name}: a number", page_of({name: "7"}), read_page, (name,)))
    found.append(Case(page, "neither summary, settings nor manifest", page_of({}), _gone, ("the summary of a run",)))
    return found

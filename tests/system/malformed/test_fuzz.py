"""Whatever bytes a parser is given, it reads them or says what is wrong with them: no error but SrcfastError comes out.

Each target has some hundred examples, the same in each run; `make fuzz` takes twenty times as many.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed_checkpoints import ADAPTER_CONFIG, ASSETS, CONFIG, SOUND, SOUND_ADAPTER, framed, lvlm
from malformed_containers import parquet, stream, zstandard
from malformed_conversations import CHAT, HISTORY, NO, PROMPT, YES
from malformed_images import ENDINGS, picture_bytes
from malformed_records import ASKED, CANDIDATE, PAIR, SAMPLE, SCORES, TALK, TAUGHT
from malformed_runs import CARD, EVALUATED, HEADROOM, STEP, SUMMARY

from srcfast.config.load import known_settings, load_config
from srcfast.data.images import FORMATS, decode_image
from srcfast.data.jsonl import COMPLETE, json_hash, read_shards, write_jsonl
from srcfast.data.rationale_format import normalise_answer, parse_response
from srcfast.data.readers import read_logprob_rows, read_preferences, read_samples
from srcfast.data.records import Candidate, Preference, Sample
from srcfast.data.stage_rows import check_scores
from srcfast.errors import SrcfastError
from srcfast.memory.model_sizes import read_headers
from srcfast.report.page import render
from srcfast.report.run_files import read_run
from srcfast.run.directory import RunDirectory
from srcfast.training.checkpoint import load_training

EXAMPLES = 100
VISION_CONFIG = json.loads((ASSETS / "base" / "config.json").read_text())["vision_config"]


def fuzz(*strategies: Any, examples: int = EXAMPLES) -> Callable[..., Any]:
    """A test as a fuzz target, and beside it the same with twenty times the examples, marked fuzz."""

    def of(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.fuzz)], ids=["some", "many"])
        def run(many: bool, tmp_path: Path) -> None:
            @settings(
                max_examples=examples * (20 if many else 1),
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(st.tuples(*strategies))
            def each(values: tuple[Any, ...]) -> None:
                test(tmp_path, *values)

            each()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return of


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "<image>", "\0", "..", "a.png", "\ud800", "</s>", "user", "assistant", "text", "image"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def row_like(*rows: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Rows of these fields, each as it should be, gone, or anything else."""
    sound: dict[str, Any] = {"image": "a.png", "images": ["a.png"], "rationale": "It is.", "facts": ["It is."]}
    for row in rows:
        sound |= row
    fields = {name: st.just(value) | VALUES for name, value in sound.items()}
    return st.fixed_dictionaries({}, optional=fields)


def changed_bytes(*wholes: bytes) -> st.SearchStrategy[bytes]:
    """One of these with some bytes replaced, a piece cut out or put in, or cut off."""

    def change(whole: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
        for at, gone, put in edits:
            at %= len(whole) + 1
            whole = whole[:at] + put + whole[at + gone :]
        return whole

    edit = st.tuples(st.integers(0, 1 << 20), st.sampled_from([0, 1, 1, 4, 50, 1 << 20]), st.binary(max_size=6))
    return st.builds(change, st.sampled_from(wholes), st.lists(edit, min_size=1, max_size=4))


RECORDS = {"sample": (Sample, SAMPLE), "candidate": (Candidate, CANDIDATE), "preference": (Preference, PAIR)}


@fuzz(st.data())
def test_records(folder: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(RECORDS)))
    kind, row = RECORDS[name]
    root = {} if kind is Candidate else {"image_root": folder}
    with suppress(SrcfastError):
        kind.from_json(data.draw(row_like(row) | VALUES), file="f", line=3, **root)


@fuzz(row_like(SCORES))
def test_score_rows(folder: Path, row: dict[str, Any]) -> None:
    with suppress(SrcfastError):
        check_scores(row, "f", 3)


WHOLE_CHATS = (CHAT, {"messages": [*HISTORY, *PROMPT], "chosen": YES, "rejected": NO})
WHOLE_LINES = b"\n".join(
    json.dumps(row).encode() for row in (SAMPLE, PAIR, TALK, *WHOLE_CHATS, CANDIDATE, ASKED, TAUGHT)
)
READERS: dict[str, tuple[Any, str]] = {
    "samples": (read_samples, "jsonl"),
    "llava": (read_samples, "llava"),
    "messages": (read_samples, "messages"),
    "preferences": (read_preferences, "jsonl"),
    "preferences as messages": (read_preferences, "messages"),
    "trl": (read_preferences, "trl"),
}


@fuzz(st.sampled_from(sorted(READERS)), st.data())
def test_readers_of_json(folder: Path, name: str, data: st.DataObject) -> None:
    read, format = READERS[name]
    message = st.fixed_dictionaries({}, optional={"role": LEAVES, "content": VALUES, "from": LEAVES, "value": LEAVES})
    part = st.fixed_dictionaries({}, optional={"type": st.sampled_from(["text", "image"]) | LEAVES, "text": LEAVES})
    turn = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": LEAVES | st.lists(part, max_size=3)}
    )
    talks = {"conversations": st.lists(message, max_size=3), "chosen": st.lists(message, max_size=2)}
    talks |= {"messages": st.lists(turn, max_size=4), "turns": st.lists(turn, max_size=3), "rejected_response": LEAVES}
    rows = st.lists(row_like(SAMPLE, PAIR, TALK) | st.fixed_dictionaries(talks), max_size=3)
    written = rows.map(lambda rows: json.dumps(rows).encode()) | rows.map(
        lambda rows: b"\n".join(json.dumps(row).encode() for row in rows)
    )
    whole = data.draw(
        written | changed_bytes(WHOLE_LINES, b"[" + WHOLE_LINES.replace(b"\n", b",") + b"]") | st.binary()
    )
    (folder / "rows").write_bytes(whole)
    rejected: list[dict[str, Any]] = []
    with suppress(SrcfastError):
        read(folder / "rows", format=format, image_root=folder, rejected=rejected)
        write_jsonl(folder / "rejected.jsonl", rejected)  # what is set aside can be written down
    with suppress(SrcfastError):
        read_logprob_rows(folder / "rows", folder)


IMAGE = base64.b64encode(picture_bytes("PNG")).decode()
TABLE = f"index\timage\tquestion\tanswer\tA\thint\n1\t{IMAGE}\tq\ta\tx\t\n2\t1\tq\ta\t\th\n".encode()


@fuzz(changed_bytes(TABLE) | st.binary())
def test_reader_of_tables(folder: Path, whole: bytes) -> None:
    (folder / "rows.tsv").write_bytes(whole)
    rejected: list[dict[str, Any]] = []
    with suppress(SrcfastError):
        samples = read_samples(folder / "rows.tsv", format="vlmeval_tsv", image_root=folder, rejected=rejected)
        write_jsonl(folder / "rejected.jsonl", rejected)
        write_jsonl(folder / "samples.jsonl", (sample.to_json() for sample in samples))


CONTAINERS = (
    parquet(SAMPLE | {"image": {"bytes": picture_bytes("PNG"), "path": "a"}}, SAMPLE | {"image": None}),
    parquet(CHAT),
    stream(SAMPLE, SAMPLE),
    gzip.compress(WHOLE_LINES),
    zstandard(WHOLE_LINES),
)


@fuzz(changed_bytes(*CONTAINERS))
def test_readers_of_containers(folder: Path, whole: bytes) -> None:
    (folder / "rows").write_bytes(whole)
    rejected: list[dict[str, Any]] = []
    for read in (read_samples, read_preferences):
        with suppress(SrcfastError):
            records = read(folder / "rows", rejected=rejected)
            write_jsonl(folder / "records.jsonl", (record.to_json() for record in records))
        write_jsonl(folder / "rejected.jsonl", rejected)


@fuzz(changed_bytes(b'{"rows": 1, "shards": 1}') | st.binary(), changed_bytes(WHOLE_LINES))
def test_shards(folder: Path, marker: bytes, shard: bytes) -> None:
    (folder / COMPLETE).write_bytes(marker)
    (folder / "00000.jsonl").write_bytes(shard)
    with suppress(SrcfastError):
        list(read_shards(folder))


TAGS = st.sampled_from(
    ["<see>", "</see>", "<think>", "</think>", "<answer>", "</answer>", "Answer:", " ", "\n", "1.", "e.g."]
)


@fuzz(st.lists(TAGS | st.text(max_size=9)).map("".join))
def test_responses_are_always_parsed(folder: Path, text: str) -> None:
    parsed = parse_response(text)
    assert parsed.answer is None or parsed.answer.strip()
    normalise_answer(parsed.answer or "")


@fuzz(changed_bytes(*(picture_bytes(format) for format in FORMATS)), examples=300)
def test_images(folder: Path, data: bytes) -> None:
    with suppress(SrcfastError):
        assert decode_image(data, "a.img").mode == "RGB"


YAML = b"""name: run
seed: 1
lora: &a {r: 8, alpha: 1.5e1, target_modules: [q_proj]}
data: {train: [{name: w, format: world, limit: 3, use: [rationale]}], evaluation: []}
memory: 12GiB
rationale: {teacher: null, activation_checkpointing: auto}
"""
SYNTAX = st.sampled_from(
    list("{}[]:,-?!&*|>%@`'\"#\n\t 019.") + ["!!int ", "!!timestamp ", "<<: *a", "2001-01-01", ".nan"]
)


@fuzz(
    changed_bytes(YAML)
    | st.lists(SYNTAX | st.text(max_size=3)).map(lambda parts: "".join(parts).encode("utf-8", "replace"))
)
def test_settings_files(folder: Path, text: bytes) -> None:
    (folder / "a.yaml").write_bytes(text)
    with suppress(SrcfastError):
        load_config(folder / "a.yaml")


@fuzz(
    st.sampled_from(["", "r", "dpo.", *known_settings()]),
    st.lists(SYNTAX | st.text(max_size=3)).map("".join) | VALUES.map(repr),
)
def test_settings_words(folder: Path, key: str, value: str) -> None:
    with suppress(SrcfastError):
        load_config(None, [f"{key}={value}"])


ENTRIES = st.dictionaries(
    st.sampled_from(["a", "__metadata__"]) | st.text(max_size=5),
    st.fixed_dictionaries({}, optional={"dtype": LEAVES, "shape": VALUES, "data_offsets": VALUES}) | VALUES,
    max_size=3,
)
HEADERS = changed_bytes(SOUND[:1200], SOUND) | ENTRIES.map(
    lambda entries: framed(json.dumps(entries).encode(), bytes(64))
)


@fuzz(HEADERS)
def test_safetensors_headers(folder: Path, data: bytes) -> None:
    from srcfast.models.checkpoint import read_file

    (folder / "model.safetensors").write_bytes(data)
    with suppress(SrcfastError):
        list(read_headers(folder))
    with suppress(SrcfastError):
        list(read_file(folder / "model.safetensors"))


@fuzz(
    row_like(ADAPTER_CONFIG).map(lambda told: json.dumps(told).encode())
    | changed_bytes(json.dumps(ADAPTER_CONFIG).encode())
)
def test_adapter_settings(folder: Path, told: bytes) -> None:
    from srcfast.models.lora import adapter_hash, load_adapter

    (folder / "adapter_config.json").write_bytes(told)
    (folder / "adapter_model.safetensors").write_bytes(SOUND_ADAPTER)
    with suppress(SrcfastError):
        adapter_hash(folder)
    with suppress(SrcfastError):
        load_adapter(_decoder(), folder)


@fuzz(
    row_like(CONFIG).map(lambda told: json.dumps(told).encode()) | changed_bytes(json.dumps(CONFIG).encode()),
    examples=60,
)
def test_model_settings(folder: Path, told: bytes) -> None:
    import torch

    from srcfast.models.checkpoint import read_config
    from srcfast.models.text_model import build_decoder

    (folder / "config.json").write_bytes(told)
    with suppress(SrcfastError):
        build_decoder(read_config(folder), folder, "meta", torch.float32)


@fuzz(row_like(VISION_CONFIG), examples=40)
def test_tower_settings(folder: Path, told: dict[str, Any]) -> None:
    from srcfast.models.checkpoint import read_config
    from srcfast.models.vision import Vision

    place = folder / "lvlm"
    if not place.exists():
        lvlm({})(folder)
    config = json.loads((ASSETS / "base" / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"vision_config": told}))
    with suppress(SrcfastError):
        Vision(read_config(place), place)


ENTRY = {"settings": {"seed": 3}, "seconds": 1.0, "tokens": 7, "files": {"a": "b"}}


@fuzz(st.sampled_from(["iteration-1/dpo", "dpo", "", "/", "bake"]) | st.text(), row_like(ENTRY) | VALUES, st.booleans())
def test_manifests(folder: Path, name: str, entry: Any, signed: bool) -> None:
    run = RunDirectory(folder)
    if signed and isinstance(entry, dict):
        with suppress(ValueError):  # an integer beyond what is written in digits
            entry |= {"sha256": json_hash([name, entry])}
    with suppress(ValueError, UnicodeEncodeError):
        run.manifest_file.write_text(json.dumps({name: entry}))
    with suppress(SrcfastError):
        run.stage_done(name, {"seed": 3})


STATE = {"step": 7, "seconds": 2.0, "identity": {"seed": 3}, "history": [{"loss": 1.0}], "sha256": {}}


@fuzz(row_like(STATE).map(lambda told: json.dumps(told).encode()) | changed_bytes(json.dumps(STATE).encode()))
def test_checkpoints_of_trainings(folder: Path, state: bytes) -> None:
    place = folder / "checkpoint" / "step-00000007"
    place.mkdir(parents=True, exist_ok=True)
    (place / "state.json").write_bytes(state)
    (place / COMPLETE).write_text(json.dumps({"state.json": hashlib.sha256(state).hexdigest()}))
    with suppress(SrcfastError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_training(folder / "checkpoint", {"seed": 3})


@fuzz(
    row_like(SUMMARY, {"evaluations": [EVALUATED, EVALUATED | {"model": "rationale", "alignment": 0.5}]})
    | row_like(EVALUATED, {"cases": {}, "by_ability": {"a": {"n": 3}, "b": {"accuracy": 0.5}}}).map(
        lambda one: {"evaluations": [one]}
    )
    | row_like(HEADROOM).map(lambda one: {"headroom": [one]})
    | row_like(SUMMARY["funnel"]["iteration-1"]).map(lambda one: {"funnel": {"a": one}, "evaluations": []}),
    row_like(CARD),
    row_like(STEP),
    row_like({"name": "a", "model": {"path": "b"}, "seed": 3, "candidates": {"num_candidates": 4}}),
)
def test_pages(folder: Path, summary: Any, card: Any, step: Any, told: Any) -> None:
    files = {"summary.json": summary, "gallery.json": [card], "config.yaml": told, "metrics.jsonl": step}
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value) + "\n")
    with suppress(SrcfastError), mock.patch("srcfast.report.plots.can_plot", lambda: False):
        render(read_run(folder)).encode("utf-8")


def _decoder() -> Any:
    """A module with the decoder that the adapter is for."""
    import torch
    from transformers import LlamaConfig

    from srcfast.models.decoder import Decoder, DecoderConfig

    module = torch.nn.Module()
    module.decoder, module.adapter_prefix = Decoder(DecoderConfig.from_huggingface(LlamaConfig(**CONFIG))), "model"
    return module


def test_every_accepted_format_is_among_the_changed_images() -> None:
    assert set(ENDINGS) < set(FORMATS)
    for format in FORMATS:
        assert decode_image(picture_bytes(format), format).size == (16, 12)

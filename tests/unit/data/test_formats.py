"""Each format is known by its rows' keys, and read to literal records; what is of none is refused with what was seen."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from srcfast.cli.app import app
from srcfast.cli.inputs import Source, check_output, datasets
from srcfast.config.datasets import DatasetConfig
from srcfast.config.settings import Config
from srcfast.data.convert import convert
from srcfast.data.readers import read_logprob_rows, read_preferences, read_samples
from srcfast.errors import ConfigError, InputError
from srcfast.stages.datasets import read_dataset

Rows = list[dict[str, Any]]
HUMAN, GPT = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}
ASKED, SAID = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}
OTHER = {"role": "assistant", "content": "This."}


def picture(seed: int = 0, size: tuple[int, int] = (5, 6)) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(data, "png")
    return data.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "1.png").write_bytes(picture())
    return tmp_path


def write(folder: Path, rows: Rows, name: str = "rows.any") -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


# format -> row, then what it is read as: (question, answer, images, turns)
SAMPLES: dict[str, tuple[str, dict[str, Any], list[tuple]]] = {
    "ours": (
        "jsonl",
        {"id": "s", "image": "1.png", "question": "What?", "answer": "That."},
        [("What?", "That.", 1, [])],
    ),
    "LLaVA": ("llava", {"id": "s", "image": "1.png", "conversations": [HUMAN, GPT]}, [("What?", "That.", 1, [])]),
    "LLaMA-Factory's sharegpt": (
        "llava",
        {"conversations": [HUMAN, GPT], "system": "Be brief.", "images": ["1.png"], "tools": ""},
        [("What?", "That.", 1, [("system", "Be brief.")])],
    ),
    "messages": ("messages", {"messages": [ASKED, SAID], "images": ["1.png"]}, [("What?", "That.", 1, [])]),
    "ms-swift's": (
        "messages",
        {"query": "What?", "response": "That.", "images": ["1.png"]},
        [("What?", "That.", 1, [])],
    ),
    "LLaMA-Factory's alpaca": (
        "alpaca",
        {
            "instruction": "What?",
            "input": "Say it in a word.",
            "output": "That.",
            "system": "Be brief.",
            "history": [["<image>Is it?", "It is."]],
            "images": ["1.png"],
        },
        [
            ("Is it?", "It is.", 1, [("system", "Be brief.")]),
            (
                "What?\nSay it in a word.",
                "That.",
                1,
                [("system", "Be brief."), ("user", "Is it?"), ("assistant", "It is.")],
            ),
        ],
    ),
}
PAIR_TEXTS = {"chosen": "That.", "rejected": "This."}
RLHF_V = {"ds_name": "RLHF-V", "image": "1.png", "idx": 7, "origin_dataset": "x", "image_path": "y/0.jpg"}
PAIRS: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "ours": ("jsonl", {"images": ["1.png"], "prompt": "What?", **PAIR_TEXTS}, []),
    "TRL's messages": ("trl", {"images": ["1.png"], "prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}, []),
    "TRL's implicit prompt": ("trl", {"images": ["1.png"], "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}, []),
    "messages": ("messages", {"images": ["1.png"], "messages": [ASKED], **PAIR_TEXTS}, []),
    "ms-swift's": ("messages", {"images": ["1.png"], "messages": [ASKED, SAID], "rejected_response": "This."}, []),
    "LLaMA-Factory's sharegpt": (
        "messages",
        {
            "images": ["1.png"],
            "conversations": [HUMAN],
            "chosen": GPT,
            "rejected": {"from": "gpt", "value": "This."},
            "system": "Be brief.",
        },
        [("system", "Be brief.")],
    ),
    "LLaMA-Factory's alpaca": (
        "alpaca",
        {"images": ["1.png"], "instruction": "<image>", "input": "What?", "history": [], **PAIR_TEXTS},
        [],
    ),
    "RLHF-V": ("rlhf_v", RLHF_V | {"text": json.dumps({"question": "What?", **PAIR_TEXTS})}, []),
    "RLHF-V without pictures inside": (
        "rlhf_v",
        {"image_path": "1.png", "text": json.dumps({"question": "What?", **PAIR_TEXTS})},
        [],
    ),
    "RLAIF-V": ("rlhf_v", RLHF_V | {"question": "What?", "origin_split": '{"model": "m"}', **PAIR_TEXTS}, []),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_samples_of_every_format_are_known_by_their_keys(root: Path, name: str, named: bool, as_list: bool) -> None:
    format, row, expected = SAMPLES[name]
    file = root / "rows.any"
    file.write_text(json.dumps([row]) if as_list else json.dumps(row))
    rejected: Rows = []
    samples = read_samples(file, format=format if named else "auto", rejected=rejected)
    found = [(s.question, s.answer, len(s.images), [(t.role, t.text) for t in s.turns]) for s in samples]
    assert found == expected and rejected == []
    assert all((s.images, s.image_root) == (("1.png",), root) for s in samples)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_preferences_of_every_format_are_known_by_their_keys(root: Path, name: str, named: bool, ending: str) -> None:
    format, row, turns = PAIRS[name]
    rejected: Rows = []
    file = write(root, [row], f"rows{ending}")
    [pair] = read_preferences(file, format=format if named else "auto", rejected=rejected)
    assert rejected == [] and (pair.prompt, pair.chosen, pair.rejected) == ("What?", "That.", "This.")
    assert (pair.images, pair.image_root, pair.confidence) == (("1.png",), root, 1.0)
    assert [(turn.role, turn.text) for turn in pair.turns] == turns
    if "idx" in row:
        assert pair.sample_id == "7" and pair.extra["ds_name"] == "RLHF-V"


def test_rlaif_v_as_it_is_published_parquet_with_pictures_inside(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets")
    rows = [
        {
            "ds_name": "RLAIF-V",
            "image": picture(n),
            "question": f"What {n}?",
            **PAIR_TEXTS,
            "idx": n,
            "image_path": f"{n}.jpg",
        }
        for n in range(40)
    ]
    table = library.Dataset.from_list([row | {"image": {"bytes": row["image"], "path": None}} for row in rows])
    table.cast_column("image", library.Image()).to_parquet(tmp_path / "part-0.parquet")
    rejected: Rows = []
    pairs = read_preferences(tmp_path / "part-0.parquet", rejected=rejected)
    assert rejected == [] and [pair.sample_id for pair in pairs] == [str(n) for n in range(40)]
    assert [(pair.image_root / pair.images[0]).read_bytes() for pair in pairs] == [row["image"] for row in rows]


def test_a_prompt_beside_a_question_is_the_prompt_or_refused(root: Path) -> None:
    ours = {"sample_id": "1", "prompt": "What?", "question": "Which?", **PAIR_TEXTS}
    rejected: Rows = []
    [pair] = read_preferences(write(root, [ours]), rejected=rejected)
    assert (pair.prompt, pair.extra, rejected) == ("What?", {"question": "Which?"}, [])
    for name in ("question", "instruction", "messages"):
        other = PAIR_TEXTS | {name: [ASKED] if name == "messages" else "Which?", "prompt": [ASKED], "images": ["1.png"]}
        assert read_preferences(write(root, [other]), rejected=rejected) == []
    assert [bad["field"] for bad in rejected] == ["prompt"] * 3


def test_fields_beside_a_conversation_do_not_replace_it(root: Path) -> None:
    row = {"id": "a", "question": "Which?", "answer": "No.", "turns": 2, "kind": "x", "conversations": [HUMAN, GPT]}
    write(root, [row | {"image": "1.png"}])
    convert(root / "rows.any", root / "ours.jsonl", source_format="auto", target_format="jsonl", rejected=[])
    [written] = map(json.loads, (root / "ours.jsonl").read_text().splitlines())
    assert (written["question"], written["answer"], written["kind"]) == ("What?", "That.", "x")
    [sample] = read_samples(root / "ours.jsonl", rejected=[])
    assert (sample.question, sample.answer, sample.turns) == ("What?", "That.", ())


def test_parts_may_name_images_by_index_as_trl_s_data_sets_do(root: Path) -> None:
    """As in HuggingFaceH4/llava-instruct-mix-vsft, whose parts have all keys, those of another type null."""
    text = {"index": None, "type": "text"}

    def row(*indices: Any) -> dict[str, Any]:
        parts = [text | {"text": "What?"}, *({"index": index, "text": None, "type": "image"} for index in indices)]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [text | {"text": "That."}]}]
        return {"images": ["1.png", "2.png"][: len(indices)], "messages": messages}

    (root / "2.png").write_bytes(picture(2))
    rejected: Rows = []
    rows = [row(0), row(0, 1), row(1, 0), row(0, 2), row(-1), row(True), row("0")]
    samples = read_samples(write(root, rows), rejected=rejected)
    assert [s.images for s in samples] == [("1.png",), ("1.png", "2.png")]
    assert [(bad["line"], bad["field"]) for bad in rejected] == [
        *((line, "images") for line in (3, 4, 5)),
        *((line, "messages") for line in (6, 7)),
    ]


def test_the_format_is_that_of_the_first_row_that_has_one(root: Path) -> None:
    rows = [{"comment": "mine"}, SAMPLES["LLaVA"][1], SAMPLES["ours"][1] | {"id": "t"}]
    rejected: Rows = []
    samples = read_samples(write(root, rows), rejected=rejected)
    assert [sample.id for sample in samples] == ["s"]
    assert [(row["line"], row["field"]) for row in rejected] == [(1, "conversations"), (3, "conversations")]


REFUSED: dict[str, tuple[Any, bytes, tuple[str, ...]]] = {
    "other keys": (
        read_samples,
        b'{"frage": "Was?", "antwort": "Das."}',
        ("the keys frage, antwort", "jsonl (question and answer)", "llava (conversations)", "query and response"),
    ),
    "no answer": (read_samples, b'{"id": 1, "question": "What?"}', ("the keys id, question",)),
    "preferences as samples": (
        read_samples,
        json.dumps(PAIRS["ms-swift's"][1]).encode(),
        ("as preferences have them", "srcfast dpo"),
    ),
    "samples as preferences": (
        read_preferences,
        json.dumps(SAMPLES["LLaVA"][1]).encode(),
        ("the keys id, image, conversations", "trl (chosen and rejected)", "question and chosen and rejected"),
    ),
    "nothing": (read_samples, b"", ("no record",)),
    "a table of commas": (read_samples, b"id,question,answer\n1,What?,That.\n", ("line 1", "id,question,answer")),
    "a table without its columns": (read_samples, b"id\tquestion\n1\tWhat?\n", ("columns index, image",)),
    "an HTML page": (read_samples, b"\n<!DOCTYPE html><html></html>", ("found an HTML page", "fetch the file itself")),
    "a Git LFS pointer": (
        read_preferences,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        ("found a Git LFS pointer", "git lfs pull"),
    ),
    "a zip archive": (read_samples, b"PK\x03\x04\0\0", ("found a zip archive", "unpack it")),
    "a pickle": (read_samples, b"\x80\x04\x95\0", ("found a pickle",)),
    "a picture": (read_samples, picture(), ("found a PNG image",)),
    "a page within gzip": (read_samples, gzip.compress(b"<html>"), ("found an HTML page",)),
    "gzip within gzip": (read_samples, gzip.compress(gzip.compress(b"{}")), ("found a gzip file", "decompress it")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_no_format_is_refused_for_its_true_cause(tmp_path: Path, name: str) -> None:
    read, data, words = REFUSED[name]
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(InputError) as error:
        read(tmp_path / "rows.jsonl", rejected=[])
    assert [word for word in ("rows.jsonl", *words) if word not in str(error.value)] == [], str(error.value)


@pytest.mark.parametrize("data", [b"PAR1\0\0PAR1", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_the_true_cause_is_named_of_every_file_of_lines(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "rows").write_bytes(data)
    with pytest.raises(InputError, match="found (a parquet file|an HTML page|a Git LFS pointer)"):
        read_logprob_rows(tmp_path / "rows", tmp_path)


# Tables of VLMEvalKit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_table_with_paths_of_images(root: Path, compressed: bool) -> None:
    table = "index\timage_path\tquestion\tanswer\n1\t1.png\tWhat?\tred\n2\t['1.png', '1.png']\tSame?\tyes\n3\tno.png\tQ\ta\n"
    data = table.encode()
    (root / "t.any").write_bytes(gzip.compress(data) if compressed else data)
    rejected: Rows = []
    samples = read_samples(root / "t.any", rejected=rejected)
    assert [(s.id, s.images, s.image_root, s.extra) for s in samples] == [
        ("1", ("1.png",), root, {}),
        ("2", ("1.png", "1.png"), root, {}),
    ]
    assert [(row["line"], row["field"]) for row in rejected] == [(4, "image")] and "no such file" in rejected[0][
        "found"
    ]


def test_a_table_s_own_image_comes_before_a_file_of_that_name(root: Path) -> None:
    code = base64.b64encode(picture(3)).decode()
    (root / "t.tsv").write_text(f"index\timage\timage_path\tquestion\tanswer\n1\t{code}\t1.png\tWhat?\tred\n")
    [sample] = read_samples(root / "t.tsv", rejected=[])
    assert (sample.image_root / sample.images[0]).read_bytes() == picture(3)


# Image roots and links ------------------------------------------------------------------------------------------------


def test_images_lie_below_the_first_root_that_has_them(tmp_path: Path) -> None:
    for number, name in ((1, "a/1.png"), (2, "a/2.png"), (3, "b/2.png"), (4, "b/3.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    base = SAMPLES["ours"][1]
    images = (["1.png"], ["2.png"], ["3.png"], ["1.png", "3.png"], ["4.png"], ["../c.png"], [])
    rows = [base | {"id": str(n), "image": None, "images": names} for n, names in enumerate(images)]
    rejected: Rows = []
    samples = read_samples(write(tmp_path, rows), image_root=[tmp_path / "a", tmp_path / "b"], rejected=rejected)
    data = [[(s.image_root / name).read_bytes() for name in s.images] for s in samples]
    assert data == [[picture(1)], [picture(2)], [picture(4)], [picture(1), picture(4)], []]
    assert [row["line"] for row in rejected] == [5, 6]
    assert "no such file" in rejected[0]["found"] and "a path below" in rejected[1]["expected"]


def test_links_lead_out_of_the_root_only_where_that_is_set(tmp_path: Path) -> None:
    for folder in ("root", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(picture(1))
    (tmp_path / "root" / "2.png").write_bytes(picture(2))
    os.symlink(tmp_path / "elsewhere" / "1.png", tmp_path / "root" / "file.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "root" / "folder")
    base = SAMPLES["ours"][1]
    names = (
        "file.png",
        "folder/1.png",
        "2.png",
        "../elsewhere/1.png",
        str(tmp_path / "elsewhere/1.png"),
        "folder/../1.png",
    )
    file = write(tmp_path, [base | {"id": str(n), "image": name} for n, name in enumerate(names)])
    rejected: Rows = []
    [sample] = read_samples(file, image_root=tmp_path / "root", rejected=rejected)
    assert sample.images == ("2.png",) and [row["line"] for row in rejected] == [1, 2, 4, 5, 6]
    rejected = []
    samples = read_samples(file, image_root=tmp_path / "root", rejected=rejected, follow_links=True)
    assert [(s.image_root / s.images[0]).read_bytes() for s in samples] == [picture(1), picture(1), picture(2)]
    assert (samples[2].image_root, samples[2].images) == (tmp_path / "root", ("2.png",))
    assert [row["line"] for row in rejected] == [4, 5, 6]


# What the model should be shown ---------------------------------------------------------------------------------------

SHOWN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "an untyped part": (
        read_samples,
        {"messages": [{"role": "user", "content": [{"image": "1.png"}]}, SAID]},
        "messages",
    ),
    "an input_image": (
        read_samples,
        {"messages": [{"role": "user", "content": [{"type": "input_image", "image_url": "1.png"}]}, SAID]},
        "messages",
    ),
    "an image in a part of text": (
        read_samples,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "1.png"}]}, SAID]},
        "messages",
    ),
    "a text in a part of an image": (
        read_samples,
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png", "text": "a"}]}, SAID]},
        "messages",
    ),
    "pixels that a part asks for": (
        read_samples,
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png", "max_pixels": 9}]}, SAID]},
        "messages",
    ),
    "images of a turn": (read_samples, {"messages": [ASKED | {"images": ["1.png"]}, SAID]}, "messages"),
    "a video of a turn": (read_samples, {"conversations": [HUMAN | {"video": "1.mp4"}, GPT]}, "conversations"),
    "LLaVA's video": (read_samples, {"conversations": [HUMAN, GPT], "video": "1.mp4"}, "video"),
    "a video beside a question": (read_samples, {"id": 1, "question": "q", "answer": "a", "video": "1.mp4"}, "video"),
    "an image under another name": (
        read_samples,
        {"id": 1, "question": "q", "answer": "a", "image_path": "1.png"},
        "image_path",
    ),
    "a pair's image under another name": (read_preferences, {"prompt": "q", **PAIR_TEXTS, "img": "1.png"}, "img"),
    "a system prompt": (read_samples, {"id": 1, "question": "q", "answer": "a", "system_prompt": "s"}, "system_prompt"),
    "a system prompt beside conversations": (
        read_samples,
        {"conversations": [HUMAN, GPT], "image": "1.png", "system_prompt": "s"},
        "system_prompt",
    ),
    "a system prompt of TRL's": (read_preferences, {"prompt": [ASKED], "images": ["1.png"], "system": "s"}, "system"),
    "another prompt's settings": (
        read_preferences,
        {"prompt": "q", **PAIR_TEXTS, "chat_template_kwargs": {"enable_thinking": False}},
        "chat_template_kwargs",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_would_not_be_shown_is_refused_by_name(root: Path, name: str) -> None:
    read, row, field = SHOWN[name]
    if field == "system":
        row = row | {"chosen": [SAID], "rejected": [OTHER]}
    rejected: Rows = []
    assert read(write(root, [row]), rejected=rejected) == []
    assert [bad["field"] for bad in rejected] == [field], rejected


VICUNA = "A chat between a user and an assistant. USER: <image>\nWhat? ASSISTANT:"
TEMPLATED: dict[str, tuple[str, bool]] = {  # text, and whether it is a prompt
    "LLaVA-1.5": ("USER: <image>\nWhat? ASSISTANT:", True),
    "Vicuna": (VICUNA, True),
    "Vicuna without an end": ("USER: <image>\nWhat?", True),
    "ChatML": ("<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n", True),
    "Llama 3": ("<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>", True),
    "Llama 2": ("<s>[INST] What? [/INST]", True),
    "Llama 2's turns": ("<s>[INST] What? [/INST] That.</s><s>[INST] Why? [/INST]", True),
    "a beginning token": ("<s>What?", True),
    "Vicuna's turns": ("<s> USER: What? ASSISTANT: That.</s>USER: Why? ASSISTANT:", True),
    "a beginning token and a role": ("<s>ASSISTANT: That, <s>so</s> it is.", False),
    "Gemma": ("<start_of_turn>user\nWhat?<end_of_turn>\n", True),
    "Anthropic's": ("\n\nHuman: What?\n\nAssistant:", True),
    "Alpaca": ("Below is an instruction.\n\n### Instruction:\nWhat?\n\n### Response:\n", True),
    "an end token": ("That.</s>", False),
    "ChatML's end": ("That.<|im_end|>\n", False),
    "Llama 3's end": ("That.<|eot_id|>", False),
    "Gemma's end": ("That.<end_of_turn>\n", False),
    "a role": ("ASSISTANT: That.", False),
}


@pytest.mark.parametrize("name", TEMPLATED)
def test_rows_that_were_templated_before_are_refused_by_name(root: Path, name: str) -> None:
    text, is_prompt = TEMPLATED[name]
    pair, sample = PAIRS["ours"][1], SAMPLES["ours"][1]
    fields = ("prompt", "question") if is_prompt else ("rejected", "answer")
    for read, row, field in ((read_preferences, pair, fields[0]), (read_samples, sample, fields[1])):
        rejected: Rows = []
        assert len(read(write(root, [row, row | {field: text, "id": "t"}]), rejected=rejected)) == 1
        assert [(bad["line"], bad["field"], bad["expected"]) for bad in rejected] == [
            (2, field, "a text without a chat template")
        ]
    asked = {"images": ["1.png"], "prompt": "What?", "response": "That."} | {
        "prompt" if is_prompt else "response": text
    }
    with pytest.raises(InputError, match="line 1.*without a chat template"):
        read_logprob_rows(write(root, [asked]), root)


@pytest.mark.parametrize(
    "text",
    [
        "What does </s> mean?",
        "User: or ASSISTANT: who spoke?",
        "Is <|im_end|> a token?",
        "What says the USER: it?",
        "<s>9 $</s> 5 $: what is it?",
    ],
)
def test_texts_that_speak_of_templates_are_read(root: Path, text: str) -> None:
    rows = [{"id": "a", "question": text, "answer": "a"}, {"id": "b", "question": "q", "answer": f"{text} So."}]
    assert len(read_samples(write(root, rows), rejected=[])) == 2


# Settings, commands ---------------------------------------------------------------------------------------------------


def test_settings_of_old_runs_are_the_same_identity() -> None:
    old = {"name": "a", "format": "jsonl", "path": "a.jsonl", "image_root": "images"}
    found = Config.model_validate({"data": {"train": [old]}}).identity()["data"]["train"]
    assert found == [
        old | {"split": "train", "limit": 0, "seed": 0, "check_images": True, "use": ["rationale", "calibration"]}
    ]
    new = DatasetConfig(name="a", path=("a.jsonl", "b*.jsonl"), image_root=("x", "y"), duplicate_ids="rename")
    found = Config.model_validate({"data": {"train": [new]}}).identity()["data"]["train"][0]
    assert found["path"] == ["a.jsonl", "b*.jsonl"] and found["duplicate_ids"] == "rename" and found["format"] == "auto"


# Of each section whose settings are part of what names unfinished work, those of version 0.1.
OF_VERSION_0_1 = {
    "scorer": ("path verdict mode token_budget dtype pairs adaptive_margin adaptive_contenders adaptive_audit"),
    "candidates": (
        "samples num_candidates num_beams proposals temperature top_p max_sentences max_sentence_tokens max_new_tokens "
        "length_penalty diversity batch_size cuda_graphs"
    ),
    "curation": (
        "pairs_per_sample pair_choice min_margin min_confidence min_rating max_length_ratio weighting pairing"
    ),
    "dpo": (
        "epochs micro_batch_size gradient_accumulation_steps token_budget learning_rate warmup_ratio weight_decay "
        "max_grad_norm min_learning_rate_ratio optimizer activation_checkpointing loader_workers beta loss_type "
        "label_smoothing sft_weight rehearsal_weight reuse_generation_logprobs"
    ),
}


@pytest.mark.parametrize("section", OF_VERSION_0_1)
def test_younger_settings_name_work_only_where_they_are_set(section: str) -> None:
    assert " ".join(Config().identity()[section]) == OF_VERSION_0_1[section]


def test_a_younger_setting_that_is_set_names_other_work() -> None:
    found = Config.model_validate({"dpo": {"preference_weight": 0.5}}).identity()["dpo"]
    assert found == Config().identity()["dpo"] | {"preference_weight": 0.5}


@pytest.mark.parametrize("source", [*SAMPLES, *PAIRS])
def test_every_format_is_converted_to_ours(root: Path, source: str) -> None:
    row = (SAMPLES if source in SAMPLES else PAIRS)[source][1]
    for target_format in ("jsonl", "llava" if source in SAMPLES else "trl"):
        file, rejected = write(root, [row]), []
        count = convert(file, root / "out", source_format="auto", target_format=target_format, rejected=rejected)
        read = read_samples if source in SAMPLES else read_preferences
        again = read(root / "out", rejected=rejected)
        assert len(again) == count and rejected == []
        assert [r.images for r in again] == [r.images for r in read(file, rejected=[])]


def test_pictures_within_a_file_are_written_beside_what_it_is_converted_to(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"question": "What?", **PAIR_TEXTS, "image": {"bytes": picture(1), "path": "a.png"}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    (tmp_path / "out").mkdir()
    result = CliRunner().invoke(
        app, ["convert", str(tmp_path / "pairs.parquet"), str(tmp_path / "out" / "pairs.jsonl")]
    )
    assert result.exit_code == 0, result.output
    [pair] = read_preferences(tmp_path / "out" / "pairs.jsonl", rejected=[])
    assert (tmp_path / "out" / pair.images[0]).read_bytes() == picture(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.parquet"]


def test_data_of_the_command_line_may_be_several_files_or_a_glob(root: Path) -> None:
    rows = [SAMPLES["ours"][1] | {"id": name} for name in "abc"]
    files = [write(root, [row], f"{number}.rows") for number, row in enumerate(rows)]
    for source, name in (
        (Source(files[0], None, None, more=tuple(files[1:])), "0"),
        (Source(root / "*.rows", None, None), "data"),
        (Source(root / "[012].ro*", "jsonl", root), "012"),
    ):
        [dataset] = datasets(Config(), source, "rationale")
        assert [sample.id for sample in read_dataset(dataset, root, [])] == ["a", "b", "c"] and dataset.name == name
    with pytest.raises(ConfigError, match="--duplicate-ids: expected reject or rename, found 'drop'"):
        datasets(Config(), Source(files[0], None, None, duplicate_ids="drop"), "rationale")
    with pytest.raises(ConfigError, match="found .*0.rows, which is .*0.rows"):
        check_output(None, root / "0.rows", (root / "*.rows",), is_file=True)


@pytest.mark.parametrize("name", ["\U0001f600", "a\x7fb", "a\u2028b", "a 'b' \"c\", d: e #f\\g", "é" * 200])
def test_data_of_the_command_line_may_have_any_name(root: Path, name: str) -> None:
    file = str(root / name)
    [dataset] = datasets(Config(), Source(Path(file), None, Path(file)), "rationale")
    assert (dataset.name, dataset.path, dataset.image_root) == (name, file, file)

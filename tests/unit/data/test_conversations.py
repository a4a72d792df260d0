"""Conversations of other projects' formats: turns, system texts and images stay in place and order, or the record is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.seeds import fresh_rng
from PIL import Image

from srcfast.data.convert import convert
from srcfast.data.readers import read_logprob_rows, read_preferences, read_samples
from srcfast.data.records import Preference, Sample
from srcfast.data.turns import IMAGE_MARK, Turn, messages_of
from srcfast.errors import InputError

IMAGES = ("a.png", "b.png", "c.png")
SYSTEM = Turn("system", "Be brief.")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in IMAGES:
        Image.fromarray(fresh_rng().integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def samples_of(root: Path, format: str, *rows: dict[str, Any]) -> tuple[list[Sample], list[dict[str, Any]]]:
    rejected: list[dict[str, Any]] = []
    file = root / "rows.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_samples(file, format=format, image_root=root, rejected=rejected), rejected


def pairs_of(root: Path, format: str, *rows: dict[str, Any]) -> tuple[list[Preference], list[dict[str, Any]]]:
    rejected: list[dict[str, Any]] = []
    file = root / "pairs.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    return read_preferences(file, format=format, image_root=root, rejected=rejected), rejected


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str, **more: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **more}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


PICTURE = {"type": "image"}
HISTORY = (Turn("user", "What is it?"), Turn("assistant", "A cat."))


# Where images stand ---------------------------------------------------------------------------------------------------

# (question, images) -> question in the record; contents of the messages
PLACED: list[tuple[str, int, str, list[str]]] = [
    ("What?", 1, "What?", ["image", "What?"]),
    (" What?\n", 0, " What?\n", [" What?\n"]),
    ("<image>\nWhat?", 1, "What?", ["image", "What?"]),
    ("<image> <image>\n What? \n", 2, "What?", ["image", "image", "What?"]),
    ("What?\n<image>", 1, "What?\n<image>", ["What?\n", "image"]),
    ("Is <image> as <image>?", 2, "Is <image> as <image>?", ["Is ", "image", " as ", "image", "?"]),
    ("<image>\nor <image>", 2, "<image>or <image>", ["image", "or ", "image"]),
    (
        "1: <image>\n2: <image>\nSame?",
        2,
        "1: <image>\n2: <image>\nSame?",
        ["1: ", "image", "\n2: ", "image", "\nSame?"],
    ),
]


def contents(messages: list[dict[str, Any]]) -> list[list[str]]:
    return [[part.get("text", "image") for part in message["content"]] for message in messages]


@pytest.mark.parametrize(("question", "count", "stored", "parts"), PLACED)
def test_an_image_stands_where_its_mark_does(
    question: str, count: int, stored: str, parts: list[str], root: Path
) -> None:
    images = list(IMAGES[:count])
    plain = {"id": "s", "images": images, "question": question, "answer": "yes"}
    talk = {"id": "s", "images": images, "conversations": [human(question), gpt("yes")]}
    chat = {"id": "s", "images": images, "messages": [said("user", question), said("assistant", "yes")]}
    pair = {"images": images, "prompt": question, "chosen": "yes", "rejected": "no"}
    for format, row in (("jsonl", plain), ("llava", talk), ("messages", chat)):
        [sample], rejected = samples_of(root, format, row)
        expected = stored if format == "jsonl" else stored.strip()
        assert not rejected and (sample.question, sample.images, sample.turns) == (expected, tuple(images), ())
        [again], _ = samples_of(root, "jsonl", sample.to_json())
        assert again == sample
    for format in ("jsonl", "trl"):
        [preference], rejected = pairs_of(root, format, pair)
        assert not rejected and preference.prompt == stored
    assert contents(messages_of((), stored, count)) == [parts]


def test_images_without_marks_stand_before_the_first_question(root: Path) -> None:
    turns = [SYSTEM.to_json(), *(turn.to_json() for turn in HISTORY)]
    row = {"id": "s", "images": ["a.png", "b.png"], "turns": turns, "question": "Sure?", "answer": "yes"}
    [sample], _ = samples_of(root, "jsonl", row)
    assert sample.turns == (SYSTEM, *HISTORY) and sample.to_json() == row
    expected = [["Be brief."], ["image", "image", "What is it?"], ["A cat."], ["Sure?"]]
    assert contents(messages_of(sample.turns, sample.question, 2)) == expected
    marked = [SYSTEM.to_json(), said("user", "<image>\n<image>\nWhat is it?"), turns[2]]
    [same], _ = samples_of(root, "jsonl", row | {"turns": marked})
    assert same == sample


def test_a_mark_in_a_later_turn_stays_there(root: Path) -> None:
    row = {
        "id": "s",
        "images": list(IMAGES),
        "turns": [
            said("user", "Look: <image>"),
            said("assistant", "Yes."),
            said("user", "<image>"),
            said("assistant", "?"),
        ],
        "question": "<image>\nAnd this?",
        "answer": "yes",
    }
    [sample], _ = samples_of(root, "jsonl", row)
    expected = [["Look: ", "image"], ["Yes."], ["image"], ["?"], ["image", "And this?"]]
    assert contents(messages_of(sample.turns, sample.question, 3)) == expected
    [again], _ = samples_of(root, "jsonl", sample.to_json())
    assert again == sample


# Formats --------------------------------------------------------------------------------------------------------------


def test_each_answer_of_a_conversation_is_a_response_after_what_precedes_it(root: Path) -> None:
    turns = [
        human("Hi."),
        gpt("Hello."),
        human("<image>\nWhat is it?"),
        gpt("A cat."),
        human("And <image>?"),
        gpt("A dog."),
    ]
    row = {
        "id": 4,
        "system": "Be brief.",
        "images": ["a.png", "b.png"],
        "conversations": turns,
        "rationale": "It greets.",
    }
    names = {"human": "user", "gpt": "assistant"}
    messages = [said(names[turn["from"]], turn["value"]) for turn in turns]
    chat = {key: value for key, value in row.items() if key not in ("conversations", "system")}
    by_format = {
        "llava": row,
        "messages": chat | {"messages": [said("system", "Be brief."), *messages]},
    }
    read = {format: samples_of(root, format, one) for format, one in by_format.items()}
    assert read["llava"] == read["messages"]
    samples, rejected = read["llava"]
    assert not rejected
    first = (Turn("user", "Hi."), Turn("assistant", "Hello."))
    second = (Turn("user", "<image>What is it?"), Turn("assistant", "A cat."))
    assert [(s.id, s.turns, s.question, s.answer, s.images, s.rationale) for s in samples] == [
        ("4", (SYSTEM,), "Hi.", "Hello.", (), "It greets."),
        ("4-1", (SYSTEM, *first), "<image>What is it?", "A cat.", ("a.png",), None),
        ("4-2", (SYSTEM, *first, *second), "And <image>?", "A dog.", ("a.png", "b.png"), None),
    ]


def test_parts_name_their_images_or_the_record_does(root: Path) -> None:
    def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"id": "s", "messages": [said("user", list(parts)), said("assistant", [text("yes")])], **more}

    def image(key: str, value: Any) -> dict[str, Any]:
        return {"type": "image", key: value}

    url = {"type": "image_url", "image_url": {"url": "b.png"}}
    rows = [
        chat(text("Is "), image("path", "a.png"), text("as "), url, text("?")),
        chat(
            text("Is "),
            image("image", "a.png"),
            text("as "),
            image("url", "b.png"),
            text("?"),
            images=["a.png", "b.png"],
        ),
        chat(text("Is "), PICTURE, text("as "), PICTURE, text("?"), images=["a.png", "b.png"]),
    ]
    for row in rows:
        [sample], rejected = samples_of(root, "messages", row)
        assert not rejected and (sample.question, sample.images) == ("Is <image>as <image>?", ("a.png", "b.png"))


def test_a_turn_without_loss_is_context(root: Path) -> None:
    for flags in (({"loss": False}, {"loss": True}), ({"weight": 0}, {"weight": 1}), ({"loss": 0.0}, {})):
        turns = [human("Hi."), gpt("Hello.", **flags[0]), human("Why?"), gpt("So.", **flags[1])]
        [sample], _ = samples_of(root, "llava", {"id": "s", "conversations": turns})
        assert (sample.id, sample.question, sample.answer) == ("s", "Why?", "So.")
        assert sample.turns == (Turn("user", "Hi."), Turn("assistant", "Hello."))


def test_the_response_of_a_query_is_the_one_to_train_on(root: Path) -> None:
    row = {
        "query": "And <image>?",
        "response": "A dog.",
        "history": [["<image>What is it?", "A cat."]],
        "system": "Be brief.",
        "images": ["a.png", "b.png"],
    }
    [sample], rejected = samples_of(root, "messages", row)
    assert not rejected and (sample.id, sample.question, sample.answer) == ("record-1", "And <image>?", "A dog.")
    assert sample.turns == (SYSTEM, Turn("user", "<image>What is it?"), Turn("assistant", "A cat."))
    [short], _ = samples_of(root, "messages", {"query": "Why?", "response": "So.", "history": None})
    assert (short.turns, short.question) == ((), "Why?")


def test_preferences_have_turns_before_the_responses(root: Path) -> None:
    prompt = [
        said("system", "Be brief."),
        said("user", [text("What is it? "), PICTURE]),
        said("assistant", [text("A cat.")]),
        said("user", "Sure?"),
    ]
    chosen, rejected_ = [said("assistant", "Yes.")], [said("assistant", [text("No.")])]
    images = {"images": ["a.png"]}
    rows = {
        "trl": [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected_} | images,
            {"chosen": prompt + chosen, "rejected": prompt + rejected_} | images,
        ],
        "messages": [
            {"messages": prompt + chosen, "rejected_response": " No.\n"} | images,
            {"messages": prompt, "chosen": chosen[0], "rejected": rejected_[0]} | images,
            {"conversations": [human("What is it? <image>"), gpt("A cat."), human("Sure?")], "system": "Be brief."}
            | {"chosen": gpt("Yes."), "rejected": gpt("No.")}
            | images,
        ],
    }
    for format, found in rows.items():
        pairs, bad = pairs_of(root, format, *found)
        assert not bad and len(pairs) == len(found)
        for pair in pairs:
            assert pair.turns == (SYSTEM, Turn("user", "What is it? <image>"), Turn("assistant", "A cat."))
            assert (pair.prompt, pair.chosen, pair.rejected, pair.images) == ("Sure?", "Yes.", "No.", ("a.png",))
            [again], _ = pairs_of(root, "jsonl", pair.to_json())
            assert again == pair


def test_a_plain_message_is_read_as_it_stands(root: Path) -> None:
    """White space of a text part beside leading images belongs to the text, as it always has."""
    row = {"prompt": [said("user", [PICTURE, text(" What?\n")])], "chosen": "a", "rejected": "b", "image": "a.png"}
    [pair], _ = pairs_of(root, "trl", row)
    assert (pair.prompt, pair.turns) == (" What?\n", ()) and "turns" not in pair.to_json()


def test_log_probabilities_are_asked_for_after_turns(root: Path) -> None:
    row = {"images": ["a.png"], "prompt": "Sure?", "response": "Yes.", "turns": [turn.to_json() for turn in HISTORY]}
    file = root / "asked.jsonl"
    file.write_text(json.dumps(row))
    [asked] = read_logprob_rows(file, root)
    assert (asked.turns, asked.question, asked.images) == (HISTORY, "Sure?", ("a.png",))
    file.write_text(json.dumps(row | {"turns": row["turns"][::-1]}))
    with pytest.raises(InputError, match=r"line 1, field 'turns'.*in pairs.*Fix"):
        read_logprob_rows(file, root)


def test_a_table_s_images_stand_where_their_numbers_do(root: Path) -> None:
    from test_readers import image_code, write_tsv  # the helpers of tables

    code = f"['{image_code(1)}', '{image_code(2)}']"
    columns = ["index", "image", "question", "hint", "A", "B", "answer"]
    rows = [
        {"index": 1, "image": code, "question": "Is <image 2> as <image 1>?", "answer": "no"},
        {
            "index": 2,
            "image": code,
            "question": "Which?",
            "A": "<image 1>",
            "B": "<image 2> or <image 1>",
            "answer": "A",
        },
        {"index": 3, "image": code, "question": "Is <image> as <image>?", "answer": "no"},
        {"index": 4, "image": code, "question": "Same?", "answer": "no"},
        {"index": 5, "image": code, "question": "Is <image 1> red?", "answer": "no"},
        {"index": 6, "image": code, "question": "Is <image 1> as <image 3>?", "answer": "no"},
        {"index": 7, "image": code, "question": "Is <image> red?", "answer": "no"},
    ]
    write_tsv(root / "t.tsv", rows, columns)
    rejected: list[dict[str, Any]] = []
    samples = read_samples(root / "t.tsv", format="vlmeval_tsv", image_root=root, rejected=rejected)
    end = "Please select the correct answer from the options above."
    assert [(s.question, s.images) for s in samples] == [
        ("Is <image> as <image>?", ("1-1.png", "1.png")),
        (f"Question: Which?\nOptions:\nA. <image>\nB. <image> or <image>\n{end}", ("2.png", "2-1.png", "2.png")),
        ("Is <image> as <image>?", ("3.png", "3-1.png")),
        ("Same?", ("4.png", "4-1.png")),
    ]
    assert [(row["sample_id"], row["field"]) for row in rejected] == [
        ("5", "question"),
        ("6", "question"),
        ("7", "images"),
    ]
    lines = root / "t.jsonl"
    convert(root / "t.tsv", lines, source_format="vlmeval_tsv", target_format="jsonl", image_root=root, rejected=[])
    options = {"source_format": "jsonl", "target_format": "vlmeval_tsv", "image_root": root, "rejected": []}
    convert(lines, root / "back.tsv", **options)
    back = read_samples(root / "back.tsv", format="vlmeval_tsv", image_root=root, rejected=[])
    assert [sample.question for sample in back] == [sample.question for sample in samples]
    for sample, old in zip(back, samples, strict=True):
        pixels = [[(s.image_root / name).read_bytes() for name in s.images] for s in (sample, old)]
        assert pixels[0] == pixels[1]


# Conversions ----------------------------------------------------------------------------------------------------------


def test_conversations_come_back_from_each_format_that_holds_them(root: Path) -> None:
    turns = [
        human("<image>\nWhat is it?"),
        gpt("A cat."),
        human("Is it as <image>?"),
        gpt("No."),
        human("Why?"),
        gpt("So."),
    ]
    row = {"id": "s", "system": "Be brief.", "images": ["a.png", "b.png"], "conversations": turns}
    samples, _ = samples_of(root, "llava", row, {"id": "t", "image": "c.png", "conversations": turns[4:]})
    assert len(samples) == 4
    options = {"image_root": root, "rejected": []}
    convert(root / "rows.json", root / "s.jsonl", source_format="llava", target_format="jsonl", **options)
    convert(root / "s.jsonl", root / "back.json", source_format="jsonl", target_format="llava", **options)
    assert read_samples(root / "back.json", format="llava", image_root=root, rejected=[]) == samples
    pairs = [
        Preference(s.id, s.images, s.question, s.answer, "never", image_root=root, turns=s.turns).to_json()
        for s in samples
    ]
    (root / "p.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    convert(root / "p.jsonl", root / "p.json", source_format="jsonl", target_format="trl", **options)
    convert(root / "p.json", root / "p2.jsonl", source_format="trl", target_format="jsonl", **options)
    assert [json.loads(line) for line in (root / "p2.jsonl").read_text().splitlines()] == pairs
    with pytest.raises(InputError, match=r"sample 's', field 'turns'.*convert to jsonl"):
        convert(root / "s.jsonl", root / "s.tsv", source_format="jsonl", target_format="vlmeval_tsv", **options)
    with pytest.raises(InputError, match=r"field 'format'.*found messages"):
        convert(root / "s.jsonl", root / "s.json", source_format="jsonl", target_format="messages", **options)


def test_messages_become_json_lines_of_samples_or_preferences(root: Path) -> None:
    turns = [said("user", "What is it? <image>"), said("assistant", "A cat.")]
    asked = [*turns, said("user", "Sure?")]
    samples = [{"messages": [*asked, said("assistant", "Yes.")], "images": ["a.png"]}]
    pairs = [{"messages": asked, "chosen": "Yes.", "rejected": "No.", "images": ["a.png"]}]
    for name, rows, count in (("samples", samples, 2), ("pairs", pairs, 1)):
        (root / f"{name}.json").write_text(json.dumps(rows))
        options = {"source_format": "messages", "target_format": "jsonl", "image_root": root, "rejected": []}
        assert convert(root / f"{name}.json", root / f"{name}.jsonl", **options) == count
        last = json.loads((root / f"{name}.jsonl").read_text().splitlines()[-1])
        assert last["turns"] == turns and last["prompt" if name == "pairs" else "question"] == "Sure?"


def test_samples_of_a_conversation_share_their_turns(root: Path) -> None:
    """A conversation of n turns has n / 2 samples, whose turns would otherwise be n^2 / 4 objects."""
    turns = [turn for number in range(20) for turn in (human(f"question {number}"), gpt(f"answer {number}"))]
    samples, _ = samples_of(root, "llava", {"id": "s", "conversations": turns})
    assert len(samples) == 20 and len({id(turn) for sample in samples for turn in sample.turns}) == 38


def test_marks_and_images_always_match(root: Path) -> None:
    """Random conversations: each sample shows as many images as are marked up to its question, in their order."""
    rng = fresh_rng()
    for _ in range(40):
        length, images, turns = int(rng.integers(1, 5)), [], []
        for number in range(length):
            count = int(rng.integers(0, 3))
            words = [f"word{number}{index}" for index in range(count + 1)]
            images += [str(rng.choice(IMAGES)) for _ in range(count)]
            turns += [human(f" {IMAGE_MARK} ".join(words)), gpt(f"answer {number}")]
        samples, rejected = samples_of(root, "llava", {"id": "s", "images": images, "conversations": turns})
        assert not rejected and len(samples) == length
        for number, sample in enumerate(samples):
            messages = messages_of(sample.turns, sample.question, len(sample.images))
            shown = [part for content in contents(messages) for part in content if part == "image"]
            assert len(shown) == len(sample.images) and list(sample.images) == images[: len(shown)]
            plain = " ".join("".join(content).replace("image", IMAGE_MARK) for content in contents(messages)[::2])
            expected = " ".join(turn["value"] for turn in turns[: 2 * number + 1 : 2])
            assert plain.replace(" ", "") == expected.replace(" ", "")

"""What is asked of a teacher, which of its draws are taken, and why others are not."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
from PIL import Image

from srcfast.data.rationale_pairs import TeacherRationale, build_raps
from srcfast.data.records import Sample
from srcfast.data.turns import Turn
from srcfast.endpoint.client import Answer, Refused, Unanswered
from srcfast.errors import InputError
from srcfast.stages.teaching import (
    INSTRUCTIONS,
    Drawing,
    Taught,
    build_body,
    needs_no_teacher,
    read_draw,
    rows_in_order,
)

TAGGED = "<see> A red cube lies left. </see> <think> So one cube is red. </think> <answer> 1 </answer>"


def sample(**more: object) -> Sample:
    return Sample(**{"id": "s", "images": (), "question": "How many?", "answer": "1"} | more)  # type: ignore[arg-type]


def answered(text: str, truncated: bool = False) -> Answer:
    return Answer(text, truncated, 1, 1)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (answered(TAGGED), ""),
        (answered(f"\n{TAGGED}\n"), ""),
        (answered(f"<think> hm, {'long ' * 99} </think>\n{TAGGED}"), ""),
        (answered(TAGGED.replace("> 1 <", "> One. <")), ""),
        (answered("A red cube lies left. So one cube is red. Answer: 1"), ""),
        (answered(TAGGED.replace("> 1 <", "> 2 <")), "wrong_answer"),
        (answered("1"), "no_rationale"),
        (answered("<see> A red cube lies left. </see> <think> So", truncated=True), "cut_off"),
        (answered("<see> A red cube lies left. </see> <think> So"), "unreadable"),
        (answered(f"{TAGGED} {TAGGED}"), "unreadable"),
        (answered(""), "unreadable"),
        (Refused("too long"), "refused"),
        (Unanswered("timed out"), "unanswered"),
        (InputError(expected="an image", found="none"), "unreadable_image"),
    ],
)
def test_which_draws_are_taken(outcome: Answer | Refused | Unanswered | InputError, reason: str) -> None:
    entry, why = read_draw(sample(), outcome)
    assert why == reason and (entry is None) == bool(reason)
    if entry is not None:
        [(_, response)], dropped = build_raps([sample()], teacher={"s": entry})
        assert not dropped and response == TAGGED


def test_an_answer_within_the_tolerance_is_right_and_the_gold_one_is_trained_on() -> None:
    near = sample(answer="100", extra={"tolerance": 0.05})
    entry, reason = read_draw(near, answered(TAGGED.replace("> 1 <", "> 103 <")))
    assert reason == "" and entry is not None and entry.answer == "103"
    assert build_raps([near], teacher={"s": entry})[0][0][1].endswith("<answer> 100 </answer>")


def test_who_needs_no_teacher() -> None:
    assert needs_no_teacher(sample()) is None and needs_no_teacher(sample(facts=("A.",), rationale=" ")) is None
    assert needs_no_teacher(sample(rationale="So it is.")) == "has_rationale"
    assert needs_no_teacher(sample(answer=" ")) == "no_answer"


def test_a_request_has_pictures_where_they_stand_and_no_gold_answer(tmp_path: Path) -> None:
    for name, size, colour in (
        ("a.png", (20, 10), "red"),
        ("b.png", (700, 600), "blue"),
        ("c.png", (4096, 64), "green"),
    ):
        Image.new("RGB", size, colour).save(tmp_path / name)
    turns = (Turn("system", "Be brief."), Turn("user", "<image>And here?"), Turn("assistant", "A cube."))
    asked = sample(
        images=("a.png", "b.png", "c.png"),
        question="Is <image> like <image>?",
        answer="SECRET",
        turns=turns,
        image_root=tmp_path,
    )
    request = build_body(asked, 3, Drawing(temperature=0.5, max_tokens=99))
    body = request.body()
    messages = body["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == "A cube."
    last = messages[3]["content"]
    assert [part["type"] for part in last] == ["text", "image_url", "text", "image_url", "text"]
    assert last[4]["text"] == f"?\n\n{INSTRUCTIONS}"
    urls = [messages[1]["content"][0]["image_url"]["url"], last[1]["image_url"]["url"], last[3]["image_url"]["url"]]
    assert [url.split(";")[0] for url in urls] == ["data:image/png", "data:image/jpeg", "data:image/png"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
    assert [picture.size for picture in pictures] == [(20, 10), (700, 600), (2048, 32)]
    assert pictures[0].convert("RGB").getpixel((5, 5)) == (255, 0, 0)
    assert (body["temperature"], body["seed"], request.max_tokens) == (0.5, 3, 99)
    assert "SECRET" not in str(body) and "data:" not in str(request.content)


def test_the_content_changes_with_a_picture_s_pixels_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    contents = [
        build_body(sample(images=("a.png",), image_root=folder), 0, Drawing()).content for folder in (first, second)
    ]
    assert contents[0] == contents[1]
    Image.new("RGB", (8, 8), (254, 0, 0)).save(second / "a.png")
    assert build_body(sample(images=("a.png",), image_root=second), 0, Drawing()).content != contents[0]


def test_text_alone_is_sent_as_text() -> None:
    request = build_body(sample(), 0, Drawing())
    assert request.body()["messages"] == [{"role": "user", "content": f"How many?\n\n{INSTRUCTIONS}"}]


def test_lines_are_in_the_samples_order() -> None:
    taught = Taught({name: TeacherRationale(f"So {name}.", name) for name in ("b", "a")}, {"c": "wrong_answer"})
    samples = [sample(id=name) for name in ("a", "c", "b")]
    assert list(rows_in_order(samples, taught)) == [
        {"id": "a", "rationale": "So a.", "answer": "a"},
        {"id": "b", "rationale": "So b.", "answer": "b"},
    ]

"""What is written as a response is read back; whatever else a model writes is read in linear time or left unparsed."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srcfast.data.rationale_format import (
    UNPARSED,
    ParsedResponse,
    answer_position,
    format_response,
    leave_out_each,
    normalise_answer,
    parse_response,
    split_sentences,
    with_answer_of,
)
from srcfast.errors import InputError

WORD = st.one_of(
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=9).filter(
        lambda word: word not in ("dr", "mr", "mrs", "ms", "prof", "st", "vs", "etc", "approx", "fig", "no", "cf")
    ),
    st.sampled_from(["3.5", "e.g. this", "Dr. Who", "<", "x<y", "(so)", '"red"', "U.S. ball", "1,000"]),
)
SENTENCE = st.builds(
    lambda words, last, end: " ".join((*words, last)) + end,
    st.lists(WORD, max_size=6),
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=8, max_size=9),
    st.sampled_from([".", "?", "!", '."', "...", ".)"]),
)
SENTENCES = st.lists(SENTENCE, max_size=4)
ANSWER = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
PIECE = st.sampled_from(
    [
        "<see>",
        "</see>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "Answer:",
        "a. ",
        "e.g. ",
        "\n",
        " ",
        "1. ",
        ".",
        '"',
        "<",
        "x",
    ]
)


@given(SENTENCES, SENTENCES, ANSWER)
def test_tagged_responses_read_back(see: list[str], think: list[str], answer: str) -> None:
    parsed = parse_response(format_response(see, think, answer, "tagged"))
    assert parsed == ParsedResponse(tuple(see), tuple(think), answer)
    assert parsed.has_rationale == bool(see or think)


@given(SENTENCES, SENTENCES, ANSWER)
def test_plain_responses_read_back(see: list[str], think: list[str], answer: str) -> None:
    parsed = parse_response(format_response(see, think, answer, "plain"))
    assert parsed == ParsedResponse((), (*see, *think), answer)
    assert parsed.rationale == " ".join((*see, *think))


@settings(max_examples=300)
@given(st.one_of(st.text(), st.lists(PIECE, max_size=30).map("".join)))
def test_any_text_is_read_or_left_unparsed(text: str) -> None:
    parsed = parse_response(text)
    assert parsed.answer is None or parsed.answer.strip() == parsed.answer != ""
    assert parsed.answer is not None or parsed == UNPARSED
    kept = "".join((*parsed.perception, *parsed.reasoning, parsed.answer or ""))
    assert len(kept) <= len(text)


@given(SENTENCES, SENTENCES, st.text(max_size=12), st.sampled_from(["tagged", "plain"]))
def test_what_would_not_read_back_is_refused(see: list[str], think: list[str], answer: str, form: str) -> None:
    try:
        text = format_response(see, think, answer, form)
    except InputError:
        return
    assert parse_response(text).answer == answer.strip() != ""


@pytest.mark.parametrize(
    "unit", ["<see>", "a. ", "A. ", "e.g. ", "1. ", ". ", " ", "\n", '."', "<", "Answer: ", "</answer> "]
)
@pytest.mark.parametrize("around", [("", ""), ("<see> ", "</see> <answer> red </answer>"), ("", "Answer: red")])
def test_long_responses_are_read_in_linear_time(unit: str, around: tuple[str, str]) -> None:
    def seconds(size: int) -> float:
        text = around[0] + unit * (size // len(unit)) + around[1]
        start = time.process_time()
        parse_response(text)
        return time.process_time() - start

    # Quadratic time would take 100 times as long for 10 times the text; the machine may be busy.
    small, large = min(seconds(25_000) for _ in range(3)), seconds(250_000)
    assert large < 40 * small + 0.5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "one two three four five six",
        "red\nblue",
        "It is red. Answer: red\nAnswer: blue",
        "Answer: red Answer: blue",
        "Answer:",
        "Answer: red\nbecause it is",
        "<see> A. </see> <answer> red </answer> <answer> blue </answer>",
        "<see> A. </see> <answer> red </answer> and more",
        "<see> A. </see> and <answer> red </answer>",
        "<answer> red </answer> <see> A. </see>",
        "<see> A. <think> B. </think> </see> <answer> red </answer>",
        "<see> A. </see> <answer>  </answer>",
        "<see> A. </see> <think> B.",
    ],
)
def test_what_gives_no_single_answer_is_unparsed(text: str) -> None:
    assert parse_response(text) == UNPARSED


def test_bare_short_answers_have_no_rationale() -> None:
    parsed = parse_response("  two red balls \n")
    assert parsed.answer == "two red balls" and not parsed.has_rationale


def test_a_list_keeps_its_items_whole() -> None:
    text = (
        "1. There is a ball.\n2. It is red. It shines.\n"
        "- The box (see Fig. 2) is 3.5 m wide, e.g. here.\na) so it goes\n\n**Answer:** red"
    )
    parsed = parse_response(text)
    assert parsed.answer == "red"
    assert parsed.reasoning == (
        "1. There is a ball.",
        "2. It is red.",
        "It shines.",
        "- The box (see Fig. 2) is 3.5 m wide, e.g. here.",
        "a) so it goes",
    )


@given(st.text())
def test_splitting_loses_nothing_but_space(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        (" \n ", []),
        ("It is red", ["It is red"]),
        ("It is red. It rolls!", ["It is red.", "It rolls!"]),
        ("Is it red? Yes.", ["Is it red?", "Yes."]),
        ("It is 3.5 m wide. So it is wide.", ["It is 3.5 m wide.", "So it is wide."]),
        ("It holds fruit, e.g. apples. It is full.", ["It holds fruit, e.g. apples.", "It is full."]),
        ("Dr. Who is here. He waves.", ["Dr. Who is here.", "He waves."]),
        ("The U.S. flag hangs. It is old.", ["The U.S. flag hangs.", "It is old."]),
        ('The sign says "Stop." It is red.', ['The sign says "Stop."', "It is red."]),
        ("It rolls (fast.) It stops.", ["It rolls (fast.)", "It stops."]),
        ("It rolls... It stops.", ["It rolls...", "It stops."]),
        ("One line\nanother line", ["One line", "another line"]),
        ("1. A ball. 2. A box.", ["1. A ball.", "2. A box."]),
    ],
)
def test_sentences_end_where_readers_end_them(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("", ""),
        (" Red. ", "red"),
        ("GREY", "gray"),
        ("The  two\tballs", "2 balls"),
        ("twelve", "12"),
        ("3.5", "3.5"),
        ("theatre", "theatre"),
        ("someone", "someone"),
        ("yes!", "yes"),
        ("an apple", "apple"),
        ("a the an apple", "apple"),  # all articles in front, and none behind
        ("apple an", "apple an"),
        ("the a", "a"),
        ("zero", "0"),
        ("a dozen", "dozen"),
    ],
)
def test_answers_are_normalised(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal


@pytest.mark.parametrize("unit", ["<see>", "a. "])
def test_a_megabyte_is_read_within_a_second(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()  # takes a tenth of it; time on the clock would tell of other work on the machine
    parse_response(text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Two.", "2"),
        ("the Red ball", "red ball"),
        ("A grey cube!", "gray cube"),
        ("**yes**", "Yes"),
        ("an apple", "apple"),
    ],
)
def test_answers_that_mean_the_same_are_equal(one: str, other: str) -> None:
    assert normalise_answer(one) == normalise_answer(other)


def test_a_lone_article_is_an_answer() -> None:
    assert normalise_answer("A") == "a" and normalise_answer("no") != normalise_answer("yes")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("one two three four five", "one two three four five"),  # as many words as a bare answer may have
        ("one two three four five six", None),
        ("red\nblue", None),
        ("Answer: one two three four five six", "one two three four five six"),
    ],
)
def test_a_bare_answer_has_up_to_five_words(text: str, answer: str | None) -> None:
    assert parse_response(text).answer == answer


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("1. It is red. 2. It is small.", ["1. It is red.", "2. It is small."]),
        ("(10) It is red. (11) It is small.", ["(10) It is red.", "(11) It is small."]),
        ("It is red.\n100. It is small.", ["It is red.", "100. It is small."]),
        ("a) It is red. B. It is small.", ["a) It is red.", "B. It is small."]),
        ("It has 10. It is red.", ["It has 10.", "It is red."]),
        ('He said "no." Then he left!', ['He said "no."', "Then he left!"]),
        ("Dr. No is, e.g. here. Yes", ["Dr. No is, e.g. here.", "Yes"]),
    ],
)
def test_markers_of_lists_begin_a_sentence_and_end_none(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is red. Answer: red", "red"),
        ("It is red. Answer: red Answer: blue", None),
        ("It is red. **Answer:** red", "red"),
        ("It is red. Answer: red\nblue", None),
        ("It is red. Answer:", None),
        ("<see> a. </see> <answer> b </answer> c", None),
        ("<see> a. </see> b <answer> c </answer>", None),
        ("<see> a. </see> <answer> </answer>", None),
        ("<think> a. </think> <answer> b </answer>", None),
        ("<see> a. </see> <think> b. </think> <answer> c </answer>", "c"),
    ],
)
def test_a_response_has_one_answer_at_its_end(text: str, answer: str | None) -> None:
    assert parse_response(text).answer == answer


def test_each_sentence_of_the_perception_is_left_out_and_the_rest_stays_as_it_is() -> None:
    text = "<see>  A man sits.  He holds 2.5 cups! A dog. </see> <think> He sits. </think> <answer> a </answer>"
    rest = "</see> <think> He sits. </think> <answer> a </answer>"
    assert leave_out_each(text) == [
        f"<see>  He holds 2.5 cups! A dog. {rest}",
        f"<see>  A man sits.  A dog. {rest}",
        f"<see>  A man sits.  He holds 2.5 cups! {rest}",
    ]
    twice = "<see> A cup. A dog. A cup. </see> <answer> a </answer>"
    assert leave_out_each(twice) == ["<see> A cup. A cup. </see> <answer> a </answer>"]
    for single in ("<see> A man. </see> <answer> a </answer>", "A man. A dog. Answer: a", "<see> A. B. <answer> a", ""):
        assert leave_out_each(single) == []


@settings(max_examples=200)
@given(see=st.lists(SENTENCE, min_size=2, max_size=5), think=SENTENCES, answer=ANSWER)
def test_what_is_left_out_is_that_sentence_alone(see: list[str], think: list[str], answer: str) -> None:
    text = format_response(see, think, answer, "tagged")
    whole = parse_response(text)
    shortened = [parse_response(one) for one in leave_out_each(text)]
    left_out = [index for index, one in enumerate(whole.perception) if whole.perception.count(one) == 1]
    for index, one in zip(left_out, shortened, strict=True):
        assert one.perception == whole.perception[:index] + whole.perception[index + 1 :]
        assert (one.reasoning, one.answer) == (whole.reasoning, whole.answer)


@pytest.mark.parametrize(
    ("text", "other", "joined"),
    [
        (
            "<see> A. </see> <answer> red </answer>",
            "<see> B. </see> <think> C. </think> <answer> blue </answer>",
            "<see> A. </see> <answer> blue </answer>",
        ),
        ("A is so. Answer: red", "B. **Answer:** blue", "A is so. **Answer:** blue"),
        ("A is so. Answer: red", "<see> B. </see> <answer> blue </answer>", None),
        ("red", "B. Answer: blue", None),
        ("A. Answer: red", "blue", None),
    ],
)
def test_an_answer_is_put_behind_another_rationale(text: str, other: str, joined: str | None) -> None:
    assert with_answer_of(text, other) == joined


def test_an_answer_s_mark_is_where_it_begins() -> None:
    assert answer_position("<see> A. </see> <answer> red </answer>") == 16
    assert answer_position("A is so. **Answer:** red") == 9
    assert answer_position("red") is None


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "\u6709\u7403\u3002\u5728\u5de6\u8fb9\uff01\u662f\u5417\uff1f3.5\u7c73\u3002",
            ["\u6709\u7403\u3002", "\u5728\u5de6\u8fb9\uff01", "\u662f\u5417\uff1f", "3.5\u7c73\u3002"],
        ),
        (
            "\u4ed6\u8bf4\uff1a\u201c\u597d\u3002\u201d\u8d70\u4e86\u3002",
            ["\u4ed6\u8bf4\uff1a\u201c\u597d\u3002\u201d", "\u8d70\u4e86\u3002"],
        ),
        (
            "\u8d64\u3044\uff0e\u5024\u306f\uff13\uff0e\uff15\u3060\uff0e",
            ["\u8d64\u3044\uff0e", "\u5024\u306f\uff13\uff0e\uff15\u3060\uff0e"],
        ),
        (
            "\u092f\u0939 \u0932\u093e\u0932 \u0939\u0948\u0964 \u0928\u0939\u0940\u0902\u0964",
            ["\u092f\u0939 \u0932\u093e\u0932 \u0939\u0948\u0964", "\u0928\u0939\u0940\u0902\u0964"],
        ),
        (
            "\u0623\u062d\u0645\u0631\u061f \u0646\u0639\u0645.",
            ["\u0623\u062d\u0645\u0631\u061f", "\u0646\u0639\u0645."],
        ),
    ],
)
def test_sentences_end_in_other_scripts(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences
    tagged = f"<see> {text} </see> <answer> 1 </answer>"
    assert parse_response(tagged) == ParsedResponse(tuple(sentences), (), "1")
    assert format_response(sentences, (), "1", "tagged") == f"<see> {' '.join(sentences)} </see> <answer> 1 </answer>"


@pytest.mark.parametrize(
    "mark",
    [
        *("Antwort:", "R\u00e9ponse :", "Respuesta:", "Risposta:", "\u041e\u0442\u0432\u0435\u0442:", "\uc815\ub2f5:"),
        *("\u7b54\u6848\uff1a", "**\u7b54\u6848\uff1a**", "\u7b54\u3048\uff1a"),
        *("\u0627\u0644\u0625\u062c\u0627\u0628\u0629:", "\u0909\u0924\u094d\u0924\u0930:"),
    ],
)
def test_the_mark_of_the_answer_in_other_languages(mark: str) -> None:
    assert parse_response(f"It is so. {mark} 2") == ParsedResponse((), ("It is so.",), "2")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\u7ea2\u8272", "\u7ea2\u8272"),
        ("\u4e2d\u534e\u4eba\u6c11\u5171\u548c\u56fd", "\u4e2d\u534e\u4eba\u6c11\u5171\u548c\u56fd"),
        ("\u7ea2" * 14, "\u7ea2" * 14),  # 1 + 4 words
        ("\u7ea2" * 15, None),
        ("\u0e2a\u0e35\u0e41\u0e14\u0e07", "\u0e2a\u0e35\u0e41\u0e14\u0e07"),
    ],
)
def test_a_sentence_without_spaces_is_no_bare_answer(text: str, answer: str | None) -> None:
    assert parse_response(text).answer == answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\uff12\u500b\u3002", "2\u500b"),
        ("\uff32\uff45\uff44", "red"),
        ("\u0939\u093e\u0901\u0964", "\u0939\u093e\u0901"),
        ("\u7ea2 \u8272", "\u7ea2 \u8272"),
    ],
)
def test_answers_in_other_scripts_are_normalised(text: str, normal: str) -> None:
    assert normalise_answer(text) == normal

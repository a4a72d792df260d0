"""Where sentences end while they are being written."""

from __future__ import annotations

import pytest

from srcfast.generation.sentences import TERMINATORS, needs_next, sentence_ended

ENDED = [
    "There is a dog.",
    "There is a dog. ",
    "Is it red?",
    "It is red!",
    "Wait...",
    "Wait\u2026",
    'He said "no."',
    "He said \u201cno.\u201d",
    "(It is red.)",
    "First line\n",
    "1. a ring\n",
    "It is 3.5 m. The",
    "It is 2. There",
    "It is 2. ",
    "It is 2.\n",
    "It is 2. </see>",
    "It is 2.</see>",
    'It says "3."',
    "The answer is no.",
    "It costs 3.5. Then",
    "The answer is b. Then",
]
OPEN = [
    "See e.g",
    "See e.g. a",
    "There is a dog",
    "It is 3.5",
    "It is red, e.g. a",
    "red.5",
    "<answer> 3 </answer>",
    "",
    "Mr. Smith has 3",
]
UNDECIDED = [
    "It is 3.5 m.",
    "It is 3.",
    "It is 10.",
    "for e.g.",
    "i.e.",
    "Dr.",
    "He met Mr.",
    "the U.S.",
    "J.",
    "is b.",
    "See e.",
    "etc.",
    "It is 3.5.",
]


@pytest.mark.parametrize("text", ENDED)
def test_these_have_ended(text: str) -> None:
    assert sentence_ended(text) and not needs_next(text)


@pytest.mark.parametrize("text", OPEN)
def test_these_go_on(text: str) -> None:
    assert not sentence_ended(text) and not needs_next(text)


@pytest.mark.parametrize("text", UNDECIDED)
def test_only_the_next_character_tells(text: str) -> None:
    assert not sentence_ended(text) and needs_next(text)


def test_a_decimal_written_letter_by_letter_never_ends() -> None:
    text = "The bar is 3.25 wide"
    assert not any(sentence_ended(text[:length]) for length in range(len(text)))


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It is 2. There are 3 rings. ", "It is 2. "),
        ("See e.g. Fig. 3.5 for Dr. No. ", None),
        ('He said "no." Then he left.', 'He said "no.'),
        ("A ring! Two.", "A ring!"),
    ],
)
def test_the_first_end_in_a_text_that_grows(text: str, first: str | None) -> None:
    ends = [text[:length] for length in range(1, len(text) + 1) if sentence_ended(text[:length])]
    assert (ends[0] if ends else None) == first


def test_every_ended_text_holds_a_terminator() -> None:
    """Beam search looks at a text only after a token with one of them, or while it waits for the next character."""
    for text in ENDED:
        assert set(text) & set(TERMINATORS)

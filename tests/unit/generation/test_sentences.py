"""Where sentences end while they are being written."""

from __future__ import annotations

import pytest

from srcfast.generation.sentences import TERMINATORS, SentenceEnds, needs_next, sentence_ended

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
    "\u6709\u4e00\u53ea\u72d7\u3002",  # Chinese
    "\u662f\u7ea2\u8272\u7684\u5417\uff1f",
    "\u4ed6\u8bf4\uff1a\u201c\u4e0d\uff01\u201d",
    "\u8d64\u3044\uff0e",  # Japanese
    "\u300c\u8d64\u3044\u3002\u300d",
    "\u092f\u0939 \u0932\u093e\u0932 \u0939\u0948\u0964",  # Hindi
    "\u0647\u0644 \u0647\u0630\u0627 \u0623\u062d\u0645\u0631\u061f",  # Arabic
    "\u06cc\u06c1 \u0633\u0631\u062e \u06c1\u06d2\u06d4",  # Urdu
    "\u12ed\u1205 \u1240\u12ed \u1290\u12cd\u1362",  # Amharic
    "\u17a2\u178f\u17cb\u1791\u17c1\u17d4",  # Khmer
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
    "\u6709\u4e00\u53ea\u72d7\uff0c",
    "\u503c\u662f3.5",
    "\u5024\u306f\uff13\uff0e",  # a wide decimal point, or the end
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


def test_a_full_stop_whose_bytes_are_several_tokens_is_looked_for() -> None:
    """A byte-level tokenizer without the whole character: its tokens are single bytes, which decode to no character."""

    class Bytes:
        def __len__(self) -> int:
            return 256

        def decode(self, token_ids: list[int]) -> str:
            return bytes(token_ids).decode("utf-8", errors="replace")

    ends = SentenceEnds(Bytes(), 256)
    first, second = "\u72d7\u3002", "Yes. "
    tokens = list((first + second + "\u732b").encode())
    assert ends.cut(tokens) == [6, 6 + 4, 6 + 5 + 3]

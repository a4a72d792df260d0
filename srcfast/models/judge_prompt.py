"""The texts around references and candidates by which a text LLM judges, and the spellings of its verdicts.

An R-Scorer that was trained here reads a short prompt. A language model that was not trained to judge reads instructions, in its
chat template, and answers with a verdict token at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srcfast.models.verdict_temperature import CALIBRATION

PromptKind = Literal["trained", "instructions"]
# What `srcfast scorer` and the recipes write beside an R-Scorer's weights.
RECORDS = (CALIBRATION, "TRAINING.json", "summary.json")


@dataclass(frozen=True)
class Spelling:
    """How verdicts are written: a word for each, from "the first is better" to "the second is"; each must be one token.

    Attributes:
        words: the verdicts.
        replies: the instruction's words for them.
        alone: its words for them where one candidate is rated by itself, if they differ.
    """

    words: tuple[str, ...]
    replies: str
    alone: str = ""


@dataclass(frozen=True)
class JudgePrompt:
    """The parts of a prompt: instruction, reference (of `reference_text`), the first candidate, the second and what is asked.

    Attributes:
        instruction: before the reference, in a chat template alone; `{replies}` stands for a spelling's.
        first: the first candidate, which `{text}` stands for.
        second: the second candidate, and the question.
        alone: what follows the first candidate where one candidate is rated by itself; `{alone}` stands for a spelling's.
        spellings: of each form of verdict, to be tried in order.
    """

    instruction: str
    first: str
    second: str
    alone: str
    spellings: dict[str, tuple[Spelling, ...]]


PROMPTS: dict[PromptKind, JudgePrompt] = {
    "trained": JudgePrompt(
        instruction="Which response has the better rationale and answer? Reply {replies}.\n",  # chat models need one
        first="First: {text}\n",
        second="Second: {text}\nBetter:",
        alone="Second: none\nBetter:",
        spellings={
            "choice": (
                Spelling(("first", "tie", "second"), "first, tie or second"),
                Spelling(("A", "C", "B"), "A for the first, B for the second, C for a tie"),
            ),
            "graded": (
                Spelling(("1", "2", "3", "4", "5"), "1 (the first is far better) to 5 (the second is), 3 for a tie"),
            ),
        },
    ),
    "instructions": JudgePrompt(
        instruction=(
            "Judge responses to a question about pictures, which you do not see. A response has a rationale, what is seen and"
            " what follows from it, and an answer. Take the reference for true. A right answer is better than a wrong one. Of two"
            " right answers the one is better whose rationale contradicts the reference less.\n"
        ),
        first="First response: {text}\n",
        second="Second response: {text}\nWhich response is better? Reply with {replies}, and nothing else.",
        alone="Are the answer and each statement of this response right? Reply with {alone}, and nothing else.",
        spellings={
            "choice": (
                Spelling(
                    ("1", "tie", "2"),
                    "1 for the first, 2 for the second, or tie if they are equally good",
                    "1 for yes, 2 for no, or tie if you can't say",
                ),
                Spelling(
                    ("1", "0", "2"),
                    "1 for the first, 2 for the second, or 0 if they are equally good",
                    "1 for yes, 2 for no, or 0 if you can't say",
                ),
                Spelling(
                    ("A", "C", "B"),
                    "A for the first, B for the second, or C if they are equally good",
                    "A for yes, B for no, or C if you can't say",
                ),
            ),
            "graded": (
                Spelling(
                    ("1", "2", "3", "4", "5"),
                    "a grade from 1, the first is far better, to 5, the second is far better; 3 if they are equally good",
                    "a grade from 1, all is right, to 5, all is wrong; 3 if you can't say",
                ),
            ),
        },
    ),
}


def prompt_kind(setting: str, directory: str | Path, has_chat_template: bool) -> PromptKind:
    """Return which prompt a checkpoint reads: what `scorer.prompt` says, or where that is "auto", what its files say.

    A model with a chat template and none of the files that are written beside a trained R-Scorer gets instructions.
    """
    if setting != "auto":
        return "trained" if setting == "trained" else "instructions"
    is_trained = any((Path(directory) / name).exists() for name in RECORDS)
    return "instructions" if has_chat_template and not is_trained else "trained"

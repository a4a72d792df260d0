"""An instruct model that was not trained to judge: its prompt, its verdict tokens, and its shares by transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_scorer import small_tokenizer, write_text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from srcfast.data.records import Candidate, Sample
from srcfast.errors import InputError
from srcfast.models.judge_prompt import prompt_kind
from srcfast.models.scorer import Scorer, load_scorer, scorer_hash
from srcfast.stages.scoring import score_candidates

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAMPLE = Sample("s", (), "Which colour?", "red", facts=("It is red.", "It is so."))
TEXTS = ["It is red. So it is red.", "It is blue {text}.", "green"]
RULES = (
    "Judge responses to a question about pictures, which you do not see. A response has a rationale, what is seen and what"
    " follows from it, and an answer. Take the reference for true. A right answer is better than a wrong one. Of two right"
    " answers the one is better whose rationale contradicts the reference less.\n"
)
REFERENCE = "Question: Which colour?\nFacts: It is red. It is so.\nAnswer: red\n"


def instruct_model(directory: Path, *more: str, template: str | None = TEMPLATE, words: str | None = None) -> Path:
    tokenizer: Any = small_tokenizer(*(() if words is None else (words, 300)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(list(more))
    tokenizer.chat_template = template
    return write_text_model(directory, tokenizer)


def shares_by_transformers(directory: Path, content: str, words: tuple[str, ...]) -> np.ndarray:
    """The softmax, over the words, of transformers' logits after the prompt that its template writes."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1].double()
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(each) == 1 for each in ids)
    return logits[[each[0] for each in ids]].softmax(-1).numpy()


@pytest.mark.parametrize(
    ("form", "words", "values", "reply", "alone"),
    [
        (
            "choice",
            ("1", "tie", "2"),
            (1.0, 0.5, 0.0),
            "1 for the first, 2 for the second, or tie if they are equally good",
            "1 for yes, 2 for no, or tie if you can't say",
        ),
        (
            "graded",
            ("1", "2", "3", "4", "5"),
            (1.0, 0.75, 0.5, 0.25, 0.0),
            "a grade from 1, the first is far better, to 5, the second is far better; 3 if they are equally good",
            "a grade from 1, all is right, to 5, all is wrong; 3 if you can't say",
        ),
    ],
)
def test_shares_are_those_of_transformers_on_the_templated_text(
    form: Any, words: tuple[str, ...], values: tuple[float, ...], reply: str, alone: str, tmp_path: Path
) -> None:
    directory = instruct_model(tmp_path, "tie")
    scorer = load_scorer(directory, verdict_form=form, prompt="auto")
    assert scorer.verdict_words == words and scorer.verdict_values.tolist() == list(values)
    candidates = [Candidate(str(n), "s", text, "", "", -1.0) for n, text in enumerate(TEXTS)]
    (row,) = score_candidates(scorer, [SAMPLE], {"s": candidates}, 100_000)

    def share(asked: str, first: str) -> float:
        content = f"{RULES}{REFERENCE}First response: {first}\n{asked}, and nothing else."
        return float(shares_by_transformers(directory, content, words) @ values)

    for i, first in enumerate(TEXTS):
        rated = share(f"Are the answer and each statement of this response right? Reply with {alone}", first)
        assert row["alone"][i] == pytest.approx(rated, abs=1e-5)  # fp32
        for j, second in enumerate(TEXTS):
            if i != j:
                asked = f"Second response: {second}\nWhich response is better? Reply with {reply}"
                assert row["raw"][i][j] == pytest.approx(share(asked, first), abs=1e-5)


def test_a_reference_of_lower_quality_is_stated_as_to_an_r_scorer(tmp_path: Path) -> None:
    scorer = load_scorer(instruct_model(tmp_path), prompt="auto", quality="partial")
    candidates = {"s": [Candidate(str(n), "s", text, "", "", -1.0) for n, text in enumerate(TEXTS)]}
    (row,) = score_candidates(scorer, [SAMPLE], candidates, 100_000)
    content = f"{RULES}Details are missing from the reference.\n{REFERENCE}First response: {TEXTS[0]}\n"
    content += f"Second response: {TEXTS[2]}\nWhich response is better? Reply with {scorer.spelling.replies}, and nothing else."
    shares = shares_by_transformers(tmp_path, content, scorer.verdict_words)
    assert row["raw"][0][2] == pytest.approx(float(shares @ [1.0, 0.5, 0.0]), abs=1e-5)


def test_pairs_share_the_beginning_that_they_have_in_common(tmp_path: Path) -> None:
    scorer = load_scorer(instruct_model(tmp_path), prompt="auto")
    judged = scorer.judge_tree("Question: Q?\n", TEXTS)
    segments = judged.tree.segments
    assert [segment.parent for segment in segments] == [-1, 0, 1, 1, 0, 4, 4, 0, 7, 7]
    decode = scorer.text_model.tokenizer.decode
    assert decode(segments[0].tokens) == f"<|im_start|>user\n{RULES}Question: Q?\n"
    assert decode(segments[1].tokens) == "First response: It is red. So it is red.\n"


def test_verdicts_that_are_no_token_are_spelled_otherwise_or_refused(tmp_path: Path) -> None:
    directory = instruct_model(tmp_path, words="Question Facts Answer red")
    assert load_scorer(directory, prompt="instructions").verdict_words == ("1", "0", "2")

    class Words:
        """Splits each word into two tokens."""

        chat_template = TEMPLATE
        bos_token_id = unk_token_id = None

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

    model = load_scorer(directory).text_model
    model.tokenizer = Words()
    with pytest.raises(InputError, match="each verdict is one token, found none of these spellings: '1', 'tie', '2'"):
        Scorer(model, prompt="instructions")


@pytest.mark.parametrize("record", ["calibration.json", "TRAINING.json", "summary.json"])
def test_a_trained_r_scorer_is_known_by_what_is_beside_it(record: str, tmp_path: Path) -> None:
    assert prompt_kind("auto", tmp_path, True) == "instructions"
    assert prompt_kind("auto", tmp_path, False) == "trained"
    (tmp_path / record).write_text("{}")
    assert prompt_kind("auto", tmp_path, True) == "trained"
    assert prompt_kind("instructions", tmp_path, True) == "instructions"


def test_scores_by_instructions_are_not_taken_for_those_of_a_trained_prompt(tmp_path: Path) -> None:
    directory = instruct_model(tmp_path)
    plain, instructed = (load_scorer(directory, prompt=prompt) for prompt in ("trained", "auto"))
    assert (plain.prompt_kind, instructed.prompt_kind) == ("trained", "instructions")
    assert scorer_hash(plain) != scorer_hash(instructed)
    entry = '{"complete": {"temperature": 2.0, "verdict": "choice"}}'
    (directory / "calibration.json").write_text(entry)
    assert load_scorer(directory, prompt="instructions").temperature == 1.0  # it was fitted with the other prompt
    assert load_scorer(directory, prompt="auto").temperature == 2.0


def test_instructions_need_a_chat_template(tmp_path: Path) -> None:
    directory = instruct_model(tmp_path, template=None)
    assert load_scorer(directory, prompt="auto").prompt_kind == "trained"
    with pytest.raises(InputError, match=r"'chat_template': expected a chat template.*Fix: set scorer\.prompt=trained"):
        load_scorer(directory, prompt="instructions")

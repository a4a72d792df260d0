"""The R-Scorer: a text LLM that compares two rationale-answer candidates and answers with one verdict token.

All ordered pairs of a sample's N candidates are one tree: question and reference, then each candidate as the
first, then under it each other candidate as the second, which ends with the verdict slot. Logits are computed
for the slots alone, and only of the verdict tokens. "None" may stand as the second candidate: the verdict is
then on a single candidate (independent scoring, the baseline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from srcfast.config.settings import LoRAConfig
from srcfast.data.forest import Forest, Segment, Tree
from srcfast.data.jsonl import json_hash
from srcfast.data.prefixes import share_prefixes
from srcfast.data.records import ReferenceQuality
from srcfast.errors import InputError
from srcfast.models.chat import chat_text, user_turn
from srcfast.models.checkpoint import model_hash
from srcfast.models.embedded import checkpoint_directory
from srcfast.models.head import Head
from srcfast.models.judge_prompt import PROMPTS, Spelling, prompt_kind
from srcfast.models.text_model import TextModel, load_text_model
from srcfast.models.verdict_temperature import read_calibration
from srcfast_kernels.transfers import to_device

VerdictForm = Literal["choice", "graded"]
PromptSetting = Literal["auto", "trained", "instructions"]

# The value of each verdict token in p_ij: the first candidate's share of the win.
VERDICT_VALUES: dict[str, tuple[float, ...]] = {
    "choice": (1.0, 0.5, 0.0),
    "graded": (1.0, 0.75, 0.5, 0.25, 0.0),
}

# What the prompt states of the reference that follows.
_NOTICES: dict[str, str] = {
    "complete": "",
    "noisy": "A detail of the reference may be wrong.\n",
    "partial": "Details are missing from the reference.\n",
    "answer": "The reference is the answer alone.\n",
}
ALONE = -1  # the second candidate's index there
CPU_TOKENS = 4096  # in one forward pass on a CPU: more would exceed its caches and take memory without gain


@dataclass(frozen=True)
class JudgeTree:
    """Comparisons of one sample: the tree, and per verdict slot the candidates and the slot's segment.

    `first`, `second` and `slots` are int64 [slots]; `second` is -1 where a candidate is rated alone.
    """

    tree: Tree
    first: np.ndarray
    second: np.ndarray
    slots: np.ndarray


class Scorer(nn.Module):
    """A text model with the verdict tokens that its tokenizer allows.

    Attributes:
        verdict_words: the tokens' text, from "first is better" to "second is better".
        verdict_token_ids: [K] int64.
        verdict_values: [K] fp32, the first candidate's share of the win, see VERDICT_VALUES.
        quality: what the prompt states of the references of samples that it scores.
        prompt_kind: which prompt it reads, a trained R-Scorer's or instructions.
        calibration: what `calibration.json` beside the checkpoint says of this quality; {} without it.
        temperature: by which verdict logits are divided before shares are taken of them.
    """

    verdict_token_ids: Tensor
    verdict_values: Tensor

    def __init__(
        self,
        text_model: TextModel,
        verdict_form: VerdictForm = "choice",
        quality: ReferenceQuality = "complete",
        prompt: PromptSetting = "trained",
    ) -> None:
        super().__init__()
        if verdict_form not in VERDICT_VALUES:
            raise InputError(field="verdict_form", expected="choice or graded", found=repr(verdict_form))
        self.text_model = text_model
        self.verdict_form = verdict_form
        self.quality = quality
        tokenizer = text_model.tokenizer
        chat = bool(tokenizer.chat_template)
        self.prompt_kind = prompt_kind(prompt, text_model.path, chat)
        if self.prompt_kind == "instructions" and not chat:
            expected, fix = "a chat template, in which instructions stand", "set scorer.prompt=trained"
            raise InputError(file=text_model.path, field="chat_template", expected=expected, found="none", fix=fix)
        self.prompt = PROMPTS[self.prompt_kind]
        is_trained = self.prompt_kind == "trained"  # a calibration is of the prompt that it was trained with
        self.calibration = read_calibration(text_model.path, quality, verdict_form) if is_trained else {}
        self.temperature = float(self.calibration.get("temperature", 1.0))
        self.verdict_words, ids, self.spelling = _verdict_tokens(tokenizer, self.prompt.spellings[verdict_form], chat)
        self.register_buffer("verdict_token_ids", torch.tensor(ids), persistent=False)
        self.register_buffer("verdict_values", torch.tensor(VERDICT_VALUES[verdict_form]), persistent=False)
        self.opening, self.closing = (
            _frame(tokenizer, self.prompt.instruction.format(replies=self.spelling.replies))
            if chat
            else _plain_frame(tokenizer)
        )
        self._encoded: dict[str, np.ndarray] = {}

    def forward(self, forest: Forest, rows: Tensor | None = None) -> Tensor:
        """Compute hidden states [T, D] of a forest of judge trees, or those of `rows` [M] alone: [M, D]."""
        return self.text_model(forest, rows)

    @property
    def verdict_head(self) -> Head:
        """Return the head of the verdict tokens alone, of weight [K, D], whose logits are divided by the temperature."""
        head = self.text_model.decoder.head
        weight, cap = head.weight[self.verdict_token_ids], head.softcap
        if self.temperature == 1.0:
            return replace(head, weight=weight)
        softcap = None if cap is None else cap / self.temperature
        return replace(head, weight=weight.float() / self.temperature, softcap=softcap)

    def verdict_logits(self, slots: Tensor) -> Tensor:
        """Compute logits [M, K] fp32 of the verdict tokens from the slots' hidden states [M, D], before any temperature."""
        return self.text_model.decoder.head.logits(slots, self.verdict_token_ids)

    @torch.no_grad()
    def win_and_verdict(self, slots: Tensor) -> Tensor:
        """Compute p and the value of the likeliest verdict, [2, M] fp64 on the device, from the slots' hidden states [M, D]."""
        logits = self.verdict_logits(slots)
        wins = (logits.double() / self.temperature).softmax(-1) @ self.verdict_values.double()
        return torch.stack([wins, self.verdict_values[logits.argmax(-1)].double()])

    def judge_tree(
        self,
        reference: str,
        texts: Sequence[str],
        pairs: Sequence[tuple[int, int]] | None = None,
        key: Any = None,
    ) -> JudgeTree:
        """Build the tree root -> A_i -> {B_j + verdict slot} of one sample.

        Args:
            reference: the root's text, as `reference_text` writes it.
            texts: candidates' texts.
            pairs: (first, second) indices into texts, second -1 for a candidate rated alone; default: all ordered
                pairs.
            key: the tree's key, which errors name: the sample's id.

        Raises:
            InputError: two candidates need more positions than the model has, or a text has tokens that its embedding lacks.
        """
        pairs = sorted(all_pairs(len(texts)) if pairs is None else pairs)
        root = np.concatenate([self.opening, self.encode(reference)])
        segments = [Segment(root)]
        node_of: dict[int, int] = {}
        slots = np.empty(len(pairs), dtype=np.int64)
        for slot, (first, second) in enumerate(pairs):
            if first not in node_of:
                node_of[first] = len(segments)
                segments.append(Segment(self.encode(self.prompt.first.format(text=texts[first])), 0))
            slots[slot] = len(segments)
            tokens = self.encode(self._asked(None if second == ALONE else texts[second]))
            if len(self.closing):
                tokens = np.concatenate([tokens, self.closing])
            segments.append(Segment(tokens, node_of[first]))
            length = sum(segments[number].tokens.size for number in (0, node_of[first], -1))
            if length > (most := self.text_model.decoder.config.max_positions):
                expected, fix = (
                    f"at most {most} tokens, the R-Scorer's positions",
                    "shorten candidates, or take another",
                )
                raise InputError(
                    sample_id=key, field="candidates", expected=expected, found=f"{length} tokens", fix=fix
                )
        order = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        tree = Tree(tuple(segments), key=key)
        return JudgeTree(tree, order[:, 0], order[:, 1], slots)

    def _asked(self, second: str | None) -> str:
        """Write what follows the first candidate: the second one, None where the first is rated alone, and the question."""
        if second is None:
            return self.prompt.alone.format(alone=self.spelling.alone)
        return self.prompt.second.format(text=second, replies=self.spelling.replies)

    def encode(self, text: str) -> np.ndarray:
        """Tokenize one segment, with a cache: a candidate is the second N - 1 times."""
        tokens = self._encoded.get(text)
        if tokens is None:
            if len(self._encoded) >= 200_000:
                self._encoded.clear()
            # Text of a model or a data set never becomes a control token.
            tokenizer = self.text_model.tokenizer
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
            if (size := len(self.text_model.decoder.head_weight)) <= tokens.max(initial=0):
                expected, fix = f"text of tokens below {size}, of the R-Scorer's embedding", "repair its tokenizer"
                raise InputError(file=self.text_model.path, field="text", expected=expected, found=text, fix=fix)
            self._encoded[text] = tokens
        return tokens


def all_pairs(count: int) -> list[tuple[int, int]]:
    """List the ordered pairs of `count` candidates."""
    return [(i, j) for i in range(count) for j in range(count) if i != j]


def reference_text(
    question: str,
    answer: str,
    facts: Sequence[str] = (),
    rationale: str | None = None,
    quality: ReferenceQuality = "complete",
) -> str:
    """Write the root's text: how far the reference can be trusted, the question, and the sample's reference.

    The reference is its facts, or without facts its rationale: a rationale adds nothing to complete facts, and an
    R-Scorer that sees one learns to compare wordings.
    """
    lines = [f"{_NOTICES[quality]}Question: {question}"]
    if facts:
        lines.append(f"Facts: {' '.join(facts)}")
    elif rationale:
        lines.append(f"Rationale: {rationale}")
    lines.append(f"Answer: {answer}")
    return "\n".join(lines) + "\n"


def slot_rows(forest: Forest, judged: Sequence[JudgeTree]) -> Tensor:
    """Find the verdict slots' rows [M] in the forest: the last position of each slot's segment.

    Args:
        forest: a forest of the trees of `judged`, in this order.
    """
    rows = [
        starts[slot] + comparisons.tree.segments[slot].tokens.size - 1
        for starts, comparisons in zip(forest.segment_start, judged, strict=True)
        for slot in comparisons.slots.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int64)


@torch.no_grad()
def slot_hidden(scorer: Scorer, judged: Sequence[JudgeTree], token_budget: int) -> tuple[Tensor, int]:
    """Compute the hidden states [M, D] at the verdict slots of all trees, in the order of `judged`, whatever the packing.

    Candidates with a common prefix share it, and the last layer runs for the slots alone.

    Returns:
        The hidden states, and the number of tokens run.

    Raises:
        InputError: a tree doesn't fit into the token budget; it names the tree's key.
    """
    shared = [share_prefixes(comparisons.tree) for comparisons in judged]
    device = scorer.verdict_values.device
    if device.type == "cpu":
        largest = max(tree.num_tokens for tree, _ in shared)
        token_budget = min(token_budget, max(CPU_TOKENS, largest))
    hidden_by_tree: dict[int, Tensor] = {}
    tokens = 0
    for forest in Forest.packed([tree for tree, _ in shared], token_budget):
        bounds = forest.cu_seqlens_q.numpy()
        firsts = np.cumsum([0, *(len(tree.segments) for tree in forest.trees)])  # each tree's first segment
        ends = [
            first + np.array(shared[index][1])[judged[index].slots]
            for first, index in zip(firsts, forest.indices, strict=False)
        ]
        rows, inverse = np.unique(bounds[np.concatenate(ends) + 1] - 1, return_inverse=True)
        hidden = scorer(forest.to(device), torch.from_numpy(rows.astype(np.int64)))
        slots = hidden.index_select(0, to_device(inverse, device))
        hidden_by_tree.update(zip(forest.indices, slots.split([len(segments) for segments in ends]), strict=True))
        tokens += forest.num_tokens
    return torch.cat([hidden_by_tree[index] for index in range(len(judged))]), tokens


def scorer_hash(scorer: Scorer) -> str:
    """Hash what decides an R-Scorer's scores: config, weights, the temperature where it has one, instructions likewise."""
    weights = model_hash(scorer.text_model.path)
    if scorer.prompt_kind == "instructions":
        return f"{weights} instructions {json_hash(asdict(scorer.prompt))}"
    return weights if scorer.temperature == 1.0 else f"{weights} temperature {scorer.temperature!r}"


def load_scorer(
    path: str | Path,
    *,
    verdict_form: VerdictForm = "choice",
    quality: ReferenceQuality = "complete",
    prompt: PromptSetting = "trained",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    lora: str | Path | LoRAConfig | None = None,
) -> Scorer:
    """Load an R-Scorer from a Hugging Face directory of a text LLM, with an adapter if one is named.

    Where the directory has a calibration (`calibration.json`), its temperature for the quality is applied.

    Args:
        path: directory, or "embedded" for the small one that comes with the package.
        verdict_form: "choice" (first, tie, second) or "graded" (1 to 5).
        quality: of the references that it is to read.
        prompt: that of a trained R-Scorer, instructions, or what the directory's files say ("auto").
        lora: an adapter's directory, or a LoRAConfig for a new adapter.
    """
    path = checkpoint_directory(path, "scorer")
    text_model = load_text_model(path, dtype=dtype, device=device, lora=lora)
    return Scorer(text_model, verdict_form, quality, prompt).to(device)


def _verdict_tokens(
    tokenizer: Any, spellings: Sequence[Spelling], chat: bool
) -> tuple[tuple[str, ...], list[int], Spelling]:
    """Choose the first spelling of which every verdict is one token; return its words, their token ids, and itself.

    After a chat template the reply starts without a space, after "Better:" with one.
    """
    leads = ("", " ") if chat else (" ", "")
    tried = []
    for spelling in spellings:
        for lead in leads:
            words = tuple(lead + word for word in spelling.words)
            encoded = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
            ids = [tokens[0] for tokens in encoded if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id]
            if len(set(ids)) == len(words):
                return words, ids, spelling
            tried.append(", ".join(repr(word) for word in words))
    raise InputError(
        field="tokenizer",
        expected="a tokenizer in which each verdict is one token",
        found=f"none of these spellings: {'; '.join(tried)}",
        fix="choose another verdict_form, or another scorer",
    )


def _frame(tokenizer: Any, instruction: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize what is before and after the user's turn in the tokenizer's chat template."""
    mark = "\u0001"
    text = chat_text(tokenizer, user_turn(mark))
    before, _, after = text.partition(mark)
    if text.count(mark) != 1:
        raise InputError(
            field="chat_template",
            expected="a template that shows the user's turn once",
            found=text,
            fix="repair tokenizer_config.json's chat_template, or remove it",
        )
    opening, closing = (
        np.asarray(tokenizer(frame, add_special_tokens=False)["input_ids"], dtype=np.int64)
        for frame in (before + instruction, after)
    )
    return opening, closing


def _plain_frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame without a chat template: the beginning-of-text token if the tokenizer itself would add one."""
    bos = tokenizer.bos_token_id
    opening = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    return np.asarray(opening, dtype=np.int64), np.zeros(0, dtype=np.int64)

"""Texts that another program has put into a chat template. The checkpoint's own template would be written around them again."""

from __future__ import annotations

import re
from typing import Any

from srcfast.data.turns import USER
from srcfast.errors import InputError

# What a templated text begins with, ends with, or has between system text and question. Text that <s> strikes out, as in HTML,
# has an end before the whole text's: whether it spells a token, the model's own tokens say.
_BEGINNING = re.compile(
    r"(?:<s>\s*)?(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant|system)\|>|\[INST\])|<s>(?!.*</s>)",
    re.DOTALL,
)
_END = re.compile(
    r"(?:</s>|<eos>|\[/INST\]|<\|(?:im_end|eot_id|end|endoftext|end_of_text)\|>|<(?:end_of_turn|end_of_utterance)>)\Z"
)
_ROLE = re.compile(
    r"(?:\A(?:<s>\s*)?|\n|\. )(?:USER|User|HUMAN|Human|### (?:User|Human|Instruction)):(\s{0,4}<image>)?"
)
_REPLY = re.compile(r"(?:<s>\s*)?(?:ASSISTANT|Assistant|### (?:Assistant|Response)):")
_PROMPTS, _RESPONSES = ("question", "prompt"), ("answer", "rationale", "chosen", "rejected", "response")
_LONGEST = 32  # characters of any of these


def _is_templated(text: str, is_prompt: bool) -> bool:
    """Return whether a template is around a text: its tokens; or, of those that have plain names of roles, these."""
    text = text.strip()
    if _BEGINNING.match(text) or _END.search(text[-_LONGEST:]):
        return True
    if not is_prompt:
        return _REPLY.match(text) is not None
    last = _REPLY.search(text[-_LONGEST:])
    is_open = last is not None and last.end() == len(text[-_LONGEST:])
    return any(is_open or role.group(1) for role in _ROLE.finditer(text))


def check_untemplated(record: Any) -> None:
    """Raise InputError, with the field, where a text of a sample or a preference has a chat template around it."""
    texts = [(name, vars(record).get(name) or "", name in _PROMPTS) for name in (*_PROMPTS, *_RESPONSES)]
    texts += [("turns", turn.text, turn.role == USER) for turn in record.turns]
    for name, text, is_prompt in texts:
        if _is_templated(text, is_prompt):
            fix = "take the template's words and end tokens out: the checkpoint's own template is applied"
            shown = text if len(text) <= 160 else f"{text[:60]} ... {text[-60:]}"
            raise InputError(field=name, expected="a text without a chat template", found=repr(shown), fix=fix)

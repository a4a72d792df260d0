"""Conversations in the formats of other projects: LLaVA's, messages of chat models, ms-swift's queries, TRL's preferences.

And LLaMA-Factory's instructions, and the rows of RLHF-V and RLAIF-V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from srcfast.data.jsonl import parse_object
from srcfast.data.records import OTHER_IMAGES, UNUSABLE, Fields, MadeUpId, Preference, Sample, are_in_turn, check_marks
from srcfast.data.turns import ASSISTANT, IMAGE_MARK, SYSTEM, USER, Turn, count_marks, settle_marks, tidy, without_marks
from srcfast.errors import InputError

_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT, "system": SYSTEM}
# What a prompt would lose of a turn or a part of one, and what it takes of a part beside its type.
_UNUSABLE_IN_TURN = (
    "function_call",
    "reasoning_content",
    "thinking",
    "tool_calls",
    *UNUSABLE,
    "image",
    "images",
    *OTHER_IMAGES,
)
_PATHS_OF_PART = ("image", "path", "url", "image_url")
_LLAVA = "pairs of turns {from: human, value} and {from: gpt, value}"
_MESSAGES = "pairs of messages {role: user, content} and {role: assistant, content}, after one of the system at most"
_PROMPT = (
    "a string, or messages of user and assistant in turn (one of the system may come first) that end with a user's"
)
_FLAGS: dict[float, bool] = {0: False, 1: True}  # 0.0, 1.0, False and True are equal to these


@dataclass(frozen=True)
class SpokenTurn:
    """A turn as a file has it.

    Attributes:
        turn: role and text.
        images: of each image in the text, the path that stands there, or its index among the record's; None where neither does.
        is_response: whether an assistant's turn is a response to train on, and not only context.
    """

    turn: Turn
    images: tuple[str | int | None, ...] = ()
    is_response: bool = True


def llava_samples(fields: Fields, image_root: Path) -> list[Sample | InputError]:
    """Read the samples of a LLaVA conversation: each answer is a response after all turns before it (`id`, `id-1`, ...)."""
    if "conversations" not in fields.left and ("messages" in fields.left or "query" in fields.left):
        fix = "read this file with --format messages (format: messages in a config)"
        raise fields.error("conversations", _LLAVA, "messages", fix)
    return _samples(fields, _spoken_turns(fields, "conversations", _LLAVA), _LLAVA, image_root)


def message_samples(fields: Fields, image_root: Path) -> list[Sample | InputError]:
    """Read the samples of `{messages, images}`, as of LLaVA's conversation, or that of ms-swift's `{query, response, ...}`."""
    if "query" in fields.left and "messages" not in fields.left:
        return _samples(fields, _query_turns(fields), _MESSAGES, image_root)
    return _samples(fields, _spoken_turns(fields, "messages", _MESSAGES), _MESSAGES, image_root)


def alpaca_samples(fields: Fields, image_root: Path) -> list[Sample | InputError]:
    """Read the samples of LLaMA-Factory's `{instruction, input, output, history, system, images}`, one of each answer."""
    spoken = [*_instruction_turns(fields), SpokenTurn(Turn(ASSISTANT, fields.text("output")))]
    return _samples(fields, _with_system(fields, spoken), _MESSAGES, image_root)


def alpaca_preference(fields: Fields, image_root: Path) -> list[Preference]:
    """Read a pair of LLaMA-Factory's `{instruction, input, chosen, rejected, history, system, images}`."""
    return _preference(fields, "instruction", _with_system(fields, _instruction_turns(fields)), image_root)


def rlhf_v_preference(fields: Fields, image_root: Path) -> list[Preference]:
    """Read a pair of RLAIF-V's `{image, question, chosen, rejected, idx}`, or of RLHF-V's, whose texts are JSON in `text`."""
    if "question" not in fields.left:
        text, expected = fields.take("text", "a text"), "JSON of {question, chosen, rejected}"
        try:
            fields.left |= text if isinstance(text, dict) else parse_object(text)
        except (ValueError, AttributeError) as error:
            raise fields.error("text", expected, text) from error
    if fields.left.get("idx") is not None:
        fields.left["sample_id"] = fields.left.pop("idx")
    if not fields.left.get("image") and fields.left.get("image_path"):
        fields.left["image"] = fields.left.pop("image_path")
    return _preference(fields, "question", [_string_turn(USER, fields.text("question"))], image_root)


def trl_preference(fields: Fields, image_root: Path) -> list[Preference]:
    """Read a TRL row {images, prompt, chosen, rejected} of message lists or strings.

    Without a prompt, it is what the messages of `chosen` and `rejected` have in common at their beginning.
    """
    row = fields.left
    if "prompt" not in row and isinstance(row.get("chosen"), list) and isinstance(row.get("rejected"), list):
        row |= _split_prompt(row["chosen"], row["rejected"])
    elif "prompt" not in row and ("messages" in row or "conversations" in row):
        raise fields.error("prompt", _PROMPT, "messages", "read this file with --format messages")
    prompt = fields.take("prompt", _PROMPT)
    spoken = [_string_turn(USER, prompt)] if isinstance(prompt, str) else _read_turns(fields, "prompt", prompt, _PROMPT)
    return _preference(fields, "prompt", spoken, image_root)


def message_preference(fields: Fields, image_root: Path) -> list[Preference]:
    """Read a pair of `messages` (or `conversations`), and either `chosen` and `rejected` or `rejected_response`.

    With the latter, the last message is the chosen response.
    """
    name = "messages" if "messages" in fields.left or "conversations" not in fields.left else "conversations"
    spoken = _spoken_turns(fields, name, _PROMPT)
    if "rejected_response" in fields.left:
        rejected = fields.left.pop("rejected_response")
        fields.left["rejected"] = rejected.strip() if isinstance(rejected, str) else rejected
        if spoken[-1].turn.role != ASSISTANT or "chosen" in fields.left:
            fix = "name the other response 'rejected' where 'chosen' is there, too"
            raise fields.error(name, "messages that end with the chosen response", "another end", fix)
        fields.left["chosen"] = spoken.pop().turn.text
    return _preference(fields, name, spoken, image_root)


# Samples --------------------------------------------------------------------------------------------------------------


def _samples(
    fields: Fields, spoken: Sequence[SpokenTurn], expected: str, image_root: Path
) -> list[Sample | InputError]:
    """Build a sample of each response; rationale and facts beside a conversation belong to the first."""
    name, images = fields.identifier("id"), _images(fields, spoken)
    turns = [item.turn for item in spoken]
    if not turns or not are_in_turn([turn.role for turn in turns]) or turns[-1].role == SYSTEM:
        raise fields.error("conversations" if expected == _LLAVA else "messages", expected, [t.role for t in turns])
    ends = [index for index, item in enumerate(spoken) if item.turn.role == ASSISTANT and item.is_response]
    if not ends:
        raise fields.error("messages", "a turn of the assistant to train on", "none", "leave the record out")
    fields.check_no_other_turns()
    rationale, facts, extra = fields.optional_text("rationale"), fields.sentences("facts"), fields.rest()
    samples: list[Sample | InputError] = []
    for number, end in enumerate(ends):
        fields.sample_id = MadeUpId(f"{name}-{number}") if number else name
        try:
            before, question, shown = _prompt_before(fields, turns, end, images)
        except InputError as error:
            samples.append(error)
            continue
        notes = (rationale, facts) if number == 0 else (None, ())
        response = turns[end].text
        samples.append(
            Sample(fields.sample_id, shown, question, response, *notes, dict(extra), image_root, tuple(before))
        )
    return samples


def _prompt_before(
    fields: Fields, turns: Sequence[Turn], end: int, images: tuple[str, ...]
) -> tuple[list[Turn], str, tuple[str, ...]]:
    """Return the turns before the question that the turn `end` answers, the question, and the images that these show.

    Raises:
        InputError: one of these turns, or the answer, has no text; or a mark is in another turn than a user's.
    """
    prompt = turns[:end]
    for number, turn in enumerate(turns[: end + 1]):
        text = without_marks(turn.text) if number == end - 1 else turn.text
        if not text:
            kind = {ASSISTANT: "answer", USER: "question"}.get(turn.role, SYSTEM)
            raise fields.error(kind, f"a non-empty {kind} in turn {number}", text, "fill it in")
        if number < end and turn.role != USER and IMAGE_MARK in turn.text:
            fix = f"take {IMAGE_MARK} out of the other turns"
            raise fields.error("images", "images in the user's turns alone", turn.text, fix)
    marked = any(IMAGE_MARK in turn.text for turn in turns if turn.role == USER)
    *before, question = settle_marks(prompt)
    return before, question.text, images[: count_marks(prompt)] if marked else images


def _spoken_turns(fields: Fields, name: str, expected: str) -> list[SpokenTurn]:
    """Take a list of turns, after that of the field `system` where it has a text. Raises InputError."""
    turns = fields.take(name, expected)
    if not isinstance(turns, list) or not turns:
        raise fields.error(name, expected, turns)
    return _with_system(fields, _read_turns(fields, name, turns, expected))


def _query_turns(fields: Fields) -> list[SpokenTurn]:
    """Take the turns of ms-swift's `{system, history, query, response}`, of which `response` alone is a response to train on."""
    spoken = _history_turns(fields, is_response=False)
    spoken += [_string_turn(USER, fields.text("query")), SpokenTurn(Turn(ASSISTANT, fields.text("response")))]
    return _with_system(fields, spoken)


def _instruction_turns(fields: Fields) -> list[SpokenTurn]:
    """Take the turns before LLaMA-Factory's response: `history`, whose answers are trained on, too, `instruction` and `input`."""
    spoken, more = _history_turns(fields, is_response=True), fields.optional_text("input")
    return [*spoken, _string_turn(USER, "\n".join((fields.text("instruction"), *([more] if more else []))))]


def _history_turns(fields: Fields, is_response: bool) -> list[SpokenTurn]:
    """Take the turns of the field `history`. Raises InputError where it is no list of pairs of text."""
    history = fields.left.pop("history", None) or []
    expected = "a list of pairs [query, response] of text"
    if not isinstance(history, list) or any(
        not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise fields.error("history", expected, history)
    spoken = []
    for query, response in history:
        spoken += [_string_turn(USER, query), SpokenTurn(Turn(ASSISTANT, response), (), is_response)]
    return spoken


def _with_system(fields: Fields, spoken: list[SpokenTurn]) -> list[SpokenTurn]:
    """Put the field `system`, where it has a text, before the stripped turns. Raises InputError where they have such a turn."""
    spoken = [_stripped(turn) for turn in spoken]
    system = (fields.optional_text("system") or "").strip()
    if system and spoken and spoken[0].turn.role == SYSTEM:
        raise fields.error("system", "one text of the system", "one beside that of the turns", "leave one of them out")
    return [SpokenTurn(Turn(SYSTEM, system)), *spoken] if system else spoken


def _stripped(spoken: SpokenTurn) -> SpokenTurn:
    return SpokenTurn(
        Turn(spoken.turn.role, tidy(spoken.turn.text).strip()), spoken.images, is_response=spoken.is_response
    )


# Preferences ----------------------------------------------------------------------------------------------------------


def _split_prompt(chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    """Return prompt, chosen and rejected of two whole conversations; each response has one message at least."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _preference(fields: Fields, name: str, spoken: Sequence[SpokenTurn], image_root: Path) -> list[Preference]:
    """Build the pair of a prompt's turns and the two responses among the fields."""
    if name != "prompt" and fields.left.get("prompt"):
        raise fields.error("prompt", f"the prompt once, as {name!r}", fields.left["prompt"], "leave one of them out")
    responses = {which: _response(fields, which) for which in ("chosen", "rejected")}
    images, turns = _images(fields, spoken), [item.turn for item in spoken]
    roles = [turn.role for turn in turns]
    if roles[-1:] != [USER] or not are_in_turn(roles[:-1]):
        raise fields.error(name, _PROMPT, roles, "let the prompt end with what the responses answer")
    if any(IMAGE_MARK in turn.text for turn in turns if turn.role != USER):
        raise fields.error(name, "images in the user's turns alone", IMAGE_MARK, "keep images in the user's turns")
    *before, question = settle_marks(turns)
    if not without_marks(question.text).strip():
        raise fields.error(name, "text beside the image marks", question.text)
    prompt = {"images": list(images), "prompt": question.text, "turns": [turn.to_json() for turn in before]}
    row = fields.rest() | responses | prompt
    pair = Preference.from_json(row, file=fields.file, line=fields.line, image_root=image_root)
    others = {"turns": fields.left["turns"]} if "turns" in fields.left else {}  # a field that is none of the format's
    return [replace(pair, extra=pair.extra | others)]


def _response(fields: Fields, name: str) -> str:
    """Take the text of a response: a string, a message of the assistant, or a list of one. Raises InputError."""
    expected = "a string, or one message of role 'assistant' with text"
    value = fields.take(name, expected)
    if isinstance(value, str):
        return value
    messages = value if isinstance(value, list) else [value]
    if len(messages) != 1:
        raise fields.error(name, expected, value, "put all turns before the response into the prompt")
    [spoken] = _read_turns(fields, name, messages, expected)
    if spoken.turn.role != ASSISTANT:
        raise fields.error(name, expected, value)
    return spoken.turn.text


# Turns ----------------------------------------------------------------------------------------------------------------


def _read_turns(fields: Fields, name: str, values: Any, expected: str) -> list[SpokenTurn]:
    """Read turns `{role, content}` or `{from, value}`. Raises InputError where one is none, or has what would be lost."""
    if not isinstance(values, list):
        raise fields.error(name, expected, values)
    return [_read_turn(partial(fields.error, name), value, expected) for value in values]


def _read_turn(error: partial[InputError], value: Any, expected: str) -> SpokenTurn:
    """Read a turn; its text is as it stands, except where an image mark is in it."""
    if not isinstance(value, dict):
        raise error(expected, value)
    speaker, content = (value.get(key) for key in (("role", "content") if "role" in value else ("from", "value")))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise error(expected, value)
    lost = next((key for key in _UNUSABLE_IN_TURN if value.get(key)), None)
    if lost is not None:
        raise error("turns of text and images", f"{lost!r} in a turn", "write it into the turn's text, or leave it out")
    is_response = _is_response(error, role, value)
    if isinstance(content, str):
        spoken = _string_turn(role, content)
        return SpokenTurn(spoken.turn, spoken.images, is_response)
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise error(expected, value)
    text, images = _read_parts(error, content, expected)
    if images and role != USER:
        raise error(
            "a turn of text", f"an image part in a turn of the {role}", "keep images in the prompt's user turns"
        )
    return SpokenTurn(Turn(role, text), images, is_response)


def _string_turn(role: str, text: str) -> SpokenTurn:
    """Return the turn of a string; in a user's, marks are images."""
    if role != USER:
        return SpokenTurn(Turn(role, text))
    return SpokenTurn(Turn(role, tidy(text)), (None,) * text.count(IMAGE_MARK))


def _is_response(error: partial[InputError], role: str, value: dict[str, Any]) -> bool:
    """Return whether a turn is a response to train on, as `loss` (ms-swift) or `weight` (OpenAI) say; both are 0 or 1."""
    flags = [value[key] for key in ("loss", "weight") if value.get(key) is not None]
    if not flags:
        return role == ASSISTANT
    known = [_FLAGS.get(flag) if isinstance(flag, int | float) else None for flag in flags]
    if role != ASSISTANT or None in known or len(set(known)) > 1:
        raise error("'loss' or 'weight' of 0 or 1 in turns of the assistant", value)
    return bool(known[0])


def _read_parts(
    error: partial[InputError], parts: list[Any], expected: str
) -> tuple[str, tuple[str | int | None, ...]]:
    """Join the parts of a message to its text, marks for the images; return also the images' paths or indices."""
    texts: list[str] = []
    images: list[str | int | None] = []
    for part in parts:
        kind = part.get("type")
        known = ("text",) if kind == "text" else (*_PATHS_OF_PART, "index", "detail")
        if kind not in ("text", "image", "image_url"):
            raise error("parts of type 'text' or 'image'", part, "leave this record out: other parts are not supported")
        if other := next((key for key in part if part[key] is not None and key not in ("type", *known)), None):
            raise error(f"a part of type {kind!r} with {' or '.join(known)}", part, f"leave {other!r} out of it")
        if kind != "text":
            texts.append(IMAGE_MARK)
            images.append(_path_of(error, part))
        elif not isinstance(part.get("text"), str):
            raise error(expected, part)
        else:
            texts.append(part["text"])
    marks = "".join(texts).count(IMAGE_MARK)
    if images and marks != len(images):
        raise error("images as parts or as marks in the text", "both", f"take {IMAGE_MARK} out of the text")
    return "".join(texts), tuple(images) or (None,) * marks


def _path_of(error: partial[InputError], part: dict[str, Any]) -> str | int | None:
    """Return the path, or else the index among the record's images, of an image part; None where it has neither.

    Raises:
        InputError: it has several, or anything else.
    """
    named = [part[key] for key in _PATHS_OF_PART if part.get(key) is not None]
    paths = [value.get("url") if isinstance(value, dict) else value for value in named]
    index = part.get("index")  # as `datasets` of TRL have it
    if not paths and (index is None or type(index) is int):
        return index
    path = paths[0] if index is None else None
    if len(paths) > 1 or not isinstance(path, str) or not path:
        raise error("an image part with one path, or none", part)
    if "://" in path or path.startswith("data:"):
        raise error("a path below the image root", path[:100], "write the image into a file, and name it")
    return path


def _images(fields: Fields, spoken: Sequence[SpokenTurn]) -> tuple[str, ...]:
    """Take a record's images: its field's, or those that the turns' image parts name.

    Raises:
        InputError: marks are neither none nor as many as the images, or parts and field name different ones.
    """
    images, marks = fields.images(), [image for item in spoken for image in item.images]
    if beyond := [mark for mark in marks if isinstance(mark, int) and not 0 <= mark < len(images)]:
        raise fields.error("images", f"indices of {len(images)} images in the parts", beyond)
    named = tuple(images[image] if isinstance(image, int) else image for image in marks if image is not None)
    if named and len(named) < len(marks):
        raise fields.error("images", "a path in each image part or in none", f"{len(named)} in {len(marks)}")
    if named and images not in ((), named):
        raise fields.error("images", "the images of the turns' parts", list(images), "name them once")
    check_marks(fields, len(marks), len(named or images))
    return named or images

"""Malformed conversations: turns out of order, images that are not there, and what a prompt of text and images would lose."""

from __future__ import annotations

import json
from typing import Any

from malformed_case import Case, file_of
from malformed_records import write_rejected

from srcfast.data.readers import read_preferences


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


PICTURE = {"type": "image"}
HISTORY = [said("user", "What is it?"), said("assistant", "A cat.")]

CHAT = {"id": "s", "messages": [said("user", "What?"), said("assistant", "That.")]}
TALK = {"id": "s", "conversations": [human("What?"), gpt("That.")]}
PLAIN = {"id": "s", "question": "What?", "answer": "That."}


def chat(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return CHAT | {"messages": list(messages), **more}


SAMPLES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a history beside a question": ("jsonl", PLAIN | {"history": [["a", "b"]]}, "history", "under the name 'turns'"),
    "a system text beside a question": ("jsonl", PLAIN | {"system": "Be brief."}, "system", "under the name 'turns'"),
    "messages beside a question": ("jsonl", PLAIN | CHAT, "messages", "under the name 'turns'"),
    "turns that end with a question": ("jsonl", PLAIN | {"turns": [said("user", "a")]}, "turns", "in pairs"),
    "a system text behind a question": (
        "jsonl",
        PLAIN | {"turns": [*HISTORY, said("system", "Be brief.")]},
        "turns",
        "in pairs",
    ),
    "a turn of a tool": ("jsonl", PLAIN | {"turns": [said("tool", "a")]}, "turns", "role one of"),
    "a turn of parts": ("jsonl", PLAIN | {"turns": [said("system", [text("a")])]}, "turns", "content a text"),
    "an image mark of the assistant": (
        "jsonl",
        PLAIN | {"turns": [said("user", "a"), said("assistant", "<image>")], "image": "a.png"},
        "turns",
        "in the user's turns alone",
    ),
    "more marks than images in turns": (
        "jsonl",
        PLAIN | {"turns": [said("user", "<image>"), said("assistant", "b")], "question": "<image> c", "image": "a.png"},
        "images",
        "2 images, as many as are marked",
    ),
    "messages in place of conversations": ("llava", CHAT, "conversations", "--format messages"),
    "a video": ("llava", TALK | {"video": "a.mp4"}, "video", "text and images alone"),
    "tools": ("messages", CHAT | {"tools": [{"name": "search"}]}, "tools", "text and images alone"),
    "two system texts": (
        "messages",
        chat(said("system", "a"), *CHAT["messages"], system="b"),
        "system",
        "one text of the system",
    ),
    "a system text in the middle": (
        "messages",
        chat(*CHAT["messages"], said("system", "a"), *CHAT["messages"]),
        "messages",
        "after one of the system at most",
    ),
    "two users' turns": ("messages", chat(said("user", "a"), *CHAT["messages"]), "messages", "pairs of messages"),
    "a question without an answer": ("messages", chat(said("user", "a")), "messages", "pairs of messages"),
    "a system text alone": ("messages", chat(said("system", "a")), "messages", "pairs of messages"),
    "a tool's message": ("messages", chat(said("tool", "a"), *CHAT["messages"]), "messages", "pairs of messages"),
    "a tool call": (
        "messages",
        chat(said("user", "a"), said("assistant", "b", tool_calls=[{}])),
        "messages",
        "turns of text and images",
    ),
    "a thought": (
        "messages",
        chat(said("user", "a"), said("assistant", "b", reasoning_content="c")),
        "messages",
        "turns of text and images",
    ),
    "a video part": (
        "messages",
        chat(said("user", [{"type": "video", "video": "a.mp4"}, text("a")]), said("assistant", "b")),
        "messages",
        "type 'text' or 'image'",
    ),
    "an image of the assistant": (
        "messages",
        chat(said("user", "a"), said("assistant", [PICTURE, text("b")]), images=["a.png"]),
        "messages",
        "an image part in a turn of the assistant",
    ),
    "an image mark in the assistant's context": (
        "messages",
        chat(said("user", "a"), said("assistant", "<image>", loss=0), said("user", "c"), said("assistant", "d")),
        "images",
        "in the user's turns alone",
    ),
    "an image from the net": (
        "messages",
        chat(said("user", [{"type": "image", "url": "https://example.org/a.png"}, text("a")]), said("assistant", "b")),
        "messages",
        "a path below the image root",
    ),
    "an image in base64": (
        "messages",
        chat(said("user", [{"type": "image", "image": "data:image/png;base64,AAAA"}]), said("assistant", "b")),
        "messages",
        "a path below the image root",
    ),
    "an image part with two paths": (
        "messages",
        chat(said("user", [{"type": "image", "url": "a.png", "path": "b.png"}]), said("assistant", "b")),
        "messages",
        "one path, or none",
    ),
    "parts of which some name an image": (
        "messages",
        chat(said("user", [PICTURE, {"type": "image", "path": "a.png"}, text("a")]), said("assistant", "b")),
        "images",
        "in each image part or in none",
    ),
    "parts that name other images than the record": (
        "messages",
        chat(said("user", [{"type": "image", "path": "a.png"}, text("a")]), said("assistant", "b"), images=["b.png"]),
        "images",
        "the images of the turns' parts",
    ),
    "an image part and a mark": (
        "messages",
        chat(said("user", [PICTURE, text("<image> a")]), said("assistant", "b"), images=["a.png", "b.png"]),
        "messages",
        "as parts or as marks",
    ),
    "a part without an image": (
        "messages",
        chat(said("user", [PICTURE, text("a")]), said("assistant", "b")),
        "images",
        "1 images, as many as are marked",
    ),
    "images alone": (
        "messages",
        chat(said("user", [PICTURE]), said("assistant", "b"), images=["a.png"]),
        "question",
        "a non-empty question",
    ),
    "a loss in words": (
        "messages",
        chat(said("user", "a"), said("assistant", "b", loss="yes")),
        "messages",
        "'loss' or 'weight' of 0 or 1",
    ),
    "a loss on a question": (
        "messages",
        chat(said("user", "a", loss=1), said("assistant", "b")),
        "messages",
        "'loss' or 'weight' of 0 or 1",
    ),
    "a loss that the weight contradicts": (
        "messages",
        chat(said("user", "a"), said("assistant", "b", loss=1, weight=0)),
        "messages",
        "'loss' or 'weight' of 0 or 1",
    ),
    "no turn with loss": (
        "messages",
        chat(said("user", "a"), said("assistant", "b", loss=0)),
        "messages",
        "to train on",
    ),
    "a history of words": ("messages", {"query": "a", "response": "b", "history": ["a"]}, "history", "pairs"),
    "a query without a response": ("messages", {"query": "a"}, "response", "a non-empty string"),
}


PROMPT = [said("user", "a")]
YES, NO = [said("assistant", "yes")], [said("assistant", "no")]
PAIRS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a prompt that ends with an answer": ("trl", {"prompt": PROMPT + YES}, "prompt", "that end with a user's"),
    "messages in place of a prompt": (
        "trl",
        {"prompt": None, "messages": PROMPT, "chosen": "yes", "rejected": "no"},
        "prompt",
        "--format messages",
    ),
    "an empty prompt": ("trl", {"prompt": []}, "prompt", "that end with a user's"),
    "responses that share nothing": ("trl", {"prompt": None}, "prompt", "that end with a user's"),
    "a response of several turns": ("trl", {"chosen": YES + PROMPT + YES}, "chosen", "into the prompt"),
    "an image mark of the assistant": (
        "trl",
        {"prompt": [*PROMPT, said("assistant", "<image>"), *PROMPT], "image": "a.png"},
        "prompt",
        "in the user's turns alone",
    ),
    "rejected messages": ("messages", {"rejected_messages": NO}, "rejected_messages", "text and images alone"),
    "a history": ("trl", {"history": [["a", "b"]]}, "history", "under the name 'turns'"),
    "a rejected response to no response": (
        "messages",
        {"messages": PROMPT, "rejected_response": "no", "chosen": None, "rejected": None},
        "messages",
        "end with the chosen response",
    ),
    "two ways to say what is rejected": (
        "messages",
        {"messages": PROMPT + YES, "rejected_response": "no"},
        "messages",
        "end with the chosen response",
    ),
}


TITLES = {"jsonl": "Turns of samples", "llava": "LLaVA conversations", "messages": "Messages", "trl": "TRL preferences"}


def cases() -> list[Case]:
    """All of them."""
    found = []
    for wrong, (format, row, field, words) in SAMPLES.items():
        make = file_of(json.dumps(row), "rows.jsonl")
        found.append(Case(TITLES[format], wrong, make, write_rejected(format), ("line 1", f"'{field}'", words)))
    for wrong, (format, change, field, words) in PAIRS.items():
        base = {"messages": PROMPT} if format == "messages" else {"prompt": PROMPT}
        row = base | {"chosen": YES, "rejected": NO} | change
        make = file_of(json.dumps({key: value for key, value in row.items() if value is not None}), "rows.jsonl")
        act = write_rejected(format, read_preferences)
        title = "Preferences as messages" if format == "messages" else TITLES[format]
        found.append(Case(title, wrong, make, act, ("line 1", f"'{field}'", words)))
    return found

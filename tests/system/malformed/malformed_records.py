"""Malformed data files: conversations, preferences, tables, JSON lines, shards, rationales, predictions."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from malformed_case import Case, changed, file_of, folder_of, missing
from malformed_images import picture_bytes

from srcfast.data.jsonl import COMPLETE, read_shards, write_jsonl
from srcfast.data.readers import check_rejected, read_logprob_rows, read_preferences, read_samples
from srcfast.data.records import Candidate, Preference
from srcfast.data.stage_rows import read_aligned, read_pairs, read_scores
from srcfast.world.chart_tables import TABLES, read_table
from srcfast.world.digits import read_digits
from srcfast.world.easy_vqa import read_easy_vqa

SAMPLE = {"id": "s", "question": "What color?", "answer": "red"}
PAIR = {"sample_id": "s", "prompt": "What color?", "chosen": "red", "rejected": "blue"}
TURNS = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "red"}]
TALK = {"id": "s", "conversations": TURNS}
CANDIDATE = {"id": "c", "sample_id": "s", "text": "Answer: red", "logprob": -1.0, "token_ids": [1, 2]}
SCORES = {
    "sample_id": "s",
    "candidate_ids": ["a", "b"],
    "scores": [0.5, 0.5],
    "win_probability": [[0.5, 0.75], [0.25, 0.5]],
    "confidence": [[0, 0.5], [0.5, 0]],
    "alone": [0.5, 0.5],
    "flip_rate": 0.0,
    "tie_rate": 0.0,
    "pairs": 1,
    "verdicts": 2,
}
TAUGHT = {"id": "s", "rationale": "It is red.", "answer": "red"}
ASKED = {"prompt": "What color?", "response": "red"}
PREDICTED = {"id": "s", "aligned": True}

# Lines that are no record, whatever the record is.
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "half an object": (b'{"id": "x", "image": ', "one JSON object"),
    "two objects in a line": (b'{"id": "x"} {"id": "y"}', "Extra data"),
    "a list for an object": (b'["x"]', "list instead of an object"),
    "null": (b"null", "NoneType instead of an object"),
    "NaN": (b'{"id": "x", "weight": NaN}', "not a finite number"),
    "Infinity": (b'{"id": "x", "weight": -Infinity}', "not a finite number"),
    "a number beyond all floats": (b'{"id": "x", "weight": 1e999}', "not a finite number"),
    "an integer of 5,000 digits": (b'{"id": ' + b"9" * 5000 + b"}", "one JSON object"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"id": "x"}'.encode("utf-16"), "one JSON object"),
    "half of a surrogate pair": (b'{"id": "\\ud800"}', "not UTF-8"),
    "100,000 brackets": (b"[" * 100_000, "recursion"),
    "single quotes": (b"{'id': 'x'}", "one JSON object"),
    "a NUL": (b'{"id": "\0"}', "one JSON object"),
    "a key twice": (b'{"id": "x", "answer": "red", "answer": "blue"}', "'answer' is there twice"),
    "a key twice, once escaped": (b'{"id": "x", "i\\u0064": "y"}', "'id' is there twice"),
    "a key twice within an object": (b'{"id": "x", "facts": {"a": 1, "a": 2}}', "'a' is there twice"),
    "100,000 objects within each other": (b'{"a":' * 100_000, "recursion"),
    "UTF-32": ('{"id": "x"}'.encode("utf-32"), "one JSON object"),
    "two byte order marks": (b'\xef\xbb\xbf\xef\xbb\xbf{"id": "x"}', "one JSON object"),
    "half of a surrogate pair in a key": (b'{"\\ud800": 1}', "not UTF-8"),
    "a surrogate as three bytes": (b'{"id": "\xed\xa0\x80"}', "not UTF-8"),
    "an overlong byte": (b'{"id": "\xc0\xaf"}', "not UTF-8"),
    "a line of 10,000,000 letters": (b"a" * 10_000_000, "one JSON object"),
    "carriage returns alone": (b'{"id": "x"}\r{"id": "y"}', "Extra data"),
    "a comment": (b'{"id": "x"} // mine', "Extra data"),
    "a comma too many": (b'{"id": "x",}', "one JSON object"),
}


def write_rejected(format: str, read: Callable[..., Any] = read_samples) -> Callable[[Path], list[dict[str, Any]]]:
    """Read a file and returns what was set aside; the file's folder is the image root."""

    def act(path: Path) -> list[dict[str, Any]]:
        rejected: list[dict[str, Any]] = []
        read(path, format=format, image_root=path.parent, rejected=rejected)
        write_jsonl(path.with_name("rejected.jsonl"), rejected)
        return rejected

    return act


def candidates(path: Path) -> None:
    for file, line, row in read_shards(path):
        Candidate.from_json(row, file=file, line=line)


def pairs(path: Path) -> None:
    for file, line, row in read_shards(path):
        Preference.from_json(row, file=file, line=line, image_root=path)


def teacher(path: Path) -> None:
    from srcfast.data.rationale_pairs import read_teacher

    read_teacher(path)


def shards(*lines: str, marker: str | bytes | None = None) -> Callable[[Path], Path]:
    """Makes a folder of one shard; the marker says so unless another one is given."""

    def make(folder: Path) -> Path:
        place = folder / "shards"
        file_of("\n".join(lines), "shards/00000.jsonl")(folder)
        told = marker if marker is not None else json.dumps({"rows": len(lines), "shards": 1})
        file_of(told, f"shards/{COMPLETE}")(folder)
        return place

    return make


def table(*rows: str, header: str = "index\timage\tquestion\tanswer") -> Callable[[Path], Path]:
    return file_of("\n".join((header, *rows)) + "\n", "table.tsv")


def package(text: str | bytes) -> Callable[[Path], Path]:
    return file_of(text, "train/questions.json")


def easy_vqa(path: Path, split: str = "train") -> None:
    with mock.patch("srcfast.world.easy_vqa.data_folder", lambda: path.parents[1]):
        read_easy_vqa(split)


def digits(path: Path) -> None:
    with mock.patch("srcfast.world.digits.package_folder", lambda *_: path.parents[2]):
        read_digits.__wrapped__()


def chart_table(path: Path) -> None:
    name = next(name for name, table in TABLES.items() if table.file.endswith(path.name))
    folder = path.parents[TABLES[name].file.count("/")]
    with mock.patch("srcfast.world.chart_tables.package_folder", lambda *_: folder):
        read_table.__wrapped__(name)


IMAGE = base64.b64encode(picture_bytes("PNG")).decode()
HALF_IMAGE = base64.b64encode(picture_bytes("PNG")[:-30]).decode()

_NUMBER, _TEXT, _ID = "a finite number", "a non-empty string", "an id"
SAMPLE_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"id": None}, _ID),
    "an empty id": ({"id": ""}, _ID),
    "an id that is a list": ({"id": ["x"]}, _ID),
    "an id that is a number with a point": ({"id": 1.5}, _ID),
    "no question": ({"question": None}, "no such key"),
    "a question that is a number": ({"question": 3}, _TEXT),
    "a question of image marks alone": ({"question": "<image>", "image": "a.png"}, "text beside the image marks"),
    "no target: no answer": ({"answer": None}, "'answer'"),
    "no target: an empty answer": ({"answer": " "}, "'answer'"),
    "an answer that is a list": ({"answer": ["red"]}, _TEXT),
    "an answer that is true": ({"answer": True}, _TEXT),
    "a rationale that is an object": ({"rationale": {}}, "a string"),
    "an empty fact": ({"facts": ["It is red.", ""]}, "sentences"),
    "facts that are numbers": ({"facts": [1]}, "sentences"),
    "a tolerance that is text": ({"tolerance": "5%"}, _NUMBER),
    "a tolerance of the whole answer": ({"tolerance": 1}, "a share of the answer"),
    "a tolerance below 0": ({"tolerance": -0.05}, "a share of the answer"),
    "an image that is an object": ({"image": {"bytes": "x"}}, "an image path"),
    "image and images": ({"image": "a.png", "images": ["a.png"]}, "both"),
    "more image marks than images": ({"question": "<image> What?"}, "as many as are marked"),
    "an image that is not there": ({"image": "none.png"}, "no such file"),
    "an image outside of the root": ({"image": "../x.png"}, "a path below"),
    "an image path with a NUL": ({"image": "a\0.png"}, "'image'"),
    "an image path of 10,000 characters": ({"image": "a" * 10_000}, "'image'"),
    "an image path that is a folder": ({"image": "."}, "a folder"),
}
PAIR_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "'prompt'"),
    "no target: an empty chosen": ({"chosen": "\n"}, "'chosen'"),
    "no target: no rejected": ({"rejected": None}, "'rejected'"),
    "identical chosen and rejected": ({"rejected": "red"}, "other than the chosen"),
    "a confidence of 0": ({"confidence": 0}, "(0, 1]"),
    "a confidence above 1": ({"confidence": 1.01}, "(0, 1]"),
    "a confidence in words": ({"confidence": "high"}, _NUMBER),
    "a confidence that is true": ({"confidence": True}, _NUMBER),
    "an integer beyond all floats for a confidence": ({"confidence": 10**400}, _NUMBER),
    "a reference log-probability of NaN": ({"reference_chosen_logprob": float("nan")}, "not a finite number"),
    "a reference log-probability of -Infinity": ({"reference_rejected_logprob": float("-inf")}, "not a finite number"),
    "a reference log-probability in words": ({"reference_chosen_logprob": "low"}, _NUMBER),
    "a reference log-probability that is a list": ({"reference_rejected_logprob": [-1]}, _NUMBER),
    "a span's reference log-probability of NaN": (
        {"reference_chosen_span_logprob": float("nan")},
        "not a finite number",
    ),
    "a span's reference log-probability in words": ({"reference_rejected_span_logprob": "low"}, _NUMBER),
    "a credit that there is not": ({"credit": "paragraph"}, "response, sentence or answer"),
    "a credit that is a number": ({"credit": 1}, "a string"),
    "an integer beyond all floats for a reference": ({"reference_rejected_logprob": 10**400}, _NUMBER),
    "a sample_id that is an object": ({"sample_id": {}}, _ID),
    "an image that is not there": ({"images": ["none.png"]}, "no such file"),
}
TRL_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "two turns in the prompt": ({"prompt": [{"role": "user", "content": "a"}] * 2}, "end with a user's"),
    "a user who answers": ({"chosen": [{"role": "user", "content": "red"}]}, "'assistant'"),
    "no message": ({"chosen": []}, "one message"),
    "a message without content": ({"chosen": [{"role": "assistant"}]}, "'chosen'"),
    "parts that are strings": ({"rejected": [{"role": "assistant", "content": ["blue"]}]}, "'rejected'"),
    "an image in a response": (
        {"chosen": [{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
        "keep images in the prompt",
    ),
    "an image part without an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]},
        "as many as are marked",
    ),
    "identical responses": ({"rejected": [{"role": "assistant", "content": "red"}]}, "other than the chosen"),
    "a message that is null": ({"prompt": [None]}, "'prompt'"),
    "a role that is a list": ({"prompt": [{"role": ["user"], "content": "q"}]}, "'prompt'"),
}
TALK_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no conversations": ({"conversations": None}, "no such key"),
    "conversations that are text": ({"conversations": "What? Red."}, "pairs of turns"),
    "no turn": ({"conversations": []}, "pairs of turns"),
    "a question without an answer": ({"conversations": TURNS[:1]}, "pairs of turns"),
    "the answer before the question": ({"conversations": TURNS[::-1]}, "pairs of turns"),
    "a turn that is text": ({"conversations": ["a", "b"]}, "pairs of turns"),
    "a value that is a number": ({"conversations": [TURNS[0], {"from": "gpt", "value": 3}]}, "pairs of turns"),
    "a speaker that is a list": ({"conversations": [{"from": [], "value": "a"}, TURNS[1]]}, "pairs of turns"),
    "no target: an empty answer": ({"conversations": [TURNS[0], {"from": "gpt", "value": " "}]}, "non-empty answer"),
    "an empty question": ({"conversations": [{"from": "human", "value": ""}, TURNS[1]]}, "non-empty question"),
    "an image mark without an image": (
        {"conversations": [{"from": "human", "value": "<image> a"}, TURNS[1]]},
        "as many as are marked",
    ),
    "an image that is not there": ({"image": "none.png"}, "no such file"),
}
BAD_LISTS: dict[str, tuple[str | bytes, str]] = {
    "a list that is not closed": ('[{"id": "x"}', "the end of the file"),
    "a list cut off within a record": ('[{"id": "x", "conv', "a JSON list of records"),
    "no comma between records": ('[{"id": "x"} {"id": "y"}]', "',' or ']'"),
    "text behind the list": ('[{"id": "x"}] [', "nothing after the list"),
    "a number in the list": ("[7]", "one JSON object"),
    "a list that is not UTF-8": (b'[{"id": "\xff"}]', "UTF-8"),
    "100,000 lists within each other": ("[" * 100_000, "recursion"),
    "a list with half of a surrogate pair": ('[{"id": "\\udfff"}]', "surrogate"),
    "a list with a key twice": ('[{"id": "x", "id": "y"}]', "'id' is there twice"),
    "a list with a key twice in a record that is cut off": (
        '[{"id": {"a": 1, "a": 2}, "conv',
        "a JSON list of records",
    ),
    "a list with a number beyond all floats": ('[{"id": 1e999}]', "not a finite number"),
    "a list with an integer of 5,000 digits": ('[{"id": ' + "9" * 5000 + "}]", "one JSON object"),
    "a list in UTF-16": ('[{"id": "x"}]'.encode("utf-16"), "UTF-8"),
    "a list with a NUL": ('[{"id": "\0"}]', "a JSON list of records"),
}
TABLE_ROWS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no header": (file_of(b"", "table.tsv"), "columns index"),
    "a column missing": (table(header="index\timage\tquestion"), "columns index"),
    "a column twice": (table(header="index\timage\tquestion\tanswer\tanswer"), "each once"),
    "commas for tabs": (table(header="index,image,question,answer"), "columns index"),
    "a header that is not UTF-8": (file_of(b"index\timage\tquestion\tanswer\t\xff\n", "table.tsv"), "in UTF-8"),
    "a cell too few": (table(f"1\t{IMAGE}\tq"), "4 cells"),
    "a cell too many": (table(f"1\t{IMAGE}\tq\ta\tb"), "4 cells"),
    "an open quote": (table(f'1\t{IMAGE}\t"q\ta'), "a table row"),
    "a cell that is not UTF-8": (
        file_of(b"index\timage\tquestion\tanswer\n1\tx\t\xff\ta\n", "table.tsv"),
        "text in UTF-8",
    ),
    "an index that is not UTF-8": (
        file_of(b"index\timage\tquestion\tanswer\n" + b"\xff\tx\tq\ta\n", "table.tsv"),
        "text in UTF-8",
    ),
    "no index": (table(f"\t{IMAGE}\tq\ta"), "'index'"),
    "no image": (table("1\t\tq\ta"), "'image'"),
    "no question": (table(f"1\t{IMAGE}\t\ta"), "'question'"),
    "no target: no answer": (table(f"1\t{IMAGE}\tq\t"), "'answer'"),
    "UTF-16": (file_of("index\timage\tquestion\tanswer\n".encode("utf-16"), "table.tsv"), "columns index"),
    "a NUL": (table(f"1\t{IMAGE}\tq\0\ta"), "without a NUL"),
    "base64 of 10,000 brackets": (table(f"1\t{'[' * 10_000}\tq\ta"), "an empty list"),
    "base64 of half an image": (table(f"1\t{HALF_IMAGE}\tq\ta"), "a whole image"),
    "base64 of text": (table(f"1\t{base64.b64encode(b'no image' * 20).decode()}\tq\ta"), "a whole image"),
    "no base64": (table(f"1\t{'?' * 100}\tq\ta"), "base64"),
    "base64 of a wrong length": (table(f"1\t{'A' * 101}\tq\ta"), "base64"),
    "an empty list of images": (table(f"1\t[{' ' * 100}]\tq\ta"), "an empty list"),
    "the index of no row": (table("1\t7\tq\ta"), "the index of a row that has it"),
    "an index twice": (table(f"1\t{IMAGE}\tq\ta", f"1\t{IMAGE}\tq\ta"), "occurs once"),
    "an index that names itself": (table("1\t1\tq\ta"), "the index of a row that has it"),
}
SHARDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (missing("shards"), "a finished stage"),
    "no marker": (file_of("", "00000.jsonl"), "a finished stage"),
    "an empty marker": (shards(marker=b""), '"rows": n'),
    "a marker that is a list": (shards(marker="[1, 1]"), '"rows": n'),
    "a marker without rows": (shards(marker='{"shards": 1}'), '"rows": n'),
    "a marker in words": (shards(marker='{"rows": "one", "shards": 1}'), '"rows": n'),
    "a marker of fewer than no rows": (shards(marker='{"rows": -1, "shards": 1}'), '"rows": n'),
    "a marker of half a shard": (shards(marker='{"rows": 1, "shards": 0.5}'), '"rows": n'),
    "a marker that is true": (shards("{}", marker='{"rows": true, "shards": true}'), '"rows": n'),
    "a marker with rows twice": (shards(marker='{"rows": 0, "rows": 1, "shards": 1}'), "there twice"),
    "a marker that is not UTF-8": (shards(marker=b"\xff"), '"rows": n'),
    "a marker of more shards": (shards("{}", marker='{"rows": 1, "shards": 2}'), "a readable file"),
    "a marker of more rows": (shards("{}", marker='{"rows": 2, "shards": 1}'), "2 rows"),
    "a marker of fewer rows": (shards("{}", "{}", marker='{"rows": 1, "shards": 1}'), "1 rows"),
    "half a line": (shards('{"id": "x'), "one JSON object"),
    "a key twice": (shards('{"id": "x", "id": "y"}'), "there twice"),
    "a marker of 10^400 rows": (shards("{}", marker=f'{{"rows": {10**400}, "shards": 1}}'), "rows"),
    "a marker of 10^12 shards": (shards("{}", marker='{"rows": 1, "shards": 1000000000000}'), "a readable file"),
    "a marker of 100,000 brackets": (shards("{}", marker="[" * 100_000), "nested too deep"),
    "a marker of hashes that are numbers": (shards("{}", marker='{"rows": 1, "shards": 1, "sha256": [3]}'), "SHA-256"),
    "a marker of another shard's hash": (
        shards("{}", marker=f'{{"rows": 1, "shards": 1, "sha256": ["{"0" * 64}"]}}'),
        "SHA-256",
    ),
    "a marker of hashes for more shards": (
        shards("{}", marker='{"rows": 1, "shards": 1, "sha256": [null, null]}'),
        "for 1 shards",
    ),
}
CANDIDATE_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no id": ({"id": None}, _ID),
    "no sample_id": ({"sample_id": None}, _ID),
    "no text": ({"text": None}, "'text'"),
    "no target: an empty text": ({"text": ""}, "'text'"),
    "no log-probability": ({"logprob": None}, _NUMBER),
    "a log-probability in words": ({"logprob": "low"}, _NUMBER),
    "a log-probability of NaN": ({"logprob": float("nan")}, "not a finite number"),
    "a log-probability of -Infinity": ({"logprob": float("-inf")}, "not a finite number"),
    "an integer beyond all floats for a log-probability": ({"logprob": -(10**400)}, _NUMBER),
    "a log-probability above 0": ({"logprob": 0.01}, "at most 0"),
    "a log-probability that is true": ({"logprob": True}, _NUMBER),
    "a log-probability that is a list": ({"logprob": [-1.0]}, _NUMBER),
    "a rationale that is a list": ({"rationale": ["a"]}, "a string"),
    "token_ids that are text": ({"token_ids": "1 2"}, "token ids"),
    "a token id below 0": ({"token_ids": [-1]}, "token ids"),
    "a token id beyond any vocabulary": ({"token_ids": [2**40]}, "token ids"),
    "a token id that is true": ({"token_ids": [True]}, "token ids"),
}
SCORE_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no sample_id": ({"sample_id": None}, _ID),
    "no candidate_ids": ({"candidate_ids": None}, "'candidate_ids'"),
    "candidate_ids that are numbers": ({"candidate_ids": [1, 2]}, "a list of ids"),
    "a candidate twice": ({"candidate_ids": ["a", "a"]}, "each once"),
    "a candidate more than scores": ({"candidate_ids": ["a", "b", "c"]}, "3 numbers"),
    "no scores": ({"scores": None}, "'scores'"),
    "a score of NaN": ({"scores": [float("nan"), 0.5]}, "not a finite number"),
    "a score beyond all floats": ({"scores": [10**400, 0.5]}, "from 0 to 1"),
    "a score that is true": ({"scores": [True, False]}, "from 0 to 1"),
    "a win probability above 1": ({"win_probability": [[0.5, 1.1], [0.0, 0.5]]}, "'win_probability'"),
    "a win probability below 0": ({"win_probability": [[0.5, 0.5], [-0.5, 0.5]]}, "'win_probability'"),
    "a win probability of Infinity": ({"win_probability": [[0.5, float("inf")], [0.0, 0.5]]}, "not a finite number"),
    "win probabilities of fewer candidates": ({"win_probability": [[0.5]]}, "2 x 2"),
    "win probabilities in a row": ({"win_probability": [0.5, 0.5]}, "2 x 2"),
    "win probabilities of 2 x 3": ({"win_probability": [[0.5, 0.5, 0.5]] * 2}, "2 x 2"),
    "a confidence below 0": ({"confidence": [[0, -0.5], [0.5, 0]]}, "'confidence'"),
    "a confidence of null": ({"confidence": [[None, 0.5], [0.5, 0]]}, "'confidence'"),
    "pairs in words": ({"pairs": "one"}, _NUMBER),
    "a score too few": ({"scores": [0.5]}, "2 numbers"),
    "a score above 1": ({"scores": [0.5, 1.5]}, "from 0 to 1"),
    "a score that is text": ({"scores": ["0.5", 0.5]}, "from 0 to 1"),
    "a rating below 0": ({"alone": [-1, 0]}, "'alone'"),
    "a confidence that is a row": ({"confidence": [0, 0.5]}, "2 x 2"),
    "a confidence with a hole": ({"confidence": [[0, 0.5], [0.5]]}, "2 x 2"),
    "no pairs": ({"pairs": None}, "'pairs'"),
    "a rate above 1": ({"flip_rate": 2}, "a share"),
    "a count below 0": ({"verdicts": -1}, "a count"),
}
TEACHER_FIELDS: dict[str, tuple[str, str]] = {
    "no id": (changed(TAUGHT, {"id": None}), "'id'"),
    "an id that is a number": (changed(TAUGHT, {"id": 3}), "'id'"),
    "no rationale": (changed(TAUGHT, {"rationale": None}), "'rationale'"),
    "an empty rationale": (changed(TAUGHT, {"rationale": " "}), "'rationale'"),
    "a rationale that is a list": (changed(TAUGHT, {"rationale": ["a"]}), "'rationale'"),
    "an answer that is a number": (changed(TAUGHT, {"answer": 3}), "'answer'"),
    "an id twice": (f"{json.dumps(TAUGHT)}\n{json.dumps(TAUGHT)}", "an id that no other line has"),
}
PREDICTION_FIELDS: dict[str, tuple[str, str]] = {
    "no id": (changed(PREDICTED, {"id": None}), "'id'"),
    "no verdict": (changed(PREDICTED, {"aligned": None}), "'aligned'"),
    "a verdict in words": (changed(PREDICTED, {"aligned": "yes"}), "'aligned'"),
    "an id twice": (f"{json.dumps(PREDICTED)}\n{json.dumps(PREDICTED)}", "occurs once"),
}
ASKED_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "'prompt'"),
    "no target: an empty response": ({"response": ""}, "'response'"),
    "a response that is a list": ({"response": ["red"]}, "'response'"),
    "an image that is not there": ({"images": ["none.png"]}, "no such file"),
}
DIGIT_FILES: dict[str, bytes] = {
    "an empty file": b"",
    "no gzip": b"0,1,2",
    "no row": gzip.compress(b""),
    "a row of two": gzip.compress(b"1,2\n"),
    "not ASCII": gzip.compress(b"\xff"),
    "a pixel that is text": gzip.compress(b"x," * 64 + b"1\n"),
    "a digit of 10": gzip.compress((b"0," * 64 + b"10\n") * 1797),
    "a pixel of 17": gzip.compress((b"17," * 64 + b"1\n") * 1797),
    "a pixel below 0": gzip.compress((b"-1," * 64 + b"1\n") * 1797),
    "a pixel without end": gzip.compress((b"inf," * 64 + b"1\n") * 1797),
    "a gzip file that is cut off": gzip.compress(b"0," * 64 + b"1\n")[:-9],
    "a gzip file with a changed byte": gzip.compress(b"0," * 64 + b"1\n")[:12] + b"\xff" * 9,
}
NILE, WHEAT = "datasets/nile/nile.csv", "_data/wheat.json"
CHART_FILES: dict[str, tuple[str, str | bytes]] = {
    "an empty table": (NILE, ""),
    "a table that is not UTF-8": (NILE, b"\xff\xfe"),
    "a table without a column": (NILE, "year,flow\n1871,3\n"),
    "a table of words": (NILE, "year,volume\n1871,many\n"),
    "a row without its value": (NILE, "year,volume\n1871\n"),
    "values below 0": (NILE, "year,volume\n1871,-3\n"),
    "values beyond all": (NILE, "year,volume\n1871,1e999999999\n"),
    "a field of 200,000 characters": (NILE, "year,volume\n" + "1" * 200_000 + ",1\n"),
    "an empty JSON file": (WHEAT, ""),
    "an object": (WHEAT, "{}"),
    "a number": (WHEAT, "3"),
    "a list of numbers": (WHEAT, "[3]"),
    "an object without its value": (WHEAT, '[{"year": 1565}]'),
    "a year that is a list": (WHEAT, '[{"year": [1], "wheat": 4}]'),
    "a year that is null": (WHEAT, '[{"year": null, "wheat": 4}]'),
    "100,000 brackets": (WHEAT, "[" * 100_000),
}
PACKAGE_FILES: dict[str, str | bytes] = {
    "an empty file": b"",
    "an object": "{}",
    "a row of two": '[["Is there a red shape?", "yes"]]',
    "a row that is text": '["Is there a red shape?"]',
    "an image in words": '[["Is there a red shape?", "yes", "one"]]',
    "an image that is true": '[["Is there a red shape?", "yes", true]]',
    "no target: an empty answer": '[["Is there a red shape?", "", 1]]',
    "an answer that is null": '[["Is there a red shape?", null, 1]]',
    "not UTF-8": b'[["\xff", "yes", 1]]',
    "UTF-16": '[["a", "yes", 1]]'.encode("utf-16"),
    "an image number of 5,000 digits": f'[["Is there a red shape?", "yes", {"9" * 5000}]]',
    "an image number beyond all": f'[["Is there a red shape?", "yes", {10**400}]]',
    "100,000 brackets": "[" * 100_000,
}


def _by_field(
    kind: str,
    row: dict[str, Any],
    fields: dict[str, tuple[dict[str, Any], str]],
    act: Callable[[Path], Any],
    make: Callable[[str], Callable[[Path], Path]],
) -> list[Case]:
    return [Case(kind, wrong, make(changed(row, change)), act, (word,)) for wrong, (change, word) in fields.items()]


def _too_many(path: Path) -> None:
    rejected = write_rejected("jsonl")(path)
    check_rejected(rejected, 3, 1)


def cases() -> list[Case]:
    """All of them."""

    def lines(text: str | bytes) -> Callable[[Path], Path]:
        return file_of(text, "rows.jsonl")

    samples, trl, llava = write_rejected("jsonl"), write_rejected("trl", read_preferences), write_rejected("llava")
    tsv = write_rejected("vlmeval_tsv")
    found = [
        Case("JSON lines", wrong, lines(text), samples, ("line 1", word)) for wrong, (text, word) in BAD_LINES.items()
    ]
    found += [
        Case("JSON lines", "no file", missing("rows.jsonl"), samples, ("a readable file",)),
        Case("JSON lines", "a folder", folder_of("rows.jsonl"), samples, ("a readable file",)),
        Case("JSON lines", "a path with a NUL", missing("a\0b"), samples, ("a readable file",)),
        Case("JSON lines", "an unknown format", lines("{}"), write_rejected("csv"), ("'format'", "csv")),
        Case("JSON lines", "an id twice", lines(f"{json.dumps(SAMPLE)}\n" * 2), samples, ("occurs once",)),
        Case("JSON lines", "more bad rows than max_rejected", lines("{}\n{}\n{}"), _too_many, ("max_rejected",)),
    ]
    found += _by_field("Samples", SAMPLE, SAMPLE_FIELDS, samples, lines)
    found += _by_field("Preferences", PAIR, PAIR_FIELDS, write_rejected("jsonl", read_preferences), lines)
    shard_fields = {wrong: value for wrong, value in PAIR_FIELDS.items() if not wrong.startswith("an image")}
    found += _by_field("Preferences in shards", PAIR, shard_fields, pairs, shards)
    strange = shards(json.dumps(PAIR))
    found.append(
        Case(
            "Preferences in shards",
            "a sample of another run",
            strange,
            lambda path: read_pairs(path, {}) and None,
            ("a sample of this run",),
        )
    )
    found += _by_field("TRL preferences", PAIR, TRL_FIELDS | PAIR_FIELDS, trl, lines)
    found += [
        Case(
            "TRL preferences", "an unknown format", lines("{}"), write_rejected("csv", read_preferences), ("'format'",)
        ),
        Case("TRL preferences", "no file", missing("rows.json"), trl, ("a readable file",)),
    ]
    found += _by_field("LLaVA conversations", TALK, TALK_FIELDS, llava, lines)
    for kind, act in (("LLaVA conversations", llava), ("TRL preferences", trl)):
        found += [Case(kind, wrong, lines(text), act, (word,)) for wrong, (text, word) in BAD_LISTS.items()]
    found += [
        Case("LLaVA conversations", "a path with a NUL", missing("a\0b"), llava, ("a readable file",)),
        Case("LLaVA conversations", "a folder", folder_of("rows.json"), llava, ("a readable file",)),
    ]
    found += [Case("VLMEvalKit tables", wrong, make, tsv, (word,)) for wrong, (make, word) in TABLE_ROWS.items()]
    found += [
        Case("VLMEvalKit tables", "no file", missing("table.tsv"), tsv, ("a readable table",)),
        Case("VLMEvalKit tables", "a folder", folder_of("table.tsv"), tsv, ("a readable table",)),
        Case("VLMEvalKit tables", "a path with a NUL", missing("a\0b"), tsv, ("a readable table",)),
    ]
    found += [
        Case("Shards", wrong, make, lambda path: list(read_shards(path)) and None, (word,))
        for wrong, (make, word) in SHARDS.items()
    ]
    found += _by_field("Candidates", CANDIDATE, CANDIDATE_FIELDS, candidates, shards)
    found += _by_field("Scores", SCORES, SCORE_FIELDS, lambda path: list(read_scores(path)) and None, shards)
    found += [
        Case("Teacher rationales", wrong, lines(text), teacher, ("line", word))
        for wrong, (text, word) in TEACHER_FIELDS.items()
    ]
    found += [
        Case("Predictions", wrong, lines(text), read_aligned, ("line", word))
        for wrong, (text, word) in PREDICTION_FIELDS.items()
    ]
    found += _by_field(
        "Log-probabilities asked for",
        ASKED,
        ASKED_FIELDS,
        lambda path: read_logprob_rows(path, path.parent) and None,
        lines,
    )
    found += [Case("easy-VQA", wrong, package(text), easy_vqa, ("question",)) for wrong, text in PACKAGE_FILES.items()]
    found.append(Case("easy-VQA", "no file", missing("train/questions.json"), easy_vqa, ("reinstall",)))
    asked = package('[["is there a red shape?", "yes", 7]]')
    for wrong, split, words in (
        ("no picture of a split that is chosen by pictures", "fit", ("7.png", "reinstall")),
        ("an unknown split", "generalisation", ("split", "test-reworded")),
    ):
        found.append(Case("easy-VQA", wrong, asked, partial(easy_vqa, split=split), words))
    file = "datasets/data/digits.csv.gz"
    found += [
        Case("Digits", wrong, file_of(data, file), digits, ("1,797 rows", "reinstall"))
        for wrong, data in DIGIT_FILES.items()
    ]
    found.append(Case("Digits", "no file", missing(file), digits, ("reinstall",)))
    found += [
        Case("Tables of charts", wrong, file_of(data, name), chart_table, ("the table", "reinstall"))
        for wrong, (name, data) in CHART_FILES.items()
    ]
    found.append(Case("Tables of charts", "no file", missing(NILE), chart_table, ("reinstall",)))
    return found

"""Malformed settings: files, and `key=value` words."""

from __future__ import annotations

from pathlib import Path

from malformed_case import Case, file_of, folder_of, missing

from srcfast.config.load import load_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))

FILES: dict[str, tuple[str | bytes, str]] = {
    "text": ("no settings", "key: value"),
    "a list": ("- seed: 1", "key: value"),
    "a tab": ("lora:\n\tr: 8", "line 2"),
    "a bracket left open": ("lora: {r: 8", "expected YAML"),
    "not UTF-8": (b"name: \xff", "a readable YAML file"),
    "a NUL": (b"name: a\0", "expected YAML"),
    "two documents": ("seed: 1\n---\nseed: 2", "single document"),
    "a setting twice": ("seed: 1\nseed: 2", "seed is set twice"),
    "a setting twice in a section": ("lora: {r: 8, r: 9}", "lora.r is set twice"),
    "a section twice": ("lora: {r: 8}\nlora: {alpha: 9}", "lora is set twice"),
    "a Python object": ("seed: !!python/object/apply:os.system [true]", "python/object"),
    "a Python name": ("name: !!python/name:os.system", "python/name"),
    "a tag of one's own": ("seed: !mine 3", "!mine"),
    "aliases that swell": (BOMB, "leave aliases out"),
    "merged aliases that swell": (MERGED, "leave aliases out"),
    "a list that holds itself": ("data: &a {train: [*a]}", "leave aliases out"),
    "an alias of nothing": ("seed: *none", "undefined alias"),
    "2,000 brackets": ("data: " + "[" * 2000, "nested too deep"),
    "a day that is none": ("seed: 2001-99-99", "seed: expected a whole number"),
    "a number in base 60": ("threads: 1:30", "threads: expected a whole number"),
    "a name that is a number": ("name: 010", "name: expected a valid string"),
    "a boolean that is none": ("quiet: !!bool perhaps", "expected YAML"),
    "an integer that is none": ("seed: !!int x", "expected YAML"),
    "an integer of 5,000 digits": ("seed: " + "9" * 5000, "5000 digits"),
    "a key that is a number": ("1: 2", "the name of a setting"),
    "a key that is true": ("true: 2", "the name of a setting"),
    "a key that is a list": ("? [seed]\n: 2", "unhashable key"),
    "an unknown setting": ("sede: 1", "'seed'"),
    "an unknown setting in a section": ("lora: {rank: 8}", "line 1"),
    "an unknown setting of a dataset": (
        "data: {train: [{name: a, format: world, limit: 3, sed: 1}]}",
        "data.train.0.seed",
    ),
    "half of a surrogate pair": ('output: "\\ud800"', "output"),
    "an unknown preset": ("preset: 13GiB", "preset"),
    "a preset that is a list": ("preset: [12GiB]", "preset"),
    "a model that is text": ("model: embedded", "key: value"),
    "a dataset that is text": ("data: {train: [world]}", "data.train.0"),
    "datasets that are one": ("data: {train: {name: a, format: world, limit: 3}}", "data.train"),
    "a dataset without a name": ("data: {train: [{format: world, limit: 3}]}", "data.train.0.name"),
    "a dataset of an unknown format": ("data: {train: [{name: a, format: csv}]}", "data.train.0.format"),
    "a dataset without a path": ("data: {train: [{name: a, format: llava}]}", "needs a path"),
    "a world without an end": ("data: {train: [{name: a, format: world}]}", "set its limit"),
    "clips without an end": ("data: {train: [{name: a, format: clips}]}", "set its limit"),
    "digits without an end": ("data: {train: [{name: a, format: digits}]}", "format digits has no end: set its limit"),
    "charts without an end": ("data: {train: [{name: a, format: charts}]}", "format charts has no end: set its limit"),
    "two evaluation sets of a name": (
        "data: {evaluation: [{name: a, format: easy_vqa}, {name: a, format: easy_vqa}]}",
        "two datasets whose files are named",
    ),
    "two evaluation sets that differ in case": (
        "data: {evaluation: [{name: a, format: easy_vqa}, {name: A, format: easy_vqa}]}",
        "one to some disks",
    ),
    "an evaluation set that leads elsewhere": (
        "data: {evaluation: [{name: ../../up/x, format: easy_vqa}]}",
        "they name files",
    ),
    "an evaluation set of an absolute name": ("data: {evaluation: [{name: /x, format: easy_vqa}]}", "they name files"),
    "an evaluation set of 300 letters": (
        f"data: {{evaluation: [{{name: {'a' * 300}, format: easy_vqa}}]}}",
        "they name files",
    ),
    "a run of a device's name": ("name: nul", "they name files"),
    "a run of 300 letters": (f"name: {'a' * 300}", "they name files"),
    "a NUL in a path": ('output: "a\\0b"', "without a NUL"),
    "a NUL in a dataset's path": ('data: {train: [{name: a, format: jsonl, path: "a\\0b"}]}', "without a NUL"),
    "a stage that a dataset can't take part in": (
        "data: {train: [{name: a, format: easy_vqa, use: [training]}]}",
        "data.train.0.use",
    ),
}
WORDS: dict[str, tuple[str, str]] = {
    "nothing": ("", "found no '='"),
    "no equals sign": ("seed", "found no '='"),
    "a colon": ("seed: 3", "found no '='"),
    "no key": ("=3", "found no '='"),
    "no value": ("seed=", "found None"),
    "two equals signs": ("seed==3", "found '=3'"),
    "an unknown key": ("sede=3", "'seed'"),
    "an unknown section": ("lor.r=3", "'lora.r'"),
    "a key below a value": ("lora.r.x=3", "'lora.r'"),
    "a key of dots": ("..=3", "unknown setting"),
    "a bracket left open": ("lora={r: 8", "expected YAML"),
    "a setting twice": ("lora={r: 8, r: 9}", "set twice"),
    "a Python object": ("seed=!!python/object/apply:os.system [true]", "python/object"),
    "a list that holds itself": ("data.train=&a [*a]", "leave aliases out"),
    "a NUL": ("name=\0", "expected YAML"),
    "a part of a list": ("data.train.0.limit=3", "a whole list"),
    "a section that is a number": ("lora=5", "key: value"),
    "a key that is a number": ("lora={1: 2}", "the name of a setting"),
}
# One of each kind of setting, with values that are of another kind, not finite or out of bounds.
VALUES: dict[str, tuple[str, ...]] = {
    "seed": ("-1", "4294967296", "1.5", "true", ".nan", ".inf", "x", "[1]", "{a: 1}", "2001-01-01"),
    "name": ("''", "../up", "'a/b'", "3", "true", "[a]", "-flag", "null"),
    "output": ("''", "3", "null"),
    "quiet": ("perhaps", "2", "[true]", "null"),
    "max_rejected": ("-1", "1.5", ".nan", ".inf", "many", "true"),
    "memory": ("x", "12 apples", "0GiB", "-1GiB", "1e400", "9" * 400, "[1GiB]", "3"),
    "iterations": ("-1", "101"),
    "model.dtype": ("float8", "32", "null", "[float32]"),
    "model.path": ("3", "[a]", "{a: b}"),
    "lora.r": ("0", "4097", "8.5", "'8 of'", ".inf"),
    "lora.alpha": ("0", "-1", ".nan", ".inf", "'1e999'", "9" * 400, "true"),
    "lora.dropout": ("1", "-0.1", ".nan"),
    "lora.target_modules": ("[]", "q_proj", "[1]", "{a: b}", "null"),
    "rationale.activation_checkpointing": ("-1", "some", "true", "1.5"),
    "rationale.teacher": ("3", "[a]"),
    "dpo.learning_rate": ("0", "2", ".nan", "fast"),
    "candidates.top_p": ("0", "1.1", ".nan"),
    "checkpoint.minutes": ("-1", ".inf"),
    "distributed.timeout_seconds": ("0", "1.5"),
}


def cases() -> list[Case]:
    """All of them."""

    def read(path: Path) -> None:
        load_config(path)

    def read_word(path: Path) -> None:
        load_config(None, [path.read_bytes().decode("utf-8")])

    found = [
        Case("Settings files", wrong, file_of(text, "a.yaml"), read, (word,)) for wrong, (text, word) in FILES.items()
    ]
    found += [
        Case("Settings files", "no file", missing("a.yaml"), read, ("a.yaml", "a readable YAML file")),
        Case("Settings files", "a folder", folder_of("a.yaml"), read, ("a.yaml", "a readable YAML file")),
        Case("Settings files", "a path with a NUL", missing("a\0b"), read, ("a readable YAML file",)),
    ]
    for wrong, (text, word) in WORDS.items():
        found.append(Case("key=value words", wrong, file_of(text, "word"), read_word, (word,)))
    for key, values in VALUES.items():
        for value in values:
            shown = value if len(value) < 20 else f"{len(value)} digits"
            make = file_of(f"{key}={value}", "word")
            found.append(Case("Values of settings", f"{key}: {shown}", make, read_word, (key,)))
    return found

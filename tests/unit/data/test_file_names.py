"""Names that lead elsewhere, or are no name of a file on every system, are refused by one function."""

from __future__ import annotations

import pytest

from srcfast.data.file_names import as_stored, check_file_name

REFUSED = {
    "nothing": "",
    "the folder": ".",
    "the folder above": "..",
    "a path above": "../../up/x",
    "an absolute path": "/etc/x",
    "a folder and a name": "a/b",
    "a path of Windows": "a\\b",
    "a NUL": "a\0b",
    "a line feed": "a\nb",
    "an escape": "a\x1b[2Jb",
    "a mark that turns the writing": "a\u202eb",
    "a mark without width": "a\u200bb",
    "half of a surrogate pair": "a\ud800",
    "300 letters": "a" * 300,
    "201 bytes": "ä" * 100 + "a",
    "a dot at its end": "a.",
    "dots at its end": "a...",
    "a dot at its beginning": ".a",
    "a space at its end": "a ",
    "a space at its beginning": " a",
    "a device": "nul",
    "a device with an ending": "Com1.txt",
    "a device and a space": "CON .txt",
}
TAKEN = ["a", "ä" * 100, "a" * 200, "a.b", "a b", "console", "com10", "日本語", "a:b", "-a", "COM", "x-nul"]


@pytest.mark.parametrize("what", REFUSED)
def test_what_names_no_file_of_its_folder_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match="expected names without '/'"):
        check_file_name(REFUSED[what])


@pytest.mark.parametrize("name", TAKEN)
def test_other_names_are_taken_as_they_are(name: str) -> None:
    assert check_file_name(name) == name


def test_names_that_some_disk_takes_for_one_are_one() -> None:
    one = [("Test", "tEST"), ("\u00e9", "e\u0301"), ("STRASSE", "straße"), ("\u212b", "a\u030a"), ("\uff41", "A")]
    assert all(as_stored(a) == as_stored(b) for a, b in one)
    assert as_stored("a") != as_stored("b") and as_stored("e") != as_stored("\u00e9")

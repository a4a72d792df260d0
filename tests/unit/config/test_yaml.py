"""Long plain files are read; what a few lines swell to by aliases is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from srcfast.config.yaml import MAX_NODES, read_yaml
from srcfast.errors import ConfigError


def test_a_vocabulary_of_many_words_is_read(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(MAX_NODES + 1)]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"words": words}))
    assert read_yaml(tmp_path / "a.yaml", {}) == {"words": words}


@pytest.mark.parametrize("plain", [0, MAX_NODES])
def test_what_aliases_add_is_bounded_however_long_the_file(tmp_path: Path, plain: int) -> None:
    lines = ["plain:", *(f"- {number}" for number in range(plain)), "a: &a [x, x, x, x, x, x, x, x, x]"]
    once = 10  # the list and its nine items
    most = MAX_NODES // once
    for count in (most, most + 1):
        (tmp_path / "a.yaml").write_text("\n".join([*lines, "b:", *["- *a"] * count]))
        if count == most:
            assert read_yaml(tmp_path / "a.yaml", {})["b"] == [["x"] * 9] * most
        else:
            with pytest.raises(ConfigError, match="Fix: leave aliases out"):
                read_yaml(tmp_path / "a.yaml", {})

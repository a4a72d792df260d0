import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_scorer import small_tokenizer, write_text_model  # noqa: E402


@pytest.fixture(scope="session")
def scorer_directory(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("scorer"), small_tokenizer())

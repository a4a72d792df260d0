"""The command `chat`: ask a model about images; what it saw, what it concluded and its answer are shown apart."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from srcfast.cli import inputs
from srcfast.cli.hub_inputs import from_hub
from srcfast.data.images import check_image
from srcfast.data.rationale_format import parse_response
from srcfast.data.records import Sample
from srcfast.data.turns import IMAGE_MARK
from srcfast.errors import ConfigError, printable
from srcfast.stages.evaluation import answer_greedily
from srcfast.stages.policy import features_of, load_model


def chat(model: str, words: Sequence[str], images: Sequence[Path], adapter: Path | None, question: str | None) -> None:
    """Answer one question, or those that are typed in. Each is asked alone, as in training."""
    config = inputs.settings(words, None, model=model)
    root, names = below_one_root(images)
    for name in names:
        check_image(root, name)  # before the model, whose loading takes long
    config, options = from_hub(config, {"adapter": adapter}, models=["model"])
    lvlm = load_model(config, options["adapter"])
    console = Console(highlight=False)
    asked = Sample("question", names, "", "", image_root=root)
    features = features_of(lvlm, [asked])  # the images are encoded once
    for text in [question] if question is not None else questions(console):
        sample = replace(asked, question=text.replace(IMAGE_MARK, ""))
        [prediction] = answer_greedily(lvlm, [sample], features, config.evaluation.max_new_tokens, batch_size=1)
        console.print(shown_response(prediction.text))


def questions(console: Console) -> Iterator[str]:
    """Yield the lines that are typed in, until the end of input or an empty one."""
    if sys.stdin.isatty():
        console.print("One question a line; an empty line ends.")
    while True:
        try:
            line = console.input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def shown_response(text: str) -> Table:
    """Return a table of what a response says was seen and concluded, and its answer; or the response as it is."""
    parsed = parse_response(text)
    table = Table.grid(padding=(0, 2))
    parts = [("seen", parsed.perception), ("concluded", parsed.reasoning), ("answer", (parsed.answer or "",))]
    if parsed.answer is None:
        parts = [("response", (text,))]
    for title, sentences in parts:
        for number, sentence in enumerate(sentences):
            style = "bold" if title == "answer" else ""
            table.add_row(Text("" if number else title, style="dim"), Text(printable(sentence), style=style))
    return table


def below_one_root(images: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return a directory that all images lie below, and their paths in it. Raises ConfigError for one that is missing."""
    if not images:
        return Path("."), ()
    for path in images:
        if not path.is_file():
            raise ConfigError(f"--image: expected an image file, found none at {path}. Fix: name one")
    files = [Path(os.path.realpath(path)) for path in images]
    root = Path(os.path.commonpath([file.parent for file in files]))
    return root, tuple(str(file.relative_to(root)) for file in files)

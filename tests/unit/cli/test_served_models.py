"""A command that has written an adapter of projector or tower says that servers need it merged."""

from __future__ import annotations

import pytest

from srcfast.cli.commands import say_what_servers_take
from srcfast.config.settings import Config, LoRAConfig


@pytest.mark.parametrize(
    ("lora", "quiet", "said"),
    [
        (LoRAConfig(), False, False),
        (LoRAConfig(projector=True), False, True),
        (LoRAConfig(tower_layers=1), False, True),
        (LoRAConfig(projector=True, tower_layers=2), True, False),
    ],
)
def test_what_servers_do_not_take_is_said(
    lora: LoRAConfig, quiet: bool, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    say_what_servers_take(Config.model_validate({"quiet": quiet}), lora)
    assert ("srcfast merge first" in capsys.readouterr().out) is said

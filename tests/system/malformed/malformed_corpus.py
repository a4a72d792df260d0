"""The whole corpus, kind by kind."""

from __future__ import annotations

import malformed_checkpoints
import malformed_containers
import malformed_conversations
import malformed_images
import malformed_places
import malformed_processors
import malformed_records
import malformed_runs
import malformed_settings
from malformed_case import Case

CORPUS: list[Case] = [
    *malformed_records.cases(),
    *malformed_conversations.cases(),
    *malformed_containers.cases(),
    *malformed_images.cases(),
    *malformed_settings.cases(),
    *malformed_checkpoints.cases(),
    *malformed_processors.cases(),
    *malformed_runs.cases(),
    *malformed_places.cases(),
]

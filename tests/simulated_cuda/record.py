"""What a run does that costs time on a GPU, and where: waits of the host, copies from pageable memory, kernel launches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

# (what, where): "_local_scalar_dense", "srcfast.generation.decode:195(_run) < ..."
Site = tuple[str, str]

PRODUCT = ("srcfast", "srcfast_kernels", "srcfast_benchmarks")
FRAMES = 3  # of the product, that a site names


@dataclass
class Record:
    """Counts while it is active.

    Attributes:
        waits: the host waits for a device because it needs a value, or copies without `non_blocking`.
        synchronizations: of a device or a stream, by name.
        event_waits: `event.synchronize()`.
        pageable_copies: between a device and memory that is not pinned.
        launches: of Triton kernels, by name.
        attention_calls: of variable-length attention: "forward", "backward".
        replays: of CUDA graphs, by where.
        captures: likewise.
    """

    waits: Counter[Site] = field(default_factory=Counter)
    synchronizations: Counter[Site] = field(default_factory=Counter)
    event_waits: Counter[Site] = field(default_factory=Counter)
    pageable_copies: Counter[Site] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    attention_calls: Counter[str] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    captures: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """One line a site, the most frequent first."""
        lines = []
        for name in ("waits", "synchronizations", "event_waits", "pageable_copies"):
            for (what, where), times in getattr(self, name).most_common():
                lines.append(f"{times:6d} {name:16s} {what:40s} {where}")
        for name in ("captures", "replays", "launches", "attention_calls"):
            for what, times in getattr(self, name).most_common():
                lines.append(f"{times:6d} {name:16s} {what}")
        return "\n".join(lines)


_active: list[Record] = []
sync_debug_mode = 0  # 1: warn, 2: raise; as torch.cuda.set_sync_debug_mode


@contextmanager
def recording() -> Iterator[Record]:
    """Record while the body runs; records may be nested."""
    record = Record()
    _active.append(record)
    try:
        yield record
    finally:
        _active.remove(record)


def note(kind: str, what: str) -> None:
    """Count one event; called from C++ and Python. Raises RuntimeError for errors, and for waits where PyTorch is asked to."""
    if kind == "error":
        raise RuntimeError(f"simulated device: {what}")
    if kind == "wait" and sync_debug_mode == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation (simulated): {what}")
    if not _active:
        return
    attribute = {
        "wait": "waits",
        "synchronize": "synchronizations",
        "event": "event_waits",
        "pageable": "pageable_copies",
    }.get(kind)
    where = site()
    for record in _active:
        if attribute is not None:
            getattr(record, attribute)[what, where] += 1
        elif kind in ("replay", "capture"):
            getattr(record, f"{kind}s")[where] += 1
        elif kind == "launch":
            record.launches[what] += 1
        else:
            record.attention_calls[what] += 1


def site() -> str:
    """The innermost frames of the product that are being executed, as `module:line(function)`."""
    frame, frames = sys._getframe(1), []
    while frame is not None and len(frames) < FRAMES:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in PRODUCT:
            frames.append(f"{module}:{frame.f_lineno}({frame.f_code.co_name})")
        frame = frame.f_back
    return " < ".join(frames) or "elsewhere"

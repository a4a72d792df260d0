"""A process group in NCCL's place: gloo on the memory of the simulated devices."""

from __future__ import annotations

import types
from datetime import timedelta
from typing import Any

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

_groups: list[Any] = []  # PyTorch holds their C++ part alone


def install_nccl(native: types.ModuleType) -> None:
    """Let `init_process_group` with `nccl` make groups that work on simulated devices."""

    class SimulatedNCCL(native.Collectives):
        class Options:
            def __init__(self, is_high_priority_stream: bool = False) -> None:
                self.is_high_priority_stream = is_high_priority_stream
                self._timeout = timedelta(minutes=10)
                self.global_ranks_in_group: list[int] = []
                self.group_name = ""

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("simulated", store), rank, size, options._timeout)
            super().__init__(self.gloo)
            self.timeout = options._timeout
            _groups.append(self)

        def _set_default_timeout(self, timeout: timedelta) -> None:
            self.timeout = timeout
            self.gloo._set_default_timeout(timeout)

        def _shutdown(self) -> None: ...

        def abort(self) -> None: ...

    c10d._NCCL_AVAILABLE = True
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = SimulatedNCCL
    dist.is_nccl_available = c10d.is_nccl_available = lambda: True

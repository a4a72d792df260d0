"""For the whole suite: no hub is ever asked, no test fails because another one holds the cores, Triton needs no GPU."""

import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

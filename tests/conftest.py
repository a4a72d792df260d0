"""For the whole suite: no hub is ever asked, and no test fails because another one holds the cores."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

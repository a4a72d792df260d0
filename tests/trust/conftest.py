import sys
from pathlib import Path

for folder in ("distributed", "training", "generation", "fault"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import sys
from pathlib import Path

for folder in ("work_list", "distributed", "generation", "scoring", "training"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

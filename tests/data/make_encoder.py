"""Make `tests/data/encoder`: `make encoder` runs this. Needs $VLKIT_DATA; 45 minutes of one core the first time."""

import os
import sys
from pathlib import Path

from eval.general_encoder import make_general_encoder
from vlkit.cli.console import print_table, progress_bar, say
from vlkit.features.cache_folder import cache_folder

if __name__ == "__main__":
    data = os.environ.get("VLKIT_DATA")
    if not data:
        sys.exit("VLKIT_DATA is not set; it names the folder of the real data sets.")
    out = Path(__file__).parent / "encoder"
    figures = make_general_encoder(Path(data), cache_folder() / "general_small", out, bars=progress_bar, say=say)
    rows = [
        (name, metric, f"{value:.2%}", f"{low:.2%} to {high:.2%}")
        for name, metrics in figures.items()
        for metric, (value, low, high) in metrics.items()
    ]
    print_table(str(out), ("data", "metric", "value", "95% interval"), rows)

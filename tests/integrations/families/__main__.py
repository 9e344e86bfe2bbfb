"""Compare families with eager attention, and write what came of them to results.json.

python -m tests.integrations.families              # all, in ten minutes of a core
python -m tests.integrations.families llama bloom  # these again; the others keep what they have
"""

from __future__ import annotations

import json
import sys

from tests.integrations.batches import transformers
from tests.integrations.families.ways import RESULTS, compared, families


def main(names: list[str]) -> None:
    """Run the sweep."""
    transformers.logging.set_verbosity_error()
    known = json.loads(RESULTS.read_text())["families"] if names else {}
    for family, kind in families():
        if not names or family in names:
            known[family] = compared(family, kind)
            print(family, known[family], flush=True)
        written = {"transformers": transformers.__version__, "families": dict(sorted(known.items()))}
        RESULTS.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

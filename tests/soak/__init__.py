"""The soak: real processes on real servers under everything that kills them, and the table of what that proves.

    python -m tests.soak --minutes 20          # from the top of the repository; its reports lie in tests/soak/reports
    python -m tests.soak report                # adds up what was gathered on this source, and says what is short
    python -m tests.soak conditions            # writes the README's table from it

A *cell* is a store, a broker and a mode. In each, producers publish and fill an outbox, relays send it on, consumers
handle what comes, and a supervisor ends, stops and starts them, their broker and their store, and swaps their clocks
and their network (`storm.py`). Every process writes an append-only history of what it does; effects go into a table
without any unique constraint; `checker.py` says from both what was lost, doubled, unexpected and recovered. The
controls, which are the library with one protection taken out, go through the same in the same run: one that shows no
damage makes the run void.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))

"""Arms fork_watch in the processes that tests start: this folder is on their PYTHONPATH."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
try:
    import fork_watch
finally:
    del sys.path[0]
fork_watch.arm()

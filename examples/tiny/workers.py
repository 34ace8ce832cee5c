"""What the processes of a study have in common."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading

from opdengine.workers.printing import quiet_imports


def begin_worker() -> None:
    """Let this worker end with its study, also where that is killed: left alone it would go on for nobody."""
    quiet_imports()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def begin_quiet_worker() -> None:
    """Like :func:`begin_worker`; of its terminal it gets errors only."""
    from transformers.utils import logging as transformers_logging

    begin_worker()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Two processes by the agent of `python -m torch.distributed.run --standalone --nproc_per_node=2`, but forked from this
one, whose imports are done: `two.py FOLDER MODULE TASK,TASK...`, launch after launch. Of each, what it wrote is in
`TASK,TASK.log`, and how it ended in `TASK,TASK.json`.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(folder: Path, module: str, *launches: str, **environment: str) -> list[tuple[bool, str, float]]:
    """Of each launch whether it failed, what it wrote and the time of its end."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, __file__, str(folder), module, *launches]
    subprocess.run(command, env={**environment, "ACCELERATE_USE_CPU": "true"}, check=True, timeout=200)
    logs = [(folder / f"{tasks}.log").read_text() for tasks in launches]
    ends = [json.loads((folder / f"{tasks}.json").read_text()) for tasks in launches]
    return [(end["failed"], log, end["time"]) for log, end in zip(logs, ends, strict=True)]


def told(main):
    """`main`, which says what it fails by: the agent tells of one process alone, and not always of the first."""

    def run(*arguments):
        try:
            main(*arguments)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            raise

    return run


if __name__ == "__main__":
    folder, module = Path(sys.argv[1]), importlib.import_module(sys.argv[2])
    options = dict(
        min_nodes=1, max_nodes=1, nproc_per_node=2, start_method="fork", max_restarts=0, monitor_interval=0.1
    )
    gc.collect()
    gc.freeze()  # as in conftest.py
    for tasks in sys.argv[3:]:
        for output in (1, 2):
            os.dup2(os.open(folder / f"{tasks}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), output)
        config = LaunchConfig(**options, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=tasks)
        failed = False
        try:
            elastic_launch(config, told(module.main))(folder, tasks.split(","))
        except ChildFailedError as error:
            failed = True
            print(error, file=sys.stderr, flush=True)
        (folder / f"{tasks}.json").write_text(json.dumps({"failed": failed, "time": time.time()}))

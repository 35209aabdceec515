# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Runs of test_checkpoints.py that do not reach their end: `interrupted.py FOLDER HOW...`, one after the other."""

import gc
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import make_trainer, redness
from transformers import TrainerCallback, TrainerState

from rdm_trl.saving import checkpoint


OPTIONS = dict(num_iterations=2, learning_rate=5e-3, save_strategy="steps", save_steps=2)


def endless(images, prompts, metadata):
    time.sleep(1000)


async def endless_in_its_loop(images, prompts, metadata):
    time.sleep(1000)


ENDLESS = {reward.__name__: reward for reward in (endless, endless_in_its_loop)}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, what):
        self.step, self.what = step, what

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.what()


def die_in(module, name: str):
    """Writes half a file of the checkpoint of step 4, and is killed."""
    save = getattr(module, name)

    def half(*args, **kwargs):
        path = Path(args[-1])
        save(*args, **kwargs)
        if path.parent.name == "checkpoint-4":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, half)


def main(how: str, folder: Path):
    torch.set_num_threads(1)
    never_returns = ENDLESS.get(how)
    limit = 0.2 if never_returns else None
    trainer = make_trainer(folder, [never_returns or redness], max_steps=20, reward_timeout=limit, **OPTIONS)
    if how == "killed-adapters":
        die_in(checkpoint, "save_file")
    elif how == "killed-state":
        die_in(TrainerState, "save_to_json")
    elif how == "disk":  # no file may grow as large as the first that is written
        limit = (1_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        trainer.add_callback(At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)))
    elif how in ("SIGTERM", "SIGINT"):
        trainer.add_callback(At(2, (folder / "started").touch))
    trainer.train()


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # as in conftest.py
    for how in sys.argv[2:]:
        folder = Path(sys.argv[1]) / how
        process = os.fork()  # a whole process, whose imports are done
        if process == 0:
            main(how, folder)
            break
        if how in ("SIGTERM", "SIGINT"):
            while not (folder / "started").exists():
                time.sleep(0.01)
            os.kill(process, signal.Signals[how])
        returncode = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(f"\n{how} ended: {returncode}", file=sys.stderr, flush=True)

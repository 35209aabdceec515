# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

from contextlib import contextmanager

import torch


@contextmanager
def noise_apart(device: torch.device):
    """
    Inside the block torch's generators are others, which follow from the run's: code of the user's that seeds them, to
    draw the same pictures each time, would otherwise give each update the same noise.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, ())))
        yield

# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Few-step diffusion distillation in the style of TRL: distribution matching as a reward."""

from .config import RdmDistillConfig
from .demo import load_demo_pipeline
from .trainer import RdmDistillTrainer


__version__ = "0.1.0.dev0"
__all__ = ["RdmDistillConfig", "RdmDistillTrainer", "load_demo_pipeline"]

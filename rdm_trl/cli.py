# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The command `rdm-trl`."""

import argparse

from .plan import plan


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="rdm-trl", description="Tools around distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    planner = commands.add_parser("plan", help="memory and settings of a run, from the pipeline's configuration alone")
    planner.add_argument("--model", required=True, help="folder or Hub id of a pipeline")
    planner.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of the device")
    planner.add_argument("--lora-r", type=int, default=32, help="rank of the adapters")
    planner.add_argument("--height", type=int, help="of the images in pixels; the pipeline's own by default")
    planner.add_argument("--width", type=int)
    args = parser.parse_args(argv)
    print(plan(args.model, args.gpu_memory, lora_r=args.lora_r, height=args.height, width=args.width))


if __name__ == "__main__":
    main()

# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The command `rdm-trl`."""

import argparse

import torch

from .demo.page import export_space, run_demo
from .plan import plan
from .saving.export import FORMATS, export
from .saving.report import write_report


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="rdm-trl", description="Tools around distillation.")
    commands = parser.add_subparsers(dest="command", required=True)
    planner = commands.add_parser("plan", help="memory and settings of a run, from the pipeline's configuration alone")
    planner.add_argument(
        "--model", required=True, help="folder or Hub id of a pipeline, or a single .safetensors file"
    )
    planner.add_argument(
        "--single-file-config",
        metavar="DIR",
        help="of a single file: a pipeline of the same kind, for its configuration",
    )
    planner.add_argument("--gpu-memory", type=float, required=True, metavar="GIB", help="of each device")
    planner.add_argument("--num-gpus", type=int, default=1, metavar="N", help="devices that train together")
    planner.add_argument("--lora-r", type=int, default=32, help="rank of the adapters")
    planner.add_argument("--height", type=int, help="of the images in pixels; the pipeline's own by default")
    planner.add_argument("--width", type=int)
    planner.add_argument("--num-frames", type=int, help="of a video; the pipeline's own by default")
    planner.add_argument(
        "--adversarial", action="store_true", help="with a discriminator, which `adversarial_weight` asks for"
    )
    planner.add_argument("--learn-target", action="store_true", help="with the adapter that `learn_target` asks for")
    exporter = commands.add_parser("export", help="a distilled checkpoint for other programs")
    exporter.add_argument("checkpoint", help="folder that a run has saved")
    exporter.add_argument("--output_dir", "--output-dir", required=True, help="where to write")
    help = "a whole pipeline with the LoRA fused in, or a LoRA file for ComfyUI and kohya's tools"
    exporter.add_argument("--format", choices=FORMATS, required=True, help=help)
    exporter.add_argument("--base", help="folder or Hub id of the base pipeline; by default the run's")
    exporter.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of a pipeline"
    )
    reporter = commands.add_parser("report", help="how a run went, on one page; or several runs, side by side")
    reporter.add_argument("runs", nargs="+", metavar="DIR", help="`output_dir` of a run, finished or not")
    reporter.add_argument("--output", help="file to write; by default report.html, of one run in its folder")
    demo = commands.add_parser("demo", help="a page to try a finished run on: student beside teacher and base")
    demo.add_argument("run", metavar="DIR", help="folder that a run has saved")
    demo.add_argument("--export", metavar="FOLDER", help="write a Space of the Hub there, instead of serving the page")
    demo.add_argument("--base", help="folder or Hub id of the base pipeline; by default the run's")
    demo.add_argument("--port", type=int, help="of the page; the first free one from 7860 by default")
    demo.add_argument("--share", action="store_true", help="by a public link of Gradio's")
    args = parser.parse_args(argv)
    if args.command == "demo":
        try:
            if args.export is not None:
                print(export_space(args.run, args.export, args.base))
            else:
                run_demo(args.run, args.base, args.port, args.share)
        except (ImportError, ValueError) as error:
            parser.exit(2, f"{error}\n")
        return
    if args.command == "report":
        try:
            print(write_report(args.runs, args.output))
        except (ImportError, ValueError) as error:
            parser.exit(2, f"{error}\n")
        return
    if args.command == "export":
        dtype = getattr(torch, args.dtype)
        print(export(args.checkpoint, args.output_dir, args.format, base=args.base, dtype=dtype))
        return
    size = {"height": args.height, "width": args.width, "num_frames": args.num_frames, "lora_r": args.lora_r}
    learns = {"with_discriminator": args.adversarial, "learn_target": args.learn_target}
    print(plan(args.model, args.gpu_memory, args.num_gpus, args.single_file_config, **size, **learns))


if __name__ == "__main__":
    main()

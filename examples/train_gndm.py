# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
Distils a diffusion pipeline into a few-step LoRA. Without a model and without --config it distils the embedded
Fashion-MNIST pipeline with the settings of examples/configs/gndm.yaml, in minutes, on a CPU.

accelerate launch examples/train_gndm.py
accelerate launch examples/train_gndm.py --config examples/configs/dmd.yaml
accelerate launch examples/train_gndm.py \
    --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name my/prompts \
    --teacher_guidance_scale 7.5 --learning_rate 1e-4 --bf16 --output_dir sd15-4-step --push_to_hub
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig

from rdm_trl import RdmDistillConfig, RdmDistillTrainer
from rdm_trl._trl import make_parser
from rdm_trl.evaluation import cost_of_first
from rdm_trl.models.pipelines import load_pipeline
from rdm_trl.prompts import load_prompts
from rdm_trl.saving.hub import figures_table


DEMO_CONFIG = Path(__file__).parent / "configs" / "gndm.yaml"


@dataclass
class ScriptArguments:
    """
    Parameters:
        > Parameters that control the model and the prompts

        model_name_or_path (`str`, *optional*):
            The teacher: a pipeline's folder or Hub id, or a single .safetensors file; the embedded one by default.
        variant (`str`, *optional*):
            Of its weight files, where a folder or repository has these alone: `fp16`.
        single_file_config (`str`, *optional*):
            Of a single file: folder or Hub id of a pipeline of the same kind, for its configuration and tokenizer. By
            default that of the kind that diffusers finds the file to be, by the Hub or its cache.
        load_in_8bit (`bool`, *optional*, defaults to `False`):
            Hold the frozen denoiser in 8 bits (bitsandbytes, LLM.int8); needs a GPU.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Hold the frozen denoiser in 4 bits (bitsandbytes, NF4); needs a GPU.
        dataset_name (`str`, *optional*):
            Hub id of a data set with a `prompt` column, and an `image` column for a pipeline that edits images; or a
            file: txt (a prompt a line), json, jsonl, csv, tsv, parquet; or a folder of images. The embedded pipeline
            brings its own.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the prompts, where it has another name.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split of the data set.
        prompts (`list[str]`, *optional*):
            The prompts themselves, as a list in the `--config` file.
        teacher_lora (`str`, *optional*):
            Path or Hub id of a LoRA (style, character) of the teacher; the student's, alone, draws in that style.
        student_lora (`str`, *optional*):
            Path or Hub id of a few-step LoRA to continue, with its rank, alpha and layers.
        full_finetuning (`bool`, *optional*, defaults to `False`):
            Train whole copies of the denoiser instead of LoRAs: for small ones.
        lora_r (`int`, *optional*):
            Rank of the adapters of student and fake score; 32 by default.
        lora_alpha (`int`, *optional*):
            Their alpha; the rank by default, so that the scale is 1.
        lora_target_modules (`list[str]`, *optional*):
            Their layers; those of LCM-LoRA by default.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a pipeline's folder or Hub id, or a single .safetensors file."}
    )
    variant: str | None = field(default=None, metadata={"help": "Of its weight files: fp16."})
    single_file_config: str | None = field(
        default=None, metadata={"help": "Of a single file: a pipeline of the same kind, for its configuration."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The frozen denoiser in 8 bits; needs a GPU."})
    load_in_4bit: bool = field(default=False, metadata={"help": "The frozen denoiser in 4 bits; needs a GPU."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set with a `prompt` column, or a txt, json, csv or parquet file."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the data set's prompts."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of the data set."})
    prompts: list[str] | None = field(default=None, metadata={"help": "The prompts themselves."})
    teacher_lora: str | None = field(
        default=None, metadata={"help": "A LoRA of the teacher, whose style the student learns."}
    )
    student_lora: str | None = field(default=None, metadata={"help": "A few-step LoRA to continue."})
    full_finetuning: bool = field(default=False, metadata={"help": "Whole copies of the denoiser, not LoRAs."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the adapters; 32 by default."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Alpha of the adapters; the rank by default."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers of the adapters; those of LCM-LoRA by default."}
    )


def teacher_of(script_args: ScriptArguments, config: RdmDistillConfig) -> str | DiffusionPipeline | None:
    """What the trainer takes as `sd_pipeline`: the pipeline itself, where more is said of it than its name."""
    name, bits = script_args.model_name_or_path, {(False, False): None, (True, False): 8, (False, True): 4}
    wanted = (script_args.load_in_8bit, script_args.load_in_4bit)
    files = {"variant": script_args.variant, "single_file_config": script_args.single_file_config}
    if not any((*wanted, *files.values())):
        return name
    if all(wanted) or (any(wanted) and name is None):
        raise ValueError("Give one of `load_in_8bit` and `load_in_4bit`, and `model_name_or_path`.")
    if name is None:
        raise ValueError("`variant` and `single_file_config` say how `model_name_or_path` is loaded: give it too.")
    return load_pipeline(name, torch.bfloat16 if config.bf16 else torch.float32, bits[wanted], **files)


def above_file(argv: list[str]) -> list[str]:
    """With a `--save_strategy` that counts no updates a file's `save_steps` falls: the command line is above it."""
    words = [word for argument in argv for word in argument.split("=", 1)]
    if "--save_strategy" in words and "--save_steps" not in words and "steps" not in words:
        default = RdmDistillConfig.__dataclass_fields__["save_steps"].default
        return [*argv, "--save_steps", str(default)]
    return argv


def main(argv: list[str]):
    if not any(argument.split("=")[0] in ("--config", "--model_name_or_path") for argument in argv):
        argv = ["--config", str(DEMO_CONFIG), *argv]
    script_args, config = make_parser(ScriptArguments, RdmDistillConfig).parse_args_and_config(above_file(argv))

    dataset = None
    if script_args.prompts is not None and script_args.dataset_name is not None:
        raise ValueError("Give prompts by `prompts` or by `dataset_name`, not both.")
    if script_args.prompts is not None:
        if not all(isinstance(prompt, str) for prompt in script_args.prompts):
            raise ValueError("`prompts` must be texts: in YAML one with a colon stands in quotes.")
        dataset = Dataset.from_dict({"prompt": script_args.prompts})
    elif script_args.dataset_name is not None:
        dataset = load_prompts(script_args.dataset_name, script_args.dataset_train_split, script_args.prompt_column)
    peft_config, rank = None, script_args.lora_r or 32
    if script_args.full_finetuning:
        if script_args.lora_r or script_args.lora_alpha or script_args.lora_target_modules:
            raise ValueError("`full_finetuning` trains no LoRA: leave `lora_r` and its companions out.")
        peft_config = False
    elif script_args.student_lora is None or script_args.lora_r or script_args.lora_alpha:
        peft_config = LoraConfig(
            r=rank,
            lora_alpha=script_args.lora_alpha or rank,
            init_lora_weights="gaussian",
            target_modules=script_args.lora_target_modules,
        )
    trainer = RdmDistillTrainer(
        config,
        sd_pipeline=teacher_of(script_args, config),
        train_dataset=dataset,
        peft_config=peft_config,
        teacher_lora=script_args.teacher_lora,
        student_lora=script_args.student_lora,
    )
    resume = config.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if config.device.type == "cpu" and config.world_size == 1:
        torch.set_num_threads(os.cpu_count())  # `accelerate launch` gives a process one thread
    said = cost_of_first(trainer)
    if trainer.is_world_process_zero():
        print(said)
    trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    trainer.save_model()
    trainer.end()
    print(f"\n{figures_table(trainer.metrics)}\n\n{Path(config.output_dir, 'samples', 'grid.png')}")


if __name__ == "__main__":
    main(sys.argv[1:])

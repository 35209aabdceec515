# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What all families of pipelines share. See `docs/families.md` for what a new one has to define."""

import inspect
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import logging

from ...frames import contact_sheets
from ...method.diffusion import FLOW_SCHEDULERS, is_flow, make_student_scheduler


logger = logging.get_logger(__name__)

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD_LAYERS = ["ff.net.0.proj", "ff.net.2"]


class PipelineFamily:
    """
    All that the trainer has to know about a pipeline. Whatever the pipeline itself can do is left to it.

    Args:
        pipeline (`DiffusionPipeline`): it is frozen in place.
        height, width (`int`, *optional*): of the images in pixels; the pipeline's own by default.

    Attributes:
        denoiser: the module that gets the adapters.
        dtype (`torch.dtype`): of its inputs.
        lora_target_modules (`list[str]`): layers that a default LoRA covers: the linear ones of the network's
            blocks, and a UNet's convolutions. What modulates a block counts most of all in a DiT (docs/results.md).
        latent_shape (`tuple[int]`): of one image's latents, in the form that the denoiser takes them.
        num_frames (`int`, *optional*): of a video family's videos, which stand for images everywhere; else `None`.
        student_guidance_scale (`float`): `guidance_scale` of the student's plain pipeline call.
        sharded_encoders (`list[nn.Module]`): those in shards, each pass of which is one of all processes.
        encoder_loras (`dict`): LoRAs, as (config, weights), that prompts are encoded with, by the encoders' names.

    Raises:
        ValueError: a size that the pipeline cannot draw, a component is missing, or the denoiser is conditioned on
            something that no prompt gives (an IP-Adapter's image).
    """

    pipeline_class: type[DiffusionPipeline]
    denoiser_name = "transformer"
    lora_target_modules = [*ATTENTION_LAYERS, *FEED_FORWARD_LAYERS]
    student_guidance_scale = 1.0
    embeds_guidance = False  # whether the network takes a guidance scale as an input, and the family gives it
    takes_timesteps = False  # whether the pipeline's call has `timesteps`
    takes_sigmas = True  # whether it has `sigmas`, of the pipelines whose process is flow matching
    takes_image = False  # whether prompts come with an image, as `PicturePrompt`s; see `EditingFamily`
    pipeline_tag = "text-to-image"
    card_class = "DiffusionPipeline"  # the class whose `from_pretrained` the model card calls
    show_import = ""  # a line of the card's code, what `show_code` needs
    card_names: dict[str, str] = {}  # arguments of the call that the card's code has a variable for
    card_note = ""  # what the model card has to say of this family

    def __init__(self, pipeline: DiffusionPipeline, height: int | None = None, width: int | None = None):
        needed = (self.denoiser_name, "vae", "text_encoder", "tokenizer")
        missing = [name for name in needed if name in pipeline.components and pipeline.components[name] is None]
        if missing:
            raise ValueError(f"The pipeline has no {', '.join(missing)}: load it with all of its components.")
        self.pipeline = pipeline
        self.denoiser = pipeline.components[self.denoiser_name]
        self.check_conditions()
        self.dtype = self.denoiser.dtype  # asked once: diffusers looks through all layers for it
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                module.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        if pipeline.components.get("safety_checker") is not None:
            logger.warning(
                "The pipeline's safety checker is off while this run draws: samples, figures and rewards are of what "
                "the model draws, not of images that were blackened. The pipeline keeps it for calls of your own."
            )
        own_height, own_width = self.own_size()
        self.height, self.width = height or own_height, width or own_width
        # Named in every call of the pipeline, where they are not what it would do by itself.
        self.size = {} if height is None and width is None else {"height": self.height, "width": self.width}
        self.check_size()
        self.num_frames = self.own_num_frames()
        self.latent_shape = self.shape_of_latents()
        self.prompt_limit = {}
        self.student_scheduler = None
        self.student_grid = {}
        self.offloads_encoders = False
        self.sharded_encoders = []
        self.encoder_loras = {}

    def check_conditions(self):
        """Raises `ValueError` for a denoiser that asks for more than the family gives it."""
        config, name = self.denoiser.config, type(self.pipeline).__name__
        if any("IPAdapter" in type(getattr(m, "processor", None)).__name__ for m in self.denoiser.modules()):
            raise ValueError(
                f"The {name} has an IP-Adapter, whose images the student would never see: "
                "`pipeline.unload_ip_adapter()` first."
            )
        if config.get("guidance_embeds") and not self.embeds_guidance:
            raise ValueError(f"The {self.denoiser_name} has `guidance_embeds`, which is not supported for {name}.")

    # --------------------------------------------------------------------------------------------------------- devices

    def place(self, device: torch.device, offload_encoders: bool, sharded: bool = False):
        """Puts the pipeline on `device`; with `offload_encoders` without its text encoders, and without shards."""
        if sharded:  # the denoiser is where it belongs
            for module in (self.pipeline.components.get("vae"), *self.encoders()):
                if module is not None and module not in self.sharded_encoders:
                    module.to(device)
        else:
            self.pipeline.to(device)
        self.offloads_encoders = offload_encoders
        if offload_encoders:
            self._move_encoders("cpu")

    @contextmanager
    def encoders_at_hand(self):
        """Inside the block the text encoders are where the denoiser is."""
        if not self.offloads_encoders:
            yield
            return
        self._move_encoders(self.denoiser.device)
        try:
            yield
        finally:
            self._move_encoders("cpu")

    def encoders(self) -> list[torch.nn.Module]:
        """All models of the pipeline that an update of the student does not call."""
        used = (self.denoiser_name, "vae")
        modules = {name: m for name, m in self.pipeline.components.items() if isinstance(m, torch.nn.Module)}
        return [module for name, module in modules.items() if name not in used]

    def condition_modules(self) -> list[torch.nn.Module]:
        """All models that the denoiser's conditions depend on."""
        return self.encoders()

    def _move_encoders(self, device: torch.device | str):
        for module in self.encoders():
            module.to(device)

    # ------------------------------------------------------------------------------------------------- size and grid

    def own_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the pipeline draws if it is not asked for others."""
        size = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return size, size

    def own_num_frames(self) -> int | None:
        """Frames of the videos that the pipeline draws if it is not asked for others."""
        return None

    def set_num_frames(self, num_frames: int | None):
        """
        Frames of a video; None, the pipeline's own.

        Raises:
            ValueError: the pipeline draws images, or its autoencoder cannot make so many.
        """
        if num_frames is not None:
            raise ValueError(f"`sample_num_frames` is for videos, and {type(self.pipeline).__name__} draws images.")

    def size_multiple(self) -> int:
        """What height and width must be divisible by."""
        return self.pipeline.vae_scale_factor

    def check_size(self):
        multiple = self.size_multiple()
        if self.height % multiple or self.width % multiple:
            raise ValueError(
                f"`sample_height` and `sample_width` ({self.height} x {self.width}) must be divisible by {multiple} "
                f"for {type(self.pipeline).__name__}."
            )

    def shape_of_latents(self) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        return self.denoiser.config.in_channels, self.height // factor, self.width // factor

    def grid(self, num_steps: int) -> dict[str, Any]:
        """What the pipeline hands to its scheduler's `set_timesteps` beside the number of steps."""
        return {}

    def make_student_scheduler(
        self, num_steps: int, sigmas: list[float] | None = None, timesteps: list[float] | None = None
    ) -> SchedulerMixin:
        """
        The student's scheduler, with its K timesteps set. The family remembers it, and what a plain call of the
        pipeline has to be given (`sigmas=`, `timesteps=`) to run a grid of the user's own.

        Raises:
            ValueError: a grid of the other kind than the scheduler's, or one that the pipeline's call cannot be given,
                or a scheduler of another process than the pipeline's.
        """
        if timesteps is not None and not self.takes_timesteps:
            raise ValueError(f"`sample_timesteps` cannot be given to a call of {type(self.pipeline).__name__}.")
        if sigmas is not None and not self.takes_sigmas:
            raise ValueError(f"`sample_sigmas` cannot be given to a call of {type(self.pipeline).__name__}.")
        self.check_scheduler()
        scheduler = self.pipeline.scheduler
        self.student_scheduler = make_student_scheduler(scheduler, num_steps, self.grid(num_steps), sigmas, timesteps)
        if sigmas is not None:
            self.student_grid = {"sigmas": [float(sigma) for sigma in sigmas]}
        elif timesteps is not None:
            self.student_grid = {"timesteps": self.student_scheduler.timesteps.tolist()}
        return self.student_scheduler

    def check_scheduler(self):
        """Raises `ValueError` for a scheduler of another process than the networks of this pipeline are trained on."""
        pipeline, scheduler = type(self.pipeline).__name__, self.pipeline.scheduler
        name = type(scheduler).__name__
        declared = inspect.signature(self.pipeline_class.__init__).parameters["scheduler"].annotation
        if declared in FLOW_SCHEDULERS and not is_flow(scheduler):
            raise ValueError(
                f"{pipeline} is of flow matching, and its scheduler, {name}, is not: give it one of diffusers' "
                "FlowMatch schedulers, or one with `use_flow_sigmas`, `flow_shift` and "
                "`prediction_type='flow_prediction'` (UniPC, DPM-Solver)."
            )
        if declared is KarrasDiffusionSchedulers and isinstance(scheduler, FLOW_SCHEDULERS):
            raise ValueError(
                f"{pipeline} cannot be called with a {name}. Where its network was trained by flow matching, give it "
                "UniPCMultistepScheduler with `use_flow_sigmas` and `prediction_type='flow_prediction'`."
            )

    # ------------------------------------------------------------------------------------------- prompts and denoiser

    def has_guidance(self) -> bool:
        """Whether a guidance scale changes what the pipeline draws."""
        return True

    def limit_prompts(self, max_sequence_length: int | None):
        """
        Longest prompt in tokens, in every call of the pipeline and of its `encode_prompt`; None, the pipeline's own.

        Raises:
            ValueError: the pipeline has no such option.
        """
        if max_sequence_length is None:
            return
        if "max_sequence_length" not in inspect.signature(self.pipeline.__call__).parameters:
            raise ValueError(f"`max_sequence_length` cannot be given to a call of {type(self.pipeline).__name__}.")
        self.prompt_limit = {"max_sequence_length": max_sequence_length}

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """What the denoiser is conditioned on: tensors whose first dimension is `len(prompts)`."""
        raise NotImplementedError

    def encode_negative_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The same for the other half of guidance; an empty prompt means the pipeline's own unconditional."""
        return self.encode_prompts(prompts)

    def encode_own_negatives(self, prompts: list[str], negative_prompt: str) -> dict[str, torch.Tensor]:
        """What of the other half of guidance is each prompt's own, for `halves`: more of its condition."""
        return {}

    def example_condition(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Conditions for `plan`: on the meta device, where nothing may depend on a tensor's values."""
        return self.encode_prompts(["a photo"] * batch_size)

    def prompt_ids(self, prompts: list[str]) -> torch.Tensor:
        """Token ids (B, L) of the prompts, or their labels; DDPO's `prompt_ids`."""
        tokenizer = self.pipeline.tokenizer
        return tokenizer(
            prompts,
            padding="max_length",
            max_length=min(tokenizer.model_max_length, 512),
            truncation=True,
            return_tensors="pt",
        ).input_ids

    def denoise(
        self, denoiser: Callable, x_t: torch.Tensor, timesteps: torch.Tensor, condition: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """
        Raw output (B, ...) of `denoiser`, a callable with the signature of the pipeline's own, at `x_t` (B, ...) and
        `timesteps` (B,) of the scheduler. Where the network's output is the scheduler's with another sign, the
        scheduler's.
        """
        raise NotImplementedError

    def guide(
        self,
        denoise: Callable,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        condition: dict[str, torch.Tensor],
        negative: dict[str, torch.Tensor],
        guidance_scale: float,
    ) -> torch.Tensor:
        """
        The guided output (B, ...) of `denoise(x_t, timesteps, condition)`, as the pipeline computes it: without a
        `guidance_scale` above 1 the plain one, else both halves in one batch. `negative` is one prompt's condition.
        """
        if guidance_scale <= 1:
            return denoise(x_t, timesteps, condition)
        return self.combine(*self.halves(denoise, x_t, timesteps, condition, negative), guidance_scale)

    def halves(
        self,
        denoise: Callable,
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        condition: dict[str, torch.Tensor],
        negative: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The two outputs (B, ...) whose difference is guidance, from one batch: the prompt's and the negative prompt's,
        or those of a network that takes the scale as an input, called as the student's is and with a scale of 1.
        """
        both = {key: torch.cat([value, negative[key].expand_as(value)]) for key, value in condition.items()}
        output = denoise(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both)
        return output.float().chunk(2)

    def combine(self, conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """The pipeline's formula of guidance."""
        return unconditional + guidance_scale * (conditional - unconditional)

    # --------------------------------------------------------------------------------------------------------- images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), or videos (B, 3, F, H, W), in [0, 1], float32, differentiable in `latents`."""
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
        return (vae.decode(latents, return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (B, ...), float32, in the form that the denoiser takes them, of images (B, 3, H, W) in [0, 1]."""
        config = self.pipeline.vae.config
        return (self.encode_pixels(images) - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def encode_pixels(self, images: torch.Tensor) -> torch.Tensor:
        """What the autoencoder itself makes of images in [0, 1], float32; the middle of what it would draw from."""
        vae = self.pipeline.vae
        encoded = vae.encode((2 * images - 1).to(vae.dtype), return_dict=False)[0]
        return (encoded if isinstance(encoded, torch.Tensor) else encoded.mode()).float()

    def call_arguments(self, prompts: list[str], guidance_scale: float, negative_prompt: str = "") -> dict[str, Any]:
        """Arguments of the pipeline's call, but for the number of steps, the generator and the output's type."""
        arguments = {"prompt": prompts, "guidance_scale": guidance_scale, **self.size, **self.prompt_limit}
        if guidance_scale > 1:
            arguments["negative_prompt"] = [negative_prompt] * len(prompts)
        return arguments

    @torch.no_grad()
    def sample(
        self,
        scheduler: SchedulerMixin,
        prompts: list[str],
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        generator: torch.Generator | list[torch.Generator],
        output_type: str = "pt",
    ) -> torch.Tensor:
        """
        Images (B, 3, H, W), or videos (B, 3, F, H, W), in [0, 1] of the pipeline itself, in the denoiser's current
        role; its noise from one generator, or from one for each image.
        """
        arguments = self.call_arguments(prompts, guidance_scale, negative_prompt)
        if scheduler is self.student_scheduler:
            arguments |= self.student_grid
        base_scheduler, checker = self.pipeline.scheduler, self.pipeline.components.get("safety_checker")
        self.pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        if checker is not None:  # a black image says nothing of what the model draws
            self.pipeline.safety_checker = None
        device = self.denoiser.device
        try:
            # Many pipelines do not hand their generator on to the scheduler, whose noise then is torch's.
            with self.encoders_at_hand(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                first = generator[0] if isinstance(generator, list) else generator
                torch.manual_seed(first.initial_seed() + 1)
                rest = {"num_inference_steps": num_steps, "output_type": output_type, "return_dict": False}
                images = self.pipeline(**arguments, **rest, generator=generator)[0]
        finally:
            self.pipeline.scheduler = base_scheduler
            if checker is not None:
                self.pipeline.safety_checker = checker
        return images.float()

    def sample_latents(self, *arguments) -> torch.Tensor:
        """As `sample`, but the latents (B, ...) behind the last step, float32, in the form the denoiser takes them."""
        return self.sample(*arguments, output_type="latent")

    def sample_in_batches(
        self,
        scheduler: SchedulerMixin,
        prompts: list[str],
        num_steps: int,
        guidance_scale: float,
        negative_prompt: str,
        seed: int,
        batch_size: int,
        description: str | None = None,
    ) -> torch.Tensor:
        """As `sample`, for any number of prompts; batch i has the noise of `seed + i`; a description shows a bar."""
        images = []
        starts = range(0, len(prompts), batch_size)
        for i, start in enumerate(tqdm(starts, desc=description, disable=description is None)):
            chunk, generator = prompts[start : start + batch_size], torch.Generator().manual_seed(seed + i)
            images.append(self.sample(scheduler, chunk, num_steps, guidance_scale, negative_prompt, generator))
        return torch.cat(images)

    def to_pil(self, images: torch.Tensor) -> list[Image.Image]:
        """PIL images of (B, 3, H, W) in [0, 1]; of videos (B, 3, F, H, W) some frames, side by side."""
        return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(contact_sheets(images)))

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def save_lora(self, folder: str | Path, state: dict[str, torch.Tensor], metadata: dict[str, Any]):
        """
        Writes `pytorch_lora_weights.safetensors`, as `load_lora_weights` of plain diffusers reads it, with
        `encoder_loras` beside the denoiser's; for a pipeline without that method, `adapter_model.safetensors` and
        `adapter_config.json`, as peft's `from_pretrained` does.
        """
        if isinstance(self.pipeline, LoraBaseMixin):
            name = self.denoiser_name
            layers = {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": metadata}
            for name, (config, of_encoder) in self.encoder_loras.items():
                layers |= {f"{name}_lora_layers": of_encoder, f"{name}_lora_adapter_metadata": config.to_dict()}
            self.pipeline.save_lora_weights(folder, **layers)
        else:
            state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
            save_file(state, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})
            LoraConfig.from_peft_type(**metadata).save_pretrained(folder)

    def absent_code(self) -> str:
        """Arguments of `from_pretrained` for the model card: what the teacher was trained with was loaded without."""
        optional = self.pipeline._optional_components
        absent = [n for n, module in self.pipeline.components.items() if module is None and n not in optional]
        return "".join(f", {name}=None" for name in absent)

    def load_code(self, repo: str) -> tuple[str, str]:
        """Two lines for the model card: what has to be imported (or nothing), and what loads `repo` into `pipe`."""
        if isinstance(self.pipeline, LoraBaseMixin):
            return "", f"pipe.load_lora_weights({repo!r})"
        name = f"pipe.{self.denoiser_name}"
        return (
            "from peft import PeftModel\n",
            f"{name} = PeftModel.from_pretrained({name}, {repo!r}).merge_and_unload()",
        )

    def call_code(self, prompt: str, num_steps: int) -> str:
        """The plain call of the pipeline that draws as the student was trained, for the model card."""
        arguments = self.call_arguments([prompt], self.student_guidance_scale)
        if "prompt" in arguments:
            arguments["prompt"] = prompt
        # A call with a grid of its own takes the number of steps from it.
        arguments |= self.student_grid or {"num_inference_steps": num_steps}
        shown = {name: self.card_names.get(name, repr(value)) for name, value in arguments.items()}
        return f"pipe({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def show_code(self, call: str) -> str:
        """Two lines for the model card, which keep what the pipeline's `call` draws."""
        return f'image = {call}.images[0]\nimage.save("image.png")'


def dynamic_shift(
    calculate_shift: Callable, scheduler: SchedulerMixin, image_seq_len: int, max_shift: float = 1.15
) -> float:
    """`mu` of the pipeline's own `calculate_shift` for images of `image_seq_len` tokens."""
    config = scheduler.config
    return calculate_shift(
        image_seq_len,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )


def refuse_negative_prompts(family: PipelineFamily, prompts: list[str]):
    """Raises `ValueError` for a negative prompt, where the pipeline has none."""
    if any(prompts):
        raise ValueError(f"{type(family.pipeline).__name__} has no negative prompts: leave out `negative_prompts`.")


def normalized_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, guidance_scale: float) -> torch.Tensor:
    """Guidance (B, ..., D) that keeps the conditional output's norm along the last dimension."""
    guided = unconditional + guidance_scale * (conditional - unconditional)
    return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def pad_prompts(embeds: list[torch.Tensor], length: int = 512) -> dict[str, torch.Tensor]:
    """`prompt_embeds` (B, `length`, D) and `prompt_attention_mask` (B, `length`) of embeddings (L, D)."""
    masks = [row.new_ones(len(row), dtype=torch.long) for row in embeds]
    return {
        "prompt_embeds": torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in embeds]),
        "prompt_attention_mask": torch.stack([F.pad(mask, (0, length - len(mask))) for mask in masks]),
    }

# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""What text-to-video families share. A video is (3, F, H, W) in [0, 1] and counts as one image everywhere."""

import inspect
import math

import torch

from .base import PipelineFamily


class VideoFamily(PipelineFamily):
    """
    A pipeline whose call has `num_frames` and returns `frames`.

    Attributes:
        frame_rate (`int`): frames a second of what the model was trained on.
    """

    pipeline_tag = "text-to-video"
    takes_sigmas = False
    show_import = "from diffusers.utils import export_to_video\n"
    frame_rate: int

    def compression(self) -> tuple[int, int]:
        """What the autoencoder divides frames (but for the first) and pixels by."""
        raise NotImplementedError

    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        temporal, spatial = self.compression()
        return (self.num_frames - 1) // temporal + 1, self.height // spatial, self.width // spatial

    def own_size(self):
        parameters = inspect.signature(self.pipeline.__call__).parameters
        return parameters["height"].default, parameters["width"].default

    def own_num_frames(self):
        return inspect.signature(self.pipeline.__call__).parameters["num_frames"].default

    def set_num_frames(self, num_frames):
        if num_frames is None:
            return
        temporal, _ = self.compression()
        if (num_frames - 1) % temporal:
            below = (num_frames - 1) // temporal * temporal + 1
            raise ValueError(
                f"`sample_num_frames` is {num_frames}, but the autoencoder of {type(self.pipeline).__name__} makes "
                f"one frame and {temporal} for each further frame of latents: {below} or {below + temporal}."
            )
        self.num_frames = num_frames
        self.size = {**self.size, "num_frames": num_frames}
        self.latent_shape = self.shape_of_latents()

    def multiple_of(self, least: int, patch: int) -> int:
        """A multiple of `least`, which the call asks height and width for, and of whole patches of latents."""
        return math.lcm(least, self.compression()[1] * patch)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """What the autoencoder makes of the denoiser's latents (B, ...): videos (B, 3, F, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode(self, latents):
        return (self.decode_latents(latents).float() / 2 + 0.5).clamp(0, 1)

    def encode_images(self, images):
        raise ValueError(f"{type(self.pipeline).__name__} draws videos: real images are not read for it.")

    def sample(self, *arguments, output_type="pt"):
        videos = super().sample(*arguments, output_type=output_type)
        return videos.transpose(1, 2) if output_type == "pt" else videos

    def show_code(self, call):
        return f'video = {call}.frames[0]\nexport_to_video(video, "video.mp4", fps={self.frame_rate})'

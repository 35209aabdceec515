# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl[eval]"]
# ///
"""
Trains a text-to-video teacher from scratch, half an hour on one core of a CPU: a small Wan that draws nine frames of
32x32 pixels of a digit that moves, from "a seven moving left"; and the judge of what it shows. Nothing is downloaded:
digits are drawn by Pillow's own font, turned, coloured and moved at random. How they move is judged by `motion`, which
measures where the digit is in each frame and has not learned anything.

cd examples
python train_moving_teacher.py
python compare_methods.py --methods gndm --measure train_moving_teacher:motion --num_images 400 \
    --set max_steps=200 teacher_guidance_scale=3 max_sequence_length=8 sample_num_frames=9 sample_height=32 \
    sample_width=32 --teachers outputs/moving_teacher

A call that was interrupted goes on where its last checkpoint was, and leaves finished stages as they are.
"""

import argparse
import math
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from tqdm import tqdm
from train_emoji_teacher import train
from train_teacher import make_tokenizer, write_figures
from transformers import ResNetConfig, ResNetForImageClassification, UMT5Config, UMT5EncoderModel

from rdm_trl.demo import load_judge
from rdm_trl.evaluation import feature_statistics
from rdm_trl.frames import as_frames
from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.models.pipelines import read_pipeline


SIZE, NUM_FRAMES = 32, 9
LENGTH = 8  # tokens of the longest prompt; by itself the pipeline would attend to 512
NUM_STEPS = 25  # of the teacher, in the report
NUM_MEASURED = 2000  # videos that the judge's statistics are of; a quarter of them for those of the latents
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
PROMPTS = [f"a {digit} moving {direction}" for digit in DIGITS for direction in DIRECTIONS]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/moving_teacher"))
    stages = ["judge", "autoencoder", "denoiser", "report"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--judge_steps", type=int, default=500)
    parser.add_argument("--autoencoder_steps", type=int, default=700)
    parser.add_argument("--denoiser_steps", type=int, default=1600)
    parser.add_argument("--num_videos", type=int, default=5000, help="that the denoiser learns from")
    parser.add_argument("--num_samples", type=int, default=200, help="of the report, for each guidance scale")
    parser.add_argument("--save_steps", type=int, default=250)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@cache
def glyphs() -> torch.Tensor:
    """The ten digits (10, 1, 64, 64), from 0 where there is none to 1, each in the middle."""
    font, found = ImageFont.load_default(56), []
    for digit in range(10):
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).text((32, 32), str(digit), 255, font, anchor="mm", stroke_width=3)
        found.append(torch.tensor(np.asarray(image))[None] / 255)
    return torch.stack(found)


def make_videos(prompts: torch.Tensor) -> torch.Tensor:
    """
    Videos (B, 3, F, 32, 32) in [-1, 1] of `PROMPTS` by their places (B,): a light digit on a dark ground, of random
    colours, size, slant, place and speed, which moves evenly and stays in view.
    """
    number, digits = len(prompts), glyphs()[prompts // len(DIRECTIONS)]

    def draw(low, high, *shape):
        return torch.empty(number, *shape).uniform_(low, high)

    half, angle = draw(9, 12), draw(-0.25, 0.25)  # half of the glyph's box, in pixels
    direction = torch.tensor(list(DIRECTIONS.values()))[prompts % len(DIRECTIONS)].float()
    path = torch.arange(NUM_FRAMES) - (NUM_FRAMES - 1) / 2
    centre = draw(-4, 4, 2)[:, None] * (1 - direction.abs())[:, None] + draw(-1, 1, 2)[:, None]
    place = centre + draw(0.7, 1.5)[:, None, None] * path[:, None] * direction[:, None]  # (B, F, 2), pixels
    # From a pixel of the frame to one of the glyph, both in [-1, 1].
    scale = SIZE / 2 / half
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2) * scale[:, None, None]
    shift = -(turn[:, None] @ (place / (SIZE / 2))[..., None])
    theta = torch.cat([turn[:, None].expand(-1, NUM_FRAMES, -1, -1), shift], -1).flatten(0, 1)
    grid = F.affine_grid(theta, [len(theta), 1, SIZE, SIZE], align_corners=False)
    # Its pixels are fewer than the glyph's, so that it is smoothed first.
    soft = F.avg_pool2d(digits, 3, 1, 1).repeat_interleave(NUM_FRAMES, 0)
    masks = F.grid_sample(soft, grid, align_corners=False).view(number, 1, NUM_FRAMES, SIZE, SIZE)
    ground, colour = draw(-1, -0.5, 3, 1, 1, 1), draw(-0.3, 1, 3, 1, 1, 1)
    bright = torch.randint(3, (number, 1, 1, 1, 1))
    colour = colour.scatter(1, bright, 1.0)
    return ground.lerp(colour, masks)


def ground_of(videos: torch.Tensor) -> torch.Tensor:
    """The colour (B, 3, 1, 1, 1) of most of the pixels."""
    return videos.flatten(2).median(2).values[:, :, None, None, None]


def velocity(videos: torch.Tensor) -> torch.Tensor:
    """
    Pixels a frame (B, 2), to the right and down, of what stands out from the ground in videos (B, 3, F, H, W) in
    [0, 1]: the slope of its centre of mass. NaN where nothing stands out in some frame.
    """
    height, width = videos.shape[3:]
    mass = (videos - ground_of(videos)).abs().sum(1).sub(0.3).clamp(min=0)  # (B, F, H, W)
    total = mass.sum((2, 3))
    x = (mass.sum(2) * torch.arange(width)).sum(2) / total
    y = (mass.sum(3) * torch.arange(height)).sum(2) / total
    time = torch.arange(videos.shape[2]) - (videos.shape[2] - 1) / 2
    return torch.stack([(x * time).sum(1), (y * time).sum(1)], 1) / time.square().sum()


def motion(images, prompts, metadata):
    """
    A reward of whole videos, and their judge: 1 where the digit moves as its prompt says, by at least 0.4 pixels a
    frame and more that way than across, else 0.
    """
    asked = torch.tensor([DIRECTIONS[prompt.split()[-1]] for prompt in prompts]).float()
    found = velocity(images.float().cpu()).nan_to_num()
    along = (found * asked).sum(1)
    across = (found - along[:, None] * asked).norm(dim=1)
    return ((along > 0.4) & (along > across)).float()


motion.whole_clip = True


def train_judge(steps, folder: Path, save_steps):
    """A classifier of the digit in a frame. As its labels it has the prompts, each with its digit's number."""
    # Batch norm: strokes of one pixel are little of what ConvNeXt's layer norm leaves of an image.
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)

    def loss_fn():
        prompts = torch.randint(len(PROMPTS), (64,))
        frame = make_videos(prompts)[torch.arange(64), :, torch.randint(NUM_FRAMES, (64,))]
        blurred = frame.lerp(F.avg_pool2d(frame, 3, 1, 1), torch.rand(64, 1, 1, 1))
        noisy = blurred + torch.randn_like(frame) * torch.rand(64, 1, 1, 1) * 0.2
        return F.cross_entropy(model(pixel_values=noisy).logits, prompts // len(DIRECTIONS))

    train("judge", [model], loss_fn, steps, 2e-3, folder / "judge.ckpt", save_steps)
    model.config.label2id = {prompt: i // len(DIRECTIONS) for i, prompt in enumerate(PROMPTS)}
    model.eval().save_pretrained(folder / "judge")
    with torch.no_grad():
        frames = as_frames(make_videos(torch.arange(NUM_MEASURED) % len(PROMPTS)))
        features = torch.cat([model.base_model(pixel_values=x).pooler_output.flatten(1) for x in frames.split(500)])
    save_file(feature_statistics(features), folder / "judge" / "reference_statistics.safetensors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")


class Muon(torch.optim.Optimizer):
    """
    The momentum of each weight with its singular values made equal (Jordan 2024), scaled so that what one element
    changes by does not depend on the shape (Liu 2025). Both networks learn as much in fewer than half of AdamW's
    steps. That of torch takes matrices alone; here kernels have a row for each output, and vectors are of one column.
    """

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.1)
                update = weight.grad.lerp(momentum, 0.9).reshape(len(weight), -1)
                is_tall = len(update) > update.shape[1]
                update = update.T if is_tall else update
                update = update / update.norm().clamp(min=1e-7)
                for _ in range(5):
                    gram = update @ update.T
                    update = 3.4445 * update + (2.0315 * gram @ gram - 4.775 * gram) @ update
                scale = 0.2 * max(update.shape) ** 0.5
                weight.add_((update.T if is_tall else update).reshape(weight.shape), alpha=-group["lr"] * scale)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, videos: torch.Tensor) -> torch.Tensor:
    """Latents (B, 16, 5, 8, 8), as the autoencoder itself has them."""
    return torch.cat([vae.encode(x).latent_dist.mode() for x in videos.split(50)])


def make_autoencoder() -> AutoencoderKLWan:
    """In the form of Wan 2.2, with two pixels to a patch: a quarter of the pixels' rows, half of the frames."""
    vae = AutoencoderKLWan(
        base_dim=24,
        dim_mult=[1, 1],
        z_dim=16,
        num_res_blocks=1,
        temperal_downsample=[True],
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
        scale_factor_spatial=4,
        scale_factor_temporal=2,
    )
    # Each block begins as its shortcut.
    for block in vae.modules():
        if isinstance(block, WanResidualBlock):
            torch.nn.init.zeros_(block.conv2.weight)
            torch.nn.init.zeros_(block.conv2.bias)
    return vae


def train_autoencoder(steps, folder: Path, save_steps):
    vae = make_autoencoder()

    def loss_fn():
        videos = make_videos(torch.randint(len(PROMPTS), (8,)))
        # Short ones are cheaper, but the colours of what comes after drift without long ones.
        x = videos[:, :, :5] if torch.rand(()) < 0.5 else videos[:4]
        latents = vae.encode(x).latent_dist.mode()
        # The decoder is to forgive what the denoiser will leave of noise.
        spread = latents.detach().std((0, 2, 3, 4), keepdim=True)
        decoded = vae.decode(latents + 0.05 * spread * torch.randn_like(latents)).sample
        # The digit has few of the pixels.
        weights = 1 + 5 * (x - ground_of(x)).abs()
        return (weights * (decoded - x).abs()).mean()

    train("autoencoder", [vae], loss_fn, steps, 2e-2, folder / "autoencoder.ckpt", save_steps, Muon)
    latents = encode(vae.eval(), make_videos(torch.randint(len(PROMPTS), (NUM_MEASURED // 4,))))
    statistics = {"latents_mean": latents.mean((0, 2, 3, 4)), "latents_std": latents.std((0, 2, 3, 4))}
    vae.register_to_config(**{name: value.tolist() for name, value in statistics.items()})
    vae.save_pretrained(folder / "vae")


def make_pipeline(vae: AutoencoderKLWan) -> WanPipeline:
    tokenizer = make_tokenizer(PROMPTS)
    tokenizer.model_max_length = LENGTH
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    )
    channels = vae.config.z_dim
    transformer = WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=64,
        freq_dim=64,
        ffn_dim=576,
        num_layers=4,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer)


def train_denoiser(num_videos, steps, folder: Path, save_steps):
    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    pipeline = make_pipeline(vae)
    process, config = NoiseProcess(pipeline.scheduler), vae.config
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
    shown = torch.arange(num_videos) % len(PROMPTS)
    chunks = tqdm(shown.split(100), desc="encoding", mininterval=15)
    latents = (torch.cat([encode(vae, make_videos(chunk)) for chunk in chunks]) - mean) / std

    def loss_fn():
        batch = torch.randint(num_videos, (32,))
        prompt = shown[batch].masked_fill(torch.rand(32) < 0.1, len(PROMPTS))  # the empty one, for guidance
        used, place = prompt.unique(return_inverse=True)
        texts = [[*PROMPTS, ""][i] for i in used]
        embeds, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
        x0, noise = latents[batch], torch.randn_like(latents[batch])
        t = process.timesteps_at(torch.randn(len(batch)).sigmoid())
        output = pipeline.transformer(process.add_noise(x0, noise, t), t, embeds[place], return_dict=False)[0]
        return F.mse_loss(output, process.target(x0, noise, t))

    networks = [pipeline.transformer, pipeline.text_encoder]
    train("denoiser", networks, loss_fn, steps, 2e-2, folder / "denoiser.ckpt", save_steps, Muon)
    for network in networks:
        network.eval()
    pipeline.save_pretrained(folder)


def show_videos(videos: torch.Tensor, path: Path):
    """A row for each video (B, 3, F, H, W) in [0, 1], with every second frame."""
    frames = as_frames(videos, 2)
    images = WanPipeline.numpy_to_pil(frames.permute(0, 2, 3, 1).numpy())
    grid = make_image_grid(images, len(videos), len(frames) // len(videos))
    grid.resize((grid.width * 2, grid.height * 2)).save(path)


def report(num_samples, folder: Path, seed):
    """Measures what was saved: judge, motion and autoencoder by the script's own videos, the pipeline by guidance."""
    judge, pipeline = load_judge(folder), read_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(num_samples)]

    def measured(name, videos):
        figures = {**judge(name, videos, prompts), "motion": motion(videos, prompts, None).mean().item()}
        show_videos(videos[:40:5], folder / f"samples_{name}.png")
        return {key: round(value, 4) for key, value in figures.items()}

    videos = make_videos(torch.arange(num_samples) % len(PROMPTS))
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(x).sample for x in videos.split(50)])
    figures = {
        "autoencoder_psnr": round(-10 * math.log10(F.mse_loss(decoded, videos).item() / 4), 2),
        "real": measured("real", videos / 2 + 0.5),
        "autoencoded": measured("autoencoded", decoded / 2 + 0.5),
    }
    trained_with = pipeline.scheduler
    rows = [(f"guidance_{scale}", trained_with, NUM_STEPS, scale) for scale in (1.0, 2.0, 3.0)]
    rows.append(("4_steps", make_student_scheduler(trained_with, 4), 4, 1.0))
    for name, scheduler, num_steps, guidance_scale in rows:
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        options = dict(height=SIZE, width=SIZE, num_frames=NUM_FRAMES, max_sequence_length=LENGTH)
        options |= dict(num_inference_steps=num_steps, guidance_scale=guidance_scale, generator=generator)
        chunks = tqdm([prompts[i : i + 100] for i in range(0, num_samples, 100)], desc=name)
        samples = torch.cat([pipeline(chunk, output_type="pt", **options).frames for chunk in chunks])
        figures[name] = measured(name, samples.transpose(1, 2).float())
    write_figures(figures, folder)


def main():
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    for stage in args.stages:
        torch.manual_seed(args.seed)
        done = args.output_dir / {"judge": "judge", "autoencoder": "vae", "denoiser": "transformer"}.get(stage, "none")
        if done.exists():
            print(f"{done} is there: the stage {stage} is left out")
        elif stage == "judge":
            train_judge(args.judge_steps, args.output_dir, args.save_steps)
        elif stage == "autoencoder":
            train_autoencoder(args.autoencoder_steps, args.output_dir, args.save_steps)
        elif stage == "denoiser":
            train_denoiser(args.num_videos, args.denoiser_steps, args.output_dir, args.save_steps)
        else:
            report(args.num_samples, args.output_dir, args.seed)
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()

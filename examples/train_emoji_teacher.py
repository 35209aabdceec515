# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl", "emoji"]
# ///
"""
Trains a colour text-to-image teacher from scratch, about an hour on one core of a CPU: a small Stable Diffusion XL
that draws emoji of 32x32 pixels from their names, predicts v and starts at pure noise (zero terminal SNR); and the
judge of its images. Neither is shipped. The images are Microsoft's Fluent Emoji (MIT licence) as npm packs them, the
names those of the Python package `emoji`:

pip install emoji
npm pack @lobehub/fluent-emoji-3d@1.1.0
python examples/train_emoji_teacher.py --images lobehub-fluent-emoji-3d-1.1.0.tgz
python examples/compare_methods.py --methods gndm --teachers outputs/emoji_teacher,teacher_guidance_scale=4
accelerate launch examples/train_gndm.py --model_name_or_path outputs/emoji_teacher --teacher_guidance_scale 4 \
    --dataset_name outputs/emoji_teacher/prompts.txt --eval_feature_model outputs/emoji_teacher/judge

A call that was interrupted goes on where its last checkpoint was, and leaves finished stages as they are.
"""

import argparse
import io
import math
import re
import resource
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm
from train_teacher import KL_WEIGHT, encode, make_text_config, make_tokenizer, write_figures
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
)

from rdm_trl.demo import load_judge
from rdm_trl.evaluation import class_accuracy, feature_statistics
from rdm_trl.method.diffusion import NoiseProcess, make_student_scheduler
from rdm_trl.models.pipelines import read_pipeline


SIZE = 32
VOCABULARY = 4000  # words of the tokenizer: enough for all names in whole words
NUM_STEPS = 25  # of the teacher, in the report
SKIN_TONE = re.compile(r"( (medium-light|medium-dark|light|medium|dark) skin tone)+$")
SHOWN = "red apple,pizza,cat face,dog face,red heart,blue heart,flag of France,flag of Japan,sun,crying face,ghost,key"
SHOWN += ",smiling face with sunglasses,soccer ball,guitar,automobile,airplane,Christmas tree,tulip,octopus,penguin"
SHOWN = [*SHOWN.split(","), "birthday cake", "light bulb", "rocket"]


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="npm's .tgz, or the folder that it unpacks to")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/emoji_teacher"))
    stages = ["judge", "autoencoder", "denoiser", "report"]
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages)
    parser.add_argument("--judge_steps", type=int, default=2500)
    parser.add_argument("--autoencoder_steps", type=int, default=4500)
    parser.add_argument("--denoiser_steps", type=int, default=12000)
    parser.add_argument("--save_steps", type=int, default=500)
    parser.add_argument("--num_images", type=int, default=1000, help="of the report, for each guidance scale")
    parser.add_argument("--num_threads", type=int, default=1, help="on two cores, one thread is nearly as fast as two")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read_files(path: Path):
    """Names and contents of the images in a folder or an archive."""
    if path.is_dir():
        yield from ((file.name, file.read_bytes()) for file in sorted(path.rglob("*.webp")))
        return
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if member.name.endswith(".webp"):
                yield Path(member.name).name, archive.extractfile(member).read()


def load_captions() -> dict[str, str]:
    """The name of each emoji, without the selector U+FE0F, in ASCII: "flag of France"."""
    from emoji import EMOJI_DATA

    captions = {}
    for text, data in EMOJI_DATA.items():
        name = unicodedata.normalize("NFKD", data["en"].strip(":").replace("_", " ").replace("’", "'"))
        name = name.encode("ascii", "ignore").decode()
        is_flag = all("\U0001f1e6" <= letter <= "\U0001f1ff" for letter in text)
        captions[text.replace("\ufe0f", "")] = f"flag of {name}" if is_flag else name
    return captions


def load_images(path: Path) -> dict[str, torch.Tensor]:
    """Images (3, 32, 32) in [-1, 1] on white, by caption. In an order without meaning, but always the same."""
    captions, images = load_captions(), {}
    for name, content in tqdm(read_files(path), desc="images", mininterval=5):
        # Such as 0023-fe0f-20e3.webp. A few flags have names of another form.
        codes = re.fullmatch(r"([0-9a-f]+(?:-[0-9a-f]+)*)\.webp", name)
        key = "".join(chr(int(code, 16)) for code in codes[1].split("-")) if codes else ""
        caption = captions.get(key.replace("\ufe0f", ""))
        if caption is None:
            continue
        image = Image.open(io.BytesIO(content)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        images.setdefault(caption, torch.tensor(pixels).permute(2, 0, 1) / 127.5 - 1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    names = list(images)
    return {names[i]: images[names[i]] for i in order}


def adamw(parameters, lr):
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2, fused=True)


def train(description, networks, loss_fn, steps, learning_rate, checkpoint: Path, save_steps, optimizer_class=adamw):
    """
    A cosine schedule on `loss_fn()`; leaves the networks with the moving average of their weights. Goes on
    from `checkpoint`, if it is there, and removes it at the end.
    """
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = optimizer_class(parameters, lr=learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True)
    stateful = [*networks, optimizer, schedule, ema]
    start, average = 0, None
    if checkpoint.exists():
        state = torch.load(checkpoint)
        for one, saved in zip(stateful, state["states"], strict=True):
            one.load_state_dict(saved)
        start, average = state["step"], state["average"]
        torch.set_rng_state(state["random"])
    with tqdm(total=steps, initial=start, desc=description, mininterval=15) as bar:
        for step in range(start + 1, steps + 1):
            loss = loss_fn()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(parameters)
            average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            bar.update()
            if step % save_steps == 0 and step < steps:
                states, random = [one.state_dict() for one in stateful], torch.get_rng_state()
                state = {"states": states, "step": step, "average": average, "random": random}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").rename(checkpoint)
    ema.copy_to(parameters)
    checkpoint.unlink(missing_ok=True)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1], each turned, scaled, moved, tinted, blurred and made noisy at random."""
    number = len(images)

    def draw(low, high, *shape):
        return torch.empty(number, *shape).uniform_(low, high)

    angle, scale = draw(-0.2, 0.2), draw(0.85, 1.2)
    rows = [angle.cos() * scale, -angle.sin() * scale, draw(-0.15, 0.15)]
    rows += [angle.sin() * scale, angle.cos() * scale, draw(-0.15, 0.15)]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    images = 1 - F.grid_sample(1 - images, grid, align_corners=False)  # what comes in from outside is white
    images = images * draw(0.8, 1.0, 1, 1, 1) + draw(-0.15, 0.15, 3, 1, 1)
    smooth = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    images = images.lerp(smooth, draw(0, 1, 1, 1, 1))
    return images + torch.randn_like(images) * draw(0, 0.2, 1, 1, 1)


def train_judge(images: dict[str, torch.Tensor], steps, folder: Path, save_steps):
    """
    A classifier with a class for each name: retrieval of an image's name among all. Of each there is one image, which
    it sees changed by `augment`. Its features' statistics are those of the images as they are.
    """
    captions, pixels = list(images), torch.stack(list(images.values()))
    model = ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=3,
            image_size=SIZE,
            patch_size=2,
            num_stages=3,
            hidden_sizes=[48, 96, 96],
            depths=[1, 2, 1],
            drop_path_rate=0.1,
            id2label=dict(enumerate(captions)),
            label2id={name: i for i, name in enumerate(captions)},
        )
    )

    def loss_fn():
        batch = torch.randint(len(pixels), (64,))
        return F.cross_entropy(model(pixel_values=augment(pixels[batch])).logits, batch, label_smoothing=0.05)

    train("judge", [model], loss_fn, steps, 2e-3, folder / "judge.ckpt", save_steps)
    model.eval().save_pretrained(folder / "judge")
    # So that the trainer itself reads the features too, by `eval_feature_model`.
    ConvNextImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "judge")
    with torch.no_grad():
        features = torch.cat([model.base_model(pixel_values=x).pooler_output for x in pixels.split(500)])
    save_file(feature_statistics(features), folder / "judge" / "reference_statistics.safetensors")
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")


def train_autoencoder(pixels: torch.Tensor, steps, folder: Path, save_steps):
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    padded = F.pad(pixels, (2, 2, 2, 2), value=1.0)

    def loss_fn():
        top, left = torch.randint(5, (2,)).tolist()
        x = padded[torch.randint(len(padded), (16,)), :, top : top + SIZE, left : left + SIZE]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        return F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + KL_WEIGHT * posterior.kl().mean()

    train("autoencoder", [vae], loss_fn, steps, 2e-3, folder / "autoencoder.ckpt", save_steps)
    vae.eval().register_to_config(scaling_factor=1.0)
    latents = encode(vae, pixels)
    # The denoiser wants latents around zero, of unit spread. The pipeline knows only of the latter.
    mean = latents.mean((0, 2, 3))
    with torch.no_grad():
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.register_to_config(scaling_factor=1 / latents.sub(mean.view(-1, 1, 1)).std().item())
    vae.save_pretrained(folder / "vae")


def shorten(caption: str) -> str:
    """Sometimes only a part of the words: what they share is learned from few images, and "heart" is any heart."""
    words = np.array(caption.split())
    return " ".join(words[torch.rand(len(words)).numpy() < 0.5]) if torch.rand(()) < 0.2 else caption


def make_pipeline(captions: list[str], vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    tokenizer = make_tokenizer([caption.lower() for caption in captions], VOCABULARY)
    text_config = make_text_config(tokenizer)
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * text_config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text_config.projection_dim,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,  # or the white ground would show through the noisiest level
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def train_denoiser(images: dict[str, torch.Tensor], steps, folder: Path, save_steps):
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval()
    captions, padded = list(images), F.pad(torch.stack(list(images.values())), (1, 1, 1, 1), value=1.0)
    # Moved by up to a pixel, since the images are few.
    moved = [padded[:, :, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)]
    latents = torch.stack([encode(vae, x) for x in moved])
    pipeline = make_pipeline(captions, vae)
    pipeline.set_progress_bar_config(disable=True)
    unet, encoders = pipeline.unet, (pipeline.text_encoder, pipeline.text_encoder_2)
    process = NoiseProcess(pipeline.scheduler)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).float()

    def loss_fn():
        batch = torch.randint(len(captions), (32,))
        embeds, _, pooled, _ = pipeline.encode_prompt(
            [shorten(captions[i]) for i in batch], do_classifier_free_guidance=False
        )
        kept = (torch.rand(len(batch)) > 0.1).float()  # the others are what guidance leads away from: zeros
        x0 = latents[torch.randint(len(moved), batch.shape), batch]
        noise, t = torch.randn_like(x0), torch.randint(pipeline.scheduler.config.num_train_timesteps, batch.shape)
        added = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids.expand(len(batch), -1)}
        output = unet(process.add_noise(x0, noise, t), t, embeds * kept[:, None, None], added_cond_kwargs=added).sample
        return F.mse_loss(output, process.target(x0, noise, t))

    train("denoiser", [unet, *encoders], loss_fn, steps, 1e-3, folder / "denoiser.ckpt", save_steps)
    pipeline.to(torch.float16)
    for encoder in encoders:
        encoder.float().eval()  # transformers loads it as it was saved, diffusers the others in full precision
    unet.eval()
    pipeline.save_pretrained(folder)


def report(everything: dict[str, torch.Tensor], images: dict[str, torch.Tensor], num_images, folder: Path, seed):
    """Measures what was saved: the judge and the autoencoder by images, the pipeline by guidance."""
    judge = load_judge(folder)
    pipeline = read_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)

    def accuracy(pixels, captions):
        target = torch.tensor([judge.classes[caption] for caption in captions])
        logits = torch.cat([judge.features_of(x)[1] for x in (pixels / 2 + 0.5).clamp(0, 1).split(500)])
        return class_accuracy(logits, target)

    pixels = torch.stack(list(images.values()))
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(x).sample for x in pixels.split(500)])
    toned = {name: SKIN_TONE.sub("", name) for name in everything if name not in images}
    toned = {name: plain for name, plain in toned.items() if plain in images}
    figures = {
        "images": len(images),
        "judge_accuracy": accuracy(pixels, images),
        "judge_accuracy_augmented": accuracy(augment(pixels), images),
        "judge_accuracy_autoencoded": accuracy(decoded, images),
        "autoencoder_psnr": -10 * (F.mse_loss(decoded.clamp(-1, 1), pixels) / 4).log10().item(),
        "fid_autoencoded": judge("autoencoded", (decoded / 2 + 0.5).clamp(0, 1), list(images))["fid"],
        # Of so few images even the real ones are some way from all.
        f"fid_of_{num_images}_images": judge("real", pixels[:num_images] / 2 + 0.5, list(images)[:num_images])["fid"],
    }
    if toned:  # images that the judge has never seen, of names that it has
        held_out = torch.stack([everything[name] for name in toned])
        figures |= {"toned_images": len(toned), "judge_accuracy_toned": accuracy(held_out, toned.values())}
    prompts = (list(images) * math.ceil(num_images / len(images)))[:num_images]
    trained_with = pipeline.scheduler
    rows = [(f"guidance_{scale}", trained_with, NUM_STEPS, scale) for scale in (1.0, 2.0, 4.0, 6.0)]
    rows.append(("4_steps", trained_with, 4, 1.0))
    rows.append(("4_steps_of_the_student_untrained", make_student_scheduler(trained_with, 4), 4, 1.0))
    for name, scheduler, num_steps, guidance_scale in rows:
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)

        def sample(prompts, options):
            return pipeline(prompts, output_type="pt", **options).images

        options = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "generator": generator}
        chunks = [prompts[i : i + 200] for i in range(0, len(prompts), 200)]
        samples = torch.cat([sample(chunk, options) for chunk in tqdm(chunks, desc=name)])
        measured = judge(name, samples, prompts)
        figures[name] = {key: value for key, value in measured.items() if key in ("fid", "class_accuracy")}
        shown = [caption for caption in SHOWN if caption in images] or prompts[:24]
        drawn = torch.cat([sample(shown, options) for _ in range(4)]).permute(0, 2, 3, 1).numpy()
        grid = make_image_grid(pipeline.numpy_to_pil(drawn), 4, len(shown))
        grid.resize((grid.width * 2, grid.height * 2)).save(folder / f"samples_{name}.png")
    write_figures(figures, folder)


def main():
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    everything = load_images(args.images)
    images = {name: image for name, image in everything.items() if "skin tone" not in name}
    print(f"{len(images)} captioned images, {len(everything) - len(images)} of other skin tones")
    for stage in args.stages:
        torch.manual_seed(args.seed)
        done = args.output_dir / {"judge": "judge", "autoencoder": "vae", "denoiser": "unet"}.get(stage, "none")
        if done.exists():
            print(f"{done} is there: the stage {stage} is left out")
        elif stage == "judge":
            train_judge(images, args.judge_steps, args.output_dir, args.save_steps)
        elif stage == "autoencoder":
            pixels = torch.stack(list(everything.values()))
            train_autoencoder(pixels, args.autoencoder_steps, args.output_dir, args.save_steps)
        elif stage == "denoiser":
            train_denoiser(images, args.denoiser_steps, args.output_dir, args.save_steps)
        else:
            report(everything, images, args.num_images, args.output_dir, args.seed)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{(time.time() - start) / 60:.1f} minutes, {(usage.ru_utime + usage.ru_stime) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()

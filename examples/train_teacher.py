# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
Trains everything in `rdm_trl/demo/` from scratch on Fashion-MNIST: the classifier, then the autoencoder, then the text
encoder and the denoiser of a captioned latent diffusion pipeline, and reports how good they are.

python examples/train_teacher.py                                                # from the Hub
python examples/train_teacher.py --dataset /usr/share/datasets/fashion-mnist    # from a folder of IDX files
"""

import argparse
import gzip
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
)

from rdm_trl.demo import CLASSES, DEMO_PROMPTS, PHRASINGS
from rdm_trl.diffusion import make_student_scheduler


BATCH_SIZE = 64
KL_WEIGHT = 1e-6  # as in Stable Diffusion: details stay in the latents, for the denoiser to draw


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="zalando-datasets/fashion_mnist", help="Hub data set id or IDX folder")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "rdm_trl" / "demo")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=["classifier", "autoencoder", "denoiser", "report"],
        default=["classifier", "autoencoder", "denoiser", "report"],
        help="which parts to make again; later ones load what earlier ones saved",
    )
    parser.add_argument("--classifier_epochs", type=int, default=6)
    parser.add_argument("--autoencoder_epochs", type=int, default=2)
    parser.add_argument("--denoiser_epochs", type=int, default=6)
    parser.add_argument("--num_threads", type=int, default=1, help="on two cores, one thread is nearly as fast as two")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_images(dataset: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32) in [-1, 1], padded with black from 28x28, and labels (N,)."""
    if Path(dataset).is_dir():
        prefix = Path(dataset) / {"train": "train", "test": "t10k"}[split]
        with gzip.open(f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
    else:
        from datasets import load_dataset

        data = load_dataset(dataset, split=split)
        images = np.stack([np.asarray(image) for image in data["image"]])
        labels = np.asarray(data["label"])
    images = F.pad(torch.tensor(images).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return images[:, None].expand(-1, 3, -1, -1), torch.tensor(labels).long()


def train(description, parameters, loss_fn, num_samples, epochs, learning_rate, after_step=lambda: None):
    """AdamW with a cosine schedule over `epochs` shuffled passes; `loss_fn` takes the indices of a batch."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=1e-4)
    steps = epochs * (num_samples // BATCH_SIZE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    average = None
    with tqdm(total=steps, desc=description, mininterval=5) as bar:
        for _ in range(epochs):
            order = torch.randperm(num_samples)
            for batch in order[: num_samples // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                loss = loss_fn(batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                after_step()
                average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
                bar.set_postfix(loss=f"{average:.4f}", refresh=False)
                bar.update()


def train_classifier(images, labels, epochs, folder):
    model = ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=3,
            image_size=32,
            patch_size=2,
            num_stages=3,
            hidden_sizes=[32, 64, 64],
            depths=[1, 2, 1],
            drop_path_rate=0.1,
            id2label=dict(enumerate(CLASSES)),
            label2id={name: i for i, name in enumerate(CLASSES)},
        )
    )

    def loss_fn(batch):
        return F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch], label_smoothing=0.05)

    train("classifier", list(model.parameters()), loss_fn, len(images), epochs, 2e-3)
    model.eval().half().save_pretrained(folder / "classifier")


def train_autoencoder(images, epochs, folder):
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=16,  # as in Stable Diffusion 3: nearly lossless, so that the denoiser draws the details
        norm_num_groups=8,
        sample_size=32,
    )

    def loss_fn(batch):
        x = images[batch]
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        return F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + KL_WEIGHT * posterior.kl().mean()

    train("autoencoder", list(vae.parameters()), loss_fn, len(images), epochs, 2e-3)
    # The denoiser wants latents of unit spread.
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=1 / encode(vae.eval(), images[:5000]).std().item())
    vae.half().save_pretrained(folder / "pipeline" / "vae")


@torch.no_grad()
def encode(vae, images):
    batches = tqdm(images.split(500), desc="encoding", mininterval=5)
    return torch.cat([vae.encode(x).latent_dist.sample() * vae.config.scaling_factor for x in batches])


def make_tokenizer(folder) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from the captions; all bytes are in the vocabulary, so any prompt works."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator(DEMO_PROMPTS, BpeTrainer(end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    words = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder / "pipeline" / "tokenizer")
    return tokenizer


def train_denoiser(images, labels, epochs, folder):
    vae = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32).eval()
    latents = encode(vae, images)
    tokenizer = make_tokenizer(folder)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    # Stable Diffusion 1's own scheduler and settings.
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )
    captions = tokenizer([*DEMO_PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)

    def loss_fn(batch):
        caption = labels[batch] * len(PHRASINGS) + torch.randint(len(PHRASINGS), batch.shape)
        caption[torch.rand(batch.shape) < 0.1] = len(captions) - 1  # the empty prompt, for guidance
        used, caption = caption.unique(return_inverse=True)
        embeds = text_encoder(captions[used]).last_hidden_state[caption]
        x0, noise = latents[batch], torch.randn_like(latents[batch])
        t = torch.randint(scheduler.config.num_train_timesteps, batch.shape)
        output = unet(scheduler.add_noise(x0, noise, t), t, embeds).sample
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=5.0) / snr  # min-SNR weighting (arXiv 2303.09556), for faster convergence
        return (weight * (output - noise).square().mean(dim=(1, 2, 3))).mean()

    train("denoiser", parameters, loss_fn, len(latents), epochs, 1e-3, after_step=lambda: ema.step(parameters))
    ema.copy_to(parameters)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.text_encoder.float()  # transformers loads it as it was saved, diffusers the others in full precision
    pipeline.save_pretrained(folder / "pipeline")


def report(images, labels, folder, seed):
    """Measures what was saved, writes the reference statistics and the figures that the README quotes."""
    from rdm_trl import demo
    from rdm_trl.evaluation import class_accuracy, feature_statistics, frechet_distance

    classifier = demo.DemoClassifier(folder / "classifier")
    outputs = [classifier(x) for x in ((images + 1) / 2).split(500)]
    features, logits = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
    reference = feature_statistics(features)
    save_file(reference, folder / "reference_statistics.safetensors")
    figures = {
        "classifier_accuracy_on_test_images": class_accuracy(logits, labels),
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*") if f.suffix != ".py") / 2**20,
    }

    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(x).sample for x in images[:2000].split(500)]) / 2 + 0.5
    figures["fid_of_2000_autoencoded_test_images"] = frechet_distance(
        feature_statistics(classifier(decoded.clamp(0, 1))[0]), reference
    )
    prompts = [DEMO_PROMPTS[i % len(DEMO_PROMPTS)] for i in range(2000)]
    target = torch.tensor([demo.DEMO_PROMPT_CLASS[prompt] for prompt in prompts])
    trained_with = pipeline.scheduler
    trailing = {**trained_with.config, "timestep_spacing": "trailing"}
    for name, scheduler, num_steps, guidance_scale in (
        ("guidance_1.0", trained_with, 25, 1.0),
        ("guidance_1.5", trained_with, 25, 1.5),
        ("guidance_1.75", trained_with, 25, 1.75),
        ("guidance_2.0", trained_with, 25, 2.0),
        ("4_steps", trained_with, 4, 1.0),
        ("4_steps_ddim", DDIMScheduler.from_config(trailing, clip_sample=False), 4, 1.0),
        ("4_steps_dpm_solver", DPMSolverMultistepScheduler.from_config(trailing), 4, 1.0),
        ("4_steps_of_the_student_untrained", make_student_scheduler(trained_with, 4), 4, 1.0),
    ):
        pipeline.scheduler = scheduler
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for i in tqdm(range(0, len(prompts), 200), desc=name):
            samples.append(
                pipeline(
                    prompts[i : i + 200],
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale,
                    generator=generator,
                    output_type="pt",
                ).images
            )
        samples = torch.cat(samples)
        features, logits = classifier(samples)
        figures[name] = {
            "fid": frechet_distance(feature_statistics(features), reference),
            "class_accuracy": class_accuracy(logits, target),
        }
        if name != "guidance_1.75":
            continue
        picks = [samples[c * len(PHRASINGS) + row * len(DEMO_PROMPTS)] for row in range(8) for c in range(10)]
        grid = make_image_grid(
            pipeline.image_processor.numpy_to_pil(torch.stack(picks).permute(0, 2, 3, 1).numpy()), 8, 10
        )
        grid.resize((grid.width * 2, grid.height * 2)).save(folder / f"samples_{name}.png")
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def main():
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.time()
    images, labels = load_images(args.dataset, "train")
    for stage in args.stages:
        torch.manual_seed(args.seed)
        if stage == "classifier":
            train_classifier(images, labels, args.classifier_epochs, args.output_dir)
        elif stage == "autoencoder":
            train_autoencoder(images, args.autoencoder_epochs, args.output_dir)
        elif stage == "denoiser":
            train_denoiser(images, labels, args.denoiser_epochs, args.output_dir)
        else:
            report(*load_images(args.dataset, "test"), args.output_dir, args.seed)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{(time.time() - start) / 60:.1f} minutes, {(usage.ru_utime + usage.ru_stime) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()

# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
# /// script
# dependencies = ["rdm_trl"]
# ///
"""
Trains all of `rdm_trl/demo/` from scratch on Fashion-MNIST: the classifier, then the autoencoder, then text encoder
and the denoiser of a captioned latent diffusion pipeline, and reports how good they are. The stages `flow` and `dit`
make two more teachers on the same autoencoder, which are not shipped: a flow-matching transformer, as Stable Diffusion
3's, and a class-conditional DiT that predicts v. The stage `images` writes the training images with captions, as a
data set for `--image_dataset` of train_gndm.py.

python examples/train_teacher.py                                                # from the Hub
python examples/train_teacher.py --dataset /usr/share/datasets/fashion-mnist    # from a folder of IDX files
python examples/train_teacher.py --stages flow dit                              # outputs/{flow,dit}_teacher
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
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from diffusers.utils import make_image_grid
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ConvNextConfig,
    ConvNextForImageClassification,
)

from rdm_trl.demo import CLASSES, DEMO_PROMPT_CLASS, DEMO_PROMPTS, PHRASINGS, DemoClassifier
from rdm_trl.evaluation import class_accuracy, feature_statistics, frechet_distance
from rdm_trl.method.diffusion import NoiseProcess, is_flow, make_student_scheduler
from rdm_trl.models.pipelines import read_pipeline


BATCH_SIZE = 64
FLOW_LENGTH = 10  # tokens of the longest caption; by itself the pipeline would attend to 256
KL_WEIGHT = 1e-6  # as in Stable Diffusion: details stay in the latents, for the denoiser to draw


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="zalando-datasets/fashion_mnist", help="Hub data set id or IDX folder")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent.parent / "rdm_trl" / "demo")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=["classifier", "autoencoder", "denoiser", "report", "flow", "dit", "images"],
        default=["classifier", "autoencoder", "denoiser", "report"],
        help="which parts to make again; later ones load what earlier ones saved",
    )
    parser.add_argument("--flow_dir", type=Path, default=Path("outputs/flow_teacher"))
    parser.add_argument("--dit_dir", type=Path, default=Path("outputs/dit_teacher"))
    parser.add_argument("--images_dir", type=Path, default=Path("outputs/fashion_mnist"))
    parser.add_argument("--classifier_epochs", type=int, default=6)
    parser.add_argument("--autoencoder_epochs", type=int, default=2)
    parser.add_argument("--denoiser_epochs", type=int, default=6)
    parser.add_argument("--flow_epochs", type=int, default=6)
    parser.add_argument("--dit_epochs", type=int, default=6)
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


def train_averaged(description, networks, loss_fn, num_samples, epochs):
    """As `train`, at a rate of 1e-3; leaves the networks with the moving average of their weights."""
    parameters = [p for network in networks for p in network.parameters()]
    ema = EMAModel(parameters, decay=0.9995, use_ema_warmup=True, power=0.75)
    train(description, parameters, loss_fn, num_samples, epochs, 1e-3, after_step=lambda: ema.step(parameters))
    ema.copy_to(parameters)


def train_classifier(images, labels, epochs, folder):
    model = ConvNextForImageClassification(
        ConvNextConfig(
            num_channels=3,
            image_size=32,
            patch_size=1,
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


def make_tokenizer(captions: list[str], vocab_size: int = 30000) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges come from the captions; all bytes are in the vocabulary, so any prompt works."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(ByteLevel.alphabet())
    words = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16, pad_token="<|endoftext|>")


def make_text_config(tokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
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


def draw_captions(labels):
    """Different captions for the labels, and for each label the place of its own among them."""
    caption = labels * len(PHRASINGS) + torch.randint(len(PHRASINGS), labels.shape)
    caption[torch.rand(labels.shape) < 0.1] = len(DEMO_PROMPTS)  # the empty prompt, for guidance
    used, place = caption.unique(return_inverse=True)
    captions = [*DEMO_PROMPTS, ""]
    return [captions[i] for i in used], place


def train_denoiser(images, labels, epochs, folder):
    vae = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32).eval()
    latents = encode(vae, images)
    tokenizer = make_tokenizer(DEMO_PROMPTS)
    text_encoder = CLIPTextModel(make_text_config(tokenizer))
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

    def loss_fn(batch):
        captions, place = draw_captions(labels[batch])
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        embeds = text_encoder(tokens).last_hidden_state[place]
        x0, noise = latents[batch], torch.randn_like(latents[batch])
        t = torch.randint(scheduler.config.num_train_timesteps, batch.shape)
        output = unet(scheduler.add_noise(x0, noise, t), t, embeds).sample
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=5.0) / snr  # min-SNR weighting (arXiv 2303.09556), for faster convergence
        return (weight * (output - noise).square().mean(dim=(1, 2, 3))).mean()

    train_averaged("denoiser", (unet, text_encoder), loss_fn, len(latents), epochs)
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


def train_flow(images, labels, epochs, folder, flow_dir):
    """A small Stable Diffusion 3 on the autoencoder and tokenizer in `folder`, with zeros in T5's place."""
    vae = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32).eval()
    vae.register_to_config(shift_factor=0.0)
    latents = encode(vae, images)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "pipeline" / "tokenizer", model_max_length=FLOW_LENGTH)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=128,  # of two text encoders
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(make_text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(make_text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    process = NoiseProcess(pipeline.scheduler)

    def loss_fn(batch):
        captions, place = draw_captions(labels[batch])
        embeds, _, pooled, _ = pipeline.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=FLOW_LENGTH
        )
        x0, noise = latents[batch], torch.randn_like(latents[batch])
        t = process.timesteps_at(torch.randn(batch.shape).sigmoid())  # logit-normal, as Stable Diffusion 3
        output = transformer(process.add_noise(x0, noise, t), embeds[place], pooled[place], t).sample
        return F.mse_loss(output, process.target(x0, noise, t))

    train_averaged("flow", (transformer, *encoders), loss_fn, len(latents), epochs)
    pipeline.to(torch.float16)
    for encoder in encoders:
        encoder.float().eval()
    transformer.eval()
    pipeline.save_pretrained(flow_dir)


def train_dit(images, labels, epochs, folder, dit_dir):
    """A small DiT on the autoencoder in `folder`; its pipeline's empty class has the number 1000."""
    vae = AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", dtype=torch.float32).eval()
    latents = encode(vae, images)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=3,
        norm_num_groups=16,
        num_embeds_ada_norm=1000,
    ).eval()  # in training mode each block would forget the class by itself
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    process = NoiseProcess(scheduler)

    def loss_fn(batch):
        x0, noise = latents[batch], torch.randn_like(latents[batch])
        t = torch.randint(scheduler.config.num_train_timesteps, batch.shape)
        classes = labels[batch].masked_fill(torch.rand(batch.shape) < 0.1, 1000)
        output = transformer(process.add_noise(x0, noise, t), timestep=t, class_labels=classes).sample
        return F.mse_loss(output, process.target(x0, noise, t))

    train_averaged("dit", (transformer,), loss_fn, len(latents), epochs)
    pipeline = DiTPipeline(transformer, vae, scheduler)
    pipeline.register_to_config(id2label=dict(enumerate(CLASSES)))  # by itself it would not save them
    pipeline.to(torch.float16)
    pipeline.save_pretrained(dit_dir)


def report(images, labels, folder, seed):
    """Measures what was saved, writes the reference statistics and the figures that the README quotes."""
    classifier = DemoClassifier(folder / "classifier")
    outputs = [classifier(x) for x in ((images + 1) / 2).split(500)]
    features, logits = (torch.cat(tensors) for tensors in zip(*outputs, strict=True))
    reference = feature_statistics(features)
    save_file(reference, folder / "reference_statistics.safetensors")
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    with torch.no_grad():
        decoded = torch.cat([pipeline.vae(x).sample for x in images[:2000].split(500)]) / 2 + 0.5
    figures = {
        "classifier_accuracy_on_test_images": class_accuracy(logits, labels),
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*") if f.suffix != ".py") / 2**20,
        "fid_of_2000_autoencoded_test_images": frechet_distance(
            feature_statistics(classifier(decoded.clamp(0, 1))[0]), reference
        ),
    }
    write_figures(figures | measure(pipeline, classifier, reference, folder, seed), folder)


def measure(pipeline, classifier, reference, folder, seed):
    """FID and class accuracy of 2,000 images by guidance, steps and scheduler; a grid of them in `folder`."""
    figures = {}
    pipeline.set_progress_bar_config(disable=True)
    options = {"max_sequence_length": FLOW_LENGTH} if is_flow(pipeline.scheduler) else {}
    prompts = [DEMO_PROMPTS[i % len(DEMO_PROMPTS)] for i in range(2000)]
    target = torch.tensor([DEMO_PROMPT_CLASS[prompt] for prompt in prompts])
    if isinstance(pipeline, DiTPipeline):
        prompts = target.tolist()
    trained_with = pipeline.scheduler
    rows = [(f"guidance_{scale}", trained_with, 25, scale) for scale in (1.0, 1.5, 1.75, 2.0)]
    rows.append(("4_steps", trained_with, 4, 1.0))
    if not is_flow(trained_with):
        trailing = {**trained_with.config, "timestep_spacing": "trailing"}
        rows.append(("4_steps_ddim", DDIMScheduler.from_config(trailing, clip_sample=False), 4, 1.0))
        rows.append(("4_steps_dpm_solver", DPMSolverMultistepScheduler.from_config(trailing), 4, 1.0))
    rows.append(("4_steps_of_the_student_untrained", make_student_scheduler(trained_with, 4), 4, 1.0))
    for name, scheduler, num_steps, guidance_scale in rows:
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
                    **options,
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
        grid = make_image_grid(pipeline.numpy_to_pil(torch.stack(picks).permute(0, 2, 3, 1).numpy()), 8, 10)
        grid.resize((grid.width * 2, grid.height * 2)).save(folder / f"samples_{name}.png")
    return figures


def write_figures(figures, folder):
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def save_images(images, labels, folder):
    """The images with a caption each, as a data set on disk."""
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    phrasings = torch.randint(len(PHRASINGS), (len(labels),))
    captions = [DEMO_PROMPTS[i] for i in (len(PHRASINGS) * labels + phrasings).tolist()]
    rows = {"image": [Image.fromarray(image) for image in pixels], "prompt": captions}
    Dataset.from_dict(rows).save_to_disk(folder)


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
        elif stage == "report":
            report(*load_images(args.dataset, "test"), args.output_dir, args.seed)
        elif stage == "images":
            save_images(images, labels, args.images_dir)
        else:
            is_dit = stage == "dit"
            make, target = (train_dit, args.dit_dir) if is_dit else (train_flow, args.flow_dir)
            make(images, labels, args.dit_epochs if is_dit else args.flow_epochs, args.output_dir, target)
            reference = load_file(args.output_dir / "reference_statistics.safetensors")
            classifier = DemoClassifier(args.output_dir / "classifier")
            write_figures(measure(read_pipeline(target), classifier, reference, target, args.seed), target)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{(time.time() - start) / 60:.1f} minutes, {(usage.ru_utime + usage.ru_stime) / 60:.1f} CPU minutes")


if __name__ == "__main__":
    main()

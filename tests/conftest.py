# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
import gc
import importlib.metadata
import importlib.util
import os
import shutil
from functools import cache as cache_results
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: a process of one thread for each core

import pytest
import torch
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rdm_trl import RdmDistillConfig, RdmDistillTrainer, guidance
from rdm_trl.demo import DEMO_PIPELINE, DEMO_PROMPTS
from rdm_trl.models import lora


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage():
    """Every run collects garbage, and would look through all that was imported: a third of a short run's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def what_is_known_is_asked_once():
    """Diffusers reads the version of peft for each adapter, torch notes who seeds a device that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", cache_results(importlib.metadata.version))
        for kind in (torch.cuda, torch.xpu, torch.mtia):
            if not kind.is_available():
                patch.setattr(kind, "manual_seed_all", lambda seed: None)
        yield


def load_script(path: str):
    """A file of the repository that is no module of the package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0, **unet_options) -> StableDiffusionPipeline:
    """A random Stable Diffusion pipeline with 4x4 latents and 8x8 images."""
    # Half of the layers that attention everywhere would take: their number is most of a test's time.
    unet_options = {"mid_block_type": "UNetMidBlock2D", "up_block_types": ("UpBlock2D",) * 2, **unet_options}
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_PIPELINE, subfolder="tokenizer")
    text_encoder = CLIPTextModel(make_text_config(tokenizer))
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **unet_options,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What runs keep for later ones, they keep for the tests of this process and not in the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("cache"))
        patch.setattr(guidance, "HF_HOME", folder)
        patch.setenv("HF_HOME", folder)
        yield


def leave_threads(number: int):
    """In the place of `torch.set_num_threads`, and found by its name in processes that a test starts."""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Also where a script takes all cores: it would take them for all later tests of this process too."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", leave_threads)
        yield


@pytest.fixture(scope="session", autouse=True)
def saved_loras_are_tried_once():
    """Whether plain diffusers loads what is saved hangs on the kinds of network and LoRA, not on their weights."""
    check, loaded = lora.check_saved_lora, set()

    def check_once(family, roles):
        configs = roles.denoiser.peft_config, {name: config for name, (config, _) in family.encoder_loras.items()}
        kind = type(family.pipeline), type(family), str(family.denoiser.config), str(configs)
        if kind not in loaded:
            check(family, roles)
        loaded.add(kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "check_saved_lora", check_once)
        yield


PROMPTS = ["a photo of a bag", "a dress", "a coat"]
# Linear layers and convolutions, but a quarter of those that an adapter has by default: their number is most of the
# time that a run takes.
FEW = ["to_q", "conv1"]


def redness(images, prompts, metadata):
    return images[:, 0].mean(dim=(1, 2))


def make_config(tmp_path, **options) -> RdmDistillConfig:
    defaults = dict(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=8,
        num_eval_images=8,
        num_log_images=2,
        teacher_num_steps=3,
        log_images_steps=0,
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        fake_learning_rate=1e-3,
        fake_updates=2,
        num_teacher_images=0,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    return RdmDistillConfig(**{**defaults, **options})


def make_trainer(
    tmp_path,
    *args,
    pipeline=None,
    prompts=PROMPTS,
    peft_config=None,
    config=None,
    teacher_lora=None,
    student_lora=None,
    **options,
):
    if peft_config is None and student_lora is None:
        peft_config = LoraConfig(r=2, target_modules=FEW)
    return RdmDistillTrainer(
        config or make_config(tmp_path, **options),
        *args,
        sd_pipeline=pipeline or make_tiny_pipeline(),
        train_dataset=Dataset.from_dict({"prompt": prompts}) if prompts else None,
        peft_config=peft_config,
        teacher_lora=teacher_lora,
        student_lora=student_lora,
    )


def save_style(folder, **options):
    """A LoRA that changes pictures, as diffusers' own scripts save one."""
    pipeline = make_tiny_pipeline()
    config = LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_v", "conv1"], **options})
    pipeline.unet.add_adapter(config, "style")
    generator = torch.Generator().manual_seed(4)
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    layers = {"unet_lora_layers": get_peft_model_state_dict(pipeline.unet, adapter_name="style")}
    layers["unet_lora_adapter_metadata"] = pipeline.unet.peft_config["style"].to_dict()
    pipeline.save_lora_weights(folder, **layers)
    return folder


def record_steps(scheduler):
    """What a pipeline hands to `scheduler` from now on: (output, timestep, sample) of each step."""
    seen, step = [], scheduler.step

    def recording(model_output, timestep, sample, *args, **kwargs):
        seen.append((model_output.clone(), timestep, sample.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    scheduler.step = recording
    return seen


def logs_of(trainer) -> dict:
    return {key: value for row in trainer.state.log_history for key, value in row.items()}


@pytest.fixture
def tiny_pipeline():
    return make_tiny_pipeline()


@pytest.fixture
def offline(monkeypatch):
    """No second asking of a Hub that is not there, with its waits between."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


MARKUP = 'a bag </script><b>bold</b> & "quoted" {{ 1 }}'


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Folder of a short run of the embedded pipeline, with an evaluation on the way, a reward and an odd prompt."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(folder, max_steps=4, log_images_steps=2, eval_strategy="steps", eval_steps=2)
    prompts = Dataset.from_dict({"prompt": [DEMO_PROMPTS[0], MARKUP]})
    trainer = RdmDistillTrainer(config, redness, train_dataset=prompts, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return folder / "run"


@pytest.fixture(scope="module")
def browser():
    """
    A real browser without a window; a test that needs one is skipped where none is installed. Playwright's event loop
    runs until its end: tests of other modules may need one of their own.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        system = shutil.which("chromium") or shutil.which("google-chrome")
        if system is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("needs a browser: apt-get install chromium, or playwright install chromium")
        # Its sandbox needs rights that containers seldom give.
        browser = driver.chromium.launch(executable_path=system, args=["--no-sandbox"])
        yield browser
        browser.close()

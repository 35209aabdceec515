"""A few-step student beside its teacher and its base, by plain diffusers. What it shows stands in demo.json."""

import json
import time
from pathlib import Path

import diffusers
import gradio as gr
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image


FOLDER = Path(__file__).parent
DEMO = json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))
STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def here(path: str) -> str:
    """A folder beside this file, or else a path or Hub id as it is."""
    return str(FOLDER / path) if (FOLDER / path).is_dir() else path


# -------------------------------------------------------------------------------------------------------------- model

dtype = torch.bfloat16 if DEVICE == "cuda" and DEMO["bf16"] else torch.float32
absent = dict.fromkeys(DEMO["absent"])
if DEMO["single_file_class"]:
    cls = getattr(diffusers, DEMO["single_file_class"])
    pipe = cls.from_single_file(DEMO["base"], config=DEMO["config"], dtype=dtype, **absent)
else:
    pipe = DiffusionPipeline.from_pretrained(here(DEMO["base"]), dtype=dtype, variant=DEMO["variant"], **absent)
pipe.set_progress_bar_config(disable=True)
student = here("student")
base_network = student_network = getattr(pipe, DEMO["denoiser"])
if DEMO["kind"] == "network":
    student_network = type(base_network).from_pretrained(student, subfolder=DEMO["denoiser"], dtype=dtype).to(DEVICE)
elif DEMO["kind"] == "peft":
    model = PeftModel.from_pretrained(base_network, student, adapter_name="student")  # its layers are in the network
    if DEMO["teacher_lora"]:
        model.load_adapter(here(DEMO["teacher_lora"]), "teacher")
else:
    pipe.load_lora_weights(student, adapter_name="student")
    if DEMO["teacher_lora"]:
        pipe.load_lora_weights(here(DEMO["teacher_lora"]), adapter_name="teacher")
pipe.to(DEVICE)
base_scheduler = pipe.scheduler
student_scheduler = getattr(diffusers, DEMO["scheduler"]).from_pretrained(student, subfolder="scheduler")


def set_lora(name: str, strength: float):
    """Uses one LoRA, scaled; at 0 the networks are the base's own."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(strength != 0)
            if strength != 0:
                module.set_adapter(name)
                module.set_scale(name, strength)


@torch.inference_mode()
def draw(who: str, prompt: str, seed: int, strength: float = 1.0, num_steps: int = DEMO["num_steps"]):
    """An image, and the seconds that it took."""
    is_student, is_teacher = who == "student", who == "teacher"
    set_lora(who, strength if is_student else float(is_teacher and bool(DEMO["teacher_lora"])))
    setattr(pipe, DEMO["denoiser"], student_network if is_student else base_network)
    scheduler = student_scheduler if is_student else base_scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    arguments = {**DEMO["teacher_arguments" if is_teacher else "arguments"]}
    if is_student and num_steps == DEMO["num_steps"] and DEMO["grid"]:
        arguments |= DEMO["grid"]  # the grid that it was trained on
    else:
        arguments["num_inference_steps"] = DEMO["teacher_num_steps"] if is_teacher else num_steps
    torch.manual_seed(seed + 1)  # some pipelines do not hand their generator on to the scheduler
    start = time.perf_counter()
    image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).images[0]
    seconds = time.perf_counter() - start
    scale = max(1, round(256 / image.width))  # browsers would blur a tiny picture
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS), seconds


# --------------------------------------------------------------------------------------------------------------- page


def format_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def compare(prompt, seed, strength, num_steps):
    """The student first: it is there while the teacher is still drawing."""
    few = f"{int(num_steps)} step{'s' * (num_steps > 1)}"
    words = {"student": few, "teacher": f"{DEMO['teacher_num_steps']} steps", "base": few}
    shown = dict.fromkeys(f"{who}{part}" for who in words for part in ("", "_below"))
    shown |= {f"{who}_below": "drawing …" for who in words}
    taken = {}
    for who in words:
        image, taken[who] = draw(who, prompt, int(seed), float(strength), int(num_steps))
        shown[who] = image
        shown[f"{who}_below"] = f"**{format_seconds(taken[who])}** · {words[who]}"
        if who == "teacher":
            ratio = taken["teacher"] / taken["student"]
            shown["student_below"] += f" · **{ratio:.1f}×** as fast as its teacher"
        yield list(shown.values())


def over_strengths(prompt, seed, num_steps):
    return [draw("student", prompt, int(seed), strength, int(num_steps))[0] for strength in STRENGTHS]


CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.below { min-height: 2.2em; text-align: center; } .below p { margin: 0; } #draw { align-self: stretch; }
#strengths .icon-button-wrapper { display: none; }
footer { display: none !important; }
"""
# Fonts of the system: the page asks no other server for anything.
theme = gr.themes.Soft(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)
with gr.Blocks(title=DEMO["title"], analytics_enabled=False) as page:
    gr.Markdown(
        f"# {DEMO['title']}\n{DEMO['teacher_num_steps']} guided steps, distilled to {DEMO['num_steps']} unguided "
        "ones. Same prompt and same noise for all three. The LoRA is not fused here, so that its strength can change: "
        "fused, the student takes the base's time."
    )
    with gr.Row():
        prompt = gr.Textbox(DEMO["prompts"][0], label="Prompt", scale=5, elem_id="prompt", lines=1, submit_btn=False)
        button = gr.Button("Draw", variant="primary", scale=1, min_width=120, elem_id="draw")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120)
        num_steps = gr.Slider(1, 8, DEMO["num_steps"], step=1, label="Steps", min_width=200, elem_id="steps")
        strength = gr.Slider(
            0, 1.5, 1, step=0.05, label="LoRA strength", min_width=200, visible=DEMO["kind"] != "network"
        )
    with gr.Row():
        outputs = []
        for who in ("student", "teacher", "base"):
            with gr.Column(min_width=240):
                outputs.append(
                    gr.Image(label=who.capitalize(), elem_id=who, interactive=False, height=340, buttons=["download"])
                )
                outputs.append(gr.Markdown("", elem_classes="below", elem_id=f"{who}-below"))
    gr.Examples(DEMO["prompts"], prompt, label="Prompts to try")
    if DEMO["kind"] != "network":
        with gr.Row():
            grid_button = gr.Button("Draw a grid over strengths", elem_id="draw-strengths")
        with gr.Row(elem_id="strengths"):
            cells = []
            for value in STRENGTHS:
                with gr.Column(min_width=140):
                    cells.append(gr.Image(show_label=False, interactive=False, height=180, buttons=[]))
                    gr.Markdown(f"strength {value:g}", elem_classes="below")
        gr.on(
            grid_button.click,
            over_strengths,
            [prompt, seed, num_steps],
            cells,
            concurrency_id="model",
            concurrency_limit=1,
        )
    # One at a time: all of them set the same network's strength.
    gr.on(
        [button.click, prompt.submit],
        compare,
        [prompt, seed, strength, num_steps],
        outputs,
        concurrency_id="model",
        concurrency_limit=1,
    )

if __name__ == "__main__":
    page.launch(theme=theme, css=CSS)

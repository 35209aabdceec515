# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Sample grids, which say of themselves what they show, and the card's picture of teacher and student."""

import json
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo


# The text chunk of a grid's file that says where which image lies.
LAYOUT = "rdm_trl"
# Characters of a prompt that a grid shows.
LABEL = 80


def comparison_grid(columns: dict[str, list[list[Image.Image]]], prompts: list[str]) -> Image.Image:
    """
    A labelled picture with a block of columns for each model and a row for each prompt.

    Args:
        columns: by title, for each prompt the images (any number, the same everywhere).
    """
    sample = next(iter(columns.values()))[0]
    size = max(sample[0].width, 64)
    labels = [one_line(prompt) for prompt in prompts]
    gap, header, margin = 12, 20, 8 + max(int(ImageDraw.Draw(sample[0]).textlength(label)) for label in labels)
    block, height = len(sample) * size, size * sample[0].height // sample[0].width
    picture = Image.new("RGB", (margin + len(columns) * (block + gap), header + len(prompts) * height), "white")
    draw = ImageDraw.Draw(picture)
    for row, label in enumerate(labels):
        draw.text((4, header + row * height + height // 2), label, fill="black", anchor="lm")
    lefts = []
    for column, (title, rows) in enumerate(columns.items()):
        left = margin + column * (block + gap)
        lefts.append(left)
        draw.text((left + block // 2, header // 2), title, fill="black", anchor="mm")
        for row, images in enumerate(rows):
            for i, image in enumerate(images):
                picture.paste(image.resize((size, height)), (left + i * size, header + row * height))
    picture.info[LAYOUT] = {
        "prompts": prompts,
        "titles": list(columns),
        "lefts": lefts,
        "top": header,
        "each": len(sample),
        "size": [size, height],
    }
    return picture


def input_picture(image: Image.Image, like: Image.Image, width: int) -> Image.Image:
    """`image`, `width` pixels wide and as high as `like`, on as much white: contact sheets are wider than frames."""
    picture = Image.new("RGB", like.size, "white")
    picture.paste(image.resize((width, like.height)))
    return picture


def one_line(prompt: str) -> str:
    """A prompt as a grid shows it: captions of language models have paragraphs, and hundreds of words."""
    text = " ".join(prompt.split())
    return text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"


def save_grid(picture: Image.Image, file: Path):
    """A PNG that `read_grid` can take apart again."""
    info = PngInfo()
    info.add_itxt(LAYOUT, json.dumps(picture.info[LAYOUT]))
    picture.save(file, pnginfo=info)


def save_animation(pictures: list[Image.Image], file: Path, frame_rate: int):
    """An animated WebP of pictures of one size, `frame_rate` a second, again from its end."""
    first, *others = pictures
    first.save(file, save_all=True, append_images=others, duration=round(1000 / frame_rate), loop=0, quality=80)


def read_grid(file: Path) -> tuple[dict[str, list[list[Image.Image]]], list[str]] | None:
    """`columns` and `prompts` of `comparison_grid`; `None` for a picture that does not say what it shows."""
    try:
        with Image.open(file) as picture:
            picture.load()
            layout = json.loads(picture.text[LAYOUT])
            (width, height), top = layout["size"], layout["top"]
            each = range(layout["each"])
            tops = range(top, top + len(layout["prompts"]) * height, height)
            columns = {
                title: [
                    [picture.crop((left + i * width, y, left + (i + 1) * width, y + height)) for i in each]
                    for y in tops
                ]
                for title, left in zip(layout["titles"], layout["lefts"], strict=True)
            }
            return columns, layout["prompts"]
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, AttributeError):
        return None  # half-written, of another program, or of a run before grids had a layout


def card_picture(columns: dict[str, list[list[Image.Image]]], times: dict[str, str]) -> Image.Image:
    """
    Teacher and student side by side on the same prompts, one image of each, with steps and seconds under both.

    Args:
        columns: as `read_grid` returns them; the titles begin with `"teacher, "` and `"student, "`.
        times: what stands below `"teacher"` and `"student"`, of those that were timed.
    """
    shown = [title for title in columns if title.split(",")[0] != "base"]
    chosen = {title: [images[0] for images in columns[title]] for title in shown}
    count = len(next(iter(chosen.values())))
    # Full rows, where there is a number of columns that makes them and is not too large.
    least = math.ceil(math.sqrt(count))
    across = next((n for n in range(least, min(count, 6) + 1) if count % n == 0), least)
    rows, size, gap, space, footer = math.ceil(count / across), 168, 6, 36, 84
    block = across * size + (across - 1) * gap
    width = space + len(chosen) * (block + space)
    picture = Image.new("RGB", (width, space + rows * (size + gap) - gap + footer), "white")
    draw = ImageDraw.Draw(picture)
    for column, (title, images) in enumerate(chosen.items()):
        left = space + column * (block + space)
        for i, image in enumerate(images):
            scale = size / max(image.size)
            shown = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
            picture.paste(shown, (left + i % across * (size + gap), space + i // across * (size + gap)))
        who, rest = (title.split(", ", 1) + [""])[:2]
        below = [rest]
        if who in times:
            below.append(times[who])
        top, middle = picture.height - footer, left + block // 2
        for y, text, fill, height in ((28, who.capitalize(), "#111827", 22), (56, " · ".join(below), "#4b5563", 16)):
            draw.text((middle, top + y), text, fill=fill, anchor="mm", font=ImageFont.load_default(height))
    return picture


def student_seconds(seconds: dict[str, float], is_lora: bool) -> float | None:
    """
    Of the student's image, where a LoRA is fused: what the base takes for the same number of steps. During training it
    is not fused, and a small network spends more time on its layers than on its own.
    """
    return seconds.get("base" if is_lora else "student")


def format_seconds(seconds: float) -> str:
    """With two digits, in a unit that suits."""
    if seconds < 1:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds:.2f} s"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

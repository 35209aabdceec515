# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""
Draws the diagrams of concepts.md into docs/images. All numbers are of a one-dimensional example with closed forms,
computed by the package's own functions; nothing is trained.

python docs/figures.py
"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from rdm_trl.method.matching import Probe, center  # noqa: E402


IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GREY = "#4269d0", "#e07b39", "#3a9a6e", "#8a8a8a"
# The teacher is a mixture of two Gaussians, the student one Gaussian between them.
TEACHER = {"weights": torch.tensor([0.6, 0.4]), "means": torch.tensor([-1.5, 2.0]), "stds": torch.tensor([0.5, 0.4])}
STUDENT = {"weights": torch.ones(1), "means": torch.tensor([0.2]), "stds": torch.tensor([0.9])}
SIGMA = 0.5  # noise level: x_t = (1 - SIGMA) x_0 + SIGMA noise


def log_density(mixture: dict, x: torch.Tensor, a: float = 1.0, b: float = 0.0) -> torch.Tensor:
    """Log-density of `a x0 + b noise` at `x` (B,)."""
    stds = (a * mixture["stds"]).square().add(b * b).sqrt()
    parts = torch.distributions.Normal(a * mixture["means"], stds).log_prob(x[:, None])
    return (parts + mixture["weights"].log()).logsumexp(1)


def denoised(mixture: dict, x: torch.Tensor) -> torch.Tensor:
    """The exact denoised prediction at `x` (B,) and noise level `SIGMA`: by Tweedie's formula."""
    x = x.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(log_density(mixture, x, 1 - SIGMA, SIGMA).sum(), x)
    return ((x + SIGMA**2 * score) / (1 - SIGMA)).detach()


def plain(axis):
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_yticks([])


def draw_policy(path: Path, num_steps: int = 4):
    figure, axis = plt.subplots(figsize=(8, 2.5))
    for k in range(num_steps):
        shade = str(0.45 + 0.5 * k / num_steps)
        for y, text, color in ((1, f"$x_{{t_{k}}}$", shade), (0, rf"$\hat x_0^{{({k})}}$", "white")):
            box = dict(boxstyle="round,pad=0.5", facecolor=color, edgecolor="black")
            axis.text(2 * k, y, text, ha="center", va="center", fontsize=13, bbox=box)
        axis.annotate("", (2 * k, 0.27), (2 * k, 0.73), arrowprops=dict(arrowstyle="->", color=BLUE, lw=2))
        if k + 1 < num_steps:
            arrow = dict(arrowstyle="->", color=ORANGE, lw=2, linestyle="--")
            axis.annotate("", (2 * k + 1.65, 0.85), (2 * k + 0.35, 0.12), arrowprops=arrow)
    axis.text(-0.35, 0.5, "predict", color=BLUE, ha="right", va="center")
    axis.text(0.78, 0.85, "re-noise:\nthe action", color=ORANGE, ha="center", va="center")
    axis.text(2 * num_steps - 1.4, 0, "the image", ha="left", va="center")
    axis.set(xlim=(-1.6, 2 * num_steps - 0.2), ylim=(-0.4, 1.4))
    axis.axis("off")
    save(figure, path)


def draw_reward(path: Path):
    x = torch.linspace(-3.5, 3.5, 400)
    teacher, student = (log_density(m, x, 1 - SIGMA, SIGMA) for m in (TEACHER, STUDENT))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, height_ratios=[3, 2])
    for values, color, name in ((teacher, BLUE, "teacher"), (student, ORANGE, "student")):
        top.fill_between(x, values.exp(), color=color, alpha=0.3, lw=0)
        top.plot(x, values.exp(), color=color, label=name)
    top.legend(frameon=False)
    bottom.axhline(0, color=GREY, lw=0.8)
    bottom.plot(x, teacher - student, color=GREEN)
    at = torch.linspace(-1.5, 1.75, 9)
    reward = log_density(TEACHER, at, 1 - SIGMA, SIGMA) - log_density(STUDENT, at, 1 - SIGMA, SIGMA)
    direction = denoised(TEACHER, at) - denoised(STUDENT, at)
    arrows = dict(angles="xy", scale_units="xy", scale=3, width=4e-3)
    bottom.quiver(at, reward, direction, torch.zeros(9), color=GREEN, **arrows)
    bottom.set_ylabel("$R_{dm}$", rotation=0, labelpad=16)
    bottom.set_ylim(-1.8, 4)
    for axis in (top, bottom):
        plain(axis)
    bottom.set_xlabel("noisy image $x$; arrows: the direction $r$")
    save(figure, path)


def draw_group(path: Path, lag: float = 2.0):
    """Six images of a student that has moved by `lag`; its fake score has not, and knows where it was before."""
    torch.manual_seed(1)
    behind = {**STUDENT, "means": STUDENT["means"] - lag}
    x0 = STUDENT["means"] + STUDENT["stds"] * torch.randn(6)
    x = (1 - SIGMA) * x0 + SIGMA * torch.randn(6)
    to_teacher, fake, exact = (denoised(mixture, x)[:, None] for mixture in (TEACHER, behind, STUDENT))
    dmd = Probe(to_teacher - fake, (x0[:, None] - to_teacher).abs(), fake - x0[:, None], torch.zeros(6))
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharex=True, sharey=True)
    for axis, title, found, color in (
        (axes[0], "DMD", dmd.direction, ORANGE),
        (axes[1], "GNDM: less the others' residual", center(dmd, 6).direction, BLUE),
    ):
        axis.bar(torch.arange(6) - 0.2, (to_teacher - exact)[:, 0], 0.4, color=GREY, label="exact fake score")
        axis.bar(torch.arange(6) + 0.2, found[:, 0], 0.4, color=color, label="fake score that lags")
        axis.axhline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(6), [f"image {i + 1}" for i in range(6)], fontsize=7)
        axis.legend(fontsize=7, frameon=False, loc="upper right")
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(axis="y", labelsize=7)
    axes[0].set_ylabel("direction", fontsize=8)
    save(figure, path)


def save(figure, path: Path):
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(folder: Path = IMAGES):
    draw_policy(folder / "policy.png")
    draw_reward(folder / "r_dm.png")
    draw_group(folder / "group.png")


if __name__ == "__main__":
    main()

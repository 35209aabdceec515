# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""The logged figures that say whether a run is healthy, and when one has left its range: see docs/metrics.md."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Guardrail:
    """
    Args:
        key: under which it is logged.
        title, hint: for people who have not read docs/metrics.md: what it is, and what it tells.
        healthy: the range, or nothing where no measured one tells the sick from the healthy.
        relative: whether the range is in units of the run's first value, and leaving it is warned of.
    """

    key: str
    title: str
    hint: str
    healthy: tuple[float, float] | None = None
    relative: bool = False


GUARDRAILS = (
    Guardrail("x0/std", "Contrast", "Falling: blur. Rising: over-saturation or noise.", (0.67, 1.5), True),
    Guardrail("x0/diversity", "Diversity within a prompt", "Falling to half: collapse.", (0.5, 2.0), True),
    Guardrail("x0/saturation", "Black and white pixels", "Rising: the commonest reward hack.", (0.5, 2.0), True),
    Guardrail("dm/direction", "Teacher against fake score", "Falls slowly. Growing: the student runs away."),
    Guardrail("dm/fake_error", "Common error of the fake score", "GNDM takes it out, DMD follows it."),
    Guardrail("loss/fake", "Loss of the fake score", "Flat. Rising: it does not keep up."),
    Guardrail("rewards/distribution_matching/mean", "Estimate of R_dm", "Slightly negative. Falling on: drift."),
    Guardrail("dm/scale", "Distance from the teacher's prediction", "Growing: images it would not draw."),
    Guardrail("grad_norm", "Gradient", "Spikes: lower the learning rate."),
    Guardrail("dm/kl", "Divergence from the teacher", "Above target_dm for long: the budget does not hold."),
    Guardrail("frac_reward_zero_std", "Groups without a reward signal", "1: the reward has no effect.", (0, 0.5)),
    Guardrail("adversarial/accuracy", "Discriminator's accuracy", "Near 1 for long: it has won.", (0.4, 0.95)),
    Guardrail("ratio/mean", "Importance ratio", "1 within a few percent.", (0.95, 1.05)),
    Guardrail("ratio/clipped", "Clipped ratios", "High: fewer uses of a rollout.", (0, 0.2)),
    Guardrail("ratio/effective_samples", "Effective samples", "Low: few elements decide.", (0.9, 1)),
)
FAKE_ERROR = 10.0
# Of the discriminator in so many logs in a row: more right than this, or log-odds of both sides closer than that.
ADVERSARIAL_LOGS = 5
WON, DIED = 0.98, 0.01


def drift_warnings(history: list[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], str]]:
    """
    What a run's logs warn of: by figure, the first row of `history` that did, and the warning.

    A figure warns that leaves its range around its first value: collapse and reward hacking show there before anyone
    looks at a picture. And `dm/fake_error`, where the direction is mostly the fake score's error, in three logs in a
    row behind the first: at the start directions are next to nothing. And `adversarial/accuracy`, where the
    discriminator has won or died.
    """
    found, first, errors, judged = {}, {}, [], []
    for row in history:
        step = row.get("step") or 0
        for name, (low, high) in {rail.key: rail.healthy for rail in GUARDRAILS if rail.relative}.items():
            value = row.get(name)
            if value is None:
                continue
            if value:
                first.setdefault(name, value)
            if name in first and name not in found and not low <= value / first[name] <= high:
                found[name] = (
                    row,
                    f"{name} is {value:.3g} at step {step:.0f}, {value / first[name]:.2f} times its first "
                    f"value ({first[name]:.3g}). Look at the samples: lower the rewards' weights or `learning_rate`, "
                    "or use `reward_mixing='constrained'`.",
                )
        if row.get("adversarial/accuracy") is not None:
            judged.append((row["adversarial/accuracy"], row["adversarial/real"] - row["adversarial/fake"]))
            warning = discriminator_warning(judged[-ADVERSARIAL_LOGS:])
            if warning is not None and "adversarial/accuracy" not in found:
                found["adversarial/accuracy"] = (row, f"At step {step:.0f} {warning}")
        if row.get("dm/fake_error") is None:
            continue
        errors.append(row["dm/fake_error"])
        if "dm/fake_error" not in found and len(errors) > 3 and min(errors[-3:]) > FAKE_ERROR:
            found["dm/fake_error"] = (
                row,
                f"dm/fake_error is {errors[-1]:.3g} at step {step:.0f}: the fake score's error is far larger "
                "than the direction that it is a part of, so that it does not keep pace with the student. Raise "
                "`fake_updates` or `fake_learning_rate`, lower `learning_rate`, or take it out with "
                "`dm_centering='group'`.",
            )
    return found


def check_finite(name: str, values: torch.Tensor, step: int, prompts: list[str] | None = None):
    """Raises `FloatingPointError` that names the first of `prompts` whose value, of (B,), is not finite."""
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if bad:
        where = f" for the prompt {prompts[bad[0]]!r}" if prompts is not None else ""
        raise FloatingPointError(
            f"The {name} is not finite{where} at step {step}; no weight was changed. Lower `learning_rate` or "
            "`sample_guidance_scale`, or train in full precision."
        )


def discriminator_warning(judged: list[tuple[float, float]]) -> str | None:
    """What the last logs say, each an accuracy and how far the log-odds of real images are above the student's."""
    if len(judged) < ADVERSARIAL_LOGS:
        return None
    if min(accuracy for accuracy, _ in judged) > WON:
        return (
            f"the discriminator has won: adversarial/accuracy is {judged[-1][0]:.3g}, and its gradient says little of "
            "how to look real. Lower `fake_learning_rate`, and check that `image_dataset` is of what the prompts ask "
            "for, in the same size and framing."
        )
    if max(abs(gap) for _, gap in judged) < DIED:
        return (
            f"the discriminator tells nothing apart: adversarial/real and adversarial/fake differ by "
            f"{judged[-1][1]:.2g}. It has died, and teaches nothing: raise `fake_learning_rate`."
        )
    return None

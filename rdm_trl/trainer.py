# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list, gather, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from . import evaluation, guidance
from .adversary import Adversary
from .callbacks import ImageTracker, StopOnSignalCallback, call_apart, default_callbacks, mean_figures
from .checks import check_learned_target
from .config import RdmDistillConfig
from .ddpo import ask_black_boxes, compute_rewards, generate_samples, of_one, policy_loss, transition_loss
from .demo import DEMO_PIPELINE, DEMO_PROMPTS, load_demo_judge, load_demo_pipeline
from .guardrails import check_finite
from .inherited import check_best_metric
from .method import losses, matching, policy
from .method.advantages import Feedback
from .method.diffusion import NoiseProcess
from .method.experience import Experience
from .models import sharding
from .models.lora import make_roles
from .models.pipelines import base_of, family_of, load_pipeline
from .noise import noise_apart
from .optimizers import check_optimizers, create_optimizers
from .prompts import PromptSampler, evaluation_prompts, prompt_caches, split_rows, training_prompts
from .rewards import RewardFunction, resolve_reward
from .rewards.panel import RewardPanel, distribution_matching_push
from .saving import checkpoint
from .saving.hub import run_settings, save_checkpoint, write_card, write_metrics
from .saving.upload import prepare_push, push, push_checkpoint
from .scores import LearnedTarget, add_noise_to, denoising_loss_of


class RdmDistillTrainer(Trainer):
    """
    Distils a many-step diffusion pipeline into a few-step LoRA, with distribution matching as a reward.

    One update: the student's rollout (no gradient), R_dm's direction from teacher and fake score, its normalisation
    over the prompt's group, one student update along it, and `fake_updates` updates of the fake score on the same
    images. With `num_iterations` above 1 a rollout and the teacher's judgement of it serve as many updates. The
    constructor follows TRL's former `DDPOTrainer`.

    Example:

    ```python
    from rdm_trl import RdmDistillConfig, RdmDistillTrainer

    trainer = RdmDistillTrainer(RdmDistillConfig("my-4-step-model", max_steps=100))  # the embedded pipeline
    trainer.train()
    ```

    Args:
        config (`RdmDistillConfig`): all options.
        reward_function (callable or list of callables, *optional*):
            `f(images, prompts, metadata)` or `f(images=..., prompts=..., **columns)`; images are (B, 3, H, W) in
            [0, 1], of videos each frame. Returns one number an image, or (numbers, metadata). See [`rewards.Scorer`].
        prompt_function (callable, *optional*): `() -> (prompt, metadata)`, as in DDPO; instead of `train_dataset`.
        sd_pipeline (pipeline, folder, .safetensors file or Hub id, *optional*): the teacher; by default embedded.
        image_samples_hook (callable, *optional*): `(prompt_image_data, global_step, tracker)`, called at each logging
            step with a list of `[images, prompts, metadata, rewards, reward_metadata]`.
        train_dataset (`Dataset`, *optional*):
            With a `prompt` column, and an `image` column for pipelines that take one; the rewards get all others.
        eval_dataset (`Dataset`, *optional*): prompts of `evaluate`; those of training by default.
        peft_config (`LoraConfig`, *optional*):
            Of student and fake score; rank 32 by default. `False` trains whole copies of the denoiser.
        teacher_lora (path or Hub id, *optional*):
            A LoRA (style, character) of the teacher. The student's adapter begins as a copy of it, followed by
            `peft_config`'s rank; the saved one alone draws in that style. Text encoders' part is saved as it is.
        student_lora (path or Hub id, *optional*):
            A few-step LoRA to continue, with its rank, alpha and layers: an earlier run's folder, or an LCM-LoRA.
        callbacks: as in `transformers.Trainer`.
        optimizers: to be left out, since the parameters are made here. See `create_optimizer`.

    Raises:
        ValueError: no prompts, an unsupported pipeline or scheduler, mismatched weights; before anything is trained.
    """

    _tag_names = ["diffusers", "lora", "trl", "rdm-trl"]

    def __init__(
        self,
        config: RdmDistillConfig,
        reward_function: RewardFunction | list[RewardFunction] | None = None,
        prompt_function: Callable[[], tuple[str, Any]] | None = None,
        sd_pipeline: DiffusionPipeline | str | Path | None = None,
        image_samples_hook: Callable[[Any, int, Any], Any] | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        peft_config: LoraConfig | bool | None = None,
        teacher_lora: str | Path | None = None,
        student_lora: str | Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        # Pipeline
        if sd_pipeline is None:
            sd_pipeline = load_demo_pipeline()
        elif not isinstance(sd_pipeline, DiffusionPipeline):
            sd_pipeline = load_pipeline(sd_pipeline, torch.bfloat16 if config.bf16 else torch.float32)
        self.sd_pipeline = sd_pipeline
        size = config.sample_height, config.sample_width, config.sample_num_frames, config.max_sequence_length
        self.family = family_of(sd_pipeline, *size)
        self.base_model, self.variant, self.single_file_config = base_of(sd_pipeline)
        self.is_demo = self.base_model == DEMO_PIPELINE
        self.process = NoiseProcess(sd_pipeline.scheduler)
        grid = config.sample_num_steps, config.sample_sigmas, config.sample_timesteps
        self.student_scheduler = self.family.make_student_scheduler(*grid)

        # Rewards
        given = reward_function if isinstance(reward_function, list | None) else [reward_function]
        functions = [resolve_reward(reward) for reward in (*(given or []), *(config.reward_funcs or []))]
        self.overrides_rewards = type(self).compute_rewards is not RdmDistillTrainer.compute_rewards
        self.rewards = RewardPanel(functions, config, not self.overrides_rewards, self.family.num_frames is not None)
        self.image_samples_callback = image_samples_hook

        # Prompts
        self.prompt_fn = prompt_function
        if train_dataset is None and prompt_function is None and self.is_demo:
            train_dataset = Dataset.from_dict({"prompt": DEMO_PROMPTS})
        number = config.prompts_per_generation, config.prompts_in_all
        train_dataset = training_prompts(prompt_function, train_dataset, *number, config.seed, self.family)
        eval_dataset = evaluation_prompts(eval_dataset, train_dataset, self.family)

        # Model: one frozen denoiser and its adapters, equal on all processes
        set_seed(config.seed)
        absorbs = config.num_teacher_images > 0 and config.teacher_guidance_scale > 1 and self.family.has_guidance()
        check_learned_target(config, absorbs)
        roles = make_roles(self.family, peft_config, teacher_lora, student_lora, config.learn_target)
        if sharding.is_asked_for():
            sharding.shard(roles, self.family, config.device, not config.offload_encoders)
        self.encode, self.encode_negative = prompt_caches(self.family, config, self.base_model)
        self.teacher_lora, self.student_lora = (path and str(path) for path in (teacher_lora, student_lora))

        super().__init__(
            model=roles,
            args=config,
            data_collator=list,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[*default_callbacks(self), *(callbacks or [])],
            optimizers=optimizers,
        )
        if config.torch_compile:  # every role; `Trainer` by itself would compile the student's training pass alone
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")
            roles.compile_denoiser(config.torch_compile_backend, config.torch_compile_mode)
        self.stop_callback = StopOnSignalCallback()
        self.add_callback(self.stop_callback)
        call_apart(self.callback_handler, self.accelerator.device)
        self.model_accepts_loss_kwargs = False  # `Roles.forward` takes any keyword, but no token count
        self.family.place(self.accelerator.device, config.offload_encoders, roles.sharded)
        evaluation.check_types(self)
        self.student_timesteps = self.student_scheduler.timesteps.to(self.accelerator.device)
        self.adversary = Adversary(self) if config.adversarial_weight else None
        self.learned_target = LearnedTarget(self) if config.learn_target else None
        # Other noise on each process, from here on.
        set_seed(config.seed, device_specific=True)

        self.absorbs_guidance, self.target, self.target_key, self.fake_score = absorbs, None, None, None
        features = config.eval_feature_model and evaluation.PretrainedFeatures(config.eval_feature_model)
        self.judge = load_demo_judge() if self.is_demo and not features else evaluation.Judge(features)
        check_best_metric(config, [*self.judge.names, *self.rewards.names])
        check_optimizers(self)
        self.metrics, self.best_note = {}, ""
        self.cost = {"updates": 0, "rollouts": 0, "teacher_evaluations": 0, "seconds": 0.0}
        self._measured = {}
        self._begin()

    def _begin(self):
        """Forgets what a run may have left behind that was broken off in the middle of an update."""
        self._experiences, self._trusted, self._accumulated = [], True, 0
        self._fake_batches, self._records = [], defaultdict(list)

    # -------------------------------------------------------------------------------------------------- data and roles

    def create_accelerator_and_postprocess(self):
        with sharding.hidden_from_accelerate():
            super().create_accelerator_and_postprocess()

    def _move_model_to_device(self, model, device):
        if not model.sharded:  # shards are in their place
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        wrapped = super()._wrap_model(model, training, dataloader)
        return sharding.wrap(self, wrapped) if wrapped is self.model and wrapped.sharded else wrapped

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        return PromptSampler(
            train_dataset if train_dataset is not None else self.train_dataset,
            lambda: int(self.state.epoch or 0),
            mini_repeat_count=args.num_generations,
            batch_size=args.prompts_per_generation,
            repeat_count=args.num_iterations,
            seed=args.seed,
        )

    def predict_x0(self, model, role: str, x_t, timesteps, condition) -> torch.Tensor:
        """Denoised prediction of `role`, without guidance; `model` is `self.model`, wrapped or not."""
        output = self.family.denoise(lambda *a, **k: model(role, *a, **k), x_t, timesteps, condition)
        return self.process.to_x0(output, x_t, timesteps)

    @cached_property
    def teacher_weights(self) -> str:
        return guidance.weights_of(self)

    @torch.no_grad()
    def predict_teacher(self, x_t, timesteps, condition) -> torch.Tensor:
        """R_dm's teacher: the fitted target, or the teacher with guidance as its pipeline computes it."""
        if self.absorbs_guidance:
            return guidance.predict_target(self, x_t, timesteps, condition)
        negative, scale = self.encode_negative([self.args.negative_prompts]), self.args.sample_guidance_scale
        output = self.family.guide(self.denoise_as_teacher, x_t, timesteps, condition, negative, scale)
        return self.process.to_x0(output, x_t, timesteps)

    def denoise_as_teacher(self, x_t, timesteps, condition) -> torch.Tensor:
        """The teacher's raw output (B, ...), counted."""
        self.cost["teacher_evaluations"] += len(x_t)
        return self.family.denoise(lambda *a, **k: self.model("teacher", *a, **k), x_t, timesteps, condition)

    # ------------------------------------------------------------------------------------------- sample, score, update

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; `True`: from the newest complete checkpoint. SIGTERM and Ctrl-C save one and end it."""
        folder = checkpoint.find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if folder is not None:
            checkpoint.check_settings(Path(folder), self.settings(), self.args.resume_with_changes)
        if self.absorbs_guidance:
            self.absorb_guidance(folder)
        self._begin()
        with self.stop_callback.listening():
            return super().train(folder, *args, **kwargs)

    def absorb_guidance(self, resumed_from: str | None = None):
        """Before the first update: the guided teacher draws its images, and the target is fitted to them."""
        guidance.absorb_for(self, resumed_from)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        start = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._accumulated += 1
        if self.accelerator.sync_gradients:
            self._accumulated = 0
            gradients = [p.grad for p in self.model.adapter_parameters("student") if p.grad is not None]
            self._check_finite("student's gradient", torch.nn.utils.get_total_norm(gradients)[None])
            self.update_fake()
        seconds = time.perf_counter() - start
        self.cost["seconds"] += seconds
        speed = self.args.per_device_train_batch_size * self.args.world_size / seconds
        self._record({"step_time": seconds, "samples_per_second": speed})
        return loss

    def _prepare_inputs(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The experience that this step learns from, what the student predicts there, and what is said to it now."""
        args = self.args
        step = self.state.global_step * args.gradient_accumulation_steps + self._accumulated
        position = step % (args.steps_per_generation * args.num_iterations)
        if position == 0:
            self._experiences, self._trusted = [], True
        weight = 1.0
        if position >= args.steps_per_generation and self._trusted:
            experience = self._experiences[position % args.steps_per_generation]
            x0 = self._predict_exits(experience.rollout, experience.condition)
            self._check_finite("student's prediction", x0.detach().flatten(1).sum(1), experience.prompts)
            clip = args.epsilon, args.epsilon_high
            weight, figures = experience.weight(x0.detach(), self.process, args.importance_sampling_level, *clip)
            kl = gather(figures["ratio/kl"]).mean()
            self._record({**figures, "ratio/kl": kl})
            # Too far from the policy that acted: the rest of the loop gets rollouts of its own.
            self._trusted &= args.target_kl is None or bool(kl <= args.target_kl)
        else:
            experience, x0 = self._collect(rows)
            if args.num_iterations > 1 and self._trusted:
                self._experiences.append(experience)
        return {"experience": experience, "x0": x0, "feedback": self._feedback(experience, x0.detach(), weight)}

    def _predict_exits(self, rollout: policy.Rollout, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        """The student's x0 (B, ...) at its exit steps, with the graph of its update."""
        return self.predict_x0(self.model_wrapped, "student", rollout.exit_latents, rollout.exit_timesteps, condition)

    def _collect(self, rows: list[dict[str, Any]]) -> tuple[Experience, torch.Tensor]:
        """A rollout of the student, judged by the rewards and the teacher; and the student's prediction in it."""
        args, device = self.args, self.accelerator.device
        prompts, metadata = split_rows(rows, self.family)
        num_groups = len(prompts) // args.num_generations
        condition = self.encode(prompts)
        logs_now = self.state.logging_steps and self.state.global_step % self.state.logging_steps == 0
        shows = self.image_samples_callback is not None and logs_now
        # Asked at the very first step too, whatever the warm-up: a reward that fails does so at once.
        asked = bool(self.rewards.functions) and self.state.global_step not in range(1, args.reward_warmup)
        complete = shows or (asked and bool(self.rewards.black_boxes))
        warms_up = self.state.global_step < args.reward_warmup
        mirrored = args.mirrors_noise and (warms_up or not self.rewards.black_boxes)
        exit_steps = policy.draw_exit_steps(num_groups, args.num_generations, args.sample_num_steps)
        images, answers, seen = None, None, torch.zeros(len(exit_steps))
        with self.accelerator.autocast():
            rollout = self.rollout(condition, exit_steps.to(device), complete, mirrored=mirrored)
        if complete:
            images = self.family.decode(rollout.latents[:, -1])
            self._record({"x0/saturation": ((images < 1 / 255) | (images > 254 / 255)).float().mean()})
        if asked and self.rewards.black_boxes:
            answers = ask_black_boxes(self, images, prompts, metadata)
        # The rollout's last pass is that of the student's update, whose graph waits while teacher and rewards judge.
        # Not where a reward is differentiated through the autoencoder: two graphs would be in memory together.
        with torch.set_grad_enabled(not (asked and self.rewards.differentiable)):
            x0 = self._predict_exits(rollout, condition)
        rollout.x0 = x0.detach()
        self._check_finite("student's prediction", rollout.x0.flatten(1).sum(1), prompts)
        if args.dm_subintervals:
            seen = policy.seen_noise(exit_steps, self.student_timesteps.cpu(), self.process.num_train_timesteps)
        low, high = args.dm_timestep_range
        sampling, lows = args.dm_timestep_sampling, seen.clamp(min=low)
        fractions = matching.draw_fractions(num_groups, args.num_generations, sampling, lows, high)
        timesteps = self.process.timesteps_at(fractions).to(device)
        noise = policy.draw_noise(rollout.x0.shape, device, rollout.mirrored)
        with self.accelerator.autocast():
            x_t = self.process.add_noise(rollout.x0, noise, timesteps)
            teacher = self.predict_teacher(x_t, timesteps, condition)

        rewards, details = torch.full((len(prompts), len(self.rewards.functions)), torch.nan), {}
        pushes = None if self.adversary is None else []
        if asked:
            rewards, pushes, details = self.rewards.ask(answers, rollout.x0, self.family.decode, prompts, metadata)
            self._record(self.rewards.figures(gather(rewards)))
        if warms_up:
            pushes = None
        if shows and self.is_world_process_zero():
            shown = [[images, prompts, metadata, *of_one(self.rewards.names, rewards, details)]]
            with noise_apart(device):
                self.image_samples_callback(shown, self.state.global_step, ImageTracker(self))
        self._record(rollout.figures(args.num_generations))
        if not x0.requires_grad:
            x0 = self._predict_exits(rollout, condition)
            rollout.x0 = x0.detach()  # the same but for rounding, and the importance ratio must start at 1
        return Experience(prompts, condition, rollout, seen, timesteps, noise, teacher, pushes), x0

    def _feedback(self, experience: Experience, x0: torch.Tensor, weight: torch.Tensor | float) -> Feedback:
        """What `experience` says to the student that predicts `x0` (B, ...) now, against the fake score of now."""
        args, timesteps, rollout, learned = self.args, experience.timesteps, experience.rollout, self.learned_target

        def predict_teacher(x_t, t):  # a learned target is of now, as the fake score is
            if learned is None:
                return experience.teacher
            return learned.predict(experience.teacher, x_t, t, experience.condition)

        with torch.no_grad(), self.accelerator.autocast():
            probe = matching.probe(
                predict_teacher,
                lambda x_t, t: self.predict_x0(self.model, "fake", x_t, t, experience.condition),
                self.process,
                rollout.x0,
                experience.noise,
                timesteps,
                x0,
                weight,
                rollout.mirrored,
            )
        self._check_finite("R_dm", probe.direction.flatten(1).abs().sum(1), experience.prompts)
        self._record(probe.figures(args.num_generations))
        dm = distribution_matching_push(probe, experience, self.process, args)
        if experience.pushes is None:
            return Feedback(args.dm_weight * dm, torch.zeros(len(dm), device=dm.device))
        adversarial = None
        if self.adversary is not None:  # of what the student draws now, to the head of now: it needs no ratio
            adversarial = self.adversary.push(x0, experience.noise, timesteps, experience.condition)
        feedback = self.rewards.mix(dm, experience.pushes, rollout, self.process, probe.reward, adversarial)
        self._record(self.rewards.mixing_figures())
        return feedback

    def rollout(self, condition: dict[str, torch.Tensor], exit_steps: torch.Tensor, complete: bool, mirrored=False):
        shape = (len(exit_steps), self.args.sample_num_steps, *self.family.latent_shape)
        noise = policy.draw_noise(shape, self.accelerator.device, mirrored)
        self.cost["rollouts"] += len(exit_steps)

        def predict(x_t, timesteps, rows):
            chosen = {key: value[rows] for key, value in condition.items()}
            return self.predict_x0(self.model, "student", x_t, timesteps, chosen)

        rollout = policy.rollout(predict, self.process, self.student_timesteps, noise, exit_steps, complete, mirrored)
        if self.model.sharded:
            once = noise[:1, 0], self.student_timesteps[:1], slice(1)
            sharding.keep_company(shape[1] if complete else int(exit_steps.max()), lambda: predict(*once))
        return rollout

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        experience, feedback, x0 = inputs["experience"], inputs["feedback"], inputs["x0"]
        loss = losses.student_loss(x0, feedback.direction)
        if self.rewards.black_boxes:
            loss = loss + transition_loss(self, x0, experience, feedback.advantage)
        # What this forward pass shows of the student is what its fake score has to know next.
        self._fake_batches.append((x0.detach(), experience.condition, experience.seen, experience.prompts))
        self._record({"loss/student": loss})
        return (loss, x0) if return_outputs else loss

    def update_fake(self):
        """`fake_updates` denoising updates of the fake score on the student's latest images."""
        for _ in range(self.args.fake_updates):
            noisy = add_noise_to(self, self._fake_batches)
            self._record({"loss/fake": self.fake_score.update(denoising_loss_of(self, "fake"), noisy)})
            if self.adversary is not None:
                self._record(self.adversary.update(self._fake_batches))
            if self.learned_target is not None:
                self._record(self.learned_target.update([prompts for *_, prompts in self._fake_batches], noisy))
        self._fake_batches.clear()
        self._record({"fake_learning_rate": self.fake_score.scheduler.get_last_lr()[0]})

    def create_optimizer(self, model=None):
        """
        The student's optimizer, and beside it the fake score's. One of your own is set as `trainer.optimizer` before
        `train()`; it has the parameters `trainer.model.adapter_parameters("student")`.
        """
        return create_optimizers(self)

    # ------------------------------------------------------------------------------------------------ DDPO's interface

    def compute_rewards(self, prompt_image_pairs: list, is_async: bool = False) -> Iterator[tuple]:
        """
        Rewards of several batches. A subclass's own is what training and evaluation ask; all rewards are then black
        boxes.

        Args:
            prompt_image_pairs (`list`): of `[images, prompts, metadata]`, images (B, 3, H, W) in [0, 1].
            is_async (`bool`): score the batches in threads.

        Returns:
            As in TRL, a zip of two: each batch's rewards, then each batch's metadata. Rewards are (B,) with one reward
            function and (B, M) with M; metadata is what the one returned, or theirs by name.
        """
        return compute_rewards(self, prompt_image_pairs, is_async)

    def loss(self, advantages: torch.Tensor, clip_range: float, ratio: torch.Tensor) -> torch.Tensor:
        """PPO's clipped loss of `advantages` (B,) and importance `ratio` (B, ...), for every scalar reward."""
        return losses.clipped_policy_loss(advantages, ratio, clip_range, self.args.epsilon_high)

    def calculate_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds):
        """
        Policy loss of one denoising step, for samples of `_generate_samples`.

        Args:
            latents, next_latents (B, ...): the states before and behind the step.
            timesteps (B,): of `latents`, on the student's grid and not its last, which is deterministic.
            log_probs, advantages (B,): of the rollout's policy.
            embeds: prompt embeddings, or the dictionary of conditions that `encode` returns.

        Returns:
            `(loss, approx_kl, clipfrac)`.
        """
        return policy_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds)

    def _generate_samples(self, iterations: int, batch_size: int) -> tuple[list[dict], list]:
        """
        Complete rollouts in DDPO's form.

        Returns:
            Sample dictionaries, with T = `sample_num_steps - 1` stochastic transitions, of `prompt_ids`, the
            conditions (`prompt_embeds`), `timesteps` (B, T), `latents` and `next_latents` (B, T, ...), `log_probs` (B,
            T) and `negative_prompt_embeds`; and `[images, prompts, metadata]` of each batch.
        """
        return generate_samples(self, iterations, batch_size)

    # ------------------------------------------------------------------------------------------- look, measure and log

    def sample(
        self, who: str, prompts: list[str], description: str | None = None, seed: int | None = None
    ) -> torch.Tensor:
        """
        Images (B, 3, H, W), or videos (B, 3, F, H, W), in [0, 1], drawn by the pipeline itself. The same prompts get
        the same initial noise. With the base in shards all processes must call it.

        Args:
            who (`str`): `"teacher"` (`teacher_num_steps`, guided), `"base"` (the teacher at the student's number of
                steps, unguided) or `"student"` (the average of its weights, with its own scheduler).
            description (`str`, *optional*): title of a progress bar.
            seed (`int`, *optional*): of the noise; the run's seed by default.
        """
        return evaluation.sample(self, who, prompts, description, seed)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Compares teacher, base and student on `num_eval_images` images, and writes `metrics.json`.

        Returns:
            The student's figures under `eval_`, the base's and teacher's under `eval_base_` and `eval_teacher_`: `fid`
            (to real images, where their statistics are known), `fid_teacher` (to the teacher's images of the same
            prompts: the literature's FID-SD), `class_accuracy` (embedded pipeline), `diversity` and each reward's
            mean.
        """
        dataset = evaluation_prompts(eval_dataset, self.eval_dataset, self.family)
        if self.is_world_process_zero() or self.model.sharded:
            evaluation.measure(self, dataset)
        if self.is_world_process_zero():
            write_metrics(self, Path(self.args.output_dir))
        self.metrics = broadcast_object_list([self.metrics])[0]
        results = evaluation.flat_figures(self.metrics, metric_key_prefix)
        self.log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    def _record(self, figures: dict[str, Any]):
        for name, value in figures.items():
            self._records[name].append(torch.as_tensor(value).detach().float())

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs and self._records:
            logs.update(mean_figures(self._records, self.accelerator))
            self._records.clear()
        super().log(logs, start_time)

    def _check_finite(self, name: str, values: torch.Tensor, prompts: list[str] | None = None):
        check_finite(name, values, self.state.global_step, prompts)

    # ------------------------------------------------------------------------------------------- checkpoints and cards

    def settings(self) -> dict[str, Any]:
        """All that is needed to repeat the run."""
        return run_settings(self)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        """A distilled checkpoint: the student's LoRA, its scheduler, card, samples and figures."""
        if self.args.should_save:
            folder = Path(output_dir if output_dir is not None else self.args.output_dir)
            checkpoint.begin(folder, self.model)
            save_checkpoint(self, folder)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ):
        """Writes `README.md` of the output folder, for the repository that `push_to_hub` uploads to."""
        if self.is_world_process_zero():
            write_card(self, Path(self.args.output_dir), self.hub_model_id, model_name, dataset_name, tags)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """With `push_to_hub=True` before anything is trained: a repository that cannot be written to is an error."""
        if self.is_world_process_zero():
            prepare_push(self, token, private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Saves to `output_dir` and uploads LoRA, scheduler, card, samples and figures; never the base or an optimizer.

        Arguments are `Trainer.push_to_hub`'s; `kwargs` are those of `create_model_card`.

        Raises:
            RuntimeError: the upload failed; what was saved stays, and the message says how to try again.
        """
        return push(self, commit_message, blocking, token, revision, private, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        push_checkpoint(self, Path(checkpoint_folder))

    def _save_optimizer_and_scheduler(self, output_dir: str):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            checkpoint.save_training_state(Path(output_dir), self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        folder = Path(resume_from_checkpoint)
        checkpoint.load_adapters(folder, self.model)
        self.cost = checkpoint.read_metrics(folder)["cost"]

    def _load_optimizer_and_scheduler(self, folder: str | None):
        super()._load_optimizer_and_scheduler(folder)
        if folder is not None:
            checkpoint.load_training_state(Path(folder), self)

    def _load_best_model(self):
        checkpoint.load_best(self)

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        checkpoint.save_process_state(Path(output_dir), self)

    def _load_rng_state(self, folder: str | None):
        super()._load_rng_state(folder)
        if folder is not None:
            checkpoint.load_process_state(Path(folder), self)

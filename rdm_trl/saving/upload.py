# Copyright 2026 The rdm_trl team. Licensed under the Apache License, Version 2.0.
"""Uploads of distilled checkpoints to the Hub. Whatever fails there, nothing is lost here."""

import shlex
import shutil
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging


logger = logging.get_logger(__name__)

# What a repository gets of the output folder: no base model, no optimizer, nothing else that happens to lie there.
UPLOADED_FILES = [
    "README.md",
    "metrics.json",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "unet/*",
    "transformer/*",
    "scheduler/scheduler_config.json",
    "samples/*.png",
    "samples/*.webp",
    "report.html",
]


def advice(error: BaseException) -> str:
    """What to do about a failed request."""
    if not isinstance(error, HfHubHTTPError):
        return "The connection failed."
    status, headers = error.response.status_code, error.response.headers
    if status == 401:
        return "The Hub does not know you: log in by `hf auth login`, or set `HF_TOKEN`, with a token that may write."
    if status in (403, 409):
        return "Your token may not write there: name a repository of your own by `hub_model_id`, or use another token."
    if status == 404:
        return "The repository or its `hub_revision` is not there, or hidden from your token."
    if status == 429:
        return f"These were too many requests: wait for {headers.get('Retry-After', 'a few hundred')} seconds."
    return "The Hub did not accept the request."


def create_repository(
    trainer, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> HfApi:
    """Makes sure that there is a repository, and that the token may write to it; sets `trainer.hub_model_id`."""
    args, revision = trainer.args, revision or trainer.args.hub_revision
    api = HfApi(token=token or args.hub_token)
    name = trainer.hub_model_id or args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    trainer.hub_model_id = api.create_repo(name, private=private, exist_ok=True).repo_id
    # An existing repository of somebody else counts as created.
    api.auth_check(trainer.hub_model_id, write=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(trainer.hub_model_id, branch=revision, exist_ok=True)
    return api


def prepare_push(trainer, token: str | None, private: bool | None):
    """With `push_to_hub=True`, before anything is trained. Raises `RuntimeError` where nothing could be pushed."""
    trainer.push_in_progress = None
    try:
        create_repository(trainer, token, private)
    except Exception as error:
        name = trainer.args.hub_model_id or Path(trainer.args.output_dir).absolute().name
        raise RuntimeError(
            f"`push_to_hub=True`, but {name!r} cannot be pushed to. {advice(error)} Nothing was trained yet. The "
            f"Hub's client says: {error}"
        ) from error


def push(
    trainer, commit_message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None, **card
) -> CommitInfo | Future | None:
    """`RdmDistillTrainer.push_to_hub`, which see."""
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        trainer._finish_current_push()
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    try:
        api = create_repository(trainer, token, private, revision)
        trainer.create_model_card(**card)
        return upload(trainer, api, folder, commit_message, blocking, revision=revision)
    except Exception as error:
        # Whatever is thrown, by sockets, by the client or by its threads: the files are safe.
        repo = trainer.hub_model_id or args.hub_model_id or folder.absolute().name
        revision = revision or args.hub_revision
        command = ["hf", "upload", repo, str(folder.absolute()), "."]
        command += [word for pattern in UPLOADED_FILES for word in ("--include", pattern)]
        command += ["--revision", revision] if revision else []
        raise RuntimeError(
            f"The push to {repo!r} failed. {advice(error)} Nothing is lost: {folder.absolute()} holds all of it. Try "
            f"again by `trainer.push_to_hub()`, or in a shell by\n\n    {shlex.join(command)}\n\n"
            f"The Hub's client says: {error}"
        ) from error


def upload(
    trainer,
    api: HfApi,
    folder: Path,
    message: str,
    blocking: bool,
    path_in_repo: str = "",
    patterns: list[str] | None = UPLOADED_FILES,
    revision: str | None = None,
) -> CommitInfo | Future:
    """`HfApi.upload_folder`; one in the background that fails says so in the log, for training goes on."""
    answer = api.upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=folder,
        path_in_repo=path_in_repo,
        allow_patterns=patterns,
        commit_message=message,
        revision=revision or trainer.args.hub_revision,
        run_as_future=not blocking,
    )
    if not blocking:
        answer.add_done_callback(warn_of_failure)
    return answer


def warn_of_failure(future: Future):
    if not future.cancelled() and future.exception() is not None:
        error = future.exception()
        logger.warning(
            f"A push in the background failed. {advice(error)} The files are on the disk, and the next push brings "
            f"them: `trainer.push_to_hub()`. The Hub's client says: {error}"
        )


def push_checkpoint(trainer, checkpoint: Path):
    """
    What `hub_strategy` asks for behind each checkpoint, in the background: `"every_save"` uploads what the final push
    does; `"checkpoint"` and `"all_checkpoints"` also the checkpoint as a folder of the repository, whole, with its
    optimizers, to resume from elsewhere.
    """
    args = trainer.args
    if not trainer.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
        return
    if not args.hub_always_push and trainer.push_in_progress is not None and not trainer.push_in_progress.is_done():
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    output = Path(args.output_dir)
    for file in (file for pattern in UPLOADED_FILES for file in checkpoint.glob(pattern)):
        target = output / file.relative_to(checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    trainer.create_model_card()
    message = f"Training in progress, step {trainer.state.global_step}"
    api = HfApi(token=args.hub_token)  # one, for it uploads one after the other
    jobs = [upload(trainer, api, output, message, blocking=False)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(upload(trainer, api, checkpoint, f"{message}, checkpoint", False, name, patterns=None))
    if trainer.push_in_progress is None or trainer.push_in_progress.is_done():
        trainer.push_in_progress = PushInProgress(jobs)
    else:
        trainer.push_in_progress.jobs.extend(jobs)

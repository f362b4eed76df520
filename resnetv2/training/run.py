"""A training run from its configuration to its result: what is loaded, built, checked and trained.

``TrainConfig`` says what is trained and how, its defaults the recipe of He et al. 2016 (appendix
"Implementation details") in proportion to the run's length.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from ..core.sync import convert_sync_batchnorm
from ..data.batches import ImageData
from ..data.datasets import as_image_data, load_data
from ..data.streaming import FolderData
from ..errors import InputError
from .checkpoint import Checkpoints
from .config import TrainConfig, make_config
from .environment import cpu_threads, reproducible, select_device
from .evaluate import build_model, check_backend, memory_format_of
from .log import check_folder, holds_a_run, threads_of
from .loop import DivergenceError, Loop
from .metrics import Callback
from .parallel import World, alike, local_device, processes
from .report import description
from .result import TrainingResult
from .state import RunState

Data = TensorDataset | tuple[TensorDataset, TensorDataset] | ImageData | FolderData


def train_resnet_v2(
    data: str | Data | None = None,
    *,
    recipe: str | Path | None = None,
    model: nn.Module | str | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbose: bool = True,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> TrainingResult:
    """Train a pre-activation ResNet, or any image classifier, and test it after every epoch.

    Two calls with the same arguments on the same machine give bitwise equal weights. The global
    random state is left as it was.

    Args:
        data: a name that ``resnetv2.data.load_data`` knows (default "digits"); or tensors as
            ``TensorDataset(images (N, C, H, W), labels (N,))``, one for training and one for
            testing, or a single one, of which the last fifth is held out; or an ``ImageData``.
        recipe: a recipe's name or file, see ``resnetv2.training.config.make_config``.
        model: a module, see ``train``, or the name of a standard net, such as "preact_resnet50".
        out, resume, overwrite, verbose, progress, callbacks: see ``train``.
        options: fields of ``TrainConfig``: epochs=30, depth=20, batch_size=128, lr=0.1, ...

    Raises:
        InputError: an option, path or data set that cannot work, in one line.
        DivergenceError, Interrupted: see ``train``.
    """
    if isinstance(data, str):
        options["data"] = data
    elif data is not None:
        options.setdefault("data", data.name if isinstance(data, ImageData) else "tensors")
    if isinstance(model, str):
        options["model"] = model
    return train(
        make_config(recipe, **options),
        data=None if isinstance(data, str) else data,
        model=None if isinstance(model, str) else model,
        out=out,
        resume=resume,
        overwrite=overwrite,
        verbose=verbose,
        progress=progress,
        callbacks=callbacks,
    )


def train(
    config: TrainConfig,
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    verbose: bool = True,
    progress: bool | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train as ``config`` says, in this process or in all those that torchrun started.

    Args:
        config: every option of the run.
        data: the data set, instead of the one that ``config.data`` names.
        model: train this module, logits (B, classes) from images (B, C, H, W), in place, instead of
            a new ``PreActResNet``. With several processes its batch norms become synchronised ones
            unless ``config.sync_bn`` is false.
        out: the run's folder: config.yaml, metrics.jsonl, curves.png and checkpoints/. None writes
            nothing.
        resume: "auto" goes on from the newest usable checkpoint of ``out``, or begins where there
            is none; or a checkpoint, or the folder of a run. The result is, to the bit, that of a
            run that was never stopped.
        overwrite: let ``out`` hold a run, whose files are replaced.
        verbose: print what is trained and a line an epoch.
        progress: show a progress bar; None means only on a terminal.
        callbacks: each is called, by the main process, with a ``StepMetrics`` after every step and
            an ``EpochMetrics`` after every epoch; on a GPU with some steps at a time, since a loss
            waits for the device. To Weights & Biases, with ``board = wandb.init()``:

                def report(metrics):
                    kind = type(metrics).__name__.removesuffix("Metrics").lower()
                    board.log({f"{kind}/{name}": x for name, x in vars(metrics).items()})

                train_resnet_v2("digits", callbacks=[report])

    Raises:
        InputError: an option, path or data set that cannot work, in one line.
        DivergenceError: the loss became infinite or NaN. It names the step and the last checkpoint.
        Interrupted: SIGINT or SIGTERM came, and the run is saved (where ``out`` is given).
    """
    folder = None if out is None else Path(out)
    with alike():
        place = select_device(config.device)
        if model is None:
            check_backend(config.backend, place)
        if resume is not None and folder is None and str(resume) == "auto":
            raise InputError('resume "auto" looks for checkpoints in the run\'s folder: give out')
    place = local_device(place)
    # From the beginning: data are scaled, and a net initialised, with as many as the first time.
    threads = config.threads or (None if resume is None else threads_of(folder))
    with (
        processes(place) as world,
        cpu_threads(threads),
        reproducible(place, config.seed),
    ):
        speak = verbose and world.is_main
        world.on_main(lambda: _check_folder(folder, resume, overwrite))
        images = _load(config, data, world, progress)

        def build() -> RunState:
            net = _model_for(config, images, place) if model is None else model
            if world.size > 1 and config.sync_bn:
                net = convert_sync_batchnorm(net)
            net.to(place)
            net.to(memory_format=memory_format_of(config))  # type: ignore[call-overload]  # torch's stub
            run = RunState(config, images, net, place, world, own_model=model is not None)
            run.check()
            return run

        run = world.together(build)
        checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", config.keep)
        say = tqdm.write if speak else (lambda line: None)
        if resume is not None:
            run.load(resume, checkpoints or Checkpoints("."), say)
            if run.resumed_at is None:
                say(f"no checkpoint in {folder} yet: the run begins at its first step")
        if speak:
            print(description(run), flush=True)
        if run.done == run.total:
            say(f"the run is complete: all {run.total:,} steps are done")
            return run.result
        with _nothing_left_behind(None if run.done or not world.is_main else folder, run):
            Loop(
                run,
                folder,
                checkpoints,
                overwrite=overwrite,
                progress=progress,
                speak=speak,
                callbacks=callbacks,
            ).run()
    return run.result


@contextlib.contextmanager
def _nothing_left_behind(folder: Path | None, run: RunState) -> Iterator[None]:
    """Remove the files of a run that ends before its first step, or diverges before its first
    epoch and checkpoint, where there were none before."""
    if folder is None or holds_a_run(folder):
        yield
        return
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException as error:
        # A loss that is lost so early leaves nothing to look at or go on with.
        nothing = run.last_checkpoint is None and not run.result.history
        lost = nothing and isinstance(error, DivergenceError)
        if not run.done or lost:
            for name in ("config.yaml", "metrics.jsonl"):
                (folder / name).unlink(missing_ok=True)
            if folder in missing:
                shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            with contextlib.suppress(OSError):
                for place in missing:
                    place.rmdir()
        raise


def _model_for(config: TrainConfig, data: ImageData | FolderData, place: torch.device) -> nn.Module:
    if config.memory == "auto" and config.budget is None and place.type != "cuda":
        raise InputError('memory "auto" needs a budget, such as 8GiB, without a GPU')
    return build_model(config, len(data.classes), data.channels)


def run_of(checkpoint: str | Path) -> Path | None:
    """The folder of the run that a checkpoint, a run's folder or its checkpoints/ belongs to."""
    path = Path(os.path.realpath(checkpoint))
    if path.is_dir():
        return path.parent if path.name == "checkpoints" else path
    return path.parent.parent if path.parent.name == "checkpoints" else None


def _check_folder(folder: Path | None, resume: str | Path | None, overwrite: bool) -> None:
    """Refuse to mix a new run with the files of another."""
    if resume is not None and overwrite:
        raise InputError("resume goes on with a run, overwrite replaces one: give one of them")
    found = None if folder is None else holds_a_run(folder)
    if folder is not None:
        check_folder(folder)
    if found is None or overwrite or str(resume) == "auto":
        return
    if resume is not None and run_of(resume) != Path(os.path.realpath(folder or "")):
        raise InputError(
            f"{folder} holds another run ({found}) than {resume}: take another folder by --out"
        )
    if resume is None:
        raise InputError(
            f"{folder} holds a run ({found}): go on with it by --resume auto, replace it by "
            "--overwrite, or take another folder by --out"
        )


def _load(
    config: TrainConfig, data: Data | None, world: World, progress: bool | None
) -> ImageData | FolderData:
    if isinstance(data, FolderData):
        return data
    if data is not None:
        return as_image_data(data, config.data)
    loaded: list[ImageData | FolderData] = []

    def load(cache: str) -> str:
        loaded.append(
            load_data(
                config.data,
                root=config.root,
                image_size=config.image_size,
                cache=cache,
                progress=progress if world.is_main else False,
                seed=config.seed,
            )
        )
        return loaded[0].cache

    # One after the others: the first may have to download it, and decides where images are kept.
    cache = world.on_main(lambda: load(config.cache))
    if not loaded:
        load(cache)
    return loaded[0]

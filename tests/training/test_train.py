"""The training loop: reproducible bits, what is written, what is refused, and what `eval` gives."""

import json
import math
import random
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

from resnetv2.data.datasets import create_synthetic_dataset
from resnetv2.errors import InputError
from resnetv2.training.checkpoint import Checkpoints, read
from resnetv2.training.config import TrainConfig
from resnetv2.training.evaluate import evaluate_run
from resnetv2.training.loop import DivergenceError, Interrupted
from resnetv2.training.metrics import StepMetrics
from resnetv2.training.result import TrainingResult
from resnetv2.training.run import train as train_run
from resnetv2.training.run import train_resnet_v2
from resnetv2.training.schedule import learning_rate
from resnetv2.training.state import RunState

SMALL = create_synthetic_dataset(96, 4, image_size=8)  # 76 for training: 4 batches of 16 and 12
DIGITS = {"data": "digits", "limit_batches": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def train(data: Any = SMALL, **options: Any) -> TrainingResult:
    """A run of seconds on the plain PyTorch path, whatever the machine."""
    defaults = {"depth": 8, "backend": "aten", "device": "cpu", "batch_size": 16}
    if not {"epochs", "steps", "recipe"} & options.keys():
        defaults["epochs"] = 2
    return train_resnet_v2(data, **{**defaults, "verbose": False, **options})


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same_bits(a: TrainingResult, b: TrainingResult) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


def records(folder: Path, event: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Have a run get a signal in its `step`-th step."""
    one_step = RunState.rate

    def rate(run: RunState, at: int) -> float:
        if at == step - 1:
            signal.raise_signal(number)
        return one_step(run, at)

    monkeypatch.setattr(RunState, "rate", rate)


def test_digits_reach_97_percent() -> None:
    result = train("digits", depth=14, epochs=10, batch_size=64)
    assert result.test_accuracy >= 0.97


def test_two_runs_from_one_seed_are_bitwise_equal() -> None:
    first, again, other = train(seed=1), train(seed=1), train(seed=2)
    assert same_bits(first, again)
    assert first.step_losses == again.step_losses
    assert not same_bits(first, other)


def test_fused_and_eager_take_the_same_steps() -> None:
    """On ATen in float32 to the bit, at the paper's rate, where the first steps are chaotic."""
    options = {"batch_size": 128, "epochs": 2, "limit_batches": 10, "depth": 14, "lr": 0.1}
    fused = train("digits", **options)
    eager = train("digits", **options, backend="auto", eager=True)
    assert len(fused.step_losses) == len(eager.step_losses) == 20
    assert fused.step_losses == eager.step_losses
    assert eager.config["backend"] == "eager"


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_blocks(block: str) -> None:
    depth = {"basic": 8, "bottleneck": 11}[block]
    result = train(block=block, depth=depth, epochs=1, limit_batches=2)
    assert result.config["model"] == f"PreActResNet-{depth} ({block})"
    assert len(result.step_losses) == 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_trains(dtype: str) -> None:
    """In the beginning the losses are float32's to the dtype's precision."""
    low, full = (train(dtype=name, epochs=1, lr=0.01) for name in (dtype, "fp32"))
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert low.step_losses[0] == pytest.approx(full.step_losses[0], rel=0.02)
    assert low.step_losses != full.step_losses


def test_memory_format_is_asked_for() -> None:
    for channels_last in (True, False):
        result = train(epochs=1, limit_batches=1, channels_last=channels_last)
        convolution = next(m for m in result.model.modules() if isinstance(m, nn.Conv2d))
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_own_model_and_separate_test_set() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    before = model[1].weight.detach().clone()
    result = train((SMALL, SMALL), model=model, lr=0.01)
    assert result.model is model
    assert not torch.equal(before, model[1].weight)
    assert result.config["test_images"] == 96


def test_global_state_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002

    seed()
    expected = draw()
    seed()
    train(epochs=1, limit_batches=1, out=tmp_path)
    assert draw() == expected
    seed()
    train(epochs=1, limit_batches=1, out=tmp_path, resume="auto")
    assert draw() == expected
    assert torch.backends.cudnn.deterministic is False
    assert torch.backends.cudnn.benchmark is True


# --- how long, and on which batches


def test_steps_need_not_fill_an_epoch(tmp_path: Path) -> None:
    result = train(steps=10, out=tmp_path)
    assert [record["step"] for record in records(tmp_path, "epoch")] == [4, 8, 10]
    assert len(result.step_losses) == 10
    assert result.config["steps_an_epoch"] == 4
    # The last epoch's figures are of its two batches.
    assert result.history[-1].train_loss == pytest.approx(sum(result.step_losses[8:]) / 2)


def test_last_batch_is_kept_if_asked_for() -> None:
    kept, dropped = (train(epochs=1, schedule="constant", drop_last=drop) for drop in (False, True))
    assert (len(kept.step_losses), len(dropped.step_losses)) == (5, 4)
    assert kept.step_losses[:4] == dropped.step_losses
    # Of 76 images, not of five batches.
    parts = [16 * loss for loss in kept.step_losses[:4]] + [12 * kept.step_losses[4]]
    assert kept.history[0].train_loss == pytest.approx(sum(parts) / 76)


def test_moving_average_is_what_is_tested() -> None:
    images, labels = SMALL.tensors
    result = train((SMALL, SMALL), ema=0.5, batch_size=32)
    assert result.averaged is not None
    own, averaged = weights(result), result.averaged.state_dict()
    assert own.keys() == averaged.keys()
    assert not torch.equal(own["fc.weight"], averaged["fc.weight"])
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    result.averaged.eval()
    with torch.no_grad():
        right = (result.averaged((images - mean) / std).argmax(1) == labels).float().mean()
    assert result.test_accuracy == pytest.approx(float(right), abs=1.5 / len(labels))
    plain = train((SMALL, SMALL), batch_size=32)
    assert plain.averaged is None
    assert same_bits(plain, result), "the average must not change the training"
    assert plain.history[-1].test_loss != result.history[-1].test_loss


def test_label_smoothing_is_in_the_training_loss_alone() -> None:
    plain, smoothed = (train(epochs=1, limit_batches=1, label_smoothing=x) for x in (0.0, 0.2))
    # A first step from the same weights: (1 - 0.2) NLL + 0.2 mean over classes of -log p.
    assert smoothed.step_losses[0] != plain.step_losses[0]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    result = train((SMALL, SMALL), model=model, lr=1e-9, epochs=1, label_smoothing=0.2)
    assert result.step_losses[0] == pytest.approx(math.log(4))
    assert result.history[0].test_loss == pytest.approx(math.log(4), rel=1e-4)


# --- files


def test_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(out=out, log_steps=True)
    (header,) = records(out, "config")
    assert (header["depth"], header["seed"], header["parameters"]) == (
        8,
        0,
        sum(p.numel() for p in result.model.parameters()),
    )
    assert {"python", "torch", "numpy"} <= header["versions"].keys()
    steps = records(out, "step")
    assert [record["step"] for record in steps] == list(range(len(result.step_losses)))
    assert [record["loss"] for record in steps] == result.step_losses
    assert [record["lr"] for record in steps] == [learning_rate(i, 8) for i in range(8)]
    assert [record["test_accuracy"] for record in records(out, "epoch")] == [
        entry.test_accuracy for entry in result.history
    ]
    assert records(out, "end")[0]["step"] == 8
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert TrainConfig(**saved) == TrainConfig(
        data="tensors", depth=8, backend="aten", device="cpu", batch_size=16, epochs=2,
        log_steps=True, threads=1,
    )  # fmt: skip
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best.pt", "step-00000004.pt", "step-00000008.pt"]


def test_steps_are_not_logged_unless_asked_for(tmp_path: Path) -> None:
    train(out=tmp_path, epochs=1)
    assert not records(tmp_path, "step")


def test_checkpoints_every_so_many_steps_and_the_last_few(tmp_path: Path) -> None:
    train(out=tmp_path, epochs=4, checkpoint_every=3, keep=2, lr=1e-6)
    files = Checkpoints(tmp_path / "checkpoints").files()
    # Every third, and the last epoch's end.
    assert [read(path)["step"] for path in files] == [16, 15]


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(out=tmp_path, tensorboard=True, log_steps=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("step/loss")}
    assert losses == pytest.approx(dict(enumerate(result.step_losses)))
    tested = [event.value for event in events.Scalars("test/accuracy")]
    assert tested == pytest.approx([entry.test_accuracy for entry in result.history])


def test_a_folder_that_holds_a_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(out=out, seed=1)
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    with pytest.raises(InputError, match=r"run holds a run \(config.yaml, metrics.jsonl, 2 check"):
        train(out=out, seed=2)
    other = tmp_path / "other"
    train(out=other, epochs=1)
    with pytest.raises(InputError, match=r"holds another run .* than .*other: take another folder"):
        train(out=out, resume=other, seed=1)
    with pytest.raises(InputError, match="give one of them"):
        train(out=out, resume="auto", overwrite=True, seed=1)
    assert before == {path: path.read_bytes() for path in before}
    third = train(out=out, overwrite=True, seed=2, epochs=1)
    assert not same_bits(first, third)
    assert [record["step"] for record in records(out, "epoch")] == [4]
    assert [path.name for path in Checkpoints(out / "checkpoints").files()] == ["step-00000004.pt"]
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 2


# --- going on


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_stopped_run_goes_on_with_the_bits_of_one_that_was_not(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 3, "dtype": dtype, "log_steps": True, "ema": 0.9}
    whole = train(**options, out=tmp_path / "whole")
    out = tmp_path / "stopped"
    handler = signal.getsignal(signal.SIGINT)
    for step in (3, 4, 9):  # within an epoch, at its last step and in the last epoch
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"stopped after step {step} of 12") as stopped:
                train(**options, out=out, resume="auto")
        assert stopped.value.signal == signal.SIGINT
        assert f"resnetv2 train --out {out} --resume auto" in str(stopped.value)
        assert signal.getsignal(signal.SIGINT) is handler
    resumed = train(**options, out=out, resume="auto")
    assert same_bits(whole, resumed)
    assert whole.averaged is not None
    assert resumed.averaged is not None
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name
    for event in ("step", "epoch"):
        timing = {"seconds", "images_per_second", "memory"}
        mine, theirs = (
            [{k: v for k, v in record.items() if k not in timing} for record in records(at, event)]
            for at in (out, tmp_path / "whole")
        )
        assert mine == theirs
    assert [record["step"] for record in records(out, "resume")] == [3, 4, 9]


def test_best_checkpoint_stays_the_best_after_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.9, 0.1, 0.95])
    monkeypatch.setattr(
        "resnetv2.training.loop.evaluate_as", lambda *arguments: (1.0, next(accuracies))
    )
    best = tmp_path / "checkpoints" / "best.pt"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            train(out=tmp_path, epochs=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(Interrupted):
            train(out=tmp_path, epochs=3, resume="auto")
    assert read(best)["step"] == 4, "the second epoch was worse"
    train(out=tmp_path, epochs=3, resume="auto")
    assert read(best)["step"] == 12


def test_finished_run_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(out=tmp_path)
    again = train(out=tmp_path, resume="auto", verbose=True)
    assert "the run is complete: all 8 steps are done" in capsys.readouterr().out
    assert same_bits(first, again)
    assert again.history == first.history
    assert again.step_losses == []
    assert not records(tmp_path, "resume")


def test_resume_into_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            train(out=first)
    resumed = train(out=second, resume=first)
    assert same_bits(resumed, train())
    assert [record["step"] for record in records(second, "epoch")] == [8]
    # The new folder is a run of its own: it can be gone on with and tested.
    assert yaml.safe_load((second / "config.yaml").read_text())["depth"] == 8
    assert same_bits(train(out=second, resume="auto"), resumed)


def test_allowed_differences_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            train(out=tmp_path)
    train(out=tmp_path, resume="auto", keep=1, memory="invert", verbose=True)
    said = capsys.readouterr().out
    assert "keep was 3 and is 1\n" in said
    assert "memory was 'recompute' and is 'invert': the same function with other roundings" in said
    assert records(tmp_path, "resume")[0]["changes"]["memory"] == "invert"


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give out"):
        train(resume="auto")
    run = tmp_path / "run"
    train(epochs=1, limit_batches=1, out=run)
    options = {"epochs": 1, "limit_batches": 1, "resume": run}
    with pytest.raises(InputError, match=r"written with lr 0.1, seed 0, this run has lr 0.2, seed"):
        train(**options, lr=0.2, seed=1)
    with pytest.raises(InputError, match="written with classes 4, this run has 3"):
        train(create_synthetic_dataset(96, 3, image_size=8), **options)
    with pytest.raises(InputError, match="written with model 'PreActResNet-8"):
        train(**options, model=nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)))


# --- divergence and signals


def test_divergence_names_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError) as raised:
        train(lr=1e6, epochs=50, warmup_steps=0, out=tmp_path, checkpoint_every=1, log_steps=True)
    message = str(raised.value)
    assert "\n" not in message
    assert "try a learning rate below 1e+06" in message
    (end,) = records(tmp_path, "end")
    assert f"in step {end['diverged']:,} (epoch" in message
    files = Checkpoints(tmp_path / "checkpoints").files()
    assert f"the last good checkpoint is {files[0]}" in message
    for path in files:
        state = read(path)
        assert state["step"] <= end["diverged"]
        assert all(bool(value.isfinite().all()) for value in state["model"].values()), path
    assert all(record["loss"] is not None for record in records(tmp_path, "step")[:-1])


def test_divergence_before_any_checkpoint(tmp_path: Path) -> None:
    images = torch.full((32, 3, 8, 8), 1.0)
    images[:, :, ::2] = -1.0
    data = TensorDataset(images * torch.rand(32, 1, 1, 1), torch.arange(32) % 4)
    with pytest.raises(DivergenceError, match="no checkpoint before it"):
        train(data, lr=1e30, epochs=3, out=tmp_path / "runs" / "a", warmup_steps=0, batch_size=8)
    assert not list(tmp_path.iterdir()), "the next run of the name would get a number"


def test_train_works_outside_the_main_thread(tmp_path: Path) -> None:
    results: list[TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(train(out=tmp_path)))
    thread.start()
    thread.join()
    assert same_bits(results[0], train())


# --- eval


def test_eval_gives_what_the_run_recorded(tmp_path: Path) -> None:
    result = train(**DIGITS, out=tmp_path, epochs=3, ema=0.5, lr=0.5)
    found = evaluate_run(tmp_path)
    assert (found.accuracy, found.loss) == (result.test_accuracy, result.history[-1].test_loss)
    assert found.recorded == result.test_accuracy
    assert (found.step, found.epoch, found.averaged, found.images) == (9, 3, True, 360)
    best = evaluate_run(tmp_path, "best")
    assert best.accuracy == max(entry.test_accuracy for entry in result.history)
    assert evaluate_run(tmp_path, found.checkpoint) == found
    named = evaluate_run(tmp_path, device="cpu:0", backend="eager")
    assert named.accuracy == pytest.approx(found.accuracy, abs=1 / 360)


def test_eval_of_a_checkpoint_from_within_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Interrupted):
            train(**DIGITS, out=tmp_path)
    found = evaluate_run(tmp_path)
    assert (found.step, found.recorded) == (5, None)


def test_memory_auto_says_and_records_its_mode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(memory="auto", budget="1GB", epochs=2, verbose=True, out=tmp_path)
    (record,) = records(tmp_path, "memory")
    assert (record["mode"], record["step"]) == ("recompute", 4)
    assert result.config["memory_mode"] == "recompute"
    assert record["predicted"] == result.config["memory_predicted"]
    said = capsys.readouterr().out
    assert "memory auto (recompute, predicted peak " in said
    assert said.count("memory auto took recompute: predicted peak ") == 1


def test_memory_auto_measures_what_it_predicts(tmp_path: Path) -> None:
    """On a CPU what training took, without the libraries, in a process that has trained nothing."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell")
    command = [sys.executable, "-m", "resnetv2", "train", "--data", "synthetic", "--device", "cpu"]
    command += ["--epochs", "1", "--limit-batches", "2", "--batch-size", "128", "--no-progress"]
    command += ["--memory", "auto", "--budget", "1GB", "--backend", "aten", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    (record,) = records(tmp_path, "memory")
    # Resident pages: the heap's free ones are taken again, freed ones stay; 0.66 to 1.65 were seen.
    assert 0.4 < record["measured"] / record["predicted"] < 2.5


def test_callbacks_get_every_step_and_epoch() -> None:
    seen: list[Any] = []
    result = train(epochs=2, callbacks=[seen.append])
    steps = [entry for entry in seen if isinstance(entry, StepMetrics)]
    assert [entry.step for entry in steps] == [*range(8)]
    assert [entry.loss for entry in steps] == result.step_losses
    assert seen[4] == result.history[0]
    assert seen[9] == result.history[1]
    assert same_bits(result, train(epochs=2))


def test_callback_of_the_documentation() -> None:
    """With anything that logs a dictionary in the place of W&B's run."""
    code = (train_run.__doc__ or "").partition("wandb.init()``:\n")[2].partition("\n    Raises:")[0]
    logged: list[dict[str, Any]] = []
    board = SimpleNamespace(log=logged.append)
    names = {"board": board, "train_resnet_v2": lambda _, **given: train(**given)}
    exec(textwrap.dedent(code), names)
    assert [entry["step/step"] for entry in logged if "step/step" in entry] == [*range(8)]
    assert [entry["epoch/epoch"] for entry in logged if "epoch/epoch" in entry] == [1, 2]

"""The training loop: the paper's schedule, reproducible bits, checkpoints, what is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from resnetv2.train import (
    DivergenceError,
    InputError,
    TrainingResult,
    _Run,
    create_synthetic_dataset,
    learning_rate,
    train_resnet_v2,
)

SMALL = create_synthetic_dataset(96, 4, image_size=8)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are too small to share, and threads of parallel tests would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(data: Any = SMALL, **options: Any) -> TrainingResult:
    """A run of seconds on the plain PyTorch path, whatever the machine."""
    defaults = {"depth": 8, "backend": "aten", "device": "cpu", "batch_size": 16, "epochs": 2}
    return train_resnet_v2(data, **{**defaults, "verbose": False, **options})


def weights(result: TrainingResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same_bits(a: TrainingResult, b: TrainingResult) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.01),
        (399, 0.01),
        (400, 0.1),
        (31_999, 0.1),
        (32_000, 0.01),
        (47_999, 0.01),
        (48_000, 0.001),
        (63_999, 0.001),
    ],
)
def test_schedule_is_the_papers(step: int, rate: float) -> None:
    assert learning_rate(step, 64_000) == pytest.approx(rate)


def test_schedule_scales() -> None:
    rates = [learning_rate(step, 320, lr=1.0) for step in range(320)]
    assert [rates.count(value) for value in (1.0, 0.1, 0.01)] == [158, 82, 80]
    assert learning_rate(7, 100, lr=1.0, warmup_steps=8) == pytest.approx(0.1)
    assert learning_rate(0, 100, lr=1.0, warmup_steps=0) == 1.0


def test_resnet_learns_synthetic_images() -> None:
    result = train(create_synthetic_dataset(240, 4, image_size=8), epochs=4)
    assert result.test_accuracy >= 0.9
    assert result.history[-1].train_loss < 0.5 * result.history[0].train_loss
    assert len(result.step_losses) == 4 * 12


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


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(epochs=1, limit_batches=1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.backends.cudnn.deterministic is False


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(epochs=3, dtype=dtype, checkpoint=tmp_path / "whole.pt")

    # The schedule spans all epochs, so the run is broken off rather than asked for fewer.
    one_epoch = _Run.epoch

    def fails_in_second_epoch(run: _Run, epoch: int) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return one_epoch(run, epoch)

    checkpoint = tmp_path / "new" / "run.pt"
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "epoch", fails_in_second_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(epochs=3, dtype=dtype, checkpoint=checkpoint)
    resumed = train(epochs=3, dtype=dtype, resume=checkpoint, out=tmp_path / "out")
    assert same_bits(whole, resumed)
    assert [e.test_loss for e in resumed.history] == [e.test_loss for e in whole.history]
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [r["epoch"] for r in records if r["event"] == "epoch"] == [1, 2, 3]


def test_resume_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(InputError, match="no checkpoint at"):
        train(resume=path)
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a checkpoint"):
        train(resume=path)
    train(epochs=1, limit_batches=1, checkpoint=path)
    with pytest.raises(InputError, match="was written with model = 'PreActResNet-8"):
        train(epochs=1, limit_batches=1, depth=14, resume=path)


def test_files(tmp_path: Path) -> None:
    result = train(out=tmp_path / "run", log_steps=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    header, *records = [json.loads(line) for line in lines]
    assert header["event"] == "config"
    assert (header["depth"], header["seed"], header["parameters"]) == (
        8,
        0,
        sum(p.numel() for p in result.model.parameters()),
    )
    assert {"python", "torch", "numpy"} <= header["versions"].keys()
    steps = [record for record in records if record["event"] == "step"]
    assert [record["step"] for record in steps] == list(range(len(result.step_losses)))
    assert [record["loss"] for record in steps] == result.step_losses
    epochs = [record for record in records if record["event"] == "epoch"]
    assert [record["test_accuracy"] for record in epochs] == [
        entry.test_accuracy for entry in result.history
    ]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_is_said_and_written(tmp_path: Path) -> None:
    images = torch.full((32, 3, 8, 8), 1.0)
    images[:, :, ::2] = -1.0
    data = TensorDataset(images * torch.rand(32, 1, 1, 1), torch.arange(32) % 4)
    with pytest.raises(DivergenceError, match="try a learning rate below 1e\\+30"):
        train(data, lr=1e30, epochs=3, out=tmp_path, warmup_steps=0)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train_loss"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 21}, "depth"),
        ({"block": "dense"}, "block"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": 0.0}, "learning rate must be positive"),
        ({"dtype": "int8"}, "unknown dtype 'int8': choose from fp32, bf16, fp16"),
        ({"eager": True}, "eager contradicts backend='aten'"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
        ({"memory": "elephant"}, "memory"),
        ({"data": "mnist"}, "unknown data set"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        train(**options)
    assert "\n" not in str(raised.value)

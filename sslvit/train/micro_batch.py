"""`train.micro_batch_size: auto`: as many images at once as the memory of a GPU holds, by the forecast of a step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from sslvit.files import brief
from sslvit.run_plan import RunPlan
from sslvit.settings import RunSettings
from sslvit.train.fake_step import FakeStep
from sslvit.train.forecast import Forecast, forecast
from sslvit.train.hardware import gpu_memory, trains_on_gpu

# What a forecast does not count. The CUDA context with its loaded kernels takes about half a GiB, the workspaces of
# cuBLAS and cuDNN some 100 MiB, NCCL's buffers up to half a GiB, probes and pictures during training the rest.
RESERVED = 1.5 * 2**30
# The caching allocator rounds sizes up and leaves holes between the blocks of one size and those of the next; kernels
# have room of their own, too.
FRAGMENTED = 0.1  # of the memory


@dataclass(frozen=True)
class MicroBatch:
    """Images per forward pass that fit a GPU.

    Args:
        size: Number of images; None where not even the fewest fit.
        found: The forecast with that number, or with the fewest.
        memory: Bytes of the GPU.
        settings: Settings of the run.
    """

    size: int | None
    found: Forecast
    memory: float
    settings: RunSettings

    def text(self) -> str:
        """What was chosen and why, or why nothing fits and what would help, in one line."""
        run, encoder, train = self.found.run, self.settings.encoder, self.settings.train
        count = f"{run.images_per_pass} image{'' if run.images_per_pass == 1 else 's'}"
        why = (
            f"{self.found.total(train.strategy) / 2**30:.1f} GiB are forecast in {self.found.precision}, and "
            f"{usable(self.memory) / 2**30:.1f} of the GPU's {self.memory / 2**30:.1f} GiB can be planned with"
        )
        if self.size is not None:
            return f"train.micro_batch_size auto: {count} at once, of {run.images_per_rank} on each rank ({why})"
        remedies = [] if encoder.activation_checkpointing else ["encoder.activation_checkpointing true"]
        remedies += ["train.strategy fsdp on several GPUs" if train.strategy == "ddp" else "more train.devices"]
        return (
            f"train.micro_batch_size: not even {count} at once would fit: {why}. Use {', '.join(remedies)}, or a "
            f"smaller view (encoder.image_size); a number here is tried as it is."
        )


def usable(memory: float) -> float:
    """Bytes of a GPU's memory that a forecast may fill."""
    return (1 - FRAGMENTED) * memory - RESERVED


def choose_micro_batch(step: FakeStep, memory: float) -> MicroBatch:
    """The most images per forward pass, of those that divide a rank's part of the batch, whose forecast fits a GPU.

    Args:
        step: A step of the run.
        memory: Bytes of the GPU.
    """
    settings, limit, most = step.settings, usable(memory), step.run.images_per_rank
    settings.task.check_micro_batch(most)

    def needed(size: int) -> float:
        return forecast(step, size).total(settings.train.strategy)

    sizes = [size for size in range(1, most + 1) if most % size == 0 and _is_allowed(settings, size)]
    fitting = len(sizes)
    if needed(most) > limit:  # asked first: one pass does not hold the gradients of another
        fitting = bisect_right(sizes[:-1], limit, key=needed)
    found = forecast(step, sizes[max(fitting, 1) - 1])
    return MicroBatch(found.run.images_per_pass if fitting else None, found, memory, settings)


def fit_micro_batch(
    run: RunPlan, settings: RunSettings, images: int, classes: int | None
) -> tuple[RunPlan, str | None]:
    """The plan with the micro-batch that `auto` chooses for the GPU here, and what to say about it.

    The setting stays `auto`, so that a resume on another machine chooses for that one.

    Args:
        run: Steps, batch sizes and ranks.
        settings: Settings of the run.
        images: Number of images in the data set.
        classes: Number of its classes, where it has labels.

    Raises:
        ValueError: Not even the fewest images fit.
    """
    if settings.train.micro_batch_size != "auto" or not trains_on_gpu(settings.train):
        return run, None
    try:
        chosen = choose_micro_batch(FakeStep(settings, run, images, classes), gpu_memory(settings.train.devices or 1))
    except Exception as error:  # a task of one's own may do what fake tensors cannot; its run is to go on
        reason = brief(str(error))
        return run, f"train.micro_batch_size auto: all {run.images_per_rank} images of each rank at once ({reason})"
    if chosen.size is None:
        raise ValueError(chosen.text())
    return replace(run, micro_batch_size=chosen.size), chosen.text()


def _is_allowed(settings: RunSettings, size: int) -> bool:
    try:
        settings.task.check_micro_batch(size)
    except ValueError:
        return False
    return True

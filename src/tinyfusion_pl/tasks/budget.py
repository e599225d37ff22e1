"""Length and batch size of a training, independent of the number of devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length of a training in images, and batch size of an optimizer step over all devices.

    Args:
        num_images: Images to train on, >= 1; an epoch of ImageNet has 1,281,167.
        global_batch_size: Images per optimizer step, over all devices and accumulated batches, >=
        1.
        max_device_batch_size: Maximum batch size of one device; gradients are accumulated above it.
            None: no limit.

    Raises:
        ValueError: for values out of range, or fewer images than one batch.
    """

    num_images: int
    global_batch_size: int
    max_device_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "global_batch_size", "max_device_batch_size"):
            if (value := getattr(self, name)) is not None and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"budget.{name} is {value!r}; give an integer >= 1.")
        if self.num_images < self.global_batch_size:
            raise ValueError(
                f"budget.num_images is {self.num_images}, less than one batch of "
                f"{self.global_batch_size}. Give budget.num_images={self.global_batch_size} or "
                "more."
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps for at least `num_images`."""
        return -(-self.num_images // self.global_batch_size)

    def divide(self, num_devices: int) -> tuple[int, int]:
        """Batch size of each device, and number of accumulated batches.

        Their product times `num_devices` is `global_batch_size`.

        Raises:
            ValueError: if there is no such division; names batch sizes that can be divided.
        """
        size, rest = divmod(self.global_batch_size, num_devices)
        if rest or not size:
            near = sorted({max(1, size) * num_devices, (size + 1) * num_devices})
            raise ValueError(
                f"budget.global_batch_size is {self.global_batch_size}, which is not divisible by "
                f"{num_devices} devices. Give {' or '.join(map(str, near))}, or another number of "
                "devices."
            )
        limit = self.max_device_batch_size or size
        accumulated = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= limit)
        return size // accumulated, accumulated

"""How long a stage trains and on which batch, stated so that it holds on any number of devices."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A training's length in images, and the batch of one optimizer step over all devices.

    Args:
        num_images: Images seen, >= 1; an epoch of ImageNet is 1,281,167.
        global_batch_size: Images of one optimizer step, all devices and accumulated batches together, >= 1.
        max_device_batch_size: Most images that one device takes at once; None: no limit. Batches are accumulated where it is exceeded.

    Raises:
        ValueError: for numbers out of range, or fewer images than one batch.
    """

    num_images: int
    global_batch_size: int
    max_device_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "global_batch_size", "max_device_batch_size"):
            if (value := getattr(self, name)) is not None and (
                not isinstance(value, int) or value < 1
            ):
                raise ValueError(f"budget.{name} is {value!r}; give a whole number, 1 or more.")
        if self.num_images < self.global_batch_size:
            raise ValueError(
                f"budget.num_images is {self.num_images}, less than one batch of {self.global_batch_size}."
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps that see at least `num_images`."""
        return -(-self.num_images // self.global_batch_size)

    def divide(self, num_devices: int) -> tuple[int, int]:
        """(batch size of each device, batches accumulated for a step): their product times `num_devices` is `global_batch_size`.

        Raises:
            ValueError: when that cannot be; names batch sizes that can.
        """
        size, rest = divmod(self.global_batch_size, num_devices)
        if rest or not size:
            near = sorted({max(1, size) * num_devices, (size + 1) * num_devices})
            raise ValueError(
                f"budget.global_batch_size is {self.global_batch_size}, which {num_devices} devices cannot share equally. "
                f"Give {' or '.join(map(str, near))}, or another number of devices."
            )
        limit = self.max_device_batch_size or size
        accumulated = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= limit)
        return size // accumulated, accumulated

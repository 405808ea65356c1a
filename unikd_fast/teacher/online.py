"""The teacher, run on every batch: frozen, in eval mode, outside the training engine."""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from unikd_fast.teacher import precision as formats
from unikd_fast.teacher.fold import fold_batch_norm
from unikd_fast.teacher.packing import has_onednn, pack_convolutions
from unikd_fast.values import Channels, Features

_logger = logging.getLogger("unikd_fast")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")

Affine = tuple[Channels, Channels]
"""Scale and shift of each channel."""


class OnlineTeacher(nn.Module):
    """Runs a frozen network without gradients and returns its feature levels and fp32 logits.

    It stays a plain module outside the DeepSpeed engine: inside, ``engine.train()`` would switch it to batch statistics
    and its weights would enter every checkpoint. BatchNorm is folded in fp32 before the weights are cast. Outputs come
    from no_grad, not from inference_mode: a loss can save them for its backward. A bf16 network that is compiled for a
    CPU gets its convolution weights a second time, in oneDNN's layout: its weights are final with the first batch.

    Args:
        network: maps images (N, 3, H, W) to Features; on its device, and changed in place.
        precision: "fp32", "bf16" or "fp16": weights and activations are held in it. "auto": fp16 on a GPU, bf16 on a
            CPU with bf16 units, fp32 otherwise; call `settle` before relying on an fp16 chosen in this way.
        fold: fold BatchNorm into the convolutions before it, see `fold_batch_norm`.
        compile_mode: None runs eagerly; otherwise a mode of torch.compile.
        channels_last: NHWC memory format of images, weights and levels.
        batch_size: images of one call of the network. Other batches are cut and padded to it, so that a compiled
            network never sees a second shape. None: any size when run eagerly, that of the first batch when compiled.
        renormalise: (scale, shift), each of the three channels: the network sees images * scale + shift, computed in
            fp32, and within the compiled graph where there is one. If None, it sees the images as they are.

    Attributes:
        precision: what the network runs in; "auto" is resolved.
        folded: number of BatchNorms folded.

    Raises:
        ValueError: an unknown precision or mode, a batch size below 1; when called, torch.compile cannot compile the
            network or has no compiler to do it with.

    Example:
        >>> model = build_model("torchvision/resnet50", num_classes=1000, weights="IMAGENET1K_V1").cuda()
        >>> teacher = OnlineTeacher(extract_features(model, image_size=224), precision="auto", compile_mode="default")
        >>> teacher.settle(teacher.is_finite([images]))
        >>> features = teacher(images)
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        precision: str = "auto",
        fold: bool = True,
        compile_mode: str | None = None,
        channels_last: bool = True,
        batch_size: int | None = None,
        renormalise: Affine | None = None,
    ) -> None:
        super().__init__()
        if compile_mode is not None and compile_mode not in COMPILE_MODES:
            raise ValueError(
                f"OnlineTeacher: compile_mode must be None or one of {', '.join(COMPILE_MODES)}, got {compile_mode!r}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"OnlineTeacher: batch_size must be 1 or more, got {batch_size}")
        first = next(network.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        self.precision = formats.resolve_precision(precision, device)
        self.network = network.eval().requires_grad_(False)
        self.folded = fold_batch_norm(network) if fold else 0
        self.compile_mode, self.channels_last, self.batch_size = compile_mode, channels_last, batch_size
        self._affine: tuple[Tensor, Tensor] | None = None
        if renormalise is not None:
            scale, shift = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in renormalise)
            self._affine = scale, shift
        self._fp32: list[Tensor] | None = None
        if precision == "auto" and self.precision == "fp16":
            self._fp32 = [tensor.detach().to("cpu", copy=True) for tensor in self._tensors()]
        self._hold(self.precision)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of the levels."""
        return formats.PRECISIONS[self.precision]

    def renormalised(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) as the network wants them."""
        return images if self._affine is None else _affine(images, *self._affine)

    def train(self, mode: bool = True) -> Self:
        """Keeps eval mode whatever is asked: a teacher with batch statistics is another teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features in the teacher's dtype, but for the logits (N, K) in fp32, of images (N, 3, H, W)."""
        if self.network.training:  # switched behind our back
            self.network.eval()
        with torch.autocast(images.device.type, enabled=False):  # its precision is its own, not the student's
            features = self._in_fixed_batches(images)
        return features._replace(logits=features.logits.float())

    def is_finite(self, batches: Iterable[Tensor]) -> bool:
        """Whether all features and logits of these images (N, 3, H, W) are finite; waits for the device.

        Example:
            >>> teacher.is_finite([images])
            True
        """
        return all(bool(tensor.isfinite().all()) for features in map(self, batches) for tensor in _tensors(features))

    def settle(self, finite: bool) -> None:
        """End the choice of "auto": where fp16 was not finite, the weights are cast to bf16, anew from fp32.

        Once per teacher and before training; for other precisions nothing happens. Where several processes share a
        teacher, all must pass the same answer.

        Args:
            finite: what `is_finite` said about real images.

        Example:
            >>> teacher.settle(teacher.is_finite([images]))
        """
        kept, self._fp32 = self._fp32, None
        if kept is None or finite:
            return
        _logger.warning(
            "OnlineTeacher: outputs in fp16 are not finite on real images; the teacher runs in bf16 instead"
        )
        for tensor, original in zip(self._tensors(), kept, strict=True):
            tensor.data = original.to(tensor.device)
        self._hold("bf16")

    def _tensors(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    def _hold(self, precision: str) -> None:
        """Cast and lay out; what was compiled is compiled anew with the next batch."""
        self.precision = precision
        formats.cast(self.network, self.dtype)
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._run, self._is_compiled = _function(self.network, self._affine, self.dtype), False
        self._input_dtype = self.dtype if self._affine is None else torch.float32

    def _in_fixed_batches(self, images: Tensor) -> Features:
        if self.compile_mode is not None and self.batch_size is None:
            self.batch_size = max(1, len(images))
        size = self.batch_size
        if size is None or (self.compile_mode is None and len(images) == size):
            layout = torch.channels_last if self.channels_last else torch.preserve_format
            return self._run(images.to(self._input_dtype, memory_format=layout))
        parts = [self._one_batch(images[start : start + size], size) for start in range(0, max(1, len(images)), size)]
        return parts[0] if len(parts) == 1 else _map(lambda *tensors: torch.cat(tensors), *parts)

    def _one_batch(self, images: Tensor, size: int) -> Features:
        # A buffer of its own: a slice or a layout given by the loader may have other strides, and would recompile.
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        count, shape = len(images), (size, *images.shape[1:])
        batch = torch.empty(shape, dtype=self._input_dtype, device=images.device, memory_format=layout)
        batch[:count].copy_(images)
        batch[count:].zero_()
        outputs = self._compiled(batch) if self.compile_mode else self._run(batch)
        return _map(lambda output: output[:count], outputs)

    def _compiled(self, batch: Tensor) -> Features:
        graphs = batch.is_cuda and self.compile_mode in _CUDA_GRAPH_MODES
        if not self._is_compiled:
            packs = self.channels_last and self.dtype == torch.bfloat16 and batch.device.type == "cpu" and has_onednn()
            run = self._run
            if packs:
                packed = pack_convolutions(self.network, batch.to(self.dtype))
                run = _function(packed, self._affine, self.dtype)
            self._run = torch.compile(run, fullgraph=True, dynamic=False, mode=self.compile_mode)
            self._is_compiled = True
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            outputs = self._run(batch)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(
                f"OnlineTeacher: torch.compile(mode={self.compile_mode!r}) cannot compile the teacher ({reason}); run "
                "it eagerly with --set teacher.compile=null, or install what is missing (on a CPU a C++ compiler)"
            ) from error
        # The next replay of a CUDA graph writes into the same memory.
        return _map(torch.clone, outputs) if graphs else outputs


def _affine(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, images.float(), scale)


def _function(
    network: nn.Module, affine: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Callable[[Tensor], Features]:
    """The network as a function, for torch.compile."""

    def run(images: Tensor) -> Features:
        seen = images if affine is None else _affine(images, *affine).to(dtype)
        features: Features = network(seen)
        return features

    # torch.compile counts recompilations per code object, of which all teachers of a comparison would share one.
    run.__code__ = run.__code__.replace()
    return run


def _map(function: Callable[..., Tensor], *parts: Features) -> Features:
    """Applies a function to the tensors in each place of these."""
    levels, logits, before_activation, embeddings = zip(*parts, strict=True)
    return Features(
        tuple(map(function, *levels)),
        function(*logits),
        tuple(map(function, *before_activation)),
        None if embeddings[0] is None else function(*embeddings),
    )


def _tensors(features: Features) -> Iterator[Tensor]:
    yield from (*features.levels, features.logits, *features.before_activation)
    if features.embedding is not None:
        yield features.embedding

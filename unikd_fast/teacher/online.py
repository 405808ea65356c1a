"""The teacher, run on every batch: frozen, in eval mode, outside the training engine, in its own precision."""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.teacher import online as formats
from unikd_fast.teacher.ensemble import Affine
from unikd_fast.teacher.fold import fold_batch_norm
from unikd_fast.values import Features

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What torch.cpu.get_capabilities() calls the units that multiply bf16: on x86 with AVX-512 or AMX, and on ARM.
_CPU_BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """Return the precision that "auto" stands for: fp16 on a GPU, bf16 on a CPU with bf16 units, otherwise fp32.

    fp16 comes before bf16 because it rounds eight times finer; for networks that exceed its range see
    `OnlineTeacher.settle`.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16"; the last three are returned unchanged.
        device: device of the teacher.

    Raises:
        ValueError: the precision is unknown.

    Example:
        >>> resolve_precision("auto", "cuda")
        'fp16'
    """
    if precision in PRECISIONS:
        return precision
    if precision != "auto":
        raise ValueError(f"OnlineTeacher: precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Return whether this processor multiplies bf16 in hardware; without such units bf16 is slower than fp32.

    Example:
        >>> cpu_has_bf16()
        True
    """
    # Missing in some supported releases of PyTorch; then nothing is known, and fp32 is always right.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit, False) for unit in _CPU_BF16_UNITS)


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of `network` to `dtype` in place; remaining BatchNorms stay in fp32.

    A running variance may exceed fp16's range, and BatchNorm takes half-precision inputs with fp32 statistics.

    Example:
        >>> cast(network, torch.bfloat16)
    """
    for module in network.modules():
        held = torch.float32 if isinstance(module, _BatchNorm) else dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(held)


def unit_rounding(precision: str, device: torch.device | str) -> float:
    """Return the relative rounding error of a stored value in a precision.

    Half the spacing of bf16 (2^-8) and of fp16 (2^-11). In fp32 the last bit matters less than the order in which
    thousands of products are summed, amplified by depth: 2^-15, above what random ResNet-50s showed (5e-5 of the
    logits). On a GPU 2^-11, because convolutions use TF32.

    Example:
        >>> unit_rounding("bf16", "cpu")
        0.00390625
    """
    if precision == "fp32" and torch.device(device).type == "cuda":
        return 2.0**-11
    return {"fp32": 2.0**-15, "bf16": 2.0**-8, "fp16": 2.0**-11}[precision]


_OPERATORS = ("_convolution_pointwise", "_is_mkldnn_bf16_supported", "_is_mkldnn_acl_supported")
_REORDER = "mkldnn_reorder_conv2d_weight"


class PackedConv2d(nn.Conv2d):
    """A convolution with a second copy of its weight, in oneDNN's blocked layout."""

    packed: nn.Parameter

    def forward(self, input: Tensor) -> Tensor:
        window = (self.padding, self.stride, self.dilation, self.groups)
        # Inductor fuses an activation and a sum into this operator, but nothing into aten's convolution.
        operator = torch.ops.mkldnn._convolution_pointwise
        result: Tensor = operator(input, self.packed, self.bias, *window, "none", [], "")
        return result


def has_onednn() -> bool:
    """Return whether oneDNN itself runs bf16 convolutions here; on ARM it uses another library, which fuses nothing.

    Example:
        >>> has_onednn()
        True
    """
    mkldnn, operators = torch.backends.mkldnn, torch.ops.mkldnn
    if not (mkldnn.is_available() and mkldnn.enabled):
        return False
    # Private to PyTorch and not guaranteed: without one of them weights stay plain.
    if not all(hasattr(operators, name) for name in _OPERATORS) or not hasattr(torch.ops.aten, _REORDER):
        return False
    return bool(operators._is_mkldnn_bf16_supported() and not operators._is_mkldnn_acl_supported())


def pack_convolutions(network: nn.Module, batch: Tensor) -> nn.Module:
    """Return a copy that shares its tensors, and whose convolutions also have packed weights.

    Plain weights are reordered in every call: 8 % of a ResNet-50 at batch size 8 on two cores, and what Inductor fuses
    into the packed operator is worth as much again.

    Args:
        network: network in bf16, channels_last and eval mode; left unchanged.
        batch: images (N, 3, H, W); other batches must have its shape.

    Example:
        >>> packed = pack_convolutions(network, images)
    """
    network = copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    shapes: dict[nn.Conv2d, torch.Size] = {}  # inputs of each convolution: the blocks depend on them

    def note(conv: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].dim() == 4:
            shapes[conv] = inputs[0].shape

    convs = [m for m in network.modules() if type(m) is nn.Conv2d and m.padding_mode == "zeros"]
    hooks = [conv.register_forward_pre_hook(note) for conv in convs if not isinstance(conv.padding, str)]
    network(batch)
    for hook in hooks:
        hook.remove()
    for conv, shape in shapes.items():
        window = (conv.padding, conv.stride, conv.dilation, conv.groups)
        blocks = torch.ops.aten.mkldnn_reorder_conv2d_weight(conv.weight.to_mkldnn(), *window, shape)
        conv.__class__ = PackedConv2d
        conv.packed = nn.Parameter(blocks, requires_grad=False)
    return network


_logger = logging.getLogger("unikd_fast")

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


class OnlineTeacher(nn.Module):
    """Runs a frozen network without gradients and returns its feature levels and its logits in fp32.

    It stays a plain module outside the DeepSpeed engine: inside, ``engine.train()`` would switch it to batch statistics
    and its weights would be part of every checkpoint. BatchNorm is folded in fp32 before the weights are cast. Outputs
    are made under no_grad rather than inference_mode, so a loss can save them for its backward pass. A bf16 network
    compiled for a CPU gets a second copy of its convolution weights in oneDNN's layout, so weights must not change
    after the first batch.

    Args:
        network: module that maps images (N, 3, H, W) to Features; already on its device, and changed in place.
        precision: precision of weights and activations: "fp32", "bf16" or "fp16". "auto": fp16 on a GPU, bf16 on a
                CPU with bf16 units, otherwise fp32; call `settle` before relying on fp16 chosen this way.
        fold: whether to fold BatchNorm into the preceding convolutions, see `fold_batch_norm`.
        compile_mode: mode of torch.compile. If None, the network runs eagerly.
        channels_last: whether images, weights and levels use the NHWC memory format.
        batch_size: images per call of the network. Other batches are split and padded to it, so that a compiled network
            sees one shape. If None: any size when run eagerly, the size of the first batch when compiled.
        renormalise: (scale, shift), per channel: the network's input is images * scale + shift, computed in fp32,
            inside the compiled graph if there is one. If None, images are passed on unchanged.

    Attributes:
        precision: precision the network runs in, with "auto" resolved.
        folded: number of BatchNorms folded.
        record: what the run folder says about the teacher; filled in by whoever makes it.

    Raises:
        ValueError: the precision or mode is unknown or the batch size below 1; when called, torch.compile cannot
            compile the network or finds no compiler.

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
        self.record: dict[str, Any] = {}
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
        """Dtype of the weights and the levels."""
        return formats.PRECISIONS[self.precision]

    def renormalised(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) as the network expects them."""
        return images if self._affine is None else _affine(images, *self._affine)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever is asked: batch statistics would make it a different teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Return Features of images (N, 3, H, W) in the teacher's dtype, with logits (N, K) in fp32."""
        if self.network.training:  # a caller switched the network itself
            self.network.eval()
        with torch.autocast(images.device.type, enabled=False):  # the student's autocast must not apply
            features = self._in_fixed_batches(images)
        return features._replace(logits=features.logits.float())

    def is_finite(self, batches: Iterable[Tensor]) -> bool:
        """Return whether all features and logits of these images (N, 3, H, W) are finite; synchronises with the device.

        Example:
            >>> teacher.is_finite([images])
            True
        """
        return all(bool(tensor.isfinite().all()) for features in map(self, batches) for tensor in _tensors(features))

    def settle(self, finite: bool) -> None:
        """Settle "auto": if fp16 outputs were not finite, cast the weights to bf16, starting again from fp32.

        Call it once per teacher, before training; with other precisions it does nothing. If several processes share a
        teacher, all must pass the same value.

        Args:
            finite: result of `is_finite` on real images.

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._run, self._is_compiled = _function(self.network, self._affine, self.dtype), False  # a copy runs its own

    def _tensors(self) -> list[Tensor]:
        return [*self.network.parameters(), *self.network.buffers()]

    def _hold(self, precision: str) -> None:
        """Cast and set the memory format; a compiled network is compiled again with the next batch."""
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
        # A new buffer: the loader's slices and layouts may have other strides, which would trigger a recompilation.
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
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # loaded by torch.compile

        try:
            outputs = self._run(batch)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise ValueError(
                f"OnlineTeacher: torch.compile(mode={self.compile_mode!r}) cannot compile the teacher ({reason}); run "
                "it eagerly with --set teacher.compile=null, or install what is missing (on a CPU a C++ compiler)"
            ) from error
        # The next replay of a CUDA graph overwrites this memory.
        return _map(torch.clone, outputs) if graphs else outputs


def _affine(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, images.float(), scale)


def _function(
    network: nn.Module, affine: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Callable[[Tensor], Features]:
    """Return the network as a function for torch.compile."""

    def run(images: Tensor) -> Features:
        seen = images if affine is None else _affine(images, *affine).to(dtype)
        features: Features = network(seen)
        return features

    # torch.compile counts recompilations per code object, which all teachers of a comparison would share.
    run.__code__ = run.__code__.replace()
    return run


def _map(function: Callable[..., Tensor], *parts: Features) -> Features:
    """Apply a function to the tensors at the same place in each of these."""
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

"""The formats of an exported student: how each is written, read back as its users will read it, and compared."""

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unikd_fast.engine.folder import export_student, import_student
from unikd_fast.errors import ConfigError, RunError
from unikd_fast.export.preprocess import INNER, preprocess, with_preprocessing
from unikd_fast.export.student import PlainStudent
from unikd_fast.models import Preprocessing
from unikd_fast.models.hooks import Logits

Run = Callable[[Tensor], Tensor]

BATCHES = (2, 3, 1)  # exporters see two images; one is the batch size they most easily take for a constant

# Another runtime folds BatchNorm and orders sums differently. How much that may change a logit depends on the network,
# so the yardstick is the plain network's own error in fp32, measured against float64: over fifteen networks of all
# kinds ONNX Runtime differed from it by 0.6 to 1.9 times that (ResNet-152 with statistics of two batches: 1.5e-3 of the
# logits, SqueezeNet: 7e-7). The rounding of three images is one sample, hence 8, and fp32's last bits on top: 2^-19 of
# the row's size. A wrong operation stands out: approximate GELU changes logits by 1e-3.
TIMES_ROUNDING = 8.0
LAST_BITS = 2.0**-19
# For a network that does not run in float64; see `unikd_fast.teacher.unit_rounding` for the reason.
_ROUNDING_UNKNOWN = 2.0**-15


@dataclass(frozen=True)
class Agreement:
    """The largest difference over all batches, relative to the size of an image's logits, and the tolerance."""

    difference: float
    allowed: float


def random_images(size: int) -> Tensor:
    """Return the same normalised images every time, as many as the largest batch needs."""
    return torch.randn(max(BATCHES), 3, size, size, generator=torch.Generator().manual_seed(0))


@contextmanager
def _image_size_named(images: Tensor) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the student does not run on images of {images.shape[-1]} pixels ({_first_line(error)}); give --image-size"
        ) from error


@torch.no_grad()
def with_logits(network: nn.Module, images: Tensor) -> nn.Module:
    """Return the network, or one around it if its output is not the logits but has them.

    Raises:
        ConfigError: the network does not accept images of this size.
    """
    with _image_size_named(images):
        return network if isinstance(network(images[:2]), Tensor) else Logits(network)


@torch.no_grad()
def plain_logits(network: nn.Module, images: Tensor) -> dict[int, Tensor]:
    """Return a network's logits for the first images, by batch size.

    Raises:
        ConfigError: the network does not accept images of this size.
        RunError: the logits are not finite.
    """
    with _image_size_named(images):
        logits = {count: network(images[:count]) for count in BATCHES}
    if not all(bool(found.isfinite().all()) for found in logits.values()):
        raise RunError("the student's logits are not finite for random images; export an earlier checkpoint")
    return logits


@torch.no_grad()
def check(
    run: Callable[[Tensor], Tensor],
    network: nn.Module,
    images: Tensor,
    expected: dict[int, Tensor],
    *,
    exact: bool,
    slack: float = 0.0,
) -> Agreement:
    """Compare what was read back with the plain network, in fp32 and for several batch sizes.

    Args:
        run: function read back from the file: images to logits.
        expected: result of `plain_logits` for the same images.
        exact: whether no difference is allowed.
        slack: difference that is allowed beside that of rounding.

    Raises:
        RunError: the logits differ by more than reordered summation explains.
    """
    allowed = 0.0 if exact else slack + _allowed(network, images, expected)
    worst = 0.0
    for count, plain in expected.items():
        found = run(images[:count])
        if found.shape != plain.shape or found.dtype != plain.dtype:
            raise RunError(
                f"a batch of {count} gives {found.dtype} {tuple(found.shape)} instead of {plain.dtype} "
                f"{tuple(plain.shape)}"
            )
        difference = relative_difference(found, plain)
        if not difference <= allowed:
            raise RunError(
                f"a batch of {count} gives logits that differ by {difference:.1e} of their size from those of the "
                f"plain network, {allowed:.1e} allowed"
            )
        worst = max(worst, difference)
    return Agreement(worst, allowed)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return ‖found - expected‖ / ‖expected‖ over the logits of an image, for the worst image.

    Example:
        >>> relative_difference(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])) < 0.1
        True
    """
    found, expected = found.double(), expected.double()
    error, size = (found - expected).norm(dim=1), expected.norm(dim=1)
    return float(torch.where(error == 0, 0.0, error / size).max())


def _allowed(network: nn.Module, images: Tensor, expected: dict[int, Tensor]) -> float:
    try:
        exact = copy.deepcopy(network).double()(images.double())
    except RuntimeError:  # it converts something to fp32 on its way
        return _ROUNDING_UNKNOWN
    return TIMES_ROUNDING * relative_difference(expected[len(images)], exact) + LAST_BITS


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_preprocessing(run: Run, network: nn.Module, wanted: Preprocessing) -> Agreement:
    """Compare a file that preprocesses with the plain network behind the loader's preprocessing.

    Images that need no resizing must agree as every export must. Where the file resizes them, the logits may differ as
    much as they do when every level of the input is 1 of 255 higher or lower, which bounds what was measured.

    Raises:
        RunError: they differ by more.
    """
    short, worst = wanted.short_side(wanted.image_size), Agreement(0.0, 0.0)
    random = np.random.default_rng(0)
    for height, width in ((short, short), (2 * short, 3 * short), (short // 2 + 1, short)):
        raw = random.integers(0, 256, (max(BATCHES), height, width, 3), dtype=np.uint8)
        images = preprocess(raw, wanted)
        expected = plain_logits(network, images)
        slack = 0.0
        if (height, width) != (short, short):
            signs = torch.from_numpy(random.choice([-1.0, 1.0], images.shape)).float()
            with torch.no_grad():
                moved = network(images + signs / 255 / torch.tensor(wanted.std)[:, None, None])
            slack = relative_difference(moved, expected[len(images)])
        levels = torch.from_numpy(raw)
        found = check(
            lambda batch, levels=levels: run(levels[: len(batch)]),  # type: ignore[misc]
            network,
            images,
            expected,
            exact=False,
            slack=slack,
        )
        worst = max(worst, found, key=lambda one: one.difference)
    return worst


LOWEST_OPSET = 18  # of torch's exporter, which cannot write a mean over pixels for an older one
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ONNX_LIMIT = 2**31 - 2**24  # of one protobuf file; the graph itself takes part of it


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        title: name of the format in messages.
        write: function that writes the student for images like the given ones, in batches of any size.
        read: function that opens the file as its users will: images to logits, in fp32 on the CPU.
        exact: whether the outputs of the file are identical, because it holds the plain network.
    """

    title: str
    write: Callable[[PlainStudent, Path, Tensor, int | None], None]
    read: Callable[[PlainStudent, Path], Run]
    exact: bool = False


def format_of(path: Path, opset: int | None, *, preprocesses: bool = False) -> Format:
    """Return the format for a file's suffix.

    Raises:
        ConfigError: the suffix is unknown, an option is not for it, or packages are missing.

    Example:
        >>> format_of(Path("student.onnx"), None).title
        'ONNX'
    """
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        known = ", ".join(f"{ending} ({each.title})" for ending, each in FORMATS.items())
        raise ConfigError(f"--to {path}: the ending {path.suffix!r} is not a format; use one of {known}")
    if found is not FORMATS[".onnx"]:
        if opset is not None:
            raise ConfigError(f"--opset {opset} is for ONNX, and --to {path} is {found.title}; leave --opset out")
        if preprocesses:
            raise ConfigError(f"--preprocess is for ONNX, and --to {path} is {found.title}; leave --preprocess out")
        return found
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to {path} needs {', '.join(missing)}, not installed: pip install 'unikd-fast[export]'")
    if opset is not None and opset < LOWEST_OPSET:
        raise ConfigError(f"--opset {opset}: torch writes opset {LOWEST_OPSET} and later; the default is its own")
    return found


def _write_safetensors(student: PlainStudent, path: Path, images: Tensor, opset: int | None) -> None:
    export_student(student.network, path, student.card)


def _read_safetensors(student: PlainStudent, path: Path) -> Run:
    network = student.fresh()
    import_student(network, path)
    check_tensors(path, student.network)
    return network if student.logits is student.network else Logits(network)


def check_tensors(path: Path, network: nn.Module) -> None:
    """Raise RunError unless a safetensors file holds the network bit for bit."""
    written = load_file(path)
    for name, tensor in network.state_dict().items():
        if not torch.equal(_bits(written[name]), _bits(tensor)):
            raise RunError(f"{name} came back from the file with other numbers")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # also NaN equals itself


def _write_torchscript(student: PlainStudent, path: Path, images: Tensor, opset: int | None) -> None:
    # Traced, not scripted: many networks are not written in the scriptable subset of Python. What a trace may get
    # wrong, another batch size, is checked after writing.
    with torch.no_grad(), quiet():
        traced = torch.jit.trace(student.logits, images, check_trace=False)
        buffer = io.BytesIO()  # written to a file by torch, a full disk would end the process
        torch.jit.save(traced, buffer, student.in_words)
    path.write_bytes(buffer.getbuffer())


def open_torchscript(path: Path) -> Run:
    """Return the network of a TorchScript file: images to logits."""
    with quiet():
        loaded: nn.Module = torch.jit.load(path, map_location="cpu")
    return loaded.eval()


def refuse_large(network: nn.Module) -> None:
    """Raise RunError for a network that does not fit into an ONNX file."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    if needed > _ONNX_LIMIT:
        raise RunError(f"an ONNX file holds at most 2 GiB, and the student has {needed / 2**30:.1f}")


def _write_onnx(student: PlainStudent, path: Path, images: Tensor, opset: int | None) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    refuse_large(student.network)
    inside = None if student.card is None or not student.card.preprocesses else student.card.preprocessing
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            student.logits,
            (images,),
            input_names=["images" if inside is None else INNER],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        found = program.model.opset_imports[""]
        if opset is not None and found != opset:
            raise RunError(f"torch cannot write this student in opset {opset}; leave --opset out")
        # Leave out the source locations on this machine.
        ClearMetadataAndDocStringPass()(program.model)
        graph = program.model.graph
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
        program.model.metadata_props.update(student.in_words)
        if inside is None:
            program.save(path, external_data=False)
        else:
            path.write_bytes(with_preprocessing(program.model_proto, inside).SerializeToString())


def _read_onnx(student: PlainStudent, path: Path) -> Run:
    import onnx

    onnx.checker.check_model(path, full_check=True)
    return open_onnx(path)


def open_onnx(path: Path) -> Run:
    """Return the network of an ONNX file: images to logits, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        return torch.from_numpy(logits)

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Silence exporters' warnings, most of which do not concern this network; the check after writing counts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


FORMATS = {
    ".safetensors": Format("safetensors", _write_safetensors, _read_safetensors, exact=True),
    ".pt": Format("TorchScript", _write_torchscript, lambda _, path: open_torchscript(path)),
    ".onnx": Format("ONNX", _write_onnx, _read_onnx),
}

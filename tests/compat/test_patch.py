"""`patch`: every binding of the original is replaced and comes back, and nothing is replaced that does not agree."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from support.fake_packages import DKD, FLAT, KD, MDISTILLER, MMRAZOR, importable
from unikd_fast.compat import deit, mdistiller, mmrazor, patch, rep_distiller

PLACES = [
    "mdistiller.distillers.DKD:dkd_loss",
    "mdistiller.distillers.KD:kd_loss",
    "mdistiller.distillers.other:base_loss",
    "mdistiller.distillers:dkd_loss",
    "mdistiller.distillers:table['dkd']",
]


def test_every_binding_is_replaced_and_restored(tmp_path: Path) -> None:
    with importable(tmp_path, MDISTILLER):
        kd, other, package = (import_module(f"mdistiller.distillers{x}") for x in (".KD", ".other", ""))
        original, original_dkd = kd.kd_loss, package.dkd_loss
        done = patch("mdistiller", device="cpu")
        assert done.replaced == PLACES
        assert kd.kd_loss is other.base_loss is mdistiller.kd_loss
        assert package.dkd_loss is package.table["dkd"] is mdistiller.dkd_loss
        late = import_module("mdistiller.engine")
        assert late.kd_loss is mdistiller.kd_loss
        done.undo()
        assert kd.kd_loss is other.base_loss is late.kd_loss is original
        assert package.dkd_loss is package.table["dkd"] is original_dkd
        done.undo()
        assert kd.kd_loss is original


def test_the_package_calls_the_drop_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with importable(tmp_path, MDISTILLER):
        kd = import_module("mdistiller.distillers.KD")
        s, t = torch.randn(4, 5), torch.randn(4, 5)
        before = kd.KD().forward_train(s, t)
        with patch("mdistiller", device="cpu"):
            torch.testing.assert_close(kd.KD().forward_train(s, t), before)
            monkeypatch.setattr(sys.modules["unikd_fast.compat.mdistiller"], "softmax_kl", lambda *a, **k: "fast")
            assert kd.KD().forward_train(s, t) == "fast"
        torch.testing.assert_close(kd.KD().forward_train(s, t), before)


def test_the_report(tmp_path: Path) -> None:
    with importable(tmp_path, MDISTILLER), patch("mdistiller", device="cpu") as done:
        assert 0 < done.difference.relative_value < 1e-5 and 0 < done.difference.relative_gradient < 1e-4
        assert str(done).startswith(f"mdistiller 0.0.test: replaced {PLACES[0]}, ")
        assert f"{done.difference.relative_gradient:.1e} in gradient (tolerance 1e-04)" in str(done)


def test_an_exception_in_the_block_restores(tmp_path: Path) -> None:
    with importable(tmp_path, MDISTILLER):
        kd = import_module("mdistiller.distillers.KD")
        original = kd.kd_loss
        with pytest.raises(KeyboardInterrupt), patch("mdistiller", device="cpu"):
            raise KeyboardInterrupt
        assert kd.kd_loss is original


def test_classes_and_registries(tmp_path: Path) -> None:
    with importable(tmp_path, MMRAZOR):
        registry = import_module("mmrazor.registry")
        with patch("mmrazor", device="cpu") as done:
            assert registry.MODELS._module_dict["KLDivergence"] is mmrazor.KLDivergence
            losses = import_module("mmrazor.models.losses")
            assert losses.KLDivergence is mmrazor.KLDivergence
            assert losses.ChannelWiseDivergence is mmrazor.ChannelWiseDivergence
            assert "mmrazor.registry:MODELS['KLDivergence']" in done.replaced
        assert registry.MODELS._module_dict["KLDivergence"].__module__ == "mmrazor.models.losses.kl_divergence"


def test_codebases_of_loose_scripts(tmp_path: Path) -> None:
    with importable(tmp_path, FLAT):
        with patch("rep_distiller", device="cpu"):
            assert import_module("distiller_zoo").DistillKL is rep_distiller.DistillKL
        with patch("deit", device="cpu"):
            assert import_module("losses").DistillationLoss is deit.DistillationLoss
        assert import_module("losses").DistillationLoss is not deit.DistillationLoss


# What a fork may have changed: value and gradient, value alone, gradient alone.
@pytest.mark.parametrize(
    ("published", "changed"),
    [
        ("* temperature ** 2", ""),
        (".sum(1).mean()", ".mean()"),
        ("temperature ** 2", "temperature ** 2 + 1e-2"),
        ("temperature ** 2", "temperature ** 2 + 0 * logits_teacher.sum() + logits_student.sum() * 0.01 "
         "- logits_student.detach().sum() * 0.01"),
        ("p = torch.softmax(logits_teacher", "p = torch.softmax(logits_teacher.detach()"),
    ],
)  # fmt: skip
def test_a_differing_original_is_not_replaced(tmp_path: Path, published: str, changed: str) -> None:
    assert published in KD
    with importable(tmp_path, MDISTILLER | {"mdistiller/distillers/KD.py": KD.replace(published, changed)}):
        kd, dkd = (import_module(f"mdistiller.distillers.{x}") for x in ("KD", "DKD"))
        originals = kd.kd_loss, dkd.dkd_loss
        with pytest.raises(ValueError, match=r"kd_loss differs from .* \(tolerance 1e-04\) for τ = .*nothing was repl"):
            patch("mdistiller", device="cpu")
        assert (kd.kd_loss, dkd.dkd_loss) == originals


def test_a_failing_later_target_undoes_nothing_earlier(tmp_path: Path) -> None:
    files = MDISTILLER | {"mdistiller/distillers/DKD.py": DKD.replace("beta * nckd", "nckd")}
    with importable(tmp_path, files):
        kd = import_module("mdistiller.distillers.KD")
        original = kd.kd_loss
        with pytest.raises(ValueError, match="dkd_loss differs"):
            patch("mdistiller", device="cpu")
        assert kd.kd_loss is original


def test_fork_differs_from_mdistiller(tmp_path: Path) -> None:
    fork = KD.replace("temperature):", "temperature, logit_stand):")
    with (
        importable(tmp_path, MDISTILLER | {"mdistiller/distillers/KD.py": fork}),
        pytest.raises(ValueError, match=r"takes \(logits_student, logits_teacher, temperature, logit_stand\) and its"),
    ):
        patch("mdistiller", device="cpu")


def test_a_package_that_is_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match="needs the package 'mdistiller', which is not installed; put its"):
        patch("mdistiller")


def test_a_function_that_is_missing(tmp_path: Path) -> None:
    files = MDISTILLER | {"mdistiller/distillers/KD.py": "class KD: pass"}
    files["mdistiller/distillers/other.py"] = ""
    with (
        importable(tmp_path, files),
        pytest.raises(
            AttributeError, match=r"mdistiller 0.0.test has no kd_loss in mdistiller.distillers.KD, expected"
        ),
    ):
        patch("mdistiller")


def test_a_module_that_is_missing(tmp_path: Path) -> None:
    with (
        importable(tmp_path, {"mmrazor/__init__.py": ""}),
        pytest.raises(AttributeError, match=r"has no module mmrazor.models, expected mmrazor.models.losses.kl_div"),
    ):
        patch("mmrazor")


def test_import_errors_of_the_package_itself_surface(tmp_path: Path) -> None:
    files = MDISTILLER | {"mdistiller/distillers/base.py": "import yacs_that_is_not_here"}
    with importable(tmp_path, files), pytest.raises(ModuleNotFoundError, match="yacs_that_is_not_here"):
        patch("mdistiller")


def test_patching_twice_is_an_error(tmp_path: Path) -> None:
    with (
        importable(tmp_path, MDISTILLER),
        patch("mdistiller", device="cpu"),
        pytest.raises(RuntimeError, match="is patched already; call undo"),
    ):
        patch("mdistiller", device="cpu")


def test_a_failing_original_is_an_error(tmp_path: Path) -> None:
    files = MDISTILLER | {"mdistiller/distillers/KD.py": KD.replace("log_q = ", "log_q = no_gpu; ")}
    with importable(tmp_path, files), pytest.raises(RuntimeError, match="KD:kd_loss failed on cpu for τ = 1") as error:
        patch("mdistiller", device="cpu")
    assert isinstance(error.value.__cause__, NameError)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"preset must be one of mdistiller, logit_standardization, .*, got 'mdistill'"
    ):
        patch("mdistill")

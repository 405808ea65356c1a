"""The AFF module: both paths against the reference, options, autocast, compiled graphs, state, and what it refuses."""

import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.numerics import relative_error
from unikd_fast import AdaptiveFeatureFusion
from unikd_fast.kernels.reference_fusion import fuse_stagewise

Size = tuple[int, int]
MODES = ["nearest", "bilinear"]


def features_of(sizes: list[Size], channels: list[int], *, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


SIZES, CHANNELS = [(8, 8), (4, 4), (2, 2)], [3, 5, 7]


def module(seed: int = 0, **options: str | None) -> AdaptiveFeatureFusion:
    """An AFF whose gates and statistics are away from their start, where too much is symmetric."""
    torch.manual_seed(seed)
    fusion = AdaptiveFeatureFusion(CHANNELS, 6, **options)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        for norm in fusion.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return fusion


class TestModule:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("gate", ["spatial", "channel"])
    def test_forward_is_the_reference(self, gate: str, mode: str) -> None:
        fusion, features = module(gate=gate, upsample=mode), features_of(SIZES, CHANNELS)
        expected = fuse_stagewise(
            features,
            [e.weight for e in fusion.expanders],
            [e.bias for e in fusion.expanders],
            fusion.gate_kernels,
            [g.bias for g in fusion.gates],
            upsample=mode,
        )
        assert torch.equal(fusion(features), expected)

    def test_a_gate_per_channel_is_plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also where impl="auto" would take the kernels."""
        fusion, features = module(gate="channel"), features_of(SIZES, CHANNELS)
        expected = fusion(features), fusion.pooled(features)
        monkeypatch.setattr("unikd_fast.fusion.choose_impl", lambda *_: "fused")
        for name in ("feature_fusion", "pooled_fusion"):
            monkeypatch.setitem(sys.modules, f"unikd_fast.kernels.{name}", None)
        assert torch.equal(fusion(features), expected[0])
        assert torch.equal(fusion.pooled(features), expected[1])

    @pytest.mark.parametrize("norm", [None, "input", "batch"])
    @pytest.mark.parametrize("gate", ["spatial", "channel"])
    @pytest.mark.parametrize("training", [False, True])
    def test_pooled_is_the_average_of_forward(self, gate: str, norm: str | None, training: bool) -> None:
        """Whatever the path; for batch norm in eval mode that is the fold of its statistics into E."""
        fusion = module(gate=gate, norm=norm).double().train(training)
        features = [x.double() for x in features_of(SIZES, CHANNELS)]
        expected = fusion(features).mean((2, 3))
        assert relative_error(fusion.pooled(features), expected) < 1e-13

    @pytest.mark.parametrize("norm", ["input", "batch"])
    @pytest.mark.parametrize("training", [False, True])
    def test_gradients_through_the_folded_norm(self, training: bool, norm: str) -> None:
        fusion = module(norm=norm).double().train(training)
        features = [x.double().requires_grad_() for x in features_of(SIZES, CHANNELS)]
        parameters = [*features, *fusion.parameters()]
        upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad(fusion.pooled(features), parameters, upstream)
        expected = torch.autograd.grad(fusion(features).mean((2, 3)), parameters, upstream)
        for gradient, value in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-12)  # float64 in another order

    @pytest.mark.parametrize("norm", [None, "input", "batch"])
    def test_no_images_have_gradients_of_zero(self, norm: str | None) -> None:
        """As with any layer: a batch of a detector may have no regions."""
        fusion = module(norm=norm).eval()
        features = [x.requires_grad_() for x in features_of(SIZES, CHANNELS, batch=0)]
        fusion.pooled(features).sum().backward()
        assert [x.grad.shape for x in features] == [x.shape for x in features]
        assert not any(p.grad.any() for p in fusion.parameters() if p.grad is not None)
        assert fusion.expanders[0].weight.grad is not None

    @pytest.mark.parametrize("norm", ["input", "batch"])
    def test_statistics_move_in_training_only(self, norm: str) -> None:
        fusion, features = module(norm=norm), features_of(SIZES, CHANNELS)
        before = [norm.running_mean.clone() for norm in fusion.norms]
        fusion.train().pooled(features)
        assert all(not torch.equal(norm.running_mean, old) for norm, old in zip(fusion.norms, before, strict=True))
        before = [norm.running_mean.clone() for norm in fusion.norms]
        fusion.eval().pooled(features)
        assert all(torch.equal(norm.running_mean, old) for norm, old in zip(fusion.norms, before, strict=True))

    @pytest.mark.parametrize("norm", ["input", "batch"])
    def test_running_statistics_match_batch_norm(self, norm: str) -> None:
        """Collapsed as stage by stage, over several batches whose mean is large against their deviation."""
        collapsed, stagewise = (module(norm=norm, path=path).train() for path in ("collapsed", "stagewise"))
        for scale in (1.0, 3.0, 0.5):
            features = [scale * (x + 10) for x in features_of(SIZES, CHANNELS)]
            for fusion in (collapsed, stagewise):
                fusion.pooled(features)
        for ours, theirs in zip(collapsed.norms, stagewise.norms, strict=True):
            assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
            torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-5)  # fp32
            torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("norm", ["input", "batch"])
    def test_one_pixel_has_no_statistics(self, norm: str) -> None:
        fusion = AdaptiveFeatureFusion([3], 4, norm=norm)
        with pytest.raises(ValueError, match=r"two pixels or more, got a feature of \(1, 3, 1, 1\)"):
            fusion.pooled([torch.zeros(1, 3, 1, 1)])

    @pytest.mark.parametrize("norm", ["input", "batch"])
    def test_sync_batch_norm_is_folded(self, norm: str) -> None:
        fusion, features = module(norm=norm).eval(), features_of(SIZES, CHANNELS)
        expected = fusion.pooled(features)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(fusion)
        assert torch.equal(converted.pooled(features), expected)

    def test_input_norm_removes_scale_and_shift(self) -> None:
        """Nor their shift: the same function of features measured in other units, channel by channel."""
        fusion, features = module(norm="input").double(), [x.double() for x in features_of(SIZES, CHANNELS)]
        expected = fusion.pooled(features)
        others = [x * torch.linspace(3, 9, x.shape[1])[:, None, None] - 5 for x in features]
        assert relative_error(fusion.pooled(others), expected) < 1e-4  # eps, against the variance

    def test_state_dict_is_independent_of_the_path(self) -> None:
        states = [module(path=path).state_dict() for path in ("auto", "collapsed", "stagewise")]
        for state in states[1:]:
            assert list(state) == list(states[0])
            assert all(torch.equal(state[name], states[0][name]) for name in state)
        assert {name: tuple(value.shape) for name, value in states[0].items()} == {
            **{f"expanders.{level}.weight": (6, c, 1, 1) for level, c in enumerate(CHANNELS)},
            **{f"expanders.{level}.bias": (6,) for level in range(3)},
            **{f"gates.{level}.weight": (1, 12, 3, 3) for level in range(2)},
            **{f"gates.{level}.bias": (1,) for level in range(2)},
        }

    def test_initial_gates_are_near_one_half(self) -> None:
        torch.manual_seed(0)
        fusion = AdaptiveFeatureFusion([64, 128], 256)
        assert all(torch.equal(m.bias, torch.zeros_like(m.bias)) for m in (*fusion.expanders, *fusion.gates))
        for width in (16, 256):  # their logits vary by a quarter of what they are of, at any width
            (kernel,) = AdaptiveFeatureFusion([64, 128], width).gate_kernels
            inputs = torch.randn(4000, 2 * width, 3, 3)
            assert (inputs * kernel).sum((1, 2, 3)).std().item() == pytest.approx(0.25, rel=0.2)
        for expander, channels in zip(fusion.expanders, (64, 128), strict=True):
            bound = (3 / channels) ** 0.5  # Kaiming-uniform with a = 1 over C_l inputs
            assert expander.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        features = features_of([(8, 8), (4, 4)], [64, 128])
        expanded = [e(f) for e, f in zip(fusion.expanders, features, strict=True)]
        half = (expanded[0] + F.interpolate(expanded[1], scale_factor=2)) / 2
        assert relative_error(fusion(features), half) < 0.3  # pre-activations of 0.01 sqrt(4608) ~ 0.7

    @pytest.mark.parametrize("norm", [None, "input", "batch"])
    @pytest.mark.parametrize("path", ["collapsed", "stagewise"])
    def test_pooled_under_autocast(self, path: str, norm: str | None) -> None:
        """fp32 comes out, and near the fp32 result; the collapsed path is the fp32 result if the features are fp32."""
        fusion, features = module(path=path, norm=norm), features_of(SIZES, CHANNELS)
        expected = fusion.pooled(features)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = fusion.pooled(features)
            of_half = fusion.pooled([x.bfloat16() for x in features])
        assert pooled.dtype == of_half.dtype == torch.float32
        if path == "collapsed":
            assert torch.equal(pooled, expected)
        assert relative_error(of_half, expected) < 0.02  # some roundings of bf16, 3.9e-3 each
        assert relative_error(pooled, expected) < 0.02

    def test_forward_in_half_precision(self) -> None:
        fusion, features = module(), features_of(SIZES, CHANNELS)
        expected = fusion(features)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = fusion(features)
        of_half = fusion([x.bfloat16() for x in features])
        assert under_autocast.dtype == of_half.dtype == torch.bfloat16
        assert relative_error(under_autocast, expected) < 0.02  # some roundings of bf16
        assert relative_error(of_half, expected) < 0.02

    @pytest.mark.parametrize(
        ("options", "training"),
        [
            ({"upsample": "bilinear"}, False),
            ({"norm": "input"}, True),
            ({"path": "stagewise"}, False),
            pytest.param({}, False, marks=pytest.mark.long),
            pytest.param({"norm": "batch"}, True, marks=pytest.mark.long),
            pytest.param({"norm": "input"}, False, marks=pytest.mark.long),
        ],
        ids=str,
    )
    def test_compiles_into_one_graph(self, options: dict[str, str], training: bool) -> None:
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fusion = module(**options).train(training)

            def forward(self, features: list[Tensor]) -> Tensor:
                return self.fusion.pooled(features)

        torch._dynamo.reset()
        pooled = Pooled()
        features = [x.requires_grad_() for x in features_of(SIZES, CHANNELS)]
        leaves = [*features, *pooled.parameters()]
        results = []
        for compute in (torch.compile(pooled, fullgraph=True, backend="aot_eager"), pooled):
            output = compute(features)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for compiled, eager in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)  # fp32, other decompositions

    @pytest.mark.parametrize(
        ("upsample", "batches"),
        [("nearest", ((4, 1), (3, 1))), pytest.param("bilinear", ((4, 1), (3, 1), (5, 2)), marks=pytest.mark.long)],
        ids=["batch", "batch and size"],
    )
    def test_compiled_for_a_changing_batch_and_size(self, upsample: str, batches: tuple[tuple[int, int], ...]) -> None:
        """The last batch of an epoch, and images of another size."""
        torch._dynamo.reset()
        fusion = module(upsample=upsample)
        compiled = torch.compile(fusion.pooled, fullgraph=True, backend="aot_eager")
        for batch, scale in batches:
            features = features_of([(scale * h, scale * w) for h, w in SIZES], CHANNELS, batch=batch)
            torch.testing.assert_close(compiled(features), fusion.pooled(features), rtol=1e-5, atol=1e-6)  # fp32

    def test_logs_the_path_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG, logger="unikd_fast"):
            for options in ({}, {"gate": "channel"}, {"norm": "batch"}, {"path": "stagewise"}):
                fusion = module(**options)
                for _ in range(2):
                    fusion.pooled(features_of(SIZES, CHANNELS))
        messages = [record.getMessage() for record in caplog.records if record.name == "unikd_fast"]
        assert len(messages) == 4
        reasons = (
            "collapsed: exact with spatial gates",
            "stage-wise: a gate per channel",
            "batch norm is folded into",
            "as requested",
        )
        for message, reason in zip(messages, reasons, strict=True):
            assert reason in message


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"in_channels": []}, "at least one level"),
            ({"in_channels": [3, 0]}, r"every size must be at least 1, got in_channels \(3, 0\) and width 6"),
            ({"width": 0}, "and width 0"),
            ({"gate": "pixel"}, r"gate must be one of \('spatial', 'channel'\), got 'pixel'"),
            ({"upsample": "bicubic"}, r"upsample must be one of \('nearest', 'bilinear'\), got 'bicubic'"),
            ({"norm": "layer"}, r"norm must be one of \(None, 'batch', 'input'\), got 'layer'"),
            ({"path": "fast"}, "path must be one of .* got 'fast'"),
            ({"path": "collapsed", "gate": "channel"}, "path='collapsed' needs gate='spatial', got gate='channel'"),
            ({"impl": "fused", "gate": "channel"}, "impl='fused' needs gate='spatial', got gate='channel'"),
        ],
    )
    def test_options(self, options: dict, message: str) -> None:
        with pytest.raises(ValueError, match=f"AdaptiveFeatureFusion: .*{message}"):
            AdaptiveFeatureFusion(**{"in_channels": CHANNELS, "width": 6, **options})

    def test_inexact_collapse_is_rejected(self) -> None:
        fusion, features = module(norm="batch", path="collapsed"), features_of(SIZES, CHANNELS)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(fusion)
        with pytest.raises(ValueError, match=r"got SyncBatchNorm in training mode.*use path='auto' or \.eval\(\)"):
            converted.train().pooled(features)
        converted.eval().pooled(features)

    @pytest.mark.parametrize("call", ["forward", "pooled"])
    @pytest.mark.parametrize(
        ("features", "message"),
        [
            (features_of(SIZES[:2], CHANNELS[:2]), "expected one feature per entry of in_channels, 3, got 2"),
            (features_of(SIZES, [3, 5, 8]), r"must have in_channels \(3, 5, 7\), fine to coarse, got \(3, 5, 8\)"),
            ([x.flatten(2) for x in features_of(SIZES, CHANNELS)], r"must be \(N, C, H, W\), got \[\(2, 3, 64\)"),
            ([*features_of(SIZES[:2], CHANNELS[:2]), torch.zeros(3, 7, 2, 2)], "must have one batch size"),
            (features_of(SIZES[::-1], CHANNELS), r"from fine to coarse, got \(2, 2\) before \(4, 4\)"),
        ],
    )
    def test_features(self, features: list[Tensor], message: str, call: str) -> None:
        with pytest.raises(ValueError, match=f"AdaptiveFeatureFusion: .*{message}"):
            getattr(module(), call)(features)

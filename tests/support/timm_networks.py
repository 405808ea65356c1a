"""Networks of timm, of every family, as teachers: levels and a step of training."""

import timm
import torch
from torch import nn

from unikd_fast import Distiller
from unikd_fast.models import FeatureExtractor, build_model

CLASSES = 5

# The smallest networks of each family, without those of more than 35 million parameters.
# fmt: off
NAMES = [
    "beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_tiny", "convit_tiny", "convmixer_768_32",
    "cpubone_nano", "crossvit_tiny_240", "csatv2", "cspnext_tiny", "darknet17", "davit_tiny", "deit_tiny_patch16_224",
    "densenet121", "dla34", "dla60", "dpn68", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "eva02_small_patch14_224", "eva02_tiny_patch14_224",
    "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "gcvit_xxtiny", "gernet_s", "ghostnet_050", "gmlp_ti16_224",
    "halonet_h1", "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224", "hrnet_w18", "iformer_t", "inception_next_atto",
    "inception_v3", "lcnet_035", "lcnetv2_small", "legacy_seresnet18", "legacy_xception", "levit_128s", "nest_tiny",
    "nextvit_small", "rdnet_tiny", "repghostnet_050", "resnetv2_18", "sam2_hiera_tiny", "skresnet18",
    "swin_tiny_patch4_window7_224", "test_coatnet", "test_convnext", "test_mambaout", "test_vit", "tinynet_b",
    "tinynet_d", "tnt_s_legacy_patch16_224",
]
# fmt: on


def smallest(name: str) -> tuple[nn.Module, int]:
    """Build a network for the smallest of some image sizes that it takes, with random weights."""
    published = timm.models.get_pretrained_cfg(name)
    usual = 224 if published is None else published.input_size[-1]
    for size, arguments in ((64, {}), (64, {"img_size": 64}), (128, {}), (usual, {})):
        try:
            network = build_model(f"timm/{name}", num_classes=CLASSES, model_args=arguments).eval()
            with torch.no_grad():
                network(torch.zeros(1, 3, size, size))
        except Exception:  # each network has its own way to refuse a size
            continue
        return network, size
    raise AssertionError(f"{name} runs at no size")


def check_levels_and_a_step(name: str) -> None:
    """Distil from the network for a step; its levels are maps (N, C, H, W), none finer than the one before it."""
    torch.manual_seed(0)
    network, size = smallest(name)
    student = build_model("cifar/resnet8", num_classes=CLASSES)
    distiller = Distiller(network, student, method="unikd", image_size=size)
    images = torch.randn(2, 3, size, size)
    teacher = distiller.teacher.network
    assert isinstance(teacher, FeatureExtractor)
    levels = distiller.teacher(images).levels
    assert [tuple(level.shape) for level in levels] == [(2, *shape) for shape in teacher.level_shapes]
    sides = [side for _, side, _ in teacher.level_shapes]
    assert len(sides) >= 2 and sides == sorted(sides, reverse=True) and sides[-1] >= 1
    distiller.fit_teacher([images], steps=1)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    loss = distiller(images, torch.arange(2))
    loss.total.backward()
    torch.optim.SGD(student.parameters(), lr=0.01).step()
    assert loss.total.isfinite()
    moved = [not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True)]
    assert all(moved)

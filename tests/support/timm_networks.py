"""Networks of timm, of every family, as teachers: levels and a step of training."""

import timm
import torch
from torch import nn

from unikd_fast import Distiller
from unikd_fast.models import FeatureExtractor, build_model

CLASSES = 5

# Two hundred networks: the smallest of each family.
# fmt: off
NAMES = [
    "beit_base_patch16_224", "beit_base_patch16_384", "caformer_s18", "cait_xxs24_224", "cait_xxs36_224",
    "coat_lite_tiny", "coat_mini", "coat_tiny", "coatnet_0_224", "convit_small", "convit_tiny",
    "convmixer_1024_20_ks9_p14", "convmixer_768_32", "convnext_atto", "convnext_pico", "cpubone_nano", "cpubone_s0",
    "cpubone_t0", "crossvit_9_240", "crossvit_small_240", "crossvit_tiny_240", "csatv2", "csatv2_21m", "cspnext_s",
    "cspnext_tiny", "cspresnet50", "darknet17", "darknet21", "davit_tiny", "deit_small_patch16_224",
    "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224", "densenet121", "densenet169", "densenet201", "dla34",
    "dla60", "dla60x", "dpn68", "dpn92", "eca_vovnet39b", "edgenext_small", "edgenext_x_small", "edgenext_xx_small",
    "efficientformer_l1", "efficientformer_l3", "efficientformerv2_s0", "efficientformerv2_s1", "efficientformerv2_s2",
    "efficientvim_m1", "efficientvim_m1_dist", "efficientvim_m2", "efficientvit_b0", "efficientvit_b1",
    "efficientvit_b2", "efficientvit_m0", "efficientvit_m1", "efficientvit_m2", "eva02_small_patch14_224",
    "eva02_tiny_patch14_224", "eva02_tiny_patch14_336", "fasternet_t0", "fasternet_t1", "fasternet_t2", "fastvit_s12",
    "fastvit_t12", "fastvit_t8", "fbnetv3_b", "focalnet_tiny_lrf", "focalnet_tiny_srf", "gcvit_tiny", "gcvit_xtiny",
    "gcvit_xxtiny", "gernet_s", "ghostnet_050", "ghostnet_100", "ghostnetv2_100", "gmixer_12_224", "gmlp_s16_224",
    "gmlp_ti16_224", "halonet26t", "halonet_h1", "haloregnetz_b", "hardcorenas_a", "hardcorenas_b", "hardcorenas_c",
    "hgnetv2_b0", "hgnetv2_b1", "hgnetv2_b2", "hiera_small_224", "hiera_small_abswin_256", "hiera_tiny_224",
    "hieradet_small", "hrnet_w18", "iformer_s", "iformer_t", "inception_next_atto", "inception_next_tiny",
    "inception_v3", "lcnet_035", "lcnet_050", "lcnetv2_small", "legacy_seresnet18", "legacy_seresnet34",
    "legacy_xception", "levit_128", "levit_128s", "levit_192", "lowformer_b0", "lowformer_b1", "lowformer_e1",
    "mambaout_femto", "mambaout_kobe", "mobilevit_xs", "mobilevit_xxs", "mobilevitv2_050", "mvitv2_small",
    "mvitv2_small_cls", "mvitv2_tiny", "nest_tiny", "nest_tiny_jx", "nextvit_small", "pit_s_224", "pit_ti_224",
    "pit_xs_224", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2_li", "rdnet_tiny", "regnetx_002", "regnetx_004", "regnetx_006",
    "repghostnet_050", "repghostnet_058", "repghostnet_100", "repvgg_a0", "repvgg_a1", "repvit_m0_9", "repvit_m1",
    "repvit_m1_0", "res2net50_14w_8s", "res2net50_26w_4s", "res2next50", "resnest14d", "resnest26d",
    "resnest50d_1s4x24d", "resnet18", "resnet26", "resnet34", "resnetv2_18", "resnetv2_18d", "resnetv2_34",
    "rexnet_100", "rexnetr_100", "sam2_hiera_small", "sam2_hiera_tiny", "selecsls42", "selecsls60", "sequencer2d_s",
    "shvit_s1", "shvit_s2", "skresnet18", "skresnet34", "starnet_s050", "starnet_s1", "swiftformer_s", "swiftformer_xs",
    "swin_s3_tiny_224", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_cr_tiny_ns_224",
    "swinv2_tiny_window16_256", "swinv2_tiny_window8_256", "test_coatnet", "test_convnext", "test_mambaout",
    "test_maxvit", "test_vit", "test_vit2", "test_vit_relpos", "tiny_vit_11m_224", "tiny_vit_5m_224", "tinynet_b",
    "tinynet_c", "tinynet_d", "tnt_s_legacy_patch16_224", "tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small",
    "twins_svt_small", "visformer_tiny", "vit_srelpos_small_patch16_224", "vit_tiny_r_s16_p8_224", "vitamin_small_224",
    "volo_d1_224", "vovnet39a", "xception41", "xception41p", "xcit_nano_12_p16_224", "xcit_nano_12_p8_224",
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

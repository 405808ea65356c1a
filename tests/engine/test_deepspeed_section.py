"""The `deepspeed` section: what DeepSpeed would pass over or stumble over is refused before anything is made."""

from pathlib import Path
from typing import Any

import pytest

from support.real_runs import ALONE, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine.zero import deepspeed_config


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"zero_optimisation": {"stage": 1}},
            "deepspeed.zero_optimisation is not read by DeepSpeed; the nearest key is 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "deepspeed.zero_optimization.overlap_com = True is not valid: unknown key; the nearest key is "
            "'overlap_comm'",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}},
            "deepspeed.zero_optimization.reduce_bucket_size = 'large' is not valid: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.device = 'gpu' is not valid: ",
        ),
        ({"zero_optimization": {"stage": "two"}}, "deepspeed.zero_optimization.stage = 'two' is not supported; use"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage = 4 is not supported; use one of"),
        (
            {"activation_checkpointing": None},
            "deepspeed.activation_checkpointing = None is not a section; set its keys",
        ),
        ({"timers": 5}, "deepspeed.timers = 5 is not a section; set"),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization = 2 is not a section; set"),
        (
            {"flops_profiler": {"enable": True}},
            "deepspeed.flops_profiler.enable is not read by DeepSpeed; the nearest key is 'enabled'",
        ),
        ({"comms_logger": {"enabled": "some"}}, "deepspeed.comms_logger.enabled = 'some' is not valid: "),
        ({"communication_data_type": "fp17"}, "deepspeed: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_deepspeed_keys_are_named(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    config = load_config(write_config(tmp_path, deepspeed=section))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(config, ALONE)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_valid_deepspeed_keys_are_passed_on(tmp_path: Path) -> None:
    section = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "communication_data_type": "fp32",
        "prescale_gradients": True,
        "wall_clock_breakdown": False,
        "checkpoint": {"tag_validation": "Warn"},
        "flops_profiler": {"enabled": False},
        "timers": {"throughput": {"enabled": False}},
        "aio": {"block_size": 1048576},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    given = deepspeed_config(load_config(write_config(tmp_path, deepspeed=section)), ALONE)
    assert {key: given[key] for key in section} == section

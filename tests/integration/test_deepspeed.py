"""DeepSpeed configs: AutoEP is refused before anything is loaded, everything else passes."""

import json

import pytest

from hf_moe_ep.training.deepspeed import refuse_autoep

AUTOEP = {"zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 2}}
OTHERS = [None, {}, {"expert_parallel": {"enabled": False}}, {"zero_optimization": {"stage": 2}}]


@pytest.mark.parametrize("config", OTHERS)
def test_others_pass(config, tmp_path):
    refuse_autoep(config)
    if config is not None:
        (tmp_path / "ds.json").write_text(json.dumps(config))
        refuse_autoep(str(tmp_path / "ds.json"))


def test_autoep_is_refused(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(AUTOEP))
    for config in (AUTOEP, str(tmp_path / "ds.json")):
        with pytest.raises(ValueError, match="'autoep_size': 2.*--fsdp_size N --ep_size N"):
            refuse_autoep(config)


def test_a_file_that_is_no_config(tmp_path):
    (tmp_path / "ds.json").write_text("{")
    for path in (tmp_path / "ds.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match=f"deepspeed={path}: cannot be read"):
            refuse_autoep(str(path))

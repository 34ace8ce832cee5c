"""Which runs may be continued in which folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from opdengine.config import ConfigError, TrainConfig
from opdengine.run_folder import RunFolder
from opdengine.settings import from_mapping, to_mapping


@pytest.mark.parametrize("jsd_beta", [0.5, 0.3])
def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path: Path, jsd_beta: float) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 1}))
    settings = {"model": "m", "train_data": ["d.jsonl"], "output_dir": str(tmp_path)}
    stored = to_mapping(from_mapping(TrainConfig, settings))
    del stored["jsd_beta"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    now = from_mapping(TrainConfig, {**settings, "jsd_beta": jsd_beta, "resume_from_checkpoint": "latest"})
    if jsd_beta == 0.5:
        assert RunFolder(now).state == {"step": 1}
    else:
        with pytest.raises(ConfigError, match=r"jsd_beta: 0.5 then, 0.3 now"):
            RunFolder(now)

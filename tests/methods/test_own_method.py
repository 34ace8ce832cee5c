"""A method of one's own: the one of docs/extend/method.md runs as it stands, and what is none is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_helpers import make_config, make_engine, make_samples

from opdengine.config.train import ConfigError
from opdengine.data.prompts import load_prompts
from opdengine.methods import build_method
from opdengine.training.run import train
from opdengine.training.writer import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def method(tmp_path: Path) -> str:
    """The example of the page, in a file."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend" / "method.md").read_text(), re.DOTALL)
    file = tmp_path / "apart.py"
    file.write_text(code)
    return f"{file}:Apart"


def test_the_example_of_the_page_trains(models: dict[str, str], prompt_file: str, tmp_path: Path, method: str) -> None:
    changes = {"method": method, "method_options": {"bound": 3.0}}
    result = train(make_config(models, prompt_file, tmp_path / "out", **changes), progress=False)
    shares = [line["apart/share"] for line in read_metrics(result.output_dir / "metrics.jsonl")]
    assert len(shares) == 3 and 0 < np.mean(shares) < 1


def test_its_options_decide_the_weights(models: dict[str, str], prompt_file: str, tmp_path: Path, method: str) -> None:
    prompts = load_prompts([prompt_file]).prompts[:4]
    weights = {}
    for bound in (0.0, 1.0):
        config = make_config(models, prompt_file, tmp_path, method=method, method_options={"bound": bound})
        samples = make_samples(make_engine(config), prompts)
        weights[bound] = np.concatenate([sample.kl_weight for sample in samples])
    assert np.all(weights[0.0] > 0)
    assert 0 < np.mean(weights[1.0] > 0) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "nowhere.py:f"}, "method 'nowhere.py:f' cannot be loaded: there is no Python file"),
        ({"method": "opdengine.methods.opd:nothing"}, "cannot be loaded: .*'nothing'"),
        ({"method": "opdengine.methods.opd:OPD", "method_options": {"x": 1}}, "unexpected keyword argument 'x'"),
        (
            {"method": "opdengine.config.loading:to_mapping"},
            "is no class that inherits opdengine.methods.method",
        ),
        ({"method": "opdengine.methods.method:MAX_TEACHERS"}, "is no class that inherits"),
        ({"method": "mt_opd", "method_options": {"x": 1}}, "method_options=.'x': 1. is not possible"),
    ],
)
def test_what_is_no_method_is_refused(
    models: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(make_config(models, "d.jsonl", tmp_path, **changes))

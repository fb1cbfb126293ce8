"""One object holds all settings; its JSON is gpt-burn's config.json."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

from conftest import DATA

from gpt_tiny import GPTConfig
from training.config import OptimizerConfig, TrainingConfig, changed, flat


def test_the_json_has_gpt_burns_keys_in_its_order_and_the_tokenizer():
    theirs = json.loads((DATA / "gpt_burn_114k" / "config.json").read_text())
    ours = TrainingConfig().to_json()
    assert list(ours) == [*theirs, "tokenizer"]
    for section in ("model", "optimizer"):
        assert list(ours[section]) == list(theirs[section])
    clipped = TrainingConfig(optimizer=OptimizerConfig(grad_clipping=0.5)).to_json()
    assert clipped["optimizer"]["grad_clipping"] == {"Norm": 0.5}


def test_no_two_settings_share_a_name():
    def count(config) -> int:
        values = [getattr(config, field.name) for field in fields(config)]
        return sum(count(value) if is_dataclass(value) else 1 for value in values)

    assert len(flat(TrainingConfig())) == count(TrainingConfig())


def test_settings_are_changed_wherever_they_stand():
    new = {"n_steps": 3, "d_model": 32, "weight_decay": 0.5, "output_path": Path("x"), "other": 1}
    config = changed(TrainingConfig(), new)
    assert (config.n_steps, config.model.d_model) == (3, 32)
    assert (config.optimizer.weight_decay, config.files.output_path) == (0.5, Path("x"))
    assert changed(config, flat(TrainingConfig())) == TrainingConfig()
    assert config.model == GPTConfig(d_model=32)

"""The ready-made accelerate configurations can be read, and what cannot work is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from test_trainer import make_trainer

from confu_hf.training.trainer import ConFuTrainer

CONFIGS = sorted((Path(__file__).parent.parent / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_them(path):
    config = load_config_from_file(str(path))
    expected = {"one_gpu": 1, "eight_gpus": 8, "sharded_target": 8, "two_cpu_processes": 2}
    assert config.num_processes == expected[path.stem]
    assert config.use_cpu == (path.stem == "two_cpu_processes")
    assert not config.fsdp_config and not config.deepspeed_config


@pytest.mark.parametrize(("flag", "name"), [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")])
def test_sharding_the_draft_is_refused(tmp_path, monkeypatch, flag, name):
    prepare = ConFuTrainer.create_accelerator_and_postprocess

    def sharded(trainer):
        prepare(trainer)
        setattr(trainer, flag, True)

    monkeypatch.setattr(ConFuTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match=f"got {name}, expected one process, or DDP.*eight_gpus.yaml.*--shard_target"):
        make_trainer(tmp_path, False)

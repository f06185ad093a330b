"""Compose the configuration as train.py does, without running it."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"


def configured(folder: Path, *overrides: str) -> DictConfig:
    """The composed config, its run folder being `folder`; without a progress bar and, to save time, a report."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            "config", [f"run_dir='{folder}'", "trainer.enable_progress_bar=false", "report=false", *overrides]
        )

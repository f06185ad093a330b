"""Test the best run of a sweep, and no other: whoever chooses by the test part has no test left."""

import json
import logging
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from manual_mlp.errors import InputError
from manual_mlp.training.sweep import FIGURES, OfSweep, minimized, ranked


class Winner(OfSweep):
    """A callback that tests the best run by `optimized_metric` at the end of a sweep, and adds to its figures.

    If that is itself a figure of the test, each run has been tested.
    """

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        best = next(iter(ranked(self.runs(config), minimized(config))), None)
        if best is None or best.metric.startswith("test_"):
            return
        print(f"\nThe best run, {best.name}, is tested; the others are not:")
        path = folder / best.name / FIGURES
        try:
            figures = tested(folder / best.name)
        except InputError as error:
            print(f"not tested: {error}")
            return
        left = json.loads(path.read_text())
        path.write_text(json.dumps({**left, "figures": left["figures"] | figures}, indent=2))


def tested(folder: Path) -> dict[str, float]:
    """Test the kept checkpoint of a run, as it was configured, and print its summary → all its figures."""
    from manual_mlp.training import run  # brings Lightning

    cfg = cast(DictConfig, OmegaConf.load(folder / ".hydra" / "config.yaml"))
    cfg.task, cfg.run_dir, cfg.ckpt_path = "test", str(folder), str(folder / "best.ckpt")
    cfg.logger, cfg.callbacks, cfg.trainer.enable_progress_bar = {}, {}, False  # which would write to the folder
    run.quieten()
    logging.disable(logging.INFO)  # no file takes Lightning's messages now that the runs are over
    try:
        with run.in_words(cfg):
            return run.tested(cfg)
    finally:
        logging.disable(logging.NOTSET)

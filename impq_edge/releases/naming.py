"""What files are called. No name leads out of the directory it is meant for."""

import dataclasses
from pathlib import Path

from impq_edge.impq.allocation import Allocation


def file_name(allocation: Allocation, setting: str = "") -> str:
    """Return the conventional name of an allocation's file; ``setting`` tells two of one device apart."""
    device = Path(allocation.device).name + (f"-{setting}" if setting else "")
    return f"{allocation.model_name}-{device}-IMPQ-{allocation.bits_per_weight:.2f}bpw.gguf"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the parts of a release lie. Models' and devices' names were checked to be plain."""

    root: Path

    @property
    def work(self) -> Path:
        """What is only needed until the release is whole."""
        return self.root / ".work"

    def kept(self, model: str) -> Path:
        """Return where calibrated weights are kept between the steps."""
        return self.work / model / "encoded"

    def records(self, model: str) -> Path:
        """Return where the records of a model lie."""
        return self.root / "records" / model

    def cell(self, model: str, key: str) -> Path:
        """Return where the records of a model on one device lie."""
        return self.records(model) / key

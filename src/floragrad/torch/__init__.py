"""Flora for PyTorch."""

from floragrad._extras import require

require("torch", "torch")

from floragrad._report import Report, ReportRow  # noqa: E402
from floragrad.torch.accumulation import GradientAccumulator  # noqa: E402
from floragrad.torch.groups import param_groups  # noqa: E402
from floragrad.torch.optimizer import Flora  # noqa: E402

__all__ = ["Flora", "GradientAccumulator", "Report", "ReportRow", "param_groups"]

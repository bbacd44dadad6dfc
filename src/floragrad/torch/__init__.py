"""Flora for PyTorch."""

from floragrad._extras import require

require("torch", "torch")

from floragrad.torch.groups import param_groups  # noqa: E402
from floragrad.torch.optimizer import Flora  # noqa: E402
from floragrad.torch.report import Report, ReportRow  # noqa: E402

__all__ = ["Flora", "Report", "ReportRow", "param_groups"]

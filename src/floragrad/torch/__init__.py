"""Flora for PyTorch."""

from floragrad._extras import require

require("torch", "torch")

from floragrad._report import Report, ReportRow  # noqa: E402
from floragrad.torch.accumulation import GradientAccumulator  # noqa: E402
from floragrad.torch.accumulation.ddp_hook import FloraHookState, flora_hook  # noqa: E402
from floragrad.torch.groups import param_groups  # noqa: E402
from floragrad.torch.optimizer import Flora  # noqa: E402

__all__ = ["Flora", "FloraHookState", "GradientAccumulator", "Report", "ReportRow", "flora_hook", "param_groups"]

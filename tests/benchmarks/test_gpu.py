"""The benchmark for GPUs runs to its end without one, so that it cannot be broken when there is one."""

from pathlib import Path

import pytest

from benchmarks import gpu
from tests.marks import slow


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the set of devices that the kernels take, which the command adds the CPU to, as it was."""
    pytest.importorskip("triton")
    from floragrad.torch.backends.triton import step
    from tests.torch.interpreter import make_fast

    make_fast()
    monkeypatch.setattr(step, "DEVICES", set(step.DEVICES))


@pytest.mark.filterwarnings("ignore:Flora compresses no momentum")
@pytest.mark.parametrize("sections", [["--only", "cases,fold,peak"], slow([])], ids=["some", "all"])
def test_sections_run_in_the_interpreter(sections: list[str], tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), *sections]) == 0
    page = (tmp_path / "gpu.md").read_text()
    assert page.endswith("All checks passed.\n")
    assert "(triton)" in page
    assert "floragrad Flora, int4, ratio 2 | not run" not in page


def test_an_unknown_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cpu", "--out", str(tmp_path), "--only", "steps"])
    assert stopped.value.code == 2
    assert "--only steps: choose from cases, resume, step, fold, peak, nccl" in capsys.readouterr().err

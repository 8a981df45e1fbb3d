"""The package as it is installed: a wheel in a fresh environment, used from empty folders."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from ws.cache.places import root
from ws.show.tables import read_table

SHIPPED = ("ws", "nbs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
FILES = [
    "v7_sweep.ipynb", "v7_sweep.html", "params.json", "v7_per_layer.csv", "v7_summary.tsv", "v7_summary_pct.tsv",
    "v7_specific_per_layer.csv", "v7_specific_summary.tsv", "v7_joint_act_weight_scatter.png",
    "v7_joint_act_weight_scatter.pdf", "v7_definitions.md", "v7_conclusion.md", "v7_plan_merge.md",
]  # fmt: skip


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """`installed(*command, cwd)`: run a command of an environment that has the wheel, and the running environment's
    dependencies through one .pth line, which does not bring the editable install along."""
    base = tmp_path_factory.mktemp("wheel")
    source, folder = base / "source", base / "venv"
    source.mkdir()
    for name in SHIPPED:  # a build leaves files beside the sources
        junk = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info")
        (shutil.copytree(root() / name, source / name, ignore=junk) if (root() / name).is_dir() else
         shutil.copy(root() / name, source / name))  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WS_OUT", "WS_TYPED_IN")}

    def call(*command: object, cwd: Path = base) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", base, source)
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    wheel = next(base.glob("*.whl"))
    call(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    paths = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    shared = Path("share", "jupyter", "nbconvert")  # its templates are data of an environment, no modules
    (folder / shared.parent).mkdir(parents=True, exist_ok=True)
    (folder / shared).symlink_to(sys.prefix / shared)
    home = call(python, "-c", "import ws; print(ws.__file__)").strip()
    assert Path(home).is_relative_to(folder), home

    def run(command: str, *args: object, cwd: Path) -> str:
        return call(folder / "bin" / command, *args, cwd=cwd)

    return run


def test_it_imports_and_brings_its_notebooks(installed, tmp_path):
    code = "import ws; from ws.cache.places import notebooks_folder as n, out_folder; print(out_folder());"
    code += "print(*sorted(p.relative_to(n()).as_posix() for p in n().rglob('*') if '__pycache__' not in p.parts))"
    out, files = installed("python", "-c", code, cwd=tmp_path).splitlines()
    names = {
        p.relative_to(root() / "nbs").as_posix()
        for p in (root() / "nbs").rglob("*")
        if p.suffix in (".py", ".ipynb", ".yaml")
    }
    assert out == str(tmp_path / "out") and set(files.split()) >= {n for n in names if ".ipynb_checkpoints" not in n}
    assert not any(tmp_path.iterdir())


def test_the_sweep_runs_from_an_empty_folder_and_finds_the_reference(installed, tmp_path, parity_folder):
    given = {"MODEL_ID": "model", "W_PATH": "w.pt", "BEHAVIOR": "behavior.json"}
    words = [word for key, name in given.items() for word in ("-p", key, parity_folder / name)]
    told = installed("ws", "nb", "v7_sweep", *words, "-p", "DTYPE", "float32", cwd=tmp_path)
    assert "v7_sweep: ran in" in told and sorted(p.name for p in tmp_path.iterdir()) == ["logs", "out"]
    tables = list((tmp_path / "out").rglob("v7_summary_pct.tsv"))
    assert len(tables) == 1
    for name in FILES:
        assert (tables[0].parent / name).stat().st_size > 0, name
    both = read_table(parity_folder / "v7" / "v7_summary_pct.tsv").join(
        read_table(tables[0]), on="subspace", suffix="_mine"
    )
    doubtful = both["ill_conditioned"]
    assert set(both.filter(doubtful)["subspace"]) == {
        "chars_clusters", "qk_x_chars_clusters", "attention_sink", "rotation_contrast",
    }  # fmt: skip
    sure = both.filter(~doubtful)
    assert len(sure) > 30
    for column in ("mean_conc_act", "mean_conc_w_combined", "mean_cos_dW", "joint_score", "pct_w_oracle_oproj"):
        expected, got = sure[column].to_numpy(), sure[f"{column}_mine"].to_numpy()
        assert np.abs(got - expected).max() <= 1e-3 * max(1.0, np.abs(expected).max()), column


def test_the_lines_of_the_readme(installed, tmp_path):
    part = (root() / "README.md").read_text(encoding="utf-8").partition("\n## In Python\n")[2]
    (tmp_path / "lines.py").write_text(part.partition("```python\n")[2].partition("```")[0])
    (tmp_path / "empty").mkdir()
    told = installed("python", tmp_path / "lines.py", cwd=tmp_path / "empty")
    assert "mine" in told and "first axes" in told, told

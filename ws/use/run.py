"""What RUN means to a command that uses one w: the w, the model that it steers, the sweep that scored it. (docs/use.md)

A run's folder `out/<model>/<behavior>/<adapter>/seed_<k>`, a notebook's folder in it, a `w.safetensors`, or `tiny`.
"""

from dataclasses import dataclass
from pathlib import Path

from ws.cache.files import read_json
from ws.cache.models import shipped
from ws.diff import WeightDiff, load_diff
from ws.explanation.result import RECORD, Explanation
from ws.model.lm import LM, check_model, load_lm

MOST = 3.4e38  # of alpha; beyond it is infinite in float32


@dataclass(frozen=True)
class Run:
    """name: as it was typed. w: its weight difference. sweeps: the folders of its finished sweeps, v7b before v7. params: of
    the notebook that made it; {} where no record lies beside w."""

    name: str
    w: WeightDiff
    sweeps: tuple[Path, ...]
    params: dict

    def sweep(self) -> Explanation:
        """The sweep of this w whose bases `--keep` takes. FileNotFoundError where there is none, ValueError where it was of
        another w."""
        if not self.sweeps:
            how = "run one: just nb v7_sweep -p PROTOCOL v7b; dW:8 (w's own best directions) needs none"
            raise FileNotFoundError(
                f"{self.name}: no finished sweep lies beside this w, so that no candidate has a basis; {how}"
            )
        found = Explanation.load(self.sweeps[0])
        if found.setting["w"] != self.w.fingerprint:
            raise ValueError(f"{self.sweeps[0]}: was a sweep of another w than {self.name}; run it again")
        return found

    def behavior(self, given: str = "") -> str:
        """The behaviour's name or file: the given one, else what the run or the metadata of w say. ValueError where nobody
        says it."""
        found = given or self.params.get("BEHAVIOR") or self.w.meta.get("behavior")
        if not found:
            raise ValueError(f"{self.name}: does not say which behaviour it is of; give it: --behavior NAME")
        return str(found)

    def model(self, here: Path, given: str = "", dtype: str = "", weights: bool = True) -> LM:
        """The model that w steers, loaded: the given one (a MODEL_ID), else the one that the run or the metadata of w name.
        Without weights on the meta device. ValueError / FileNotFoundError where there is none, in one line."""
        options = {key.lower(): str(self.params.get(key) or "") for key in ("REVISION", "CHAT_TEMPLATE")}
        name = str(self.params.get("MODEL_ID") or self.w.meta.get("base_model") or "")
        if given:
            options = {"revision": "", "chat_template": ""}
            name = str(here / given) if not shipped(given) and (here / given).exists() else given
        elif not self.params.get("MODEL_ID") and not shipped(name) and not Path(name).exists():
            name = name.replace("__", "/", 1)
        dtype = dtype or str(self.params.get("DTYPE") or "auto")
        load = load_lm if weights else check_model
        try:
            if not name:
                raise ValueError("its metadata name no base model")
            return load(name, dtype, revision=options["revision"] or None, chat_template=options["chat_template"])
        except (ValueError, FileNotFoundError) as error:
            if given:
                raise
            raise type(error)(f"{self.name}: its base model cannot be had, give it: --model MODEL ({error})") from error


def read_run(name: Path | str, here: Path) -> Run:
    """RUN as it was typed in the folder `here`. FileNotFoundError / ValueError for what holds no weight difference."""
    if str(name) == "tiny":
        return Run("tiny", load_diff("tiny"), (), {})
    path = (here / name).expanduser()
    if path.is_file():
        return _run(str(name), path, path.parent, path.parent)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such run; give a run's folder, a w.safetensors, or tiny")
    params = read_json(path / "params.json").get("parameters", {})
    given = Path(str(params.get("W_PATH") or ""))
    files = [path / "w.safetensors", given, path.parent / "w.safetensors"]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        below = sorted(p for p in path.glob("**/w.safetensors") if p.parent.name != "null_diff")
        near = f"; one lies in {below[0].parent}" if below else ""
        raise FileNotFoundError(f"{path}: no w.safetensors in it or beside it{near}")
    return _run(str(name), file, path, path if file == files[0] else path.parent)


def _run(name: str, file: Path, folder: Path, home: Path) -> Run:
    """home: the folder in which a seed's runs lie beside each other."""
    swept = sorted({path.parent for path in [*home.glob(f"v7*/{RECORD}"), *folder.glob(RECORD)]}, key=_order)
    if folder in swept:
        swept = [folder]
    records = [folder, home / "weight_diff", *swept]
    params = next(filter(None, (read_json(place / "params.json").get("parameters", {}) for place in records)), {})
    return Run(name, load_diff(file), tuple(swept), params)


def _order(folder: Path) -> tuple[bool, int, str]:
    """v7b before v7, the usual width and switches before others."""
    return not folder.name.startswith("v7b"), len(folder.name), folder.name

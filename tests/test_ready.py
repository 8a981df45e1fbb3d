"""What a run is about to read is checked before it starts: one line per fault, in seconds, and nothing that works is refused."""

import json
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ws
from tests.test_data import small
from tests.test_diff import make_adapter
from ws.cache.models import model_slug
from ws.cache.names import RunId, behavior_name, slug
from ws.cache.places import ASSETS
from ws.data import load_behavior
from ws.diff import LowRank, WeightDiff, save_diff
from ws.lab import check_job
from ws.model.lm import check_model, load_lm
from ws.ready import check_inputs
from ws.runs.notebooks import Place
from ws.runs.once import prepare
from ws.runs.parameters import defaults, read_notebook
from ws.subspaces.captures import probes
from ws.subspaces.protocol import load_protocol

NBS = Path(__file__).parents[1] / "nbs"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(model_folder):
    return model_folder("llama")


@pytest.fixture
def ask(tmp_path, folder):
    """`ask(notebook, KEY=value)`: the checks of a notebook's defaults with changes, timed; one line and no traceback."""

    def ask(notebook, **changes):
        values = {**defaults(read_notebook(NBS / f"{notebook}.ipynb"), notebook), "MODEL_ID": str(folder), **changes}
        start = time.process_time()
        try:
            check_inputs(notebook, values, tmp_path / "out")
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
            raise
        finally:
            assert time.process_time() - start < 10  # 3 s where nothing else runs; well under 1 s each as a rule

    return ask


@pytest.fixture
def broken_model(folder, tmp_path):
    """`broken_model(config=..., remove=..., cut=...)`: a copy of the model folder with something wrong."""

    def make(config=None, remove=(), cut="", text=None):
        copy = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        if config:
            held = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**held, **config}))
        if text is not None:
            (copy / "config.json").write_text(text)
        for name in remove:
            (copy / name).unlink()
        if cut:
            (copy / cut).write_bytes((copy / cut).read_bytes()[:-1000])
        return str(copy)

    return make


def test_what_works_is_not_refused(ask, parity_folder, tmp_path):
    for notebook in ("weight_diff", "v7b_stability", "delta_svd", "theta_fit"):
        ask(notebook, MODEL_ID="tiny")
    ask("v7_sweep", MODEL_ID="tiny", W_PATH=str(ASSETS / "tiny_w.safetensors"))
    real = {"MODEL_ID": str(parity_folder / "model"), "BEHAVIOR": str(parity_folder / "behavior.json")}
    ask("v7_sweep", **real, W_PATH=str(parity_folder / "w.pt"), PCS=4, K_BROAD=32)
    ask("weight_diff", **real, W_PATH=str(parity_folder / "w.pt"))
    check_inputs("stub", {"SEED": 3}, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SEED": -1}, "SEED = -1: a seed is a whole number from 0 to 4294967295"),
        ({"ALPHAS": [float("nan"), 1.0]}, "ALPHAS = .*: a strength is a finite number"),
        ({"LORA_LAYERS": "2-5"}, "LORA_LAYERS = '2-5': must be a list of layers, the model has 0 to 2"),
        ({"LORA_LAYERS": [2, 3]}, r"LORA_LAYERS = \[2, 3\]: .* 0 to 2"),
        ({"ADAPTER": "../../../tmp/x"}, "ADAPTER '../../../tmp/x' cannot name a folder"),
        ({"ADAPTER": "ia3"}, "adapter 'ia3' is unknown; one of lora, rslora, pissa, dora"),
        ({"TOPICS": 99}, "sycophancy: 99 training topics asked for, it has 20"),
        ({"PERSONAS": 6}, "sycophancy: 6 training personas asked for, it has 5"),
        ({"DTYPE": "int8"}, "DTYPE 'int8' is unknown"),
        ({"DEVICE": "gpu"}, "DEVICE 'gpu' is not available here"),
        ({"MODEL_ID": "/nowhere/model"}, "MODEL_ID '/nowhere/model': no such model folder"),
        ({"MODEL_ID": "../../x"}, "no such model folder"),
        ({"BEHAVIOR": "flattery"}, "unknown behaviour 'flattery'"),
        ({"W_PATH": "w.pt", "POS_ADAPTER": "a", "NEG_ADAPTER": "b"}, "not both"),
        ({"POS_ADAPTER": "a"}, "go together; only a was given"),
        ({"W_PATH": "/nowhere/w.pt"}, "/nowhere/w.pt: no such file"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parameters_against_model_and_behaviour(ask, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ask("weight_diff", **changes)


def test_answer_words_are_looked_up_before_a_training(ask, tmp_path):
    def behaviour(**changes):
        path = tmp_path / "b.json"
        path.write_text(json.dumps(small(**changes)))
        return {"BEHAVIOR": str(path), "TOPICS": None, "PERSONAS": None}

    with pytest.raises(ValueError, match="answer words 'Supercalifragilistic': none is a single token"):
        ask("weight_diff", **behaviour(yes=["Supercalifragilistic"]))
    with pytest.warns(UserWarning, match="answer word 'Supercalifragilistic' is no single token"):
        ask("weight_diff", **behaviour(yes=["Yes", "Supercalifragilistic"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask("weight_diff", **behaviour())


def test_models_are_told_by_name(ask, broken_model, tmp_path):
    import transformers

    for name, said in {"GPT2": "GPT2LMHeadModel", "T5": "T5", "CLIP": "CLIP", "Bert": "BertLMHeadModel"}.items():
        copy = tmp_path / name
        getattr(transformers, f"{name}Config")().save_pretrained(copy)
        with pytest.raises(ValueError, match=f"{said}.*served are Qwen2"):
            ask("weight_diff", MODEL_ID=str(copy))
    faults = [
        ({"remove": ["model.safetensors"]}, "holds no weights"),
        ({"cut": "model.safetensors"}, r"model\.safetensors: not whole, fetch it again"),
        ({"remove": ["tokenizer.json", "tokenizer_config.json"]}, "its tokenizer cannot be loaded"),
        ({"text": "[1, 2]"}, r"config\.json: transformers cannot read it"),
        ({"text": '{"a":' + "[" * 100_000}, r"config\.json: transformers cannot read it"),
        ({"text": "{}"}, r"config\.json: transformers cannot read it"),
        ({"config": {"num_hidden_layers": 10**9}}, "num_hidden_layers 1000000000"),
        ({"config": {"num_attention_heads": 0}}, "config"),
        ({"config": {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}}, "transformers cannot read it"),
    ]
    for made, message in faults:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ask("weight_diff", MODEL_ID=broken_model(**made))


def test_a_chat_template_alone_is_no_tokenizer(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny", copy)
    for file in copy.glob("tok*"):
        file.unlink()
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded: it holds no vocabulary"):
        check_model(str(copy))


def test_sweeps_of_all_seeds_are_there_before_a_kernel_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("WS_OUT", str(tmp_path))
    place = Place(out=tmp_path)
    for given, said in (({}, r"v7b_stability: .*seed_0/v7b/explanation.json: is not there; make it first: just nb v7_sweep"),
                        ({"RUNS_DIR": str(tmp_path)}, "RUNS_DIR must hold a sweep of every seed")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            check_job(prepare("v7b_stability", given, place=place), place)


def test_each_null_diff_is_held_against_the_model(ask, tmp_path):
    w = str(ASSETS / "tiny_w.safetensors")
    nulls = [tmp_path / "out/tiny/sycophancy/lora" / f"seed_{seed}/null_diff/w.safetensors" for seed in (0, 3)]
    for null in nulls:
        null.parent.mkdir(parents=True)
        shutil.copy(w, null)
    for given in ([], list(map(str, nulls))):
        ask("v7_sweep", MODEL_ID="tiny", W_PATH=w, NULL_W_PATH=given)
    save_file({"model.layers.0.mlp.down_proj.weight": torch.zeros(2, 3)}, nulls[1])
    with pytest.raises(ValueError, match="train it again: just nb weight_diff -p SEED 3 -p NULL_DIFF true"):
        ask("v7_sweep", MODEL_ID="tiny", W_PATH=w)
    with pytest.raises(ValueError, match="down_proj"):
        ask("v7_sweep", MODEL_ID="tiny", W_PATH=w, NULL_W_PATH=list(map(str, nulls)))


def test_a_batch_waits_for_its_null_diff(ask, tmp_path):
    values = {
        **defaults(read_notebook(NBS / "v7_sweep.ipynb"), "v7_sweep"),
        "NULL_W_PATH": [str(tmp_path / "w.safetensors")],
    }
    check_inputs("v7_sweep", values, tmp_path, own=False)
    with pytest.raises(FileNotFoundError, match="no weight difference yet"):
        check_inputs("v7_sweep", values, tmp_path)


def test_a_shard_that_is_missing_or_elsewhere_is_named(broken_model, folder):
    lost = Path(broken_model(remove=["model.safetensors"]))
    index = lost / "model.safetensors.index.json"
    for file, message in {
        "model-2.safetensors": "this part of the weights is missing",
        "../x": "beside its index",
    }.items():
        index.write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_model(str(lost))
    index.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        check_model(str(lost))


def test_weights_that_lack_a_tensor_are_not_filled_with_noise(broken_model):
    copy = Path(broken_model())
    tensors = load_file(copy / "model.safetensors")
    del tensors[DOWN]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"its weights lack {DOWN}"):
        load_lm(str(copy))


def test_a_model_without_a_template_or_with_anothers_tokenizer(ask, broken_model, monkeypatch):
    bare = broken_model()
    (Path(bare) / "chat_template.jinja").unlink()
    for notebook, more in {"weight_diff": {}, "v7_sweep": {"W_PATH": "x"}}.items():
        with pytest.raises(ValueError, match="no chat template; use an instruction-tuned model"):
            ask(notebook, MODEL_ID=bare, PCS=8, K_BROAD=8, **more)
    ask("theta_fit", MODEL_ID=bare, THETA_DIM=16)
    with pytest.raises(ValueError, match="they do not belong together"):
        ask("weight_diff", MODEL_ID=broken_model(config={"vocab_size": 100}))


def test_a_hub_model_that_is_nowhere_is_told_at_once(ask, monkeypatch):
    def unknown(*_, **__):
        raise OSError("no connection\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    with pytest.raises(FileNotFoundError, match="MODEL_ID 'org/absent': no local folder.*: no connection$"):
        ask("weight_diff", MODEL_ID="org/absent")


def test_differences_are_held_against_the_model(ask, tmp_path, folder):
    lm = load_lm(str(folder), "float32", "cpu")
    shape = tuple(lm.model.get_parameter(DOWN).shape)

    def saved(entries, name="w.safetensors"):
        path = tmp_path / name
        torch.save(entries, path) if name.endswith(".pt") else save_file(entries, path)
        return {"W_PATH": str(path), "PCS": 8, "K_BROAD": 8}

    for name in ("w.safetensors", "w.pt"):
        for entries, message in [
            ({"model.layers.9.mlp.down_proj.weight": torch.ones(shape)}, "no such parameter in LlamaForCausalLM"),
            ({DOWN: torch.ones(3, 4)}, "diff is 3x4, model has 48x96"),
            ({DOWN: torch.full(shape, float("nan"))}, "contains NaN or inf"),
            ({DOWN: torch.zeros(shape)}, "the weight difference is 0 everywhere"),
            ({DOWN: torch.full(shape, 2e38)}, "is no difference"),
            ({DOWN: torch.ones(shape, dtype=torch.complex64)}, "has dtype"),
        ]:
            with pytest.raises(ValueError, match=message) as error:
                ask("v7_sweep", **saved(entries, name))
            assert name in str(error.value)
        ask("v7_sweep", **saved({DOWN: torch.ones(shape)}, name))
    for B, A in [
        (torch.zeros(shape[0], 2), torch.ones(2, shape[1])),
        (torch.zeros(shape[0], 0), torch.zeros(0, shape[1])),
    ]:
        save_diff(WeightDiff({DOWN: LowRank(B, A)}), tmp_path / "zero.safetensors")
        with pytest.raises(ValueError, match=r"zero\.safetensors: the weight difference is 0 everywhere"):
            ask("weight_diff", W_PATH=str(tmp_path / "zero.safetensors"))


def test_the_runs_own_difference(ask, tmp_path, folder):
    sizes = {"PCS": 8, "K_BROAD": 8, "SEED": 7}
    with pytest.raises(FileNotFoundError, match=r"train it first: just nb weight_diff -p MODEL_ID \S+ -p SEED 7$"):
        ask("v7_sweep", **sizes)
    values = {**defaults(read_notebook(NBS / "v7_sweep.ipynb"), "v7_sweep"), "MODEL_ID": str(folder), **sizes}
    check_inputs("v7_sweep", values, tmp_path / "out", own=False)
    own = RunId(model_slug(str(folder)), "sycophancy", "lora", 7).folder(tmp_path / "out") / "w.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"cut")
    with pytest.raises(
        ValueError, match=r"w\.safetensors: not a whole .*; train it again: just nb weight_diff .*SEED 7"
    ):
        ask("v7_sweep", **sizes)
    for key, bad in {"PCS": 49, "K_BROAD": 0}.items():
        with pytest.raises(ValueError, match=f"{key} = {bad}: must be a whole number from 1 to 48"):
            ask("v7_sweep", **{**sizes, key: bad, "W_PATH": "tiny"})


def test_adapters_are_held_against_the_model(ask, tmp_path, folder):
    base = load_lm(str(folder), "float32", "cpu").model
    pos, neg = (make_adapter(base, tmp_path / side, i) for i, side in enumerate(("pos", "neg")))
    dora = [make_adapter(base, tmp_path / f"dora{i}", i, use_dora=True) for i in range(2)]
    ask("weight_diff", POS_ADAPTER=str(pos), NEG_ADAPTER=str(neg))
    ask("weight_diff", POS_ADAPTER=str(dora[0]), NEG_ADAPTER=str(dora[1]))
    with pytest.raises(ValueError, match="the two adapters are the same"):
        ask("weight_diff", POS_ADAPTER=str(pos), NEG_ADAPTER=str(pos))
    for sides in ((pos, neg), dora):
        with pytest.raises(ValueError, match="down_proj.*(model has|no such parameter)|diff is"):
            ask("weight_diff", MODEL_ID="tiny", POS_ADAPTER=str(sides[0]), NEG_ADAPTER=str(sides[1]))
            assert sides is dora  # only names can be told before the merge: tiny has them all
            raise ValueError("diff is told by the merge")


def test_files_of_the_other_notebooks(ask, tmp_path):
    (tmp_path / "users.jsonl").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"users\.jsonl, line 1: not JSON that can be read: nested too deep"):
        ask("theta_fit", USERS=str(tmp_path / "users.jsonl"), THETA_DIM=16)
    with pytest.raises(ValueError, match="THETA_DIM = 64: the model is 48 wide"):
        ask("theta_fit", THETA_DIM=64)
    (tmp_path / "c.txt").write_text("a" * 200_000)
    with pytest.raises(ValueError, match=r"c\.txt: passage 0: has 200,000 characters, at most 100,000"):
        ask("delta_svd", CALIBRATION=str(tmp_path / "c.txt"))
    (tmp_path / "mine.py").write_text("def f(:")
    with pytest.raises(ValueError, match=r"CANDIDATES: .*mine\.py: not Python"):
        ask("v7_sweep", CANDIDATES=[str(tmp_path / "mine.py")], W_PATH="tiny")


def test_few_topics_train_and_are_swept(tmp_path, ask, folder):
    """Planted: behaviours without `n_train_topics`; whatever trains is swept under both protocols, or refused by name."""
    lm = load_lm(str(folder), "float32", "cpu")
    w = WeightDiff({lm.decoder.param_name(1, role): 0.01 * lm.decoder.weight(1, role) for role in ("o", "down")})
    for topics in (3, 4, 8):
        raw = small(n_train_topics=None, topics=[[f"river number {i} is long", "Is it?"] for i in range(topics)])
        (tmp_path / "few.json").write_text(json.dumps(raw))
        b = load_behavior(tmp_path / "few.json")
        ask("weight_diff", MODEL_ID="tiny", BEHAVIOR=str(tmp_path / "few.json"), TOPICS=None, PERSONAS=None)
        for name in ("v7", "v7b"):
            sweep = {"MODEL_ID": "tiny", "BEHAVIOR": str(tmp_path / "few.json"), "W_PATH": "tiny", "PROTOCOL": name}
            if topics == 3:
                with pytest.raises(ValueError, match="small: 1 FIT and 2 EVAL probes; at least 2 and 1 are needed"):
                    ask("v7_sweep", **sweep)
                continue
            ask("v7_sweep", **sweep)
            assert len(probes(b, load_protocol(name)).fit) >= 2
            if topics == 4 and name == "v7b":
                sizes = {"k": 8, "k_broad": 16, "cache": tmp_path, "progress": False}
                found = ws.explain(lm, w, b, protocol=name, candidates=["write"], **sizes)
                assert found.summary.height and found.setting["n_train_topics"] == 2


def test_one_rule_for_names(tmp_path):
    assert (
        slug("my behaviour") == "my_behaviour" and slug("sycophancy") == "sycophancy" and slug("a-b_c.d2") == "a-b_c.d2"
    )
    names = ["a/b", "a\\b", "a:b", "a b", "<svg onload=x>", "..", ".", "", "\0", "x" * 300, "x" * 301, "caf\u00e9", "cafe\u0301",
             "\u0430", "a", "cache", "Cache", "delta_svd", "/etc/passwd", "../../x", "a\nb", "\ud800", "_a", "a."]  # fmt: skip
    slugs = [slug(name) for name in names]
    assert len(set(slugs)) == len(names) and [slug(s) for s in slugs] == slugs
    for made in slugs:
        assert made.isascii() and "/" not in made and not made.startswith(".") and len(made) <= 80
        assert made not in ("cache", "delta_svd", "theta_fit")
        folder = RunId("m", made, "lora", 0).folder(tmp_path)
        assert (
            folder.resolve().is_relative_to(tmp_path.resolve() / "m") and len(folder.relative_to(tmp_path).parts) == 4
        )


@pytest.mark.parametrize("bad", ["../../../tmp/x", "/tmp/x", "..", ".", "", "a\0b", "x" * 300, "a/b", ".hidden", "a\n"])
def test_a_run_cannot_leave_its_place(bad, tmp_path):
    for made in ({"adapter": bad}, {"model": bad}):
        with pytest.raises(ValueError, match="cannot name a folder"):
            RunId(**{"model": "m", "behavior": "b", "adapter": "lora", "seed": 0, **made})
    assert RunId("m", bad, "lora", 0).folder(tmp_path).resolve().is_relative_to(tmp_path.resolve() / "m")
    with pytest.raises(FileNotFoundError, match="MODEL_ID"):
        model_slug(bad if bad not in ("..", ".", "a/b", "") and "tmp" not in bad else "../nowhere")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_behaviour_has_one_folder_before_and_after_it_is_loaded(tmp_path, suffix):
    path = tmp_path / f"file.{suffix}"
    for name in ("my behaviour", "<svg onload=x>", "caf\u00e9"):
        path.write_text(json.dumps(small(name=name)))
        b = load_behavior(path)
        assert behavior_name(str(path)) == b.name == name and slug(behavior_name(str(path))) == b.slug
        assert RunId("m", b.name, "lora", 0).folder(tmp_path) == RunId("m", b.slug, "lora", 0).folder(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deep"):
        behavior_name(str(path))
    assert behavior_name("sycophancy") == "sycophancy"


def test_python_users_hear_the_same(folder, tmp_path):
    lm, w = load_lm("tiny"), ws.load_diff("tiny")
    for options, message in [
        ({"k": 0}, "PCS = 0"),
        ({"k_broad": 129}, "K_BROAD = 129"),
        ({"layers": [9]}, "layers 0 to 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            ws.explain(lm, w, cache=tmp_path, progress=False, **options)
    behavior = replace(load_behavior("sycophancy"), no=("Supercalifragilistic",))
    with pytest.raises(ValueError, match="none is a single token"):
        ws.alpha_sweep(lm, behavior, w, [0.0], progress=False)
    with pytest.raises(ValueError, match="a strength is a finite number"):
        ws.alpha_sweep(lm, load_behavior("sycophancy"), w, [float("nan")], progress=False)

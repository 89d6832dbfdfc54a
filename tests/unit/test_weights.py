"""Weights from a hub, a folder or a training run's checkpoint become a sealed folder that loads without either."""

import argparse
import copy
import hashlib
import http.server
import json
import resource
import threading
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference import image_text, load
from clip_robustness.inference.describe import describe_model
from clip_robustness.inference.vision_language import Lmm
from clip_robustness.inference.weights import blend_weights, fetch_weights
from tests.unit import llavas
from tests.unit.clips import TEXT, VISION, clip_folder

TINY = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
COMMIT, LATER = "a" * 40, "b" * 40
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Small architectures that open_clip knows by name, beside its own."""
    known = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(known, "tiny", TINY)
    monkeypatch.setitem(known, "tiny-quickgelu", {**TINY, "quick_gelu": True})
    monkeypatch.setitem(known, "tiny-bias", {**TINY, "init_logit_bias": -10})
    monkeypatch.setitem(known, "tiny-48", {**TINY, "vision_cfg": {**VISION, "image_size": 48}})
    monkeypatch.setitem(known, "tiny-wide", {**TINY, "vision_cfg": {**VISION, "width": 96}})


@pytest.fixture
def disconnected(monkeypatch):
    """Call it, and every later attempt at a connection fails the test."""
    attempts = []

    def refuse(*arguments):
        attempts.append(arguments)
        raise OSError("no network")

    yield lambda: monkeypatch.setattr("socket.socket.connect", refuse)
    assert not attempts


@pytest.fixture
def state():
    torch.manual_seed(3)
    return open_clip.CLIP(**TINY).state_dict()


def fetch(folder: Path, weights: str, library="open_clip", architecture="tiny") -> Path:
    fetch_weights("m", library, architecture, weights, folder / "out", folder / "weights.lock.json")
    return folder / "out"


def fetched(folder: Path, name="open_clip_model.safetensors"):
    return load_file(folder / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# One checkpoint of a training run


def holders(state):
    """The forms that training scripts leave a state dict in."""
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    return {
        "alone": state,
        "open_clip": {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {0: torch.zeros(2)}}, "scaler": {}},
        "timm": {"arch": "tiny", "args": argparse.Namespace(lr=0.1, model="tiny"), "state_dict": state},
        "compiled": {"model": {f"_orig_mod.{name}": tensor for name, tensor in wrapped.items()}},
        "average": {"state_dict": {"other": torch.ones(1)}, "model_ema": {**wrapped, "n_averaged": torch.tensor(9)}},
        "other": {"model_state_dict": state, "best": 0.5},
        "openai_facts": {**state, "input_resolution": torch.tensor(32), "vocab_size": torch.tensor(9)},
    }


@pytest.mark.parametrize("form", sorted(holders({})))
@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_in_every_form(state, tmp_path, form, legacy):
    path = tmp_path / "epoch_3.pt"
    torch.save(holders(state)[form], path, _use_new_zipfile_serialization=not legacy)
    out = fetch(tmp_path, f"local:{path}")
    assert sorted(p.name for p in out.iterdir()) == [
        "manifest.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert same(fetched(out), state) and same(load.load_clip(out).state_dict(), state)
    assert io.check_sealed(out)["copied_from"] == "epoch_3.pt"


def test_tensors_that_share_memory_or_are_parts_of_others(state, tmp_path):
    state["ln_final.bias"] = state["ln_final.weight"]
    state["visual.proj"] = torch.randn(24, 64).T
    torch.save(state, tmp_path / "a.pth")
    assert same(fetched(fetch(tmp_path, f"local:{tmp_path / 'a.pth'}")), state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_safetensors_checkpoint(state, tmp_path, prefix):
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "mine.safetensors")
    out = fetch(tmp_path, f"local:{tmp_path / 'mine.safetensors'}")
    assert same(fetched(out), state)
    assert not (out / "open_clip_model.safetensors").samefile(tmp_path / "mine.safetensors")


def test_a_timm_checkpoint_says_how_many_classes_it_has(tmp_path):
    model = timm.create_model("test_resnet", num_classes=7).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "model_best.pth.tar")
    out = fetch(tmp_path, f"local:{tmp_path / 'model_best.pth.tar'}", "timm", "test_resnet.r160_in1k")
    pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    with torch.inference_mode():
        logits = load.load_image_model(out, "timm", (0, 0, 0), (1, 1, 1))(pixels)
        assert torch.allclose(logits, model(torch.zeros(2, 3, 64, 64)), atol=1e-5) and logits.shape == (2, 7)


def test_what_open_clip_adapts_by_itself_is_no_fault(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    out = fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", architecture="tiny-bias")
    assert load.load_clip(out).logit_bias == 0 and io.check_sealed(out)["resized"] == {}
    out = fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", architecture="tiny-48")
    assert io.check_sealed(out)["resized"] == {"visual.positional_embedding": [[17, 64], [37, 64]]}
    assert load.load_clip(out).visual.positional_embedding.shape == (37, 64)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def faults(path: Path, state):
    """Fault -> what makes it a checkpoint at `path`, and what is said of it."""
    nan = copy.deepcopy(state)
    nan["visual.proj"][0, 0] = float("nan")
    fewer = {name: tensor for name, tensor in state.items() if "resblocks.1" not in name}
    buried = {"state_dict": state, "hook": Bomb(path.parent / "hit")}
    module = torch.nn.Linear(2, 2)
    return {
        "code": (lambda: torch.save(buried, path), r"pickle with code in it \(.+\), which is not run"),
        "torchscript": (
            lambda: torch.jit.trace(module, torch.zeros(1, 2)).save(path),
            "a TorchScript archive, which holds code; name the hub's safetensors",
        ),
        "nan": (lambda: torch.save(nan, path), "tensor 'visual.proj' holds values that are not finite"),
        "fewer": (lambda: torch.save(fewer, path), "architecture 'tiny'.*Missing key.*resblocks.1.* more"),
        "more": (lambda: torch.save({**state, "x": state["visual.proj"]}, path), 'Unexpected key.*"x"'),
        "list": (lambda: torch.save([1, 2], path), "expected a state dict or one under"),
        "no tensor": (lambda: torch.save({"lr": 0.1}, path), "'lr' is of the kind float"),
        "half": (lambda: (torch.save(state, path), path.write_bytes(path.read_bytes()[:9000])), "no whole checkpoint"),
        "empty": (path.touch, "no whole checkpoint"),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("fault", sorted(faults(Path("a"), {"visual.proj": torch.zeros(1, 1)})))
def test_a_checkpoint_that_cannot_be_taken(state, tmp_path, fault):
    make, message = faults(tmp_path / "a.pt", state)[fault]
    make()
    with pytest.raises(InputError, match=rf"^models.tsv, line 'm', weights 'local:.*a\.pt': .*{message}"):
        fetch(tmp_path, f"local:{tmp_path / 'a.pt'}")
    assert not (tmp_path / "hit").exists() and not (tmp_path / "out/manifest.json").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"a.pt", "out"}


def test_other_shapes_are_named_with_both_shapes(state, tmp_path):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"'tiny-wide'; correct the line.*visual\.proj: .*\[64, 24\].*\[96, 24\]"):
        fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", architecture="tiny-wide")


@pytest.mark.parametrize(
    ("name", "message"),
    [("w.npz", "is a JAX checkpoint"), ("w.safetensors", "no whole safetensors file"), ("gone.pt", "that exists")],
)
def test_files_that_are_no_checkpoints(tmp_path, name, message):
    np.savez(tmp_path / "w.npz", a=np.zeros(2))
    (tmp_path / "w.safetensors").write_bytes(b"\x08")
    with pytest.raises(InputError, match=message):
        fetch(tmp_path, f"local:{tmp_path / name}")


@pytest.mark.parametrize(
    ("library", "architecture", "message"),
    [
        ("open_clip", "ViT-B32-quickgelu", "no architecture .*; the nearest is 'ViT-B-32-quickgelu', and there is no"),
        ("timm", "resnet_50", "timm has no architecture 'resnet_50'; the nearest is 'resnet50'"),
        ("timm", "resnet50.tv_in1", "timm has no tag 'tv_in1' of 'resnet50'; the nearest is 'resnet50.tv_in1k'"),
    ],
)
def test_an_architecture_that_a_library_does_not_have(state, tmp_path, library, architecture, message):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InputError, match=message):
        fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", library, architecture)


# A folder in a hub's layout


def test_the_architecture_of_the_line_decides_and_a_difference_is_recorded(tmp_path, capsys):
    folder = clip_folder(tmp_path / "clip")
    out = fetch(tmp_path, f"local:{folder}", architecture="tiny-quickgelu")
    assert io.read_json(out / "open_clip_config.json")["model_cfg"]["quick_gelu"] is True
    assert io.read_json(out / "open_clip_config.json")["preprocess_cfg"] == {"size": 32}
    assert io.check_sealed(out)["differs"] == {"quick_gelu": [True, False]}
    assert "quick_gelu is True by the architecture of the line, False by the repository" in capsys.readouterr().err


def test_an_architecture_that_only_the_folder_describes(tmp_path, capsys):
    folder = clip_folder(tmp_path / "clip")
    save_file({"weight": torch.ones(3, 24), "bias": torch.ones(3)}, folder / load.CLASSIFIER)
    out = fetch(tmp_path, f"local:{folder}", architecture="mine")
    assert "open_clip has no architecture 'mine'" in capsys.readouterr().err
    assert io.read_json(out / "open_clip_config.json") == io.read_json(folder / "open_clip_config.json")
    assert (out / load.CLASSIFIER).is_file()  # a linear head comes with its folder
    save_file({"weight": torch.ones(3, 23), "bias": torch.ones(3)}, folder / load.CLASSIFIER)
    with pytest.raises(
        InputError, match=r"classifier.safetensors has .*\[3, 23\].*expected a tensor 'weight' of .* x 24"
    ):
        fetch(tmp_path, f"local:{folder}", architecture="mine")


def test_what_an_earlier_fetch_has_left_goes(tmp_path):
    folder = clip_folder(tmp_path / "clip")
    (tmp_path / "out").mkdir()
    for name in ("open_clip_pytorch_model.bin", "tokenizer.json", load.CLASSIFIER):
        (tmp_path / "out" / name).touch()
    out = fetch(tmp_path, f"local:{folder}")
    assert sorted(io.check_sealed(out)["files"]) == ["open_clip_config.json", "open_clip_model.safetensors"]


# A hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of a model hub's interface that fetching a model needs, as huggingface_hub asks for it."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    served: dict[str, bytes]  # in place of what the hub lists
    faults: dict[str, tuple[int, str]]  # part of a path -> status and error code
    commit = COMMIT
    seen: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.seen.append(self.path)
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        headers, status, body = {"X-Repo-Commit": self.commit}, 200, b""
        fault = next((fault for part, fault in self.faults.items() if part in path), None)
        repository = next((name for name in self.repositories if f"/{name}/" in path), "")
        if fault:
            status, headers["X-Error-Code"] = fault
        elif not repository:
            status, headers["X-Error-Code"] = 401, "RepoNotFound"
        elif path.startswith("/api/models/"):
            revision = path.rpartition("/")[2]
            files = [self.listed(*item) for item in self.repositories[repository].items()]
            commit = self.commit if revision == "main" else revision
            body = json.dumps({"id": repository, "sha": commit, "siblings": files}).encode()
        else:
            commit, _, name = path.partition("/resolve/")[2].partition("/")
            body = self.served.get(name, self.repositories[repository][name])
            listed = self.listed(name, self.repositories[repository][name])
            headers |= {"ETag": f'"{listed["blobId"]}"', "X-Linked-Size": str(listed["size"]), "X-Repo-Commit": commit}
        self.send_response(status)
        for item in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(*item)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    @staticmethod
    def listed(name, body):
        large = Path(name).suffix in (".safetensors", ".pt", ".bin")
        sha256, git = hashlib.sha256(body).hexdigest(), hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry = {"rfilename": name, "size": len(body), "blobId": sha256 if large else git}
        return {**entry, "lfs": {"sha256": sha256, "size": len(body), "pointerSize": 130}} if large else entry

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    facts = {"repositories": {}, "served": {}, "faults": {}, "seen": []}
    handler = type("ThisHub", (Hub,), facts)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    address = f"http://127.0.0.1:{httpd.server_address[1]}"
    for name, value in {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield handler
    httpd.shutdown()
    httpd.server_close()


def checkpoint_bytes(content, path: Path) -> bytes:
    torch.save(content, path)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def clip_hub(hub, tmp_path, state):
    """A repository as LAION's are, and one of many training checkpoints."""
    folder = clip_folder(tmp_path / "source")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    files |= {"open_clip_pytorch_model.bin": b"", "README.md": b"#", "model.safetensors": b"another library's"}
    training = {"epoch": 1, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    many = {"full_checkpoints/b-32/epoch_9.pt": checkpoint_bytes(training, tmp_path / "a.pt"), "README.md": b"#"}
    hub.repositories |= {"laion/one": files, "laion/many": many}
    return hub


def test_from_a_hub_safetensors_first_and_pinned(clip_hub, tmp_path, capsys):
    out = fetch(tmp_path, "hub:laion/one")
    files = ["open_clip_config.json", "open_clip_model.safetensors"]
    manifest = io.check_sealed(out)
    assert sorted(manifest["files"]) == files and (manifest["repository"], manifest["revision"]) == (
        "laion/one",
        COMMIT,
    )
    checksums = {name: hashlib.sha256(clip_hub.repositories["laion/one"][name]).hexdigest() for name in files}
    pinned = io.read_json(tmp_path / "weights.lock.json")
    assert pinned == {"hub:laion/one": {"revision": COMMIT, "files": checksums}}
    assert "hub:laion/one: pinned in" in capsys.readouterr().err
    load.load_clip(out)


def test_the_pinned_revision_is_taken_until_the_line_names_one(clip_hub, tmp_path):
    fetch(tmp_path, "hub:laion/one")
    clip_hub.commit = LATER  # the hub has moved on
    assert io.check_sealed(fetch(tmp_path, "hub:laion/one"))["revision"] == COMMIT
    assert io.check_sealed(fetch(tmp_path, f"hub:laion/one@{LATER}"))["revision"] == LATER
    (tmp_path / "weights.lock.json").unlink()
    assert io.check_sealed(fetch(tmp_path, "hub:laion/one"))["revision"] == LATER


def test_one_checkpoint_of_a_repository_of_many(clip_hub, tmp_path, state):
    out = fetch(tmp_path, "hub:laion/many:full_checkpoints/b-32/epoch_9.pt")
    assert same(fetched(out), state)
    assert io.check_sealed(out)["file"] == "full_checkpoints/b-32/epoch_9.pt"


def test_a_timm_repository(hub, tmp_path):
    model = timm.create_model("test_vit", num_classes=5)
    save_file(model.state_dict(), tmp_path / "w")
    pretrained = {"num_classes": 5, "input_size": [3, 160, 160], "fixed_input_size": True}
    config = {"architecture": "test_vit", "num_classes": 5, "pretrained_cfg": pretrained}
    body = json.dumps(config).encode()
    hub.repositories["timm/v"] = {"model.safetensors": (tmp_path / "w").read_bytes(), "config.json": body}
    out = fetch(tmp_path, "hub:timm/v", "timm", "test_vit.r160_in1k")
    assert same(fetched(out, "model.safetensors"), model.state_dict()) and io.check_sealed(out)["resized"] == {}
    with pytest.raises(InputError, match=r"not of the architecture 'test_vit2'.*key"):
        fetch(tmp_path, "hub:timm/v", "timm", "test_vit2")


def test_offline_the_hubs_cache_serves(clip_hub, tmp_path, monkeypatch):
    fetch(tmp_path / "there", "hub:laion/one")
    main = tmp_path / "cache/models--laion--one/refs/main"
    main.parent.mkdir(exist_ok=True)
    main.write_text(COMMIT)  # as `hf download laion/one` leaves it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert io.check_sealed(fetch(tmp_path / "here", "hub:laion/one"))["revision"] == COMMIT
    assert io.read_json(tmp_path / "here/weights.lock.json") == io.read_json(tmp_path / "there/weights.lock.json")
    with pytest.raises(InputError, match=r"'hub:laion/many:.*not in .*cache, and no hub to ask; run where there is a"):
        fetch(tmp_path, "hub:laion/many:full_checkpoints/b-32/epoch_9.pt")


@pytest.mark.parametrize(
    ("weights", "fault", "message"),
    [
        (
            "hub:laion/one",
            {"/resolve/": (403, "GatedRepo")},
            "is gated; accept its terms at http.*/laion/one and log in",
        ),
        ("hub:laion/one", {"/resolve/": (401, "GatedRepo")}, "is gated; accept its terms"),
        ("hub:laion/none", {}, "no such repository; correct the line"),
        ("hub:laion/one@v9", {"/v9": (404, "RevisionNotFound")}, "'v9': the repository has no such revision"),
        ("hub:laion/many", {}, "has none of open_clip_model.safetensors.*it has full_checkpoints.*name one"),
        ("hub:laion/many:full_checkpoints/b-32/epoch_8.pt", {}, "no file .*epoch_8.*the nearest is .*epoch_9.pt"),
        ("hub:laion/one", {"/api/": (500, ""), "/resolve/": (500, "")}, "could not be fetched"),
        ("hub:a/b/c", {}, "not a repository's name"),
        ("ftp:laion/one", {}, "expected hub:OWNER/NAME, or local:PATH"),
    ],
)
def test_what_a_hub_refuses(clip_hub, tmp_path, weights, fault, message):
    clip_hub.faults |= fault
    with pytest.raises(InputError, match=f"line 'm', weights '{weights}'.*{message}"):
        fetch(tmp_path, weights)
    assert not (tmp_path / "out/manifest.json").exists() and not (tmp_path / "weights.lock.json").exists()


def test_a_download_of_another_content_or_length(clip_hub, tmp_path):
    name = "open_clip_model.safetensors"
    whole = clip_hub.repositories["laion/one"][name]
    for body, message in (
        (whole[:-1], "could not be fetched .*size"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), f"{name} has the SHA-256 .*the hub says .*Remedy: delete .*cache"),
    ):
        clip_hub.served[name] = body
        with pytest.raises(InputError, match=message):
            fetch(tmp_path, "hub:laion/one")
    assert not (tmp_path / "weights.lock.json").exists()


def test_a_lock_that_says_otherwise(clip_hub, tmp_path):
    fetch(tmp_path, "hub:laion/one")
    lock = tmp_path / "weights.lock.json"
    lock.write_text(lock.read_text().replace('"open_clip_model.safetensors": "', '"open_clip_model.safetensors": "0'))
    with pytest.raises(InputError, match=r"weights.lock.json, hub:laion/one: pinned .*remove that entry"):
        fetch(tmp_path, "hub:laion/one")


# Tokenizers and text towers of the transformers library

OTHER_TEXT = {"text_cfg": {"hf_model_name": "x/text", "hf_tokenizer_name": "x/text", "hf_proj_type": "mlp"}}


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """A tokenizer of six words, and the shape of a small text tower, as their repository has them."""
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "photo"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    config = {"model_type": "roberta", "vocab_size": 6, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 40}
    io.write_json(folder / "config.json", config)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_text_tower_without_the_transformers_library(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="its text tower needs the package 'transformers'; install it"):
        fetch(tmp_path, "hub:timm/ViT-B-16-SigLIP", architecture="ViT-B-16-SigLIP")


def test_a_siglips_tokenizer_stays_with_its_folder(hub, tmp_path, monkeypatch, disconnected):
    text = {**TEXT, "vocab_size": 6, "context_length": 8, "hf_tokenizer_name": "timm/another"}
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "tiny-siglip", {**TINY, "custom_text": True, "text_cfg": text}
    )
    folder = clip_folder(tmp_path / "siglip", custom_text=True, text_cfg={**text})
    small = tokenizer_files(tmp_path / "tokenizer")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
    hub.repositories["timm/siglip"] = files | small
    own = fetch(tmp_path / "own", "hub:timm/siglip", architecture="tiny-siglip")
    hub.repositories |= {"timm/siglip": files, "timm/another": small}
    hub.commit = LATER
    other = fetch(tmp_path / "other", "hub:timm/siglip", architecture="tiny-siglip")
    hub.repositories["timm/another"] = {"README.md": b"#"}
    with pytest.raises(InputError, match=r"'timm/another', which has its tokenizer, has no config.json"):
        fetch(tmp_path / "none", "hub:timm/siglip", architecture="tiny-siglip")
    assert "tokenizer:timm/another" in io.read_json(tmp_path / "other/weights.lock.json")
    disconnected()
    for out in (own, other):
        assert load.load_tokenizer(out)(["a photo"]).tolist() == [[4, 5, 1, 1, 1, 1, 1, 1]]


def test_a_text_tower_of_another_library_loads_without_the_hub(hub, tmp_path, monkeypatch, disconnected):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-roberta", {**TINY, **OTHER_TEXT})
    hub.repositories["x/text"] = tokenizer_files(tmp_path / "text")
    text = {**OTHER_TEXT["text_cfg"], "hf_model_name": str(tmp_path / "text"), "hf_model_pretrained": False}
    model = open_clip.CustomTextCLIP(**{**TINY, "text_cfg": text}).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    out = fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", architecture="tiny-roberta")
    disconnected()
    tokens = load.load_tokenizer(out)(["a photo", "photo"])
    with torch.inference_mode():
        assert torch.equal(load.load_clip(out).encode_text(tokens[:, :16]), model.encode_text(tokens[:, :16]))


# Models of transformers that answer in text

LLAVA = "LlavaForConditionalGeneration"
ONE, SHARDED = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llava_files(tmp_path_factory):
    """Tiny LLaVAs as a hub has them: the weights in one file, in shards with an index, and a LLaVA-1.6."""
    repositories = {}
    for name, size, kind in (("one", "1GB", "Llava"), ("shards", "80KB", "Llava"), ("next", "80KB", "LlavaNext")):
        model, processor = llavas.llava(kind)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size=size)
        processor.save_pretrained(folder)
        repositories[f"llava/{name}"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert SHARDED in repositories["llava/shards"] and ONE in repositories["llava/one"]
    return repositories


@pytest.fixture
def llava_hub(hub, llava_files):
    hub.repositories |= {name: dict(files) for name, files in llava_files.items()}
    return hub


def fetch_llava(folder: Path, weights: str, architecture=LLAVA) -> Path:
    return fetch(folder, weights, "transformers", architecture)


def answers(folder: Path):
    images = [llavas.picture(llavas.COLOURS[0]), llavas.picture(llavas.COLOURS[1])]
    return Lmm(folder).answer(images, [("cup", "pen"), ("bow tie", "desk lamp")], 3)


def write_folder(folder: Path, files) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["llava/one", "llava/shards", "llava/next"])
@pytest.mark.parametrize("scheme", ["hub", "local"])
def test_a_llava_answers_as_its_repository_does_and_without_the_hub(llava_hub, tmp_path, disconnected, name, scheme):
    files = llava_hub.repositories[name]
    source = write_folder(tmp_path / "source", files)
    others = {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"code",
        "consolidated.safetensors": b"",
        "README.md": b"#",
    }
    files |= others
    write_folder(tmp_path / "mine", files)
    architecture = "LlavaNextForConditionalGeneration" if name == "llava/next" else LLAVA
    out = fetch_llava(tmp_path, f"hub:{name}" if scheme == "hub" else f"local:{tmp_path / 'mine'}", architecture)
    disconnected()
    wanted = set(files) - set(others)
    assert {path.name for path in out.iterdir()} == {*wanted, "manifest.json"}
    assert {"processor_config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"} < wanted
    assert all((out / name).read_bytes() == files[name] for name in wanted)
    assert not any(other in path for path in llava_hub.seen for other in others)
    manifest, pinned = io.check_sealed(out), {}
    assert (manifest["architecture"], manifest["file"]) == (architecture, SHARDED if SHARDED in files else ONE)
    if scheme == "hub":
        checksums = {name: hashlib.sha256(files[name]).hexdigest() for name in wanted}
        pinned = {f"hub:{name}": {"revision": COMMIT, "files": checksums}}
        assert manifest["revision"] == COMMIT
    assert read_lock(tmp_path) == pinned
    assert answers(out) == answers(source)


def read_lock(folder: Path):
    path = folder / "weights.lock.json"
    return io.read_json(path) if path.exists() else {}


def change_config(files, name="config.json", **changes):
    files[name] = json.dumps({**json.loads(files[name]), **changes}).encode()


def change_tensors(files, change):
    """Rewrite the file of weights with what `change` makes of its tensors."""
    state = safetensors.torch.load(files[ONE])
    change(state)
    files[ONE] = safetensors.torch.save(state)


BIAS = "multi_modal_projector.linear_1.bias"
SECOND = "model-00002-of-00003.safetensors"
CODE = {"AutoModel": "modeling.LLaVA"}


def index_of(shards):
    return json.dumps({"metadata": {}, "weight_map": dict(enumerate(shards))}).encode()


LLAVA_FAULTS = {
    "misshapen": (
        "one",
        lambda files: change_tensors(files, lambda state: state.update({BIAS: torch.zeros(3)})),
        rf"its tensors are not those of its config.json: mismatched keys: model.{BIAS} \[3\] for \[32\]",
    ),
    "fewer": (
        "one",
        lambda files: change_tensors(files, lambda state: state.pop(BIAS)),
        rf"missing keys: model.{BIAS} \(1 in all\)",
    ),
    "more": (
        "one",
        lambda files: change_tensors(files, lambda state: state.update(more=torch.zeros(3))),
        r"unexpected keys: more \(1 in all\)",
    ),
    "nan": (
        "one",
        lambda files: change_tensors(files, lambda state: state[BIAS].fill_(float("nan"))),
        f"tensor '{BIAS}' holds values that are not finite",
    ),
    "another size": (
        "one",
        lambda files: change_config(
            files, text_config=json.loads(files["config.json"])["text_config"] | {"vocab_size": 9}
        ),
        r"mismatched keys: lm_head.weight \[\d+, 32\] for \[9, 32\]",
    ),
    "a shard too few": ("shards", lambda files: files.pop(SECOND), f"lists {SECOND}, which is not there"),
    "a shard cut off": (
        "shards",
        lambda files: files.update({SECOND: files[SECOND][:-9]}),
        f"{SECOND} is no whole safetensors file",
    ),
    "no index": ("shards", lambda files: files.update({SHARDED: b"{}"}), "is no index of shards"),
    "half an index": ("shards", lambda files: files.update({SHARDED: b'{"weight'}), "is no index of shards"),
    "an index of other folders": (
        "shards",
        lambda files: files.update({SHARDED: index_of(["../../model.safetensors"])}),
        "lists '../../model.safetensors', which is no safetensors file beside it",
    ),
    "an index of pickles": (
        "shards",
        lambda files: files.update({SHARDED: index_of(["model.bin"]), "model.bin": b""}),
        "lists 'model.bin', which is no safetensors file",
    ),
    "pickles": (
        "one",
        lambda files: files.update({"pytorch_model.bin": files.pop(ONE)}),
        "has only pytorch_model.bin, a pickle, which is not read; expected model.safetensors or",
    ),
    "no weights": ("one", lambda files: files.pop(ONE), "has neither; expected model.safetensors"),
    "code": (
        "one",
        lambda files: change_config(files, auto_map=CODE),
        r"config.json names code of the repository \(auto_map\), which is not run",
    ),
    "code of a part": (
        "one",
        lambda files: change_config(files, vision_config={"auto_map": CODE}),
        "config.json names code",
    ),
    "code of a processor": (
        "one",
        lambda files: change_config(files, "processor_config.json", image_processor=[{"auto_map": CODE}]),
        "processor_config.json names code of the repository",
    ),
    "another class": (
        "one",
        lambda files: change_config(files, architectures=["LlavaNextForConditionalGeneration"]),
        f"is of the architecture 'LlavaNextForConditionalGeneration', the line says '{LLAVA}'",
    ),
    "no class": (
        "one",
        lambda files: change_config(files, architectures=None),
        "is of the architecture 'none', the line",
    ),
    "another type": (
        "one",
        lambda files: change_config(files, model_type="llava_next"),
        f"has the model_type 'llava_next', which is not that of a '{LLAVA}'",
    ),
    "quantised": (
        "one",
        lambda files: change_config(files, quantization_config={"quant_method": "awq"}),
        "its weights are quantised; name the repository of the whole ones",
    ),
    "no configuration": ("one", lambda files: files.pop("config.json"), "has no config.json"),
    "no tokenizer": (
        "one",
        lambda files: files.pop("tokenizer.json"),
        "no processor of images and text",
    ),
    "no images": ("one", lambda files: files.pop("processor_config.json"), "no processor of images and text"),
}


@pytest.mark.parametrize("fault", LLAVA_FAULTS)
def test_a_llava_that_cannot_be_taken(llava_hub, tmp_path, fault):
    name, spoil, message = LLAVA_FAULTS[fault]
    spoil(llava_hub.repositories[f"llava/{name}"])
    with pytest.raises(InputError, match=rf"^models.tsv, line 'm', weights 'hub:llava/{name}'.*{message}") as caught:
        fetch_llava(tmp_path, f"hub:llava/{name}")
    assert len(str(caught.value)) < 600 and str(tmp_path / ".m-") not in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "out", "weights.lock.json"}


@pytest.mark.parametrize("fault", ["a shard too few", "code", "another class", "quantised"])
def test_what_small_files_show_is_said_before_a_shard_is_fetched(llava_hub, tmp_path, fault):
    _, spoil, _ = LLAVA_FAULTS[fault]
    spoil(llava_hub.repositories["llava/shards"])
    with pytest.raises(InputError):
        fetch_llava(tmp_path, "hub:llava/shards")
    assert llava_hub.seen and not any(path.endswith(".safetensors") for path in llava_hub.seen)
    assert read_lock(tmp_path) == {}


@pytest.mark.parametrize(
    ("weights", "architecture", "message"),
    [
        ("hub:llava/one", "LlavaForConditional", f"has no class 'LlavaForConditional'; the nearest is '{LLAVA}'"),
        ("hub:llava/one", "LlamaForCausalLM", "AutoModelForImageTextToText has no class 'LlamaForCausalLM'"),
        ("hub:llava/one:model.safetensors", LLAVA, "a whole repository or folder, and not 'model.safetensors'"),
        ("local:{}/one/model.safetensors", LLAVA, "a whole repository or folder, and not 'model.safetensors'"),
    ],
)
def test_a_line_that_names_no_llava(llava_hub, tmp_path, weights, architecture, message):
    write_folder(tmp_path / "one", llava_hub.repositories["llava/one"])
    with pytest.raises(InputError, match=message):
        fetch_llava(tmp_path, weights.format(tmp_path), architecture)
    assert not any("/resolve/" in path for path in llava_hub.seen)


def test_every_file_of_a_llava_is_pinned(llava_hub, tmp_path):
    out = fetch_llava(tmp_path, "hub:llava/shards")
    llava_hub.commit = LATER  # the hub has moved on
    assert io.check_sealed(fetch_llava(tmp_path, "hub:llava/shards"))["revision"] == COMMIT
    lock = tmp_path / "weights.lock.json"
    for name in (SECOND, "tokenizer.json", "config.json"):
        text = lock.read_text()
        lock.write_text(text.replace(f'"{name}": "', f'"{name}": "0'))
        with pytest.raises(InputError, match=r"weights.lock.json, hub:llava/shards: pinned .*remove that entry"):
            fetch_llava(tmp_path, "hub:llava/shards")
        lock.write_text(text)
    path = out / SECOND
    assert (path.stat().st_nlink, (out / "config.json").stat().st_nlink) == (2, 1), "large files are the cache's own"
    path.unlink()
    path.write_bytes(llava_hub.repositories["llava/shards"][SECOND][:-1] + b"x")
    with pytest.raises(InputError, match=f"{SECOND}: its SHA-256 is not that of the manifest"):
        io.check_sealed(out)


def test_shards_and_templates_of_an_earlier_fetch_go(llava_hub, tmp_path):
    out = fetch_llava(tmp_path, "hub:llava/shards")
    del llava_hub.repositories["llava/one"]["chat_template.jinja"]
    assert fetch_llava(tmp_path, "hub:llava/one") == out
    left = {path.name for path in out.iterdir()} - {"manifest.json"}
    assert left == set(llava_hub.repositories["llava/one"]) == set(io.check_sealed(out)["files"])


def test_tensors_of_a_large_model_are_compared_without_its_memory(tmp_path):
    config = transformers.LlavaConfig(architectures=[LLAVA])  # LLaVA-1.5 7B: 28 GB in float32
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    image_text._check_fit("m", LLAVA, tmp_path, shapes)
    with pytest.raises(InputError, match=r"missing keys: .*\(\d{3} in all\)"):
        image_text._check_fit("m", LLAVA, tmp_path, {"another": [3]})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_llava_is_described_without_its_weights(llava_hub, tmp_path, capsys):
    describe_model("transformers", LLAVA, "hub:llava/shards", "mine")
    header, row = (line.split("\t") for line in capsys.readouterr().out.splitlines()[-2:])
    line = dict(zip(header, row, strict=True))
    model, _ = llavas.llava()
    assert float(line["params_m"]) == round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
    assert line["preprocess"] == "resize(24,bicubic)|center_crop(24)|normalize(openai)"
    assert (line["image_size"], line["group"], line["family"]) == ("24", "vlm", "vit") and float(line["gflops"]) > 0
    assert not any(path.endswith(".safetensors") for path in llava_hub.seen)
    del llava_hub.repositories["llava/one"]["config.json"]
    with pytest.raises(InputError, match=r"'hub:llava/one'.* has no config.json"):
        describe_model("transformers", LLAVA, "hub:llava/one")


# Interpolation


def test_a_blend_is_the_weighted_mean_of_its_parents(tmp_path):
    parent, tuned = clip_folder(tmp_path / "parent"), clip_folder(tmp_path / "tuned")
    a = fetched(parent)
    b = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in a.items()}
    save_file(b, tuned / "open_clip_model.safetensors")
    io.seal(tuned, model="tuned")
    for share in (0, 0.25, 1):
        blend_weights("m", parent, tuned, share, tmp_path / "out")
        c = fetched(tmp_path / "out")
        assert all(torch.allclose(c[name], (1 - share) * a[name] + share * b[name], atol=1e-6) for name in a)
        assert io.check_sealed(tmp_path / "out")["share"] == share
    assert same(c, b)
    load.load_image_model(tmp_path / "out", "open_clip", HALF, HALF)


def test_a_blend_needs_two_of_a_kind(tmp_path):
    parent = clip_folder(tmp_path / "parent")
    with pytest.raises(InputError, match=r"the share is 1.5, expected 0 to 1"):
        blend_weights("m", parent, parent, 1.5, tmp_path / "out")
    other = clip_folder(tmp_path / "other", quick_gelu=True)
    with pytest.raises(InputError, match=r"open_clip_config.json describes another model"):
        blend_weights("m", parent, other, 0.5, tmp_path / "out")
    headed = clip_folder(tmp_path / "headed")
    save_file({"weight": torch.ones(3, 24), "bias": torch.ones(3)}, headed / load.CLASSIFIER)
    io.seal(headed, model="headed")
    with pytest.raises(InputError, match=r"expected the same files of weights in both folders, found .*classifier"):
        blend_weights("m", parent, headed, 0.5, tmp_path / "out")
    changed = clip_folder(tmp_path / "changed")
    save_file({**fetched(changed), "visual.proj": torch.ones(3)}, changed / "open_clip_model.safetensors")
    io.seal(changed, model="changed")
    with pytest.raises(InputError, match=r"1 tensors differ in shape, 'visual.proj' first: \[64, 24\] and \[3\]"):
        blend_weights("m", parent, changed, 0.5, tmp_path / "out")


def test_a_blend_of_llavas_needs_one_architecture(llava_files, tmp_path):
    folders = [write_folder(tmp_path / name, dict(llava_files["llava/one"])) for name in "ab"]
    for folder in folders:
        io.seal(folder, model=folder.name, architecture=LLAVA)
    blend_weights("m", *folders, 0.5, tmp_path / "out")
    assert answers(tmp_path / "out") == answers(folders[0])
    config = io.read_json(folders[1] / "config.json")
    io.write_json(folders[1] / "config.json", config | {"vision_feature_layer": -1})
    io.seal(folders[1], model="b", architecture=LLAVA)
    with pytest.raises(InputError, match=r"config.json describes another model"):
        blend_weights("m", *folders, 0.5, tmp_path / "out")


# Loading


@pytest.mark.parametrize("architecture", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
def test_channels_last_changes_no_result(tmp_path, architecture):
    model = timm.create_model(architecture, num_classes=9).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load.load_image_model(
        fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", "timm", architecture), "timm", HALF, HALF
    )
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 160, 160, 3), dtype=np.uint8))
    images = (pixels.permute(0, 3, 1, 2).float().contiguous() / 255 - 0.5) / 0.5
    first = next(m for m in loaded.tower.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.weight.is_contiguous(memory_format=torch.channels_last) is (architecture != "test_vit")
    with torch.inference_mode():
        assert (loaded(pixels) - model(images)).abs().max() < 1e-5


def test_cocas_image_tower_answers_with_its_feature(tmp_path, monkeypatch):
    shape = {"context_length": 12, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1}
    config = {
        "embed_dim": 24,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**shape, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**shape, "attn_pooler_heads": 2},
        "custom_text": True,
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-coca", config)
    model = open_clip.create_model("tiny-coca").eval()
    torch.nn.init.zeros_(model.text_decoder.text_projection)  # which open_clip leaves as the memory was
    torch.save(model.state_dict(), tmp_path / "a.pt")
    out = fetch(tmp_path, f"local:{tmp_path / 'a.pt'}", architecture="tiny-coca")
    with torch.inference_mode():
        features = load.load_image_model(out, "open_clip", (0, 0, 0), (1, 1, 1))(torch.zeros(1, 32, 32, 3).byte())
        assert torch.allclose(features, model.encode_image(torch.zeros(1, 3, 32, 32), normalize=True), atol=1e-6)

# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Push and pull against a Hub on the loopback (minihub.py): with the package and without it, revisions, private
repositories, no network, interrupted uploads. Each client is a process of its own with an empty cache. Starting one is
slow: what may share a process does, each load with a `cache_dir` of its own."""

import shutil
from textwrap import indent

import pytest
from minihub import STRANGER, MiniHub
from programs import ROOT, run_python


# An uninstalled package, whatever is installed here.
HIDE = "import sys; sys.modules.update(dict.fromkeys('transformers_based based_kernels triton'.split()))\n"
CODE = {path.name for path in (ROOT / "src" / "transformers_based").glob("*.py")} - {"__init__.py"}
# For every client: the golden tensors, and what makes a model the right one.
PRELUDE = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
golden = load_file({str(ROOT / "tests" / "reference" / "based-tiny" / "golden.safetensors")!r})
def logits(model):
    with torch.no_grad():
        return model(golden["input_ids"]).logits[..., : golden["logits"].shape[-1]]
def is_golden(model):
    torch.testing.assert_close(logits(model), golden["logits"], atol=2e-4, rtol=0)
    length = golden["greedy_ids"].shape[1]
    ids = model.generate(golden["prompt_ids"], max_length=length, do_sample=False, pad_token_id=0)
    return torch.equal(ids, golden["greedy_ids"])
"""


@pytest.fixture(scope="module")
def saved(based_tiny_path, tmp_path_factory):
    """The reference checkpoint as this package saves it, code and all."""
    from transformers_based import BasedForCausalLM

    folder = tmp_path_factory.mktemp("saved")
    BasedForCausalLM.from_pretrained(based_tiny_path).save_pretrained(folder)
    return folder


class Clients:
    """Runs programs against one hub; `cache` names the client's cache, a new one each time unless given."""

    def __init__(self, hub, folder):
        self.hub, self.folder, self.count = hub, folder, 0

    def __call__(self, program, installed=True, cache=None, check=True, prelude=PRELUDE, **variables):
        self.count += 1
        values = self.hub.environment(self.folder / (cache or f"cache {self.count}"))
        if not installed:
            values["PYTHONPATH"] = None
        program = prelude + program
        return run_python(
            "-c", program if installed else HIDE + program, cwd=self.folder, check=check, **{**values, **variables}
        )


@pytest.fixture
def clients(tmp_path):
    with MiniHub() as hub:
        yield Clients(hub, tmp_path)


def push(path, repo, **options):
    return f"""
from transformers_based import BasedForCausalLM
BasedForCausalLM.from_pretrained({str(path)!r}).push_to_hub({repo!r}, **{options!r})
"""


def load(repo, **options):
    options.setdefault("trust_remote_code", True)
    return f"""
model = AutoModelForCausalLM.from_pretrained({repo!r}, **{options!r})
assert is_golden(model)
print(type(model).__module__)
"""


def refused(program, error="OSError"):
    """Prints the error, and what it came from, in a line."""
    return f"""
try:
{indent(program, "    ")}
except {error} as error:
    print(*f"{{error}} {{error.__cause__}}".split())
else:
    raise SystemExit("nothing was refused")
"""


def test_without_the_package_a_pushed_model_works_trains_and_is_pushed_on(clients, based_tiny_path):
    clients(push(based_tiny_path, "me/based"))
    assert clients.hub.files("me/based").keys() >= CODE | {"config.json", "model.safetensors"}
    # Weights went by LFS, each upload verified.
    assert clients.hub.verified == clients.hub.objects.keys() != set()
    train = """
ids = golden["input_ids"][:, :32]
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
before = model(ids, labels=ids).loss
before.backward()
optimizer.step()
assert model(ids, labels=ids).loss < before
model.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(logits(again), logits(model))
again.push_to_hub("me/tuned")
torch.save(logits(again), "logits.pt")
"""
    process = clients(load("me/based") + train, installed=False)
    assert process.stdout.startswith("transformers_modules.me.based.")
    assert clients.hub.files("me/tuned").keys() >= CODE
    compare = """
model = AutoModelForCausalLM.from_pretrained("me/tuned", trust_remote_code=True)
assert torch.equal(logits(model), torch.load("logits.pt"))
print(type(model).__module__)
"""
    assert clients(compare, installed=False).stdout.startswith("transformers_modules.me.tuned.")
    # And back home, with the package's code: the same numbers.
    home = clients("import transformers_based\n" + compare.replace(", trust_remote_code=True", ""))
    assert home.stdout.strip() == "transformers_based.modeling_based"


def test_with_the_package_its_own_code_is_used(clients, saved):
    clients.hub.add("me/based", saved)
    program = "import transformers_based\n"
    for trust in (None, False, True):
        program += load("me/based", trust_remote_code=trust, cache_dir=f"trust {trust}")
    assert clients(program).stdout.splitlines() == 3 * ["transformers_based.modeling_based"]
    assert not any("modeling_based.py" in request for request in clients.hub.requests if request.startswith("GET"))


def test_every_head_loads_as_remote_code(clients, saved):
    clients.hub.add("me/based", saved)
    program = """
import transformers
heads = "Model ModelForCausalLM ModelForSequenceClassification ModelForTokenClassification ModelForQuestionAnswering"
for head in heads.split():
    model = getattr(transformers, "Auto" + head).from_pretrained("me/based", trust_remote_code=True)
    model(golden["input_ids"][:1, :8])
    print(type(model).__module__.rpartition(".")[2], type(model).__name__)
config = transformers.AutoConfig.from_pretrained("me/based", trust_remote_code=True)
assert set(config.auto_map) == {"AutoConfig", *("Auto" + head for head in heads.split())}
"""
    names = ["Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
    assert clients(program, installed=False).stdout.splitlines() == [f"modeling_based Based{x}" for x in names]


def test_shards(clients, based_tiny_path):
    clients(push(based_tiny_path, "me/shards", max_shard_size="200KB") + load("me/shards"))
    shards = [name for name in clients.hub.files("me/shards") if name.endswith(".safetensors")]
    assert len(shards) > 2
    clients(load("me/shards"), installed=False)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(clients, saved):
    clients.hub.add("me/based", saved)
    clients.hub.dropped_downloads = 1
    clients(load("me/based"), installed=False)
    assert sum(x.startswith("GET") and x.endswith("/model.safetensors") for x in clients.hub.requests) == 2


def test_a_revision_is_honoured_for_weights_and_code(clients, saved, tmp_path):
    """Branch, tag and commit id; `main` has gone on to other weights and code that does not even import."""
    hub, repo = clients.hub, "me/based"
    hub.add(repo, saved)
    commit = hub.refs[repo]["branches"]["main"]
    refs = f"""
from huggingface_hub import HfApi
HfApi().create_branch({repo!r}, branch="old")
HfApi().create_tag({repo!r}, tag="v1.0")
"""
    clients(refs, prelude="")
    hub.commit(repo, {**hub.files(repo), "modeling_based.py": b"raise SystemError('code of main')\n"})
    program = refused(load(repo), "SystemError") + refused(load(repo, revision="v9"))
    for revision in ("old", "v1.0", commit):
        program += load(repo, revision=revision, cache_dir=f"revision {revision}")
    main, wrong, *modules = clients(program, installed=False).stdout.splitlines()
    assert main.startswith("code of main")
    assert "v9 is not a valid git identifier" in wrong
    assert modules == 3 * [f"transformers_modules.me.based.{commit}.modeling_based"]
    # A push to a branch leaves the others alone.
    before = hub.files(repo)
    clients(push(saved, repo, revision="old", commit_message="again"))
    assert hub.files(repo) == before
    assert hub.refs[repo]["branches"]["old"] != commit


def test_code_revision(clients, saved):
    """Weights of one commit with the code of another."""
    hub = clients.hub
    hub.add("me/based", saved)
    good = hub.refs["me/based"]["branches"]["main"]
    hub.commit("me/based", {**hub.files("me/based"), "modeling_based.py": b"raise SystemError('code of main')\n"})
    clients(load("me/based", code_revision=good), installed=False)


def test_private_repository(clients, based_tiny_path):
    clients(push(based_tiny_path, "me/secret", private=True))
    assert clients.hub.private == {"me/secret"}
    before, owner = clients.hub.files("me/secret"), clients.hub.environment("")["HF_TOKEN"]
    use = "import os\nos.environ['HF_TOKEN'] = {!r}\n".format
    home = "from transformers_based import BasedForCausalLM\nBasedForCausalLM.from_pretrained('me/secret')"
    # The owner's token as an argument counts as well as in the environment.
    goes_on = load("me/secret", token=owner, cache_dir="one") + use(owner) + load("me/secret", cache_dir="two")
    pushes = refused(push(based_tiny_path, "me/secret"), "Exception")
    for program, then, installed in ((load("me/secret"), goes_on, False), (home, pushes, True)):
        both = use("") + refused(program) + use(STRANGER) + refused(program)
        for line in clients(both + then, installed=installed).stdout.splitlines()[:2]:
            assert "me/secret is not a local folder and is not a valid model identifier" in line
            assert "token" in line
    assert clients.hub.files("me/secret") == before


@pytest.mark.parametrize("installed", [False, True])
def test_offline_with_a_warm_cache_and_with_a_cold_one(clients, saved, installed):
    clients.hub.add("me/based", saved)
    program = ("import transformers_based\n" if installed else "") + load("me/based")
    clients(program, installed=installed, cache="warm")
    clients.hub.requests.clear()
    cold = refused(load("me/based", cache_dir="cold"))
    offline = clients(program + cold, installed=installed, cache="warm", HF_HUB_OFFLINE="1")
    assert "couldn't find them in the cached files" in offline.stdout.splitlines()[-1]
    assert clients.hub.requests == []


def test_a_dropped_upload_is_tried_again_by_itself(clients, saved, based_tiny_path):
    clients.hub.upload_faults = ["drop"]
    clients(push(based_tiny_path, "me/based"))
    assert clients.hub.upload_faults == []
    pushed = clients.hub.files("me/based")
    for path in saved.iterdir():
        assert pushed[path.name] == path.read_bytes(), path.name


def test_an_interrupted_upload_shows_nothing_and_a_retry_ends_complete(clients, based_tiny_path):
    """The third shard never arrives."""
    program, hub = push(based_tiny_path, "me/based", max_shard_size="200KB"), clients.hub
    hub.upload_faults = [None, None, 507]
    upload, half = clients(refused(program, "Exception") + refused(load("me/based"), "ValueError")).stdout.splitlines()
    assert "507" in upload
    assert "me/based" in half
    assert len(hub.objects) >= 2
    assert hub.files("me/based").keys() <= {".gitattributes", "README.md"}
    hub.upload_faults, before = [], len(hub.requests)
    there = set(hub.objects)
    clients(program)
    # Shards that had arrived are not sent again.
    assert not there & {x.rpartition("/")[2] for x in hub.requests[before:] if x.startswith("PUT")}
    clients(load("me/based"), installed=False)


def test_an_interrupted_update_leaves_the_old_model(clients, saved):
    clients.hub.add("me/based", saved)
    before = clients.hub.files("me/based")
    clients.hub.upload_faults = [507]
    update = """
from transformers_based import BasedForCausalLM
model = BasedForCausalLM.from_pretrained("me/based")
assert is_golden(model)
torch.nn.init.ones_(model.model.norm.weight)
model.push_to_hub("me/based")
"""
    assert clients(update, check=False).returncode == 1
    assert clients.hub.upload_faults == []
    assert clients.hub.files("me/based") == before
    clients(update)
    assert clients.hub.files("me/based").keys() >= before.keys()
    assert clients.hub.files("me/based")["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_pushed_code_uses_installed_kernels(clients, saved, backend):
    """`based_kernels` alone in site-packages, without transformers_based."""
    pytest.importorskip("triton")
    clients.hub.add("me/based", saved)
    packages = clients.folder / "site-packages"
    shutil.copytree(ROOT / "kernels" / "torch-ext" / "based_kernels", packages / "based_kernels")
    program = """
import sys
calls = []
sys.modules["transformers_based"] = None
import based_kernels
fused = based_kernels.taylor_attention
based_kernels.taylor_attention = lambda *args, **kwargs: calls.append(1) or fused(*args, **kwargs)
model = AutoModelForCausalLM.from_pretrained("me/based", trust_remote_code=True)
ops = sys.modules[type(model).__module__.rpartition(".")[0] + ".taylor_attention"]
assert ops.based_kernels is based_kernels
torch.testing.assert_close(logits(model), golden["logits"], atol=2e-4, rtol=0)
print("fused" if calls else "plain")
"""
    variables = {"PYTHONPATH": str(packages), "TRITON_INTERPRET": "1", "TRANSFORMERS_BASED_BACKEND": backend}
    process = clients(program, **variables)
    assert process.stdout.strip() == {"torch": "plain", "triton": "fused"}[backend]

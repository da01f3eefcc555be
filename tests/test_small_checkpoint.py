# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""examples/train_small_checkpoint.py on a text of some chapters, and the checkpoint that it made of the whole one."""

import json
import math
import re

import pytest
import torch
from programs import ROOT, load_program
from transformers import AutoModelForCausalLM, AutoTokenizer

import transformers_based  # noqa: F401 (tells the Auto classes about Based)


program = load_program("examples/train_small_checkpoint.py")
CHECKPOINT = ROOT / "examples" / "small_checkpoint"
LETTERS = "In the beginning was the word; and the sea, and all that is in it."


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty chapters as `bible` prints them; those held out say other things than the rest."""
    lines = []
    for chapter in range(1, 41):
        said = LETTERS if chapter % 20 else "Of this nobody was told before!"
        lines += [f"{'1Chr' if chapter > 20 else 'Ge'}{chapter}:{verse} {said} {verse}" for verse in range(1, 12)]
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_card_tells_what_was_saved(text, tmp_path, capsys):
    options = ("--epochs", "2", "--block-size", "32", "--vocab-size", "300", "--hidden-size", "32")
    program.main(["--text", str(text), "--output", str(tmp_path), *options])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    assert model.config.use_cache
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    held_out = ["".join(f"Of this nobody was told before! {verse}\n" for verse in range(1, 12))] * 2
    ids = [i for chapter in held_out for i in [*tokenizer(chapter)["input_ids"], tokenizer.eos_token_id]]
    assert tokenizer.decode(ids[: len(ids) // 2 - 1]) == held_out[0]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    with torch.no_grad():
        logits = model.double()(blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()

    card = (tmp_path / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if re.match(r"\| (B|L)", line)
    ]
    (based, llama) = rows
    assert (based[0], llama[0]) == ("Based", "Llama")
    sizes = [int(row[1].replace(",", "")) for row in rows]
    assert sizes[0] == model.num_parameters()
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    assert f"nearly as many parameters ({sizes[1]:,} to\n{sizes[0]:,})" in card
    assert float(based[3]) == pytest.approx(loss, abs=2e-3)
    assert float(based[4]) == pytest.approx(math.exp(loss), rel=5e-3)
    count = len("".join(held_out).encode()) / (len(ids) - 2)
    assert float(based[5]) == pytest.approx(loss / math.log(2) / count, abs=2e-3)
    assert based[3:6] != llama[3:6]
    assert f"| {blocks.numel()} tokens held out |" in card
    assert "40 chapters, 440 verses" in card
    assert "\n".join(options[i] + " " + options[i + 1] for i in (4,)) in card


def test_both_models_start_with_weights_as_large(text, tmp_path, monkeypatch):
    """Those of the same role at least; the convolutions and the linear attention have none in a Llama."""
    starts = []

    class Recorder(program.Trainer):
        def __init__(self, *, model, **kwargs):
            roles = {}
            for name, weight in model.named_parameters():
                if weight.ndim == 2 and ".conv." not in name and ".linear_attn." not in name:
                    roles.setdefault(name.split(".")[-2], []).append(weight.detach().flatten())
            starts.append({role: torch.cat(weights).std().item() for role, weights in roles.items()})
            super().__init__(model=model, **kwargs)

    monkeypatch.setattr(program, "Trainer", Recorder)
    options = ("--epochs", "1", "--block-size", "32", "--vocab-size", "300", "--hidden-size", "64")
    program.main(["--text", str(text), "--output", str(tmp_path), *options])
    based, llama = starts
    assert {"embed_tokens", "q_proj", "o_proj", "gate_proj", "down_proj"} < llama.keys() == based.keys()
    assert llama == pytest.approx(based, rel=0.05)
    assert llama["down_proj"] == pytest.approx(llama["up_proj"] / 4, rel=0.05)


def test_chapters(text, tmp_path):
    chapters = program.read_chapters(text)
    assert len(chapters) == 40
    assert chapters[0].splitlines()[2] == f"{LETTERS} 3"
    assert chapters[39] == chapters[19] != chapters[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no file .*nothing.txt"),
        (
            "Ge1:1 In the beginning\nno reference\n",
            "line 2: no verse behind a reference such as Ge1:1, but 'no reference'",
        ),
        ("Ge1:1 In the beginning\n", "has 1 chapters, and 20 or more are needed"),
        ("".join(f"Ge{i}:1 In the beginning\n" for i in range(20)), "too few for a block of 256: lower --block-size"),
    ],
)
def test_refuses_in_a_line(content, message, tmp_path):
    path = tmp_path / "nothing.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        program.main(["--text", str(path), "--output", str(tmp_path / "output")])
    assert re.search(message, error.value.code)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "{folder}/latin.txt/new"], "--output .*new: .*latin.txt is a file, choose another folder"),
        (["--text", "{folder}/latin.txt"], "latin.txt is not UTF-8 .*: convert it first"),
        (["--epochs", "0"], "--epochs: 0 is not a number above 0"),
        (["--block-size", "0"], "--block-size: 0 is not a number of at least 1"),
        (["--block-size", "1"], "--block-size must be at least 2"),
        (["--learning-rate", "nan"], "--learning-rate: nan is not a number above 0"),
        (["--vocab-size", "-1"], "--vocab-size: -1 is not a number of at least 1"),
        (["--batch-size", "-1"], "--batch-size: -1 is not a number of at least 1"),
        (["--hidden-size", "48"], "--hidden-size: 48 is not a multiple of 32"),
        (["--hidden-size", "0"], "--hidden-size: 0 is not a multiple of 32"),
    ],
)
def test_refuses_before_training(options, message, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "train", lambda *args: pytest.fail("trained"))
    (tmp_path / "latin.txt").write_bytes("Ge1:1 Noë".encode("latin-1"))
    options = [option.format(folder=tmp_path) for option in options]
    with pytest.raises(SystemExit) as error:
        program.main(["--text", str(text), "--output", str(tmp_path / "output"), *options])
    assert re.search(message, f"{error.value.code} {capsys.readouterr().err}")


USUAL = """
    the and of to that in he shall unto for i his a lord they be is him not them it with all thou thy was god which
    my me said but ye their have will thee from as are when this out were upon man by you israel king son up there had
    people came then house into her come one on before your also day an so against shalt let go we at land
"""


@pytest.mark.parametrize("prompt", ["And it came to pass", "The king said unto"])
def test_the_checkpoint_of_this_repository_writes_english(prompt):
    """Recognisable: most of its words are among the most usual of its text, and they vary."""
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 8e6
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, do_sample=False, max_new_tokens=60)
    words = re.findall(r"[a-z']+", tokenizer.decode(output[0, ids.shape[1] :]).lower())
    assert len(words) > 20
    assert sum(word in USUAL.split() for word in words) > len(words) / 2
    assert len({*words}) > 8

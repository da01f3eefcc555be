# Copyright 2026 The transformers_based authors. Licensed under the Apache License, Version 2.0.
"""Pipelines, streamers and the OpenAI-compatible server of transformers, as examples/serving.md has them."""

import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from programs import ROOT, environment, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline
from transformers.utils.import_utils import is_serve_available
from word_tokenizer import save_checkpoint, words


DOCUMENT = (ROOT / "examples" / "serving.md").read_text(encoding="utf-8")
IN_A_PROGRAM, STREAMED, CLIENT = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
COMMAND = re.search(r"^python -c .*$", DOCUMENT, re.MULTILINE).group()
STARTUP_SECONDS = 120

needs_server = pytest.mark.skipif(not is_serve_available(), reason="needs the extra `serve`")


@pytest.fixture(scope="module")
def checkpoint(based_tiny_path, tmp_path_factory) -> str:
    return str(save_checkpoint(based_tiny_path, tmp_path_factory.mktemp("serving")))


@pytest.fixture
def texts(golden) -> list[tuple[str, str]]:
    """Prompt and greedy continuation by the original code, for each row."""
    length = golden["prompt_ids"].shape[1]
    return [(words(ids[:length]), words(ids[length:])) for ids in golden["greedy_ids"]]


def test_pipeline(checkpoint, texts):
    """Also in a batch with a shorter prompt, which is padded."""
    generate = pipeline("text-generation", model=checkpoint)
    generate.tokenizer.padding_side = "left"
    prompts = [*(prompt for prompt, _ in texts), "w3 w1 w4"]
    options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False}
    alone = [generate(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert alone[:2] == [continuation for _, continuation in texts]
    assert [row[0]["generated_text"] for row in generate(prompts, batch_size=3, **options)] == alone


def test_streamer(checkpoint, texts):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    (prompt, continuation), _ = texts
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    options = {"max_new_tokens": 24, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**tokenizer(prompt, return_tensors="pt"), **options})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == continuation
    assert len(pieces) > 20


@pytest.mark.parametrize("program", [IN_A_PROGRAM, STREAMED])
def test_documented_programs(checkpoint, program):
    program = program.replace("CHECKPOINT", checkpoint)
    assert re.search(r"w\d+ w\d+", run_python("-c", program).stdout)


@contextmanager
def serving(checkpoint: str, log: Path, *options: str):
    """The server as documented, on a free port; gives its address."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    python, *arguments = shlex.split(COMMAND.replace("CHECKPOINT", checkpoint).replace("8000", str(port)))
    assert python == "python"
    with log.open("w") as output:
        command = [sys.executable, *arguments, *options]
        server = subprocess.Popen(command, env=environment(), stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not is_up(f"http://localhost:{port}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def is_up(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(address, timeout=5).status == 200
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


@needs_server
def test_server(checkpoint, texts, tmp_path, monkeypatch, capsys):
    """Text and chat, at once and streamed, two requests at a time: the tokens of the original code."""
    import openai

    monkeypatch.setenv("NO_PROXY", "localhost")
    (prompt, continuation), _ = texts
    with serving(checkpoint, tmp_path / "log") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)
        complete, chat = client.completions.create, client.chat.completions.create
        request = {"model": checkpoint, "max_tokens": 24, "temperature": 0}

        answer = complete(**request, prompt=prompt)
        assert answer.choices[0].text == continuation
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, 24)
        pieces = [chunk.choices[0].text for chunk in complete(**request, prompt=prompt, stream=True)]
        assert "".join(pieces) == continuation
        assert len([piece for piece in pieces if piece]) > 20

        request["messages"] = [{"role": "user", "content": prompt}]
        assert chat(**request).choices[0].message.content == continuation
        chunks = [chunk.choices[0].delta.content or "" for chunk in chat(**request, stream=True)]
        assert "".join(chunks) == continuation

        del request["messages"]
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(lambda text: complete(**request, prompt=text[0]).choices[0].text, texts * 2)
            assert list(answers) == [text for _, text in texts * 2]

        program = CLIENT.replace("CHECKPOINT", checkpoint).replace("http://localhost:8000", address)
        exec(program, {})
        at_once, streamed = capsys.readouterr().out.split("\n")
        assert at_once == streamed
        assert re.fullmatch(r"(w\d+ ){7}w\d+", at_once)


@needs_server
def test_server_refuses_continuous_batching(checkpoint, tmp_path, monkeypatch):
    import openai

    monkeypatch.setenv("NO_PROXY", "localhost")
    log = tmp_path / "log"
    with serving(checkpoint, log, "--continuous-batching") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=60, max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model=checkpoint, prompt="w3 w1 w4", max_tokens=2)
    # Only now: the answer may come before the log.
    assert "Continuous batching keeps keys and values in pages" in log.read_text()

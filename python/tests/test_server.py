"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import COUNTING, DEMO, QUESTION
from serving import Server, serving

MODEL = "demo-model"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(DEMO) as server:
        yield server


# Any: its types name the models and options of one week of OpenAI's, and these tests are about the wire.
@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(server.url + "/metrics") as response:  # noqa: S310
        text = response.read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " "))


def test_a_chat_is_answered(client: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "12 + 30 = 42."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_chat_is_streamed_with_its_usage(client: Any) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=COUNTING, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.startswith("5, 6, 7, 8")
    assert text.rstrip(".").endswith("15")
    assert len(chunks) > 10
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 10


def test_the_stream_helper_of_the_client_puts_it_together(client: Any) -> None:
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "12 + 30 = 42."


def test_several_answers_with_a_seed_are_the_same_again(client: Any) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=QUESTION, temperature=50, top_p=1, seed=7, n=4, max_tokens=8
        )
        return [choice.message.content for choice in answer.choices]

    assert ask() == ask()
    assert len(set(ask())) > 1


def test_a_completion_continues_text_and_tokens(client: Any) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["12 + 30 =", "5, 6, 7"], temperature=0, max_tokens=4, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[1].text.startswith("5, 6, 7")
    stream = client.completions.create(
        model=MODEL, prompt="12 + 30 =", temperature=0, max_tokens=4, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_the_model_is_listed_by_name(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"


def test_what_cannot_be_is_the_clients_own_exception(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "max_completion_tokens"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"colour": "red"})
    assert caught.value.param == "colour"


def test_options_beyond_openais_go_in_extra_body(client: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=2, seed=1, extra_body={"top_k": 1, "min_p": 0.1}
    )
    assert answer.choices[0].message.content == "12 + 30 = 42.", "the likeliest token every time"


def test_a_stream_that_is_closed_stops_the_computation(long_directory: Path) -> None:
    with serving(long_directory) as server, openai.OpenAI(base_url=server.url + "/v1", api_key="x") as client:
        stream = client.completions.create(
            model="long",
            prompt="1, 2,",
            max_tokens=150_000,
            extra_body={"ignore_eos": True},
            stream=True,
        )
        next(iter(stream))
        assert metric(server, "qwen2_answers_running") == 1
        stream.close()
        deadline = time.monotonic() + 60
        while metric(server, "qwen2_answers_running") != 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_key_is_asked_for() -> None:
    with serving(DEMO, "--api-key", "secret") as server:
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key="guess") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as client:
            assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_server_without_an_error(name: str) -> None:
    with serving(DEMO) as server:
        server.process.send_signal(getattr(signal, name))
        assert server.process.wait(timeout=60) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""

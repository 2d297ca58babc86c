"""Two nodes of a Ray cluster on this machine: batch inference and a deployment, each with two models."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed; see scripts/ecosystem")
import httpx
import ray
from conftest import DEMO
from qwen2_rs import Model
from qwen2_rs.ray import Answers, generate
from qwen2_rs.ray.serve import Replica, build_app
from ray import serve
from ray.cluster_utils import Cluster

CHATS = [[{"role": "user", "content": f"What is {a} plus {b}?"}] for a in range(4, 12) for b in range(3, 7)]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the model says without Ray."""
    model = Model.load(DEMO, device="cpu", threads=1)
    return [model.generate(chat, **GREEDY).text for chat in CHATS]


@pytest.fixture(scope="module")
def nodes() -> Iterator[set[str]]:
    """A cluster of two nodes, each with cores for one model of two and a task beside it, as Ray counts."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        yield {node["NodeID"] for node in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_a_dataset_is_answered_on_both_nodes(nodes: set[str], expected: list[str]) -> None:
    class Placed(Answers):
        """Says where it answered; the workers do not have this file, so it is no class of its module."""

        def __call__(self, batch: Any) -> Any:
            answered = super().__call__(batch)
            node = ray.get_runtime_context().get_node_id()
            return {**answered, "node": [node] * len(answered["answer"])}

    assert len(nodes) == 2
    rows = [{"id": index, "prompt": chat} for index, chat in enumerate(CHATS)]
    dataset = ray.data.from_items(rows).repartition(8)
    answered = dataset.map_batches(
        Placed,
        fn_constructor_args=[str(DEMO)],
        fn_constructor_kwargs={"options": GREEDY, "load": {"threads": 1}},
        compute=ray.data.ActorPoolStrategy(size=2),
        # No node has room for two of them.
        num_cpus=2,
        batch_size=4,
    ).take_all()
    answered.sort(key=lambda row: row["id"])
    assert [row["answer"] for row in answered] == expected
    assert {row["node"] for row in answered} == nodes
    assert {row["finish_reason"] for row in answered} == {"stop"}


def test_generate_answers_texts_and_tells_of_those_it_cannot(nodes: set[str]) -> None:
    del nodes
    texts = [{"id": 0, "text": "What is"}, {"id": 1, "text": "What is " * 800}]
    dataset = ray.data.from_items(texts)
    rows = generate(
        dataset, str(DEMO), column="text", options=GREEDY, errors="failure", actors=(1, 2)
    ).take_all()
    first, second = sorted(rows, key=lambda row: int(row["id"]))
    model = Model.load(DEMO, device="cpu", threads=1)
    assert (first["answer"], first["failure"]) == (model.generate("What is", **GREEDY).text, "")
    assert second["finish_reason"] == "error"
    assert "context" in second["failure"]
    with pytest.raises(ray.exceptions.RayTaskError, match="context"):
        generate(dataset, str(DEMO), column="text", options=GREEDY).take_all()


@pytest.fixture(scope="module")
def app(nodes: set[str]) -> Iterator[tuple[str, Any]]:
    """The address of a deployment with a replica on each node, and its handle."""
    del nodes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    # As the command line gives them.
    settings = {"source": str(DEMO), "replicas": "2", "threads": "2", "name": "demo"}
    handle = serve.run(build_app(settings), route_prefix="/qwen2")
    yield f"http://127.0.0.1:{port}/qwen2", handle
    serve.shutdown()


def ask(url: str, **more: Any) -> httpx.Response:
    body = {"model": "demo", "messages": CHATS[0], "temperature": 0, "max_tokens": 40, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_a_deployment_answers_as_the_model_does(app: tuple[str, Any], expected: list[str]) -> None:
    url, handle = app
    assert httpx.get(f"{url}/health").text == "ok"
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
    for chat, answer in zip(CHATS[:8], expected, strict=False):
        completion = ask(url, messages=chat).json()
        choice = completion["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": answer}
        assert choice["finish_reason"] == "stop"
        assert completion["usage"]["completion_tokens"] > 1
    answers = [handle.generate.remote(chat, **GREEDY) for chat in CHATS]
    assert [answer.result()["text"] for answer in answers] == expected
    pieces = handle.options(stream=True).stream.remote(CHATS[0], **GREEDY)
    assert "".join(pieces) == expected[0]


def test_a_deployment_streams(app: tuple[str, Any], expected: list[str]) -> None:
    answer = ask(app[0], stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    *parts, end, usage = map(json.loads, events)
    texts = [part["choices"][0]["delta"]["content"] for part in parts]
    assert len(texts) > 3
    assert "".join(texts) == expected[0]
    assert end["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == len(parts)


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, None),
        ({"model": "other"}, 404, "model"),
        ({"temperature": -1, "stream": True}, 400, "temperature"),
    ],
)
def test_a_wrong_request_gets_an_error_of_openais_form(
    app: tuple[str, Any], wrong: dict[str, Any], status: int, param: str | None
) -> None:
    answer = ask(app[0], **wrong)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert httpx.get(f"{app[0]}/nothing").status_code == 404


def test_a_client_that_goes_away_leaves_its_place_to_the_next(
    app: tuple[str, Any], long_directory: Path, expected: list[str]
) -> None:
    base = app[0].removesuffix("/qwen2")
    settings = {"source": str(long_directory), "max_sequences": 1, "name": "demo"}
    handle = serve.run(build_app(settings), name="long", route_prefix="/long")
    endless = {
        "model": "demo",
        "messages": CHATS[1],
        "max_tokens": 150_000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{base}/long/v1/chat/completions", json=endless, timeout=60) as stream:
        lines = stream.iter_lines()
        assert all(next(lines) is not None for _ in range(9))
    # The first takes minutes; the second runs when it has ended.
    before = time.monotonic()
    assert ask(f"{base}/long").json()["choices"][0]["message"]["content"] == expected[0]
    pieces = handle.options(stream=True).stream.remote(CHATS[1], max_new_tokens=150_000, ignore_eos=True)
    assert isinstance(next(iter(pieces)), str)
    pieces.cancel()
    assert ask(f"{base}/long").json()["choices"][0]["message"]["content"] == expected[0]
    assert time.monotonic() - before < 30
    serve.delete("long")


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="sorce"):
        build_app({"sorce": "x"})
    with pytest.raises(ValueError, match="threads"):
        build_app({"source": "x", "threads": "many"})
    assert Replica.__module__ == "qwen2_rs.ray.serve"  # by reference, or its globals stay behind

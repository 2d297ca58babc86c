"""A deployment of Ray Serve that answers as OpenAI's chat completions do.

serve run qwen2_rs.ray.serve:build_app source=Qwen/Qwen2-0.5B-Instruct replicas=4 threads=8
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qwen2_rs import _extras
from qwen2_rs._qwen2 import Model, Piece, Qwen2Error, RequestStream
from qwen2_rs.ray.protocol import Answer, BadRequestError, Chat, failure

try:
    from pydantic import BaseModel, ConfigDict
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
except ImportError as error:
    raise _extras.missing(error, "ray", __name__, "'qwen2-rs[ray]'") from error

REFUSED = (Qwen2Error, TypeError, ValueError, OverflowError)
"""What is wrong with a request; anything else is a fault of ours."""


class Settings(BaseModel):
    """What build_app is told, on the command line as name=value."""

    model_config = ConfigDict(extra="forbid")

    source: str  # as of Model.load, to be found on every node
    name: str | None = None  # what requests call the model; by default the last part of source
    replicas: int = 1
    threads: int = 1  # of each replica, and the cores that it reserves
    gpus: float = 0.0  # of each replica
    device: str = "auto"
    quantize: str | None = None
    kv_cache: str | None = None
    context_length: int | None = None
    max_sequences: int = 8  # requests that a replica computes together
    queue_limit: int = 64  # requests that wait in a replica beside them


# Made a deployment by build_app, not here: a decorated class travels by value, without its module.
class Replica:
    """A model and its engine, and what they answer over HTTP."""

    def __init__(self, settings: Settings) -> None:
        """Loads the model."""
        model = Model.load(
            settings.source,
            device=settings.device,
            quantize=settings.quantize,
            kv_cache=settings.kv_cache,
            context_length=settings.context_length,
            threads=settings.threads,
        )
        self.name = settings.name or Path(settings.source).name
        self.engine = model.engine(max_sequences=settings.max_sequences, queue_limit=settings.queue_limit)

    async def __call__(self, request: Request) -> Response:
        """Answers a request."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        match request.method, path:
            case "GET", "/health":
                return PlainTextResponse("ok")
            case "GET", "/v1/models":
                model = {"id": self.name, "object": "model", "created": 0, "owned_by": "qwen2"}
                return JSONResponse({"object": "list", "data": [model]})
            case "POST", "/v1/chat/completions":
                return await self.chat(await request.body())
            case method, _:
                return refusal(BadRequestError(f"nothing answers {method} {path}", status=404))

    async def chat(self, body: bytes) -> Response:
        """Answers a conversation, whole or as server-sent events."""
        try:
            chat = Chat.read(json.loads(body), self.name)
            answer = Answer(self.name)
            if not chat.stream:
                generation = await self.engine.generate_async(chat.messages, **chat.options)
                return JSONResponse(answer.whole(generation))
            stream = await self.engine.submit_async(chat.messages, **chat.options)
            # What is wrong with a request shows by its first piece, while there is a status to tell it by.
            first = await anext(stream, None)
        except REFUSED as error:
            return refusal(error)
        events = self._events(stream, first, answer, chat.include_usage)
        return StreamingResponse(events, media_type="text/event-stream")

    async def _events(
        self, stream: RequestStream, first: Piece | None, answer: Answer, include_usage: bool
    ) -> AsyncIterator[str]:
        calls = 0
        try:
            yield event(answer.chunk({"role": "assistant", "content": ""}))
            piece = first
            while piece is not None:
                if part := answer.piece(piece, calls):
                    yield event(part)
                calls += len(piece.tool_calls)
                piece = await anext(stream, None)
            for part in answer.end(await stream.finish_async(), include_usage):
                yield event(part)
        except Qwen2Error as error:
            yield event(failure(error)[1])
        finally:
            # A client that went away; nothing where it ended.
            stream.cancel()
        yield "data: [DONE]\n\n"

    async def generate(self, prompt: Any, **options: Any) -> dict[str, Any]:
        """For other deployments: `await handle.generate.remote(prompt, temperature=0)`."""
        generation = await self.engine.generate_async(prompt, **options)
        return {
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "prompt_tokens": generation.usage.prompt_tokens,
            "completion_tokens": generation.usage.completion_tokens,
        }

    async def stream(self, prompt: Any, **options: Any) -> AsyncIterator[str]:
        """For other deployments: `handle.options(stream=True).stream.remote(prompt)` gives texts."""
        stream = await self.engine.submit_async(prompt, **options)
        try:
            async for piece in stream:
                if piece.text:
                    yield piece.text
        finally:
            stream.cancel()


def refusal(error: Exception) -> Response:
    """The answer to a request that failed."""
    status, body = failure(error)
    return JSONResponse(body, status_code=status)


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def build_app(args: Settings | Mapping[str, Any]) -> serve.Application:
    """The application for `serve.run`; for `serve run` and `serve deploy`, which give the names and texts of
    their command line or file.
    """
    settings: Settings = Settings.model_validate(args)
    deployment = serve.deployment(Replica).options(
        name="qwen2",
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_sequences + settings.queue_limit,
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": settings.gpus},
    )
    return deployment.bind(settings)

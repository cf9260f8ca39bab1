"""Another server answers: vLLM or llama.cpp, both of which speak OpenAI's chat and completions API, under our front.

Adapters are folders in PEFT's format. vLLM reads one when it is first asked for (POST /v1/load_lora_adapter; the server
needs `--enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and the same files under the same paths). llama.cpp has
them from its start (`--lora FILE.gguf`, one a model): a file belongs to the adapter whose folder it lies in, or whose
key, with "-" for "/", is its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tunery.errors import ConfigError
from tunery.jsonl import JsonMapping, JsonObject
from tunery.serve.api_errors import ApiError, Busy, shorten
from tunery.serve.engine.backend import Item, Served, TokenDelta, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from httpx2 import AsyncBaseTransport, Response

    from tunery.serve.schemas import ChatRequest, CompletionRequest

CONNECT_SECONDS = 10.0


def _client_library() -> ModuleType:
    """httpx2, or httpx where the installed huggingface_hub still comes with that."""
    try:
        import httpx2

        return httpx2
    except ImportError:
        import httpx  # type: ignore[import-not-found]

        return httpx


class RemoteBackend:
    """Passes requests on to a server at `url`.

    Args:
        url: with or without /v1 at its end.
        api_key: sent to that server; None is $TUNERY_ENGINE_API_KEY, or none.
        kind: "vllm" or "llamacpp"; None finds out.
        model: the base's name there; None is the only one, or the first.
        transport: for tests.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        kind: str | None = None,
        model: str | None = None,
        transport: AsyncBaseTransport | None = None,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        api_key = api_key or os.environ.get("TUNERY_ENGINE_API_KEY")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._model, self._transport = model, transport
        self._http = _client_library()
        self._client: Any = None
        self._kind = kind
        self._loaded: dict[str, str] = {}
        """vLLM's adapters: key → its name there."""
        self._started_with: dict[str, int] = {}
        """llama.cpp's adapters: path → its number there."""
        self._loading: dict[str, asyncio.Lock] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    # ----------------------------------------------------------------- the protocol

    async def start(self) -> None:
        """See that the server is there, and what it is.

        Raises:
            ConfigError: it does not answer, or has no model.
        """
        self._loop = asyncio.get_running_loop()
        timeout = self._http.Timeout(None, connect=CONNECT_SECONDS)
        self._client = self._http.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=timeout, transport=self._transport
        )
        try:
            answer = await self._client.get("/v1/models")
            answer.raise_for_status()
            models = [entry["id"] for entry in answer.json()["data"] if not entry.get("parent")]
            if self._kind != "vllm":
                await self._list_adapters()
        except (self._http.HTTPError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"no engine answers at {self.url}: {error}", "start vLLM or llama.cpp's server there first"
            ) from error
        if not models or (self._model is not None and self._model not in models):
            has = ", ".join(models) or "none"
            raise ConfigError(f"the engine at {self.url} has no model {self._model or ''}".strip(), f"it has: {has}")
        self._model = self._model or models[0]

    async def stop(self) -> None:
        """Let go of the connections; the other server goes on."""
        if self._client is not None:
            await self._client.aclose()

    async def chat(self, request: ChatRequest, model: Served) -> AsyncIterator[Item]:
        """Answer a conversation; see Backend."""
        body = await self._body(request, model, {"messages": request.messages})
        if request.tools:
            mode, only = request.tool_mode
            body |= {
                "tools": request.tools,
                "tool_choice": {"type": "function", "function": {"name": only}} if only else mode,
                "parallel_tool_calls": request.parallel_tool_calls,
            }
        if request.max_completion_tokens is not None:
            body["max_tokens"] = request.max_completion_tokens
        if request.logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        if request.response_format.type != "text":
            body["response_format"] = request.response_format.model_dump(by_alias=True, exclude_none=True)
        async for item in self._stream("/v1/chat/completions", body, _chat_delta):
            yield item

    async def complete(self, request: CompletionRequest, model: Served) -> AsyncIterator[Item]:
        """Go on with a text; see Backend."""
        prompt = request.prompt[0] if len(request.prompt) == 1 else request.prompt
        body = await self._body(request, model, {"prompt": prompt, "max_tokens": request.max_tokens})
        if request.echo:
            body["echo"] = True
        if request.logprobs is not None:
            body["logprobs"] = request.logprobs
        async for item in self._stream("/v1/completions", body, _completion_delta):
            yield item

    def forget(self, key: str) -> None:
        """An adapter was deleted: vLLM is told to drop it."""
        name = self._loaded.pop(key, None)
        if name is not None and self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._unload(name), self._loop)

    def health(self) -> dict[str, object]:
        """Facts for a person who looks."""
        adapters = [*self._started_with, *self._loaded]
        return {"engine": self.url, "kind": self._kind, "model": self._model, "adapters": adapters}

    # ----------------------------------------------------------------- adapters

    async def _list_adapters(self) -> None:
        """Those that llama.cpp has; without such a list it is vLLM."""
        answer = await self._client.get("/lora-adapters")
        if answer.status_code == 200:
            self._started_with = {entry["path"]: entry["id"] for entry in answer.json()}
        self._kind = self._kind or ("llamacpp" if answer.status_code == 200 else "vllm")

    async def _body(self, request: ChatRequest | CompletionRequest, model: Served, own: JsonObject) -> JsonObject:
        """What both kinds of request have in common."""
        body: JsonObject = {
            **own,
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": request.temperature,
            "top_p": request.top_p,
        }
        plain = {"n": 1, "stop": [], "seed": None, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        body |= {name: value for name, default in plain.items() if (value := getattr(request, name)) != default}
        if request.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        if self._kind == "llamacpp":
            wanted = self._llama_adapter(model)
            if self._started_with:
                body["lora"] = [{"id": i, "scale": float(i == wanted)} for i in self._started_with.values()]
        elif model.adapter is not None:
            body["model"] = await self._vllm_adapter(model.key, model.adapter)
        return body

    def _llama_adapter(self, model: Served) -> int | None:
        if model.adapter is None:
            return None
        for path, number in self._started_with.items():
            if Path(path).parent == model.adapter or Path(path).stem == _name(model.key):
                return number
        raise ApiError(
            404,
            f"The engine was started without the adapter of {model.id}. Start llama.cpp's server with "
            f"--lora {_name(model.key)}.gguf",
            code="model_not_found",
            param="model",
        )

    async def _vllm_adapter(self, key: str, folder: Path) -> str:
        """Its name there, after it was loaded if need be."""
        async with self._loading.setdefault(key, asyncio.Lock()):
            if key not in self._loaded:
                given = {"lora_name": _name(key), "lora_path": str(folder)}
                answer = await self._post("/v1/load_lora_adapter", given)
                if answer.status_code >= 400 and "already" not in answer.text:
                    why = "it does not load adapters while it runs" if answer.status_code == 404 else _reason(answer)
                    raise ApiError(
                        502,
                        f"The engine did not load the adapter: {why}. vLLM needs --enable-lora and "
                        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.",
                        type="server_error",
                    )
                self._loaded[key] = _name(key)
        return self._loaded[key]

    async def _unload(self, name: str) -> None:
        with contextlib.suppress(ApiError):
            await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def _post(self, path: str, body: JsonObject) -> Response:
        try:
            return await self._client.post(path, json=body)
        except self._http.HTTPError as error:
            raise self._silent(error) from error

    # ----------------------------------------------------------------- streaming

    async def _stream(
        self, path: str, body: JsonObject, read: Callable[[JsonMapping], TokenDelta]
    ) -> AsyncIterator[Item]:
        usage = Usage(0, 0)
        try:
            async with self._client.stream("POST", path, json=body) as answer:
                if answer.status_code >= 400:
                    await answer.aread()
                    raise _as_error(answer)
                async for line in answer.aiter_lines():
                    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ApiError(502, f"The engine failed: {_words(chunk)}", type="server_error")
                    usage = _usage(chunk) or usage
                    for choice in chunk.get("choices", ()):
                        yield read(choice)
        except self._http.HTTPError as error:
            raise self._silent(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ApiError(502, f"The engine answered in no known form: {error}", type="server_error") from error
        yield usage

    def _silent(self, error: Exception) -> ApiError:
        return ApiError(502, f"The engine at {self.url} does not answer: {error}", type="server_error")


def _name(key: str) -> str:
    """An adapter's name on the other server."""
    return key.replace("/", "-")


def _as_error(answer: Response) -> ApiError:
    """The other server's refusal, as ours."""
    if answer.status_code == 429:
        wait = answer.headers.get("retry-after", "")
        return Busy(float(wait) if wait.replace(".", "", 1).isdigit() else 1.0)
    status = answer.status_code if answer.status_code in (400, 404, 413, 422) else 502
    kind = "server_error" if status == 502 else "invalid_request_error"
    return ApiError(400 if status == 422 else status, f"The engine refused the request: {_reason(answer)}", type=kind)


def _reason(answer: Response) -> str:
    try:
        return _words(answer.json())
    except ValueError:
        return shorten(answer.text, 300) or f"status {answer.status_code}"


def _words(body: object) -> str:
    """The message of an error in OpenAI's form, or in vLLM's older one."""
    inner = body.get("error", body) if isinstance(body, Mapping) else body
    message = inner.get("message") if isinstance(inner, Mapping) else inner
    return shorten(str(message), 300)


def _usage(chunk: JsonMapping) -> Usage | None:
    if not (given := chunk.get("usage")):
        return None
    details = given.get("prompt_tokens_details") or {}
    return Usage(given["prompt_tokens"], given["completion_tokens"], details.get("cached_tokens") or 0)


def _chat_delta(choice: JsonMapping) -> TokenDelta:
    delta = choice.get("delta") or {}
    calls = tuple(
        ToolCallDelta(
            call.get("index", 0),
            call.get("id"),
            (call.get("function") or {}).get("name"),
            (call.get("function") or {}).get("arguments") or "",
        )
        for call in delta.get("tool_calls") or ()
    )
    tokens = tuple(_token(entry) for entry in (choice.get("logprobs") or {}).get("content") or ())
    return TokenDelta(choice.get("index", 0), delta.get("content") or "", calls, tokens, choice.get("finish_reason"))


def _token(entry: JsonMapping) -> TokenLogprob:
    content = entry.get("bytes")
    return TokenLogprob(
        entry["token"],
        entry["logprob"],
        tuple(content if content is not None else entry["token"].encode()),
        tuple(_token(other) for other in entry.get("top_logprobs") or ()),
    )


def _completion_delta(choice: JsonMapping) -> TokenDelta:
    told = choice.get("logprobs") or {}
    tops = told.get("top_logprobs") or [None] * len(told.get("tokens") or ())
    tokens = tuple(
        TokenLogprob(
            token,
            logprob,
            tuple(token.encode()),
            tuple(TokenLogprob(other, value, tuple(other.encode())) for other, value in (top or {}).items()),
        )
        for token, logprob, top in zip(told.get("tokens") or (), told.get("token_logprobs") or (), tops, strict=True)
    )
    return TokenDelta(choice.get("index", 0), choice.get("text") or "", (), tokens, choice.get("finish_reason"))

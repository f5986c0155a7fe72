"""What each route takes and gives, for our description of the API. A test holds that every route is here.

What administers tells it itself: the type that its handler returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec

from nimbos.api import (
    anthropic_batch_wire,
    anthropic_batches,
    anthropic_wire,
    batches,
    dashscope_request,
    dashscope_vectors,
    dashscope_wire,
    files,
    live,
    models,
    moderations,
    ollama_embed,
    ollama_models,
    ollama_request,
    ollama_wire,
    openai_completions,
    openai_embeddings,
    openai_wire,
    own_usage,
    process_wire,
    processes,
    rerank,
    responses_compact,
    responses_conversations,
    responses_request,
    responses_wire,
    uploads,
)
from nimbos.api.admin import (
    admin_keys,
    admin_routes,
    allowances,
    console,
    keys,
    prices,
    programs,
    projects,
    rates,
    spend_alerts,
    spending,
    users,
)
from nimbos.api.anthropic_body import MessagesBody
from nimbos.api.chat_request import ChatBody
from nimbos.api.process_signals import SignalBody
from nimbos.api.programs import ProgramBody, ProgramDeleted, ProgramList, ProgramTold

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
JSON = "application/json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`takes`: the body's struct, or the media type of one that is not JSON. `gives`: the reply's; None for one whose
    shape no struct says. `media`: what a reply may be besides JSON."""

    takes: type[msgspec.Struct] | str | None = None
    gives: type[msgspec.Struct] | None = None
    media: tuple[str, ...] = ()


_CHAT = (EVENTS,)
_RANKING = Operation(takes=rerank.RerankBody, gives=rerank.Ranking)
_GENERATION = Operation(takes=dashscope_request.GenerationBody, gives=dashscope_wire.Reply, media=_CHAT)
_REFUSED = Operation()
_PROCESS = "/v1/processes/{pid}"

OPERATIONS: Mapping[str, Operation] = {
    "GET /health": Operation(),
    "GET /metrics": Operation(media=("text/plain",)),
    "GET /openapi.json": Operation(),
    # OpenAI's
    "GET /v1/models": Operation(gives=models.ModelList),
    "GET /v1/models/{model}": Operation(gives=models.ModelBody),
    "POST /v1/chat/completions": Operation(takes=ChatBody, gives=openai_wire.ChatCompletion, media=_CHAT),
    "POST /v1/completions": Operation(
        takes=openai_completions.CompletionsBody, gives=openai_wire.TextCompletion, media=_CHAT
    ),
    "POST /v1/embeddings": Operation(takes=openai_embeddings.EmbeddingsBody, gives=openai_wire.EmbeddingList),
    "POST /v1/moderations": Operation(takes=moderations.ModerationsBody, gives=moderations.ModerationList),
    "POST /v1/rerank": _RANKING,
    "POST /v2/rerank": _RANKING,
    "POST /rerank": _RANKING,
    "POST /v1/responses": Operation(takes=responses_request.ResponsesBody, gives=responses_wire.Response, media=_CHAT),
    "POST /v1/responses/compact": Operation(takes=responses_compact.CompactBody, gives=responses_wire.Compacted),
    "POST /v1/responses/input_tokens": Operation(takes=responses_request.CountBody, gives=responses_wire.TokenCount),
    "GET /v1/responses/{response_id}": Operation(gives=responses_wire.Response, media=_CHAT),
    "DELETE /v1/responses/{response_id}": Operation(gives=responses_wire.Deleted),
    "POST /v1/responses/{response_id}/cancel": Operation(gives=responses_wire.Response),
    "GET /v1/responses/{response_id}/input_items": Operation(gives=responses_wire.Page),
    "POST /v1/conversations": Operation(takes=responses_conversations.CreateBody, gives=responses_wire.Conversation),
    "GET /v1/conversations/{conversation_id}": Operation(gives=responses_wire.Conversation),
    "POST /v1/conversations/{conversation_id}": Operation(
        takes=responses_conversations.UpdateBody, gives=responses_wire.Conversation
    ),
    "DELETE /v1/conversations/{conversation_id}": Operation(gives=responses_wire.Deleted),
    "POST /v1/conversations/{conversation_id}/items": Operation(
        takes=responses_conversations.ItemsBody, gives=responses_wire.Page
    ),
    "GET /v1/conversations/{conversation_id}/items": Operation(gives=responses_wire.Page),
    "GET /v1/conversations/{conversation_id}/items/{item_id}": Operation(),
    "DELETE /v1/conversations/{conversation_id}/items/{item_id}": Operation(gives=responses_wire.Conversation),
    "POST /v1/files": Operation(takes="multipart/form-data", gives=files.FileBody),
    "GET /v1/files": Operation(gives=files.FileList),
    "GET /v1/files/{file_id}": Operation(gives=files.FileBody),
    "DELETE /v1/files/{file_id}": Operation(gives=files.Deleted),
    "GET /v1/files/{file_id}/content": Operation(media=("application/octet-stream", "application/jsonl")),
    "POST /v1/uploads": Operation(takes=uploads.UploadBody, gives=uploads.UploadTold),
    "POST /v1/uploads/{upload_id}/parts": Operation(takes="multipart/form-data", gives=uploads.PartTold),
    "POST /v1/uploads/{upload_id}/complete": Operation(takes=uploads.CompleteBody, gives=uploads.UploadTold),
    "POST /v1/uploads/{upload_id}/cancel": Operation(gives=uploads.UploadTold),
    "POST /v1/batches": Operation(takes=batches.BatchBody, gives=batches.BatchTold),
    "GET /v1/batches": Operation(gives=batches.BatchList),
    "GET /v1/batches/{batch_id}": Operation(gives=batches.BatchTold),
    "POST /v1/batches/{batch_id}/cancel": Operation(gives=batches.BatchTold),
    # Anthropic's
    "POST /v1/messages": Operation(takes=MessagesBody, media=_CHAT),
    "POST /v1/messages/count_tokens": Operation(takes=MessagesBody, gives=anthropic_wire.TokenCount),
    "POST /v1/messages/batches": Operation(takes=anthropic_batches.BatchBody, gives=anthropic_batch_wire.MessageBatch),
    "GET /v1/messages/batches": Operation(gives=anthropic_batch_wire.BatchPage),
    "GET /v1/messages/batches/{batch_id}": Operation(gives=anthropic_batch_wire.MessageBatch),
    "DELETE /v1/messages/batches/{batch_id}": Operation(gives=anthropic_batch_wire.Deleted),
    "POST /v1/messages/batches/{batch_id}/cancel": Operation(gives=anthropic_batch_wire.MessageBatch),
    "GET /v1/messages/batches/{batch_id}/results": Operation(media=("application/x-jsonl",)),
    # DashScope's
    "POST /api/v1/services/aigc/text-generation/generation": _GENERATION,
    "POST /api/v1/services/aigc/multimodal-generation/generation": _GENERATION,
    "POST /api/v1/services/embeddings/text-embedding/text-embedding": Operation(
        takes=dashscope_vectors.EmbeddingBody, gives=dashscope_wire.EmbeddingsReply
    ),
    "POST /api/v1/services/embeddings/multimodal-embedding/multimodal-embedding": _REFUSED,
    "POST /api/v1/services/rerank/text-rerank/text-rerank": Operation(
        takes=dashscope_vectors.RerankBody, gives=dashscope_wire.RankingReply
    ),
    # Ollama's
    "GET /api/version": Operation(gives=ollama_wire.Version),
    "GET /api/tags": Operation(gives=ollama_wire.ModelEntries),
    "GET /api/ps": Operation(gives=ollama_wire.ModelEntries),
    "POST /api/show": Operation(takes=ollama_models.Named, gives=ollama_wire.Shown),
    "POST /api/chat": Operation(takes=ollama_request.OllamaChatBody, gives=ollama_wire.Line, media=(LINES,)),
    "POST /api/generate": Operation(takes=ollama_request.OllamaGenerateBody, gives=ollama_wire.Line, media=(LINES,)),
    "POST /api/embed": Operation(takes=ollama_embed.EmbedCall, gives=ollama_wire.EmbedReply),
    "POST /api/embeddings": Operation(takes=ollama_embed.EmbeddingsCall, gives=ollama_wire.EmbeddingsReply),
    "POST /api/pull": Operation(takes=ollama_models.Named, gives=ollama_wire.Status, media=(LINES,)),
    "DELETE /api/delete": Operation(takes=ollama_models.Named),
    "POST /api/create": _REFUSED,
    "POST /api/copy": _REFUSED,
    "POST /api/push": _REFUSED,
    "POST /api/blobs/{digest}": _REFUSED,
    # ours
    "POST /v1/processes": Operation(takes=processes.ProcessBody, gives=process_wire.ProcessTold),
    "GET /v1/processes": Operation(gives=process_wire.ProcessList),
    f"GET {_PROCESS}": Operation(gives=process_wire.ProcessTold),
    f"DELETE {_PROCESS}": Operation(gives=process_wire.ProcessTold),
    f"GET {_PROCESS}/events": Operation(media=(EVENTS,)),
    f"GET {_PROCESS}/segments/{{hash}}": Operation(media=("application/octet-stream",)),
    f"POST {_PROCESS}/signals": Operation(takes=SignalBody, gives=process_wire.SignalTold),
    f"POST {_PROCESS}/fork": Operation(takes=processes.ForkBody, gives=process_wire.Forks),
    f"POST {_PROCESS}/adopt": Operation(gives=process_wire.ProcessTold),
    f"GET {_PROCESS}/tree": Operation(gives=process_wire.ProcessList),
    f"GET {_PROCESS}/cost": Operation(gives=process_wire.CostTold),
    f"GET {_PROCESS}/verify": Operation(gives=process_wire.VerifiedTold),
    f"POST {_PROCESS}/replay": Operation(takes=processes.ReplayBody, media=(EVENTS,)),
    "POST /v1/programs": Operation(takes=ProgramBody, gives=ProgramTold),
    "GET /v1/programs": Operation(gives=ProgramList),
    "GET /v1/programs/{program}": Operation(gives=ProgramTold),
    "DELETE /v1/programs/{program}": Operation(gives=ProgramDeleted),
    "GET /v1/usage": Operation(gives=own_usage.OwnUsage),
    "GET /v1/organization/live": Operation(gives=live.LiveBody),
    "GET /v1/organization/usage/asks": Operation(media=("text/csv", "application/jsonl")),
    "POST /v1/console/login": Operation(takes=console.LoginBody),
}

_PROJECT = "/v1/organization/projects/{project_id}"
ADMIN_TAKES: Mapping[str, type[msgspec.Struct]] = {
    "/v1/organization/projects": projects.ProjectCreate,
    _PROJECT: projects.ProjectUpdate,
    f"{_PROJECT}/users": projects.MemberCreate,
    f"{_PROJECT}/users/{{user_id}}": projects.MemberUpdate,
    f"{_PROJECT}/model_permissions": projects.ModelsUpdate,
    "/v1/organization/users": users.UserCreate,
    "/v1/organization/users/{user_id}": users.UserUpdate,
    "/v1/organization/users/{user_id}/password": users.PasswordUpdate,
    f"{_PROJECT}/api_keys": keys.KeyCreate,
    f"{_PROJECT}/api_keys/{{key_id}}": keys.KeyUpdate,
    f"{_PROJECT}/service_accounts": programs.ServiceAccountCreate,
    f"{_PROJECT}/service_accounts/{{account_id}}": programs.ServiceAccountUpdate,
    f"{_PROJECT}/service_accounts/{{account_id}}/api_keys": programs.ServiceAccountKeyCreate,
    "/v1/organization/admin_api_keys": admin_keys.AdminKeyCreate,
    "/v1/organization/budgets": allowances.BudgetSet,
    "/v1/organization/limits": allowances.LimitSet,
    f"{_PROJECT}/rate_limits/{{rate_limit_id}}": rates.RateLimitUpdate,
    f"{_PROJECT}/spend_limit": spending.SpendLimitUpdate,
    f"{_PROJECT}/spend_alerts": spend_alerts.SpendAlertUpdate,
    f"{_PROJECT}/spend_alerts/{{alert_id}}": spend_alerts.SpendAlertUpdate,
    "/v1/organization/spend_limit": spending.SpendLimitUpdate,
    "/v1/organization/spend_alerts": spend_alerts.SpendAlertUpdate,
    "/v1/organization/spend_alerts/{alert_id}": spend_alerts.SpendAlertUpdate,
    "/v1/organization/prices": prices.PricesUpdate,
}


def plain_path(path: str) -> str:
    """Without Starlette's converters."""
    return path.replace(":path}", "}")


def operations() -> dict[str, Operation]:
    """By method and path, as `GET /v1/models`."""
    found = dict(OPERATIONS)
    for route in admin_routes():
        path = plain_path(route.path)
        takes = ADMIN_TAKES.get(path) if route.method == "POST" else None
        found.setdefault(f"{route.method} {path}", Operation(takes=takes, gives=_returned(route.handle)))
    return found


def _returned(handle: Any) -> type[msgspec.Struct] | None:
    function = getattr(handle, "func", handle)  # also of a partial
    gives = get_type_hints(function).get("return")
    return gives if isinstance(gives, type) and issubclass(gives, msgspec.Struct) else None

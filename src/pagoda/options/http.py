"""The options of the side that clients see: what answers hold beyond what was asked, browsers, TLS."""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.options.setting import option
from pagoda.types import MAX_LOGPROBS, MOST_LOGPROBS

_GROUP = "Clients"


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Names, meaning and defaults are vLLM's, but that streams are kept alive."""

    enable_force_include_usage: bool = option(
        False, "Tell of the usage in every chunk of every stream, whether it is asked for or not", _GROUP
    )
    return_tokens_as_token_ids: bool = option(
        False, "Write tokens of log-probabilities as token_id:N for all clients", _GROUP
    )
    fingerprint_mode: str = option(
        "full",
        "What system_fingerprint of answers is. full and hash: pagoda, its version, and a hash of the model and how it "
        "is computed; custom: --fingerprint-value; none: null",
        _GROUP,
        choices=("full", "hash", "custom", "none"),
    )
    fingerprint_value: str | None = option(None, "The text for --fingerprint-mode custom", _GROUP)
    sse_keep_alive_interval: float = option(
        15.0, "Seconds of silence after which a stream gets a comment that keeps it open; 0: never", _GROUP, low=0
    )
    max_logprobs: int = option(
        MAX_LOGPROBS, "How many log-probabilities of each token clients may ask for", _GROUP, low=0, high=MOST_LOGPROBS
    )
    disable_fastapi_docs: bool = option(False, "Do not serve /docs and /openapi.json", _GROUP)
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that --allowed-origins may use", _GROUP)
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that --allowed-origins may send", _GROUP)
    allow_credentials: bool = option(False, "Let --allowed-origins send cookies", _GROUP)
    ssl_certfile: str | None = option(None, "Certificate (PEM, with its chain): serve over TLS", _GROUP)
    ssl_keyfile: str | None = option(None, "Its private key, where it is not in the same file", _GROUP)
    ssl_ca_certs: str | None = option(None, "Certificates of those who may sign clients' own", _GROUP)
    ssl_cert_reqs: int = option(
        0, "Whether clients need a certificate: 0 no, 1 looked at if there is one, 2 yes", _GROUP, low=0, high=2
    )
    ssl_ciphers: str | None = option(None, "Ciphers for TLS 1.2, as OpenSSL writes them", _GROUP)

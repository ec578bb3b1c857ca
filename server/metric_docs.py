"""The metrics as one page of Markdown: `python -m server.metric_docs > docs/metrics.md`."""

from __future__ import annotations

import sys

from server.metric_names import FAMILIES, Family

_INTRO = """\
# Metrics

<!-- Made by `python -m server.metric_docs`; a test fails when it is out of date. -->

`GET /metrics` is read by Prometheus: text format, or OpenMetrics where `Accept` asks for it. With `[auth]` it
needs the permission `admin` (`authorization: {credentials_file: ...}` in the scrape configuration), unless
`metrics_open = true` under `[server]` (`--metrics-open`, `COBATCH_METRICS_OPEN`) lets everybody read it: names of
models and of the busiest tenants are among what is told then.

Counting is always on and costs less than half a microsecond a request; the numbers are put together when they
are asked for, piece by piece between requests.

[deploy/prometheus](../deploy/prometheus) has a scrape configuration and alert rules,
[deploy/grafana/cobatch.json](../deploy/grafana/cobatch.json) a dashboard to import.

## What to alert on

| alert | when | what to do |
| --- | --- | --- |
| `CobatchDown` | no scrape has succeeded for 2 minutes | start it, or see why it does not answer |
| `CobatchModelUnusable` | a model is `failed` or `dead` | restart; the log says why it came to that |
| `CobatchNotReady` | not ready for 5 minutes | a model takes long to load, or the keys of all issuers are missing |
| `CobatchErrors` | more than 1 % of a model's requests end with 5xx, but for 503 and 504 | the log has the reference |
| `CobatchRefusing` | more than 5 % of a model's requests get 429 or 503, not counting tenants over their own limits | another replica, or a larger `max_queue_rows` where callers wait |
| `CobatchExpiring` | more than 1 % of a model's requests get 504 | timeouts are shorter than the queue is long |
| `CobatchSlow` | 99 % of requests take longer than 1 s to answer | set the limit to what was promised to callers |
| `CobatchEngineSaturated` | an engine is busy for 95 % of the time and requests wait for over 0.1 s | another replica or a faster engine |
| `CobatchLoopBlocked` | the event loop is late by over 50 ms | too few processors, or something blocks it |
| `CobatchEngineHung` | a run did not end within `execution_timeout_ms` | look at the engine, the driver and the log |
| `CobatchForgedTokens` | more than one token a second has a wrong signature | somebody tries, or an issuer changed its keys |
| `CobatchKeysUnavailable` | the keys of an issuer cannot be had | the way to the issuer |
"""


def _line(family: Family) -> str:
    ending = {"counter": "_total", "info": "_info"}.get(family.kind, "")
    labels = ", ".join(f"`{label}`" for label in family.labels)
    watch = f" *{family.watch}*" if family.watch else ""
    return f"| `{family.name}{ending}` | {family.kind} | {labels} | {family.help}{watch} |"


_NOTES = """\

## Labels

* `model`: its name. `engine`: which of the model's engines, from 0.
* `code`: the HTTP status; 499 where the client left first. `reason`: the slug of the problem
  ([problems.md](problems.md)), empty where there is none.
* `route`: the route as it is written in the server (`/v2/models/{name}/infer`), so that there are only so many;
  empty where there is none, and where the caller was refused before his route was looked for.
* `reason` of batches: `full`, `idle` and so on, as [scheduling.md](scheduling.md) explains them.
* `tenant`: the 20 busiest by name, `other` for the rest. Who is among them counts from the time on at which he
  was found to be; a tenant gives way to another that is twice as busy, and its series end then. A tenant whose own
  name is `other` is counted there.
* `result` of `cobatch_auth_results_total`: `verified`, `remembered` or `key` where a caller became known;
  `missing`, `invalid`, `forged`, `refused-again`, `unknown-key`, `throttled` or `keys-unavailable` where not. The
  fast path looks at a credential once for as long as a client repeats its headers, so these are no requests.

Each infer item of a `POST /batch` and each prediction counts as an inference request of its model (an item took as long
as its call); in `cobatch_http_requests_total` the call is one request.

GPUs are there where NVIDIA's NVML is, and the package `nvidia-ml-py` (`pip install cobatch[nvml]`). Of the process
itself there are `process_*` (Linux) and `python_gc_*`, as `prometheus_client` has them.

## Questions and the queries that answer them

| question | query |
| --- | --- |
| requests a second | `sum by (model) (rate(cobatch_requests_total[1m]))` |
| latency, 99 % | `histogram_quantile(0.99, sum by (le, model) (rate(cobatch_request_duration_seconds_bucket[5m])))` |
| mean rows in a batch | `rate(cobatch_batch_rows_sum[1m]) / rate(cobatch_batch_rows_count[1m])` |
| busy share of an engine | `rate(cobatch_engine_busy_seconds_total[1m])` |
| part that is refused | `sum by (model) (rate(cobatch_requests_total{code=~"429\\|503"}[5m])) / sum by (model) (rate(cobatch_requests_total[5m]))` |
| wasted on padding | `rate(cobatch_batch_padding_elements_total[5m]) / rate(cobatch_batch_elements_total[5m])` |
| a tenant's part of the engines | `rate(cobatch_tenant_engine_seconds_total[5m]) / on() group_left() sum(rate(cobatch_tenant_engine_seconds_total[5m]))` |
"""


def markdown() -> str:
    """The whole page."""
    table = ["| Name | Kind | Labels | What it says, *what to look for* |", "| --- | --- | --- | --- |"]
    return "\n".join([_INTRO, "## All of them", "", *table, *map(_line, FAMILIES), _NOTES])


if __name__ == "__main__":
    sys.stdout.write(markdown())

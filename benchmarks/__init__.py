"""Benchmarks, run from a checkout. `--help` lists the options of each.

| command | measures |
|---|---|
| `python -m benchmarks.request_cost.overhead` | a request beside bare uvicorn and the model alone |
| `python -m benchmarks.request_cost.guard` | instructions of a request, beside a baseline (runs in CI) |
| `python -m benchmarks.request_cost.auth` | the cost of authentication, also under a flood of forged tokens |
| `python -m benchmarks.request_cost.batch_route` | a request inside POST /batch |
| `python -m benchmarks.request_cost.codec` | JSON libraries |
| `python -m benchmarks.scaling` | a request by batch size, row size, connections, queue, tenants |
| `python -m benchmarks.scheduling` | the scheduler beside other policies, in virtual time |
| `python -m benchmarks.scheduling.truth` | the simulator beside a real server |
| `python -m benchmarks.scheduling.agree` | `cobatch bench` beside wrk |
| `python -m benchmarks.scheduling.sizes` | the default batch size beside chosen ones |
| `python -m benchmarks.dashboard` | screenshots and cost of the live page |
| `./scripts/bench-peers` | cobatch beside other servers |
| `./scripts/gpu-check` | accuracy and speed on a GPU |
"""

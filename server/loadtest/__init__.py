"""`cobatch bench`: a load generator for any server of the Open Inference Protocol V2.

Open loop: send times are drawn beforehand and every latency counts from the scheduled time, so a stall of
the server delays all requests scheduled during it, as it would delay users (no coordinated omission). Closed
loop: each connection sends its next request after an answer, which finds the throughput limit and hides
stalls.

`requests` prepares request bytes from `options` and the `target`'s metadata. `fleet` starts the generator
processes; in each, a `driver` of `generator` sends the requests and only records seven numbers per
request (`messages.COLUMNS`). `statistics` counts them, `results` and `capacity` interpret the counts,
`report` and `page` render them; `runner` puts it together.

Invariants: each request scheduled in a trial is in the samples once, with an answer or an error; in a stopped
trial, each one scheduled before the stop. Latency percentiles exclude failures, which are counted separately;
`capacity` counts each failure as a late answer.
"""

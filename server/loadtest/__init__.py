"""`cobatch bench`: load on any server of the Open Inference Protocol V2, and what came of it.

Theory. What a user waits for begins when he wants an answer, not when a generator gets round to asking. In
the open loop the moments of sending are drawn beforehand and every latency counts from them, so that a server
which stalls is charged for all who would have asked meanwhile. In the closed loop a connection asks again
when it was answered; that finds what a server can take, and hides its stalls.

Rooms: `asked`, `target`, `examples`, `callers`, `wire` and `prepare` make the requests; `process` with
`drivers`, `loops`, `connection` and `alarm` sends them, in as many processes as are wanted, and does nothing
else on the way but note seven numbers per request (`plan.COLUMNS`); `fleet` starts the processes and hands
the numbers to `tally`, which has `histogram` and `intervals`; `results`, `verdict` and `capacity` say what
they mean; `live`, `table`, `page` and `document` show it.

Invariants: each request that was due in a trial is in the samples once, with an answer or an error; in a
trial that was stopped, each that was due until then. Latencies of failures are in no percentile; failures are
counted beside them, and `capacity` counts each as too late.
"""

"""All tuning constants of scheduling: the unit is in the name (a ratio has none), the reason beside it.

"Shown by" names the benchmark or test that gets worse without the constant: `scheduling` is
`python -m benchmarks.scheduling` (virtual time), `request_cost` the guard of the request path, `queue_cost`
`python -m benchmarks.scaling.queue_cost`; the others are modules under tests/batcher.
"""

# Dispatching

# A full batch is packed this long before the running one is expected to end: packing takes time and timers
# are late. Shown by scheduling (engine idle between batches) and test_policy.
LEAD_S = 0.002
# With a delay configured, a batch waits only if at least this many rows are expected in the time left.
# Shown by test_policy.
WORTH_WAITING_ROWS = 0.5
# While each iteration of the event loop brings another request, a batch may grow for this many iterations:
# sending a batch costs as much as about ten requests. Shown by request_cost (64 at once).
SETTLE_ITERATIONS = 6
# After this many batches of one request with none behind it, the next request leaves without waiting for an
# iteration, if a run is so short that a request right behind it loses little. Shown by request_cost (alone).
LONE_BATCHES = 16
SHORT_RUN_S = 0.0002

# Waiting for closed-loop clients. Shown by test_arrivals and scheduling (closed loop).

# Clients need about a millisecond to come back: a shorter run is not worth a wait.
LONG_RUN_S = 0.001
# The longest wait, as a part of the run that it is for.
MOST_WAIT = 0.4
# A wait must let at least this many times as many rows through per second.
WAIT_GAIN = 1.05
# The clients of all but one of this many batches must have come back within the wait.
RETURNS_SEEN = 10
# Lateness of timers, and of a request that comes when one is due.
TIMER_S = 0.0005
# The return time of a batch is when this part of its clients are back; a wait lasts a multiple of it.
RETURNED = 0.9
RETURN_MARGIN = 2.0
# Weight of a new measurement of the time in which the engine is idle between runs.
IDLE_GAIN = 0.1

# Arrival rate, for `max_delay_ms`. Shown by test_run_times.

RATE_WINDOW_S = 0.5
RATE_LEAST_REQUESTS = 10  # before that the rate is unknown

# Forming a batch. Shown by scheduling (overload) and test_deadlines, the last two by test_fair_queueing.

# A request with at least this part of its timeout left is never left out in favour of larger batches,
TIME_LEFT = 0.75
# nor is one that makes a row at most this many times as expensive.
ROW_COST = 1.0
# A tenant is light if its rows are less than this part of its share of the queue.
LIGHT = 0.25
# A light tenant's rows do not ride in a batch that runs more than this many times as long for others' rows.
HELD_UP = 1.2

# Admission

# A tenant may queue this many times the room that is left (dynamic thresholds: Choudhury and Hahne, IEEE/ACM
# Transactions on Networking, 1998). One alone fills 8/9 of the queue, two 8/17 each: a tenant that floods the
# queue keeps none out. Shown by test_fair_queueing.
SHARE_OF_ROOM = 8
# The least retry hint: a client is never told to come back at once.
LEAST_RETRY_S = 0.001
# The predicted overhead beside queue and run is at most this part of a timeout: it is predicted less well
# than runs are. Shown by test_overhead.
MOST_OVERHEAD = 0.25
# Weight of a new measurement of that overhead.
OVERHEAD_GAIN = 0.1
# Without a run for this long, the predicted run time is doubted,
DOUBT_S = 1.0
# by a request that would have less than this part of its timeout to spare. Shown by test_trial_admission.
TO_SPARE = 0.1

# Run times. Shown by test_run_times, test_cost, test_shape_times, and scheduling.

# The cost of a batch beside its run (wake the worker, the callback, take a slot), in microseconds. Counted so
# that a model whose run is almost free is still batched as far as it goes.
BATCH_OVERHEAD_US = 100.0
# A size is efficient if a row costs at most this many times the best size's;
NEAR_BEST = 1.03
# the same in overload, where only rows per second count.
NEAR_BEST_OVERLOADED = 1.003
# The size in use stays until a row costs this many times the best,
WORTH_CHANGING = 1.1
# or until a smaller size costs no more, but for this factor.
AS_GOOD = 1.01
# Runs kept for each bucket of sizes, their greatest age, and how many are believed at any age.
RUNS_KEPT = 32
MEMORY_S = 5.0
ALWAYS_KEPT = 4
# A size's measurements count less than the warm-up's after this long without a run; twice as long each time,
# so that a bad size is tried less and less often.
STALE_S = 10.0
MOST_STALE_S = 600.0
# The quantile that deadlines are planned with.
HIGH_QUANTILE = 0.95
# Measurements are taken in at most this often: sorting a few dozen runs costs as much as a batch of one.
LEARN_S = 0.05
# Shapes kept with a run time of their own, and the largest ratio between two shapes.
SHAPES_KEPT = 256
MOST_SHAPE_FACTOR = 1000.0
# A run within this part of the prediction is as expected; weight of a new measurement of a shape's factor.
AS_EXPECTED = 0.1
SHAPE_GAIN = 0.2

# Order and memory

# A priority level counts as this much waiting: nothing waits for ever. Shown by test_priority.
AGEING_S = 1.0
# Tombstones and idle tenants kept before they are swept, which keeps sweeping O(1) per request. Shown by
# queue_cost.
TOMBSTONES_KEPT = 64
IDLE_TENANTS_KEPT = 64

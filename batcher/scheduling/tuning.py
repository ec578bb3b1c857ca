"""All tuning constants of scheduling: the unit is in the name (a ratio has none), the reason beside it.

"Without:" names the loss without the constant, or with a value that switches it off: goodput in % of the
bound, or requests/s in a closed loop, from the simulator (bert-large-a100 with deadlines of 100 ms,
resnet50-v100 with 200 ms); or the module under tests/batcher that fails.
"""

# Dispatching

# A full batch is packed this long before the running one is expected to end: packing takes time and timers
# are late. Without: 98.8 % instead of 99.7 at twice the capacity (bert). While deadlines are missed nothing
# is packed ahead of a run whose end is not known that well: 1,300 requests/s in time instead of 1,190 (cell
# 38 of benchmarks.scheduling.robustness).
LEAD_S = 0.002
# With a delay configured, a batch waits only if at least this many rows are expected in the time left.
# Without: test_policy.
WORTH_WAITING_ROWS = 0.5
# While each iteration of the event loop brings another request, a batch may grow for this many iterations:
# sending a batch costs as much as about ten requests. To be measured over sockets only:
# benchmarks.request_cost.overhead.
SETTLE_ITERATIONS = 6
# After this many batches of one request with none behind it, the next request leaves without waiting for an
# iteration, if a run is so short that a request right behind it loses little. Without: test_batcher.
LONE_BATCHES = 16
SHORT_RUN_S = 0.0002

# Waiting for closed-loop clients. Without: 1,873 requests/s instead of 2,156 (bert, 32 clients), 795 instead
# of 1,478 (resnet50, 24 clients). Of the single constants all but RETURNED fail in test_arrivals.

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

# Waiting because runs stall

# The spacing of batches counts if it is this many times the run of one row, and at least `TIMER_S`. Without
# spacing: 88 % instead of 96 of the bound (cell 1 of benchmarks.scheduling.robustness).
STALLING = 1.5
# Each batch takes this part off the peak of the queue, which ends a wait: so in a closed loop whose clients
# are all there, none is waited for, also when they have become fewer. At 1: 2,021 requests/s in time instead
# of 2,127 (the same cell).
PEAK_DECAY = 1 / 16

# Arrival rate, for `max_delay_ms`. Without: test_run_times.

RATE_WINDOW_S = 0.5
RATE_LEAST_REQUESTS = 10  # before that the rate is unknown

# Forming a batch

# A request with at least this part of its timeout left is never left out in favour of larger batches, nor is
# one that makes a row at most this many times as expensive. Without leaving out: 98.3 % instead of 100.0 at
# 1.2 times the capacity, 98.6 instead of 99.7 at twice (bert). At 1.0 goodput is as at 0.75, but clients with
# short timeouts are served less.
TIME_LEFT = 0.75
ROW_COST = 1.0
# While deadlines are missed, a request is left out in favour of others if it has less left than this part of
# the runs take. At 0.5: 1,040 requests/s in time instead of 1,190 (cell 38 of
# benchmarks.scheduling.robustness); at 0.95 stalls of a few percent drop requests that are in time:
# 3,960 instead of 4,170 (cell 74).
SURE = 0.9
# A tenant is light if its rows are less than this part of its share of the queue; they do not ride in a batch
# that runs more than this many times as long for others' rows. Without: test_fair_queueing.
LIGHT = 0.25
HELD_UP = 1.2

# Suspects. Without: tests/batcher/test_suspects.

# The part of the engine's time that suspects get while others have work now and then; half while others wait.
SUSPECT_PART = 0.2
# Others have work until this long after their last batch: their next request may come any moment.
OTHERS_S = 1.0
# A source is trusted again after this many runs without a failure: six in a row are rare where one row in ten
# fails.
TRUSTED_RUNS = 6
# A request that fails alone is taken to be at fault if the engine ran others within this time.
HEALTHY_S = 1.0
# A mark's greatest age, and the greatest number of marks: the oldest go first.
SUSPECT_S = 60.0
SUSPECTS_KEPT = 1024
# A tenant that was idle may be served this many full batches before its turn. At 0 the p99 of one that asks
# for a fifth of the engine beside a flood is 75 ms instead of 40 where batching does not pay (10.5 ms a row).
# At 8 nothing is gained. Without: test_fair_queueing.
CREDIT = 4

# Admission

# A tenant may queue this many times the room that is left (dynamic thresholds: Choudhury and Hahne, IEEE/ACM
# Transactions on Networking, 1998). One alone fills 8/9 of the queue, two 8/17 each: a tenant that floods the
# queue keeps none out. Without: test_fair_queueing.
SHARE_OF_ROOM = 8
# The least retry hint: a client is never told to come back at once.
LEAST_RETRY_S = 0.001
# The predicted overhead beside queue and run is at most this part of a timeout: it is predicted less well
# than runs are. Without: test_overhead.
MOST_OVERHEAD = 0.25
# Weight of a new measurement of that overhead.
OVERHEAD_GAIN = 0.1
# Without a run for this long, the predicted run time is doubted by a request that would have less than this
# part of its timeout to spare: with less it would be admitted, and be late when its batch is formed. Without:
# test_trial_admission (the first).
DOUBT_S = 1.0
TO_SPARE = 0.1

# Run times

# The cost of a batch beside its run (wake the worker, the callback, take a slot), in microseconds. Counted so
# that a model whose run is almost free is still batched as far as it goes; the simulator has no such cost.
BATCH_OVERHEAD_US = 100.0
# A size is efficient if a row costs at most this many times the best size's. Without: test_cost.
NEAR_BEST = 1.03
# This many batches in a row that left this many full batches in the queue: it keeps growing, so only rows per
# second count. Without: 98.3 % instead of 98.8 at 1.2 times the capacity, 98.1 instead of 99.8 at twice (bert
# without deadlines).
BACKLOG = 16
# The same in overload, where only rows per second count. At 1.03: 98.3 % instead of 100.0 at 1.2 times the
# capacity, 98.6 instead of 99.7 at twice (bert).
NEAR_BEST_OVERLOADED = 1.003
# The size in use stays until a row costs this many times the best, so that it does not swing with noise, or
# until a smaller size costs no more, but for this factor. The first at 1.1: 99.5 % instead of 100.7 where
# runs stall (BUSY of test_goodput, 0.95 of the capacity). Without the second: test_run_times.
WORTH_CHANGING = 1.07
AS_GOOD = 1.01
# Runs kept for each bucket of sizes, their greatest age, and how many are believed at any age. With 32 kept,
# medians of noisy runs are 15 % off: 93 % of Triton's goodput instead of 97 (cell 8 of
# benchmarks.scheduling.robustness). Without the others: test_run_times.
RUNS_KEPT = 128
MEMORY_S = 5.0
ALWAYS_KEPT = 4
# If the median of this many last runs lies outside the middle half of those before, those are forgotten. By
# chance that happens in 3 % of all cases, at 8 in 12 %. Without: test_run_times.
RUNS_RECENT = 16
# Runs over which the mean excess over the median is averaged. At 100 or 3,000: 2,051 or 2,056 requests/s in
# time instead of 2,127 (cell 1 of benchmarks.scheduling.robustness).
MEAN_RUNS = 500
# A size's own excess counts like that of all sizes after this many runs. At 4: 2,017/s instead of 2,127 (the
# same); at 200: 97.8 % instead of 99.7 (BUSY of test_goodput, 0.95 of the capacity).
MEAN_PRIOR = 32
# How far a size's time is from the warm-up's as the machine is now: the standard deviation of the ratio's
# logarithm. Its own runs alone: 88 and 91 % of the goodput (cells 172 and 198 of
# benchmarks.scheduling.robustness).
SEED_DOUBT = 0.1
# A run takes at least this long: clocks are not exact.
LEAST_RUN_S = 1e-9
# A size's measurements count less than the warm-up's after this long without a run; twice as long each time,
# so that a bad size is tried less and less often. Without: test_run_times.
STALE_S = 10.0
MOST_STALE_S = 600.0
# Measurements are taken in at most this often, once a size has run for a while: sorting a hundred runs costs
# as much as a batch of one. At 1 s: 98.1 % instead of 99.3 in bursts of 1.2 times the capacity (bert).
LEARN_S = 0.05
# Shapes kept with a run time of their own, and the largest ratio between two shapes.
SHAPES_KEPT = 256
MOST_SHAPE_FACTOR = 1000.0
# A run within this part of the prediction is as expected; weight of a new measurement of a shape's factor.
# Without: test_shape_times.
AS_EXPECTED = 0.1
SHAPE_GAIN = 0.2

# Order and memory

# A priority level counts as this much waiting: nothing waits for ever. Without: test_priority.
AGEING_S = 1.0
# Tombstones and idle tenants kept before they are swept, so that sweeping is O(1) per request. Without:
# benchmarks.scaling.queue_cost.
TOMBSTONES_KEPT = 64
IDLE_TENANTS_KEPT = 64

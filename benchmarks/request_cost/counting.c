/* Callgrind counts from `begin` to `end`, which writes what was counted under a name. Before the first `begin`
 * the program runs several times faster; instrumentation then stays on, as each start translates all code
 * anew. Without callgrind both do nothing. */
#include <valgrind/callgrind.h>

void begin(void)
{
    CALLGRIND_START_INSTRUMENTATION;
    CALLGRIND_ZERO_STATS;
}

void end(const char *name)
{
    CALLGRIND_DUMP_STATS_AT(name);
}

/* Hands out work items to the team and answers Ctrl-C.
 *
 * Items are taken with an atomic counter, so the order varies and the results do not: an item is computed alike by
 * whichever thread takes it. The calling thread looks for signals between items and, when nothing is left for it,
 * while it waits for the others; kernels ask `schedule_stopped` between blocks, so that even one long item ends.
 */
#ifndef MHA_SCHEDULE_H
#define MHA_SCHEDULE_H
#include <sched.h>
#include <stdint.h>
#include <time.h>

typedef struct {
    int64_t next, total, done;
    int stopped, team;
    int look_for_signals;
    double looked;
} mha_schedule;

static inline double mha_seconds(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline void schedule_start(mha_schedule *s, int64_t total, int look_for_signals)
{
    s->next = s->done = 0;
    s->total = total;
    s->stopped = s->team = 0;
    s->look_for_signals = look_for_signals;
    s->looked = mha_seconds();
}

static inline int schedule_stopped(const mha_schedule *s) { return __atomic_load_n(&s->stopped, __ATOMIC_RELAXED); }
static inline void schedule_stop(mha_schedule *s) { __atomic_store_n(&s->stopped, 1, __ATOMIC_RELAXED); }
static inline void schedule_join(mha_schedule *s) { __atomic_fetch_add(&s->team, 1, __ATOMIC_RELAXED); }

/* The next item, or -1. */
static inline int64_t schedule_take(mha_schedule *s)
{
    if (schedule_stopped(s))
        return -1;
    const int64_t item = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED);
    return item < s->total ? item : -1;
}

static inline void schedule_finish(mha_schedule *s) { __atomic_fetch_add(&s->done, 1, __ATOMIC_RELEASE); }

/* Whether the calling thread should look for signals now: fifty milliseconds have passed. */
static inline int schedule_due(mha_schedule *s)
{
    if (!s->look_for_signals)
        return 0;
    const double now = mha_seconds();
    if (now - s->looked < 0.05 && now >= s->looked)
        return 0;
    s->looked = now;
    return 1;
}

static inline int schedule_all_done(const mha_schedule *s)
{
    return schedule_stopped(s) || __atomic_load_n(&s->done, __ATOMIC_ACQUIRE) >= s->total;
}

/* Lets a moment pass while others still work; returns 0 when all is done. It polls as a barrier would for the first
 * two milliseconds, so that short calls pay nothing, but gives way: the thread waited for may share this core with a
 * spinning thread of the user's BLAS. It sleeps from then on. */
static inline int schedule_wait(const mha_schedule *s)
{
    const double start = mha_seconds();
    for (int i = 0; i < 64 || mha_seconds() - start < 2e-3; i++) {
        if (schedule_all_done(s))
            return 0;
        if (i >= 64)
            sched_yield();
    }
    const struct timespec pause = {0, 500000};
    nanosleep(&pause, 0);
    return 1;
}
#endif

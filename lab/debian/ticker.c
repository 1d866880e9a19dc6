// The clock of the Debian guest: ten times a second `tick N UPTIME`, and once a
// second a line for people. It runs ahead of everything else in the guest, so
// that a tick that is late was not delayed by the guest itself.
#include <sched.h>
#include <stdio.h>
#include <time.h>

enum { TICKS_A_SECOND = 10, NANOSECONDS = 1000000000 };

int main(void)
{
    const struct sched_param priority = {.sched_priority = 10};
    if (sched_setscheduler(0, SCHED_FIFO, &priority) != 0)
        perror("sched_setscheduler");
    setvbuf(stdout, NULL, _IOLBF, 0);

    struct timespec next, now;
    clock_gettime(CLOCK_MONOTONIC, &next);
    for (unsigned long tick = 0;; tick++) {
        clock_gettime(CLOCK_BOOTTIME, &now);
        printf("tick %lu %lld.%03ld\n", tick, (long long)now.tv_sec, now.tv_nsec / 1000000);
        if (tick % TICKS_A_SECOND == 0)
            printf("guest: alive for %lu s, %lu ticks\n", tick / TICKS_A_SECOND, tick);
        next.tv_nsec += NANOSECONDS / TICKS_A_SECOND;
        if (next.tv_nsec >= NANOSECONDS) {
            next.tv_nsec -= NANOSECONDS;
            next.tv_sec++;
        }
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
    }
}

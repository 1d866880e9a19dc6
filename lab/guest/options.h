// What the kernel command line asks for.
#pragma once

#include "machine.h"

enum fill { FILL_RANDOM, FILL_STAMP, FILL_ZERO };

struct options {
    u64 mib;             // mib=: memory that is written and checked, over and over
    u64 touch_mib;       // touch=: memory written once and then only checked
    u64 rate_mib;        // rate=: MiB written a second; 0: as fast as it goes
    u64 verify_rate_mib; // verify=: MiB of the memory of `touch` checked a second
    u64 tick_ms;         // tick=
    u64 seed;            // seed=
    enum fill fill;      // fill=random|stamp|zero
    u32 spread;          // place=spread|packed
};

// Parses the command line; each `range=START,LENGTH` adds to `boot->ranges`.
struct options options_parse(struct boot *boot);

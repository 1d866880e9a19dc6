// What a page must hold: a function of the page, the pass and the seed, which
// differs in every word of every page of every pass.
#pragma once

#include "options.h"

// The pass of memory that is written once.
#define IDLE_PASS (~0ull)

struct pattern {
    enum fill fill;
    u64 seed;
};

struct difference {
    const char *kind; // stale, torn, zero or foreign
    u64 age;          // stale: by how many passes
    u32 words;        // how many words are wrong
    u32 first;        // the first of them
    u64 want, have;   // at the first
};

void pattern_write(const struct pattern *pattern, u64 address, u64 pass);
u32 pattern_holds(const struct pattern *pattern, u64 address, u64 pass);
// For a page that does not hold its pattern: how it differs.
struct difference pattern_difference(const struct pattern *pattern, u64 address, u64 pass);

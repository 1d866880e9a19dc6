/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What both objects keep: the loader reads these maps (src/records.rs has the same structures). */
#pragma once
#include "bpf.h"

/* Slot k holds what took at most 2^k microseconds, and more than slot k - 1 holds; the last one everything else. These
 * are the bounds of the agent's metrics, so that their buckets are exact. */
#define SLOTS 28
/* Of a range whose length is not known. */
#define SIZE_UNKNOWN 255

enum operation { REGISTER, DEREGISTER, KERNEL, PIN };

struct series_key {
    u32 tgid;
    u16 operation;
    u16 size_class;
};

struct histogram {
    u64 sum_ns;
    u64 max_ns;
    u64 bytes;
    u64 slots[SLOTS];
};

struct failure_key {
    u32 tgid;
    u16 operation;
    u16 number;
};

struct name {
    char text[16];
};

enum loss { LOST_CALL, LOST_SERIES, LOST_RETURN, LOST_FAILURE, LOSSES };

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 4096);
    __type(key, struct series_key);
    __type(value, struct histogram);
} series SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, struct failure_key);
    __type(value, u64);
} failures SEC(".maps");

/* For processes that are gone before anybody asks /proc. */
struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, u32);
    __type(value, struct name);
} names SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, LOSSES);
    __type(key, u32);
    __type(value, u64);
} lost SEC(".maps");

static const struct histogram empty = {};

INLINE void lose(u32 what)
{
    u64 *count = bpf_map_lookup_elem(&lost, &what);

    if (count)
        __sync_fetch_and_add(count, 1);
}

INLINE u32 slot_of(u64 ns)
{
    u64 whole_us = ns ? (ns - 1) / 1000 : 0;
    u32 slot = whole_us ? log2_of(whole_us) + 1 : 0;

    return slot < SLOTS ? slot : SLOTS - 1;
}

INLINE void raise(u64 *most, u64 value)
{
    u64 seen = *(volatile u64 *)most;

    /* Whoever loses four times in a row to larger values is no maximum. */
    for (int attempt = 0; attempt < 4; attempt++) {
        u64 before;

        if (seen >= value)
            return;
        before = __sync_val_compare_and_swap(most, seen, value);
        if (before == seen)
            return;
        seen = before;
    }
}

/* What the current process is called, as far as the object can tell. */
INLINE void name_current(struct name *name);

INLINE void remember_name(u32 tgid)
{
    struct name name = {};

    name_current(&name);
    bpf_map_update_elem(&names, &tgid, &name, BPF_NOEXIST);
}

/* A call that ended: how long it took, and what it pinned or released. */
INLINE void record(u32 tgid, u16 operation, u16 size_class, u64 ns, u64 bytes)
{
    struct series_key key = { tgid, operation, size_class };
    struct histogram *histogram = bpf_map_lookup_elem(&series, &key);

    if (!histogram) {
        bpf_map_update_elem(&series, &key, &empty, BPF_NOEXIST);
        histogram = bpf_map_lookup_elem(&series, &key);
        if (!histogram) {
            lose(LOST_SERIES);
            return;
        }
        remember_name(tgid);
    }
    u32 slot = slot_of(ns);
    if (slot < SLOTS)
        __sync_fetch_and_add(&histogram->slots[slot], 1);
    __sync_fetch_and_add(&histogram->sum_ns, ns);
    __sync_fetch_and_add(&histogram->bytes, bytes);
    raise(&histogram->max_ns, ns);
}

/* number: an errno, 0 where it is not known. */
INLINE void record_failure(u32 tgid, u16 operation, u16 number)
{
    struct failure_key key = { tgid, operation, number };
    u64 none = 0, *count = bpf_map_lookup_elem(&failures, &key);

    if (!count) {
        bpf_map_update_elem(&failures, &key, &none, BPF_NOEXIST);
        count = bpf_map_lookup_elem(&failures, &key);
    }
    if (count)
        __sync_fetch_and_add(count, 1);
    else
        lose(LOST_FAILURE);
}

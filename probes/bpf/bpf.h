/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What an eBPF program needs of the kernel, without its headers: they differ from one host to the next, this does not. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int s32;
typedef long long s64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name
#define INLINE static __attribute__((always_inline))

enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_ARRAY = 2, BPF_MAP_TYPE_LRU_HASH = 9 };
enum { BPF_ANY = 0, BPF_NOEXIST = 1 };

static void *(*const bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*const bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*const bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u64 (*const bpf_ktime_get_ns)(void) = (void *)5;
static u64 (*const bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*const bpf_get_current_comm)(void *buffer, u32 bytes) = (void *)16;
static u64 (*const bpf_get_current_task)(void) = (void *)35;
static long (*const bpf_probe_read_kernel)(void *to, u32 bytes, const void *from) = (void *)113;
static u64 (*const bpf_get_attach_cookie)(void *context) = (void *)174;

/* A stable ABI: neither uprobes nor kprobes need the kernel's type information for it. */
struct registers {
    u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
#define FIRST_ARGUMENT(registers) ((registers)->di)
#define THIRD_ARGUMENT(registers) ((registers)->dx)
#define RESULT(registers) ((registers)->ax)

/* Position of the highest bit that is set; 0 for 0. */
INLINE u32 log2_of(u64 value)
{
    u32 result = 0, shift;

    shift = (value > 0xffffffffULL) << 5;
    value >>= shift;
    result |= shift;
    shift = (value > 0xffff) << 4;
    value >>= shift;
    result |= shift;
    shift = (value > 0xff) << 3;
    value >>= shift;
    result |= shift;
    shift = (value > 0xf) << 2;
    value >>= shift;
    result |= shift;
    shift = (value > 3) << 1;
    value >>= shift;
    result |= shift;
    return result | (u32)(value >> 1);
}

/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Registration as libibverbs' callers see it. Needs no type information of the kernel and reads no memory of a process,
 * so that it works under every lockdown. The attach cookie is the function's number. */
#include "measure.h"

/* Of one thread: one is inside at most one outermost call. Least recently used, for a thread may die inside. */
struct call {
    u64 start_ns;
    u64 bytes;
    u64 region;
    /* Functions that were entered and not left, a bit each. */
    u32 inside;
    u16 operation;
    u16 number;
};

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 16384);
    __type(key, u64);
    __type(value, struct call);
} calls SEC(".maps");

/* Lengths by what ibv_reg_mr returned, for ibv_dereg_mr. Processes that end without it leave theirs. */
struct region_key {
    u64 tgid;
    u64 region;
};

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 32768);
    __type(key, struct region_key);
    __type(value, u64);
} regions SEC(".maps");

/* The thread's name: the process' own would take the kernel's type information. */
INLINE void name_current(struct name *name)
{
    bpf_get_current_comm(name, sizeof(*name));
}

/* A call inside a call is part of it: ibv_reg_mr goes on as ibv_reg_mr_iova2. */
INLINE void enter(u64 function, u16 operation, u64 bytes, u64 region)
{
    u64 thread = bpf_get_current_pid_tgid();
    u32 bit = 1u << (function & 31);
    struct call *outer = bpf_map_lookup_elem(&calls, &thread);

    if (outer && !(outer->inside & bit)) {
        outer->inside |= bit;
        return;
    }
    /* None of them calls itself: that return was never seen. */
    if (outer)
        lose(LOST_RETURN);
    struct call call = { 0, bytes, region, bit, operation, 0 };
    call.start_ns = bpf_ktime_get_ns();
    if (bpf_map_update_elem(&calls, &thread, &call, BPF_ANY))
        lose(LOST_CALL);
}

/* Whether the outermost call ends; it is then in *call, and no longer kept. */
INLINE int leave(u64 thread, u64 function, struct call *call)
{
    u32 bit = 1u << (function & 31);
    struct call *outer = bpf_map_lookup_elem(&calls, &thread);

    /* Entered before the probe was attached. */
    if (!outer || !(outer->inside & bit))
        return 0;
    outer->inside &= ~bit;
    if (outer->inside)
        return 0;
    *call = *outer;
    bpf_map_delete_elem(&calls, &thread);
    return 1;
}

SEC("uprobe") int register_enter(struct registers *registers)
{
    enter(bpf_get_attach_cookie(registers), REGISTER, THIRD_ARGUMENT(registers), 0);
    return 0;
}

SEC("uretprobe") int register_exit(struct registers *registers)
{
    u64 now_ns = bpf_ktime_get_ns(), thread = bpf_get_current_pid_tgid(), region = RESULT(registers);
    u32 tgid = thread >> 32;
    struct call call;

    if (!leave(thread, bpf_get_attach_cookie(registers), &call))
        return 0;
    u64 bytes = call.bytes;
    if (region) {
        struct region_key key = { tgid, region };
        bpf_map_update_elem(&regions, &key, &bytes, BPF_ANY);
    } else {
        record_failure(tgid, REGISTER, call.number);
    }
    record(tgid, REGISTER, log2_of(bytes), now_ns - call.start_ns, region ? bytes : 0);
    return 0;
}

/* What carries a registration to the kernel returns why it failed; ibv_reg_mr returns that in errno only. */
SEC("uretprobe") int command_exit(struct registers *registers)
{
    u64 thread = bpf_get_current_pid_tgid();
    s32 result = (s32)RESULT(registers);
    struct call *call = bpf_map_lookup_elem(&calls, &thread);

    if (call && result)
        call->number = result < 0 ? -result : result;
    return 0;
}

SEC("uprobe") int deregister_enter(struct registers *registers)
{
    struct region_key key = { bpf_get_current_pid_tgid() >> 32, FIRST_ARGUMENT(registers) };
    u64 bytes = 0, *kept = bpf_map_lookup_elem(&regions, &key);

    if (kept) {
        bytes = *kept;
        /* Now: once it is freed another thread may be given the same address. */
        bpf_map_delete_elem(&regions, &key);
    }
    enter(bpf_get_attach_cookie(registers), DEREGISTER, bytes, kept ? key.region : 0);
    return 0;
}

SEC("uretprobe") int deregister_exit(struct registers *registers)
{
    u64 now_ns = bpf_ktime_get_ns(), thread = bpf_get_current_pid_tgid();
    s32 result = (s32)RESULT(registers);
    u32 tgid = thread >> 32;
    struct call call;

    if (!leave(thread, bpf_get_attach_cookie(registers), &call))
        return 0;
    u64 bytes = call.bytes;
    if (result) {
        record_failure(tgid, DEREGISTER, result < 0 ? -result : result);
        if (call.region) {
            struct region_key key = { tgid, call.region };
            bpf_map_update_elem(&regions, &key, &bytes, BPF_ANY);
        }
    }
    /* Registered before the probes were attached: its length is not known. */
    u16 size_class = call.region ? log2_of(bytes) : SIZE_UNKNOWN;
    record(tgid, DEREGISTER, size_class, now_ns - call.start_ns, result ? 0 : bytes);
    return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";

/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Registration as the kernel does it: all of it, and the pinning of its pages. Only what a thread does between entering
 * and leaving ib_uverbs_reg_mr counts: adapters pin queues through ib_umem_get too. */
#include "measure.h"

#define RELOCATED __attribute__((preserve_access_index))
/* Of these the loader finds the offsets in the running kernel. */
struct task_struct {
    unsigned long min_flt;
    unsigned long maj_flt;
    struct task_struct *group_leader;
    char comm[16];
} RELOCATED;

struct call {
    u64 start_ns;
    u64 bytes;
    u64 pin_start_ns;
    u64 minor_before;
    u64 major_before;
    u64 compaction_start_ns;
    u32 is_sized;
    u32 zero;
};

/* What made pinning slow. */
struct pressure {
    u64 minor_faults;
    u64 major_faults;
    u64 compactions;
    u64 compaction_ns;
};

struct {
    __uint(type, BPF_MAP_TYPE_LRU_HASH);
    __uint(max_entries, 16384);
    __type(key, u64);
    __type(value, struct call);
} calls SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, u32);
    __type(value, struct pressure);
} pressures SEC(".maps");

static const struct pressure none = {};

/* As in /proc/PID/comm. */
INLINE void name_current(struct name *name)
{
    struct task_struct *task = (void *)bpf_get_current_task(), *leader = task;

    bpf_probe_read_kernel(&leader, sizeof(leader), &task->group_leader);
    bpf_probe_read_kernel(name, sizeof(*name), &leader->comm);
}

INLINE struct call *call_of(u64 thread)
{
    return bpf_map_lookup_elem(&calls, &thread);
}

INLINE struct pressure *pressure_of(u32 tgid)
{
    struct pressure *pressure = bpf_map_lookup_elem(&pressures, &tgid);

    if (pressure)
        return pressure;
    bpf_map_update_elem(&pressures, &tgid, &none, BPF_NOEXIST);
    pressure = bpf_map_lookup_elem(&pressures, &tgid);
    if (!pressure)
        lose(LOST_SERIES);
    return pressure;
}

INLINE u64 minor_faults(void)
{
    struct task_struct *task = (void *)bpf_get_current_task();
    unsigned long count = 0;

    bpf_probe_read_kernel(&count, sizeof(count), &task->min_flt);
    return count;
}

INLINE u64 major_faults(void)
{
    struct task_struct *task = (void *)bpf_get_current_task();
    unsigned long count = 0;

    bpf_probe_read_kernel(&count, sizeof(count), &task->maj_flt);
    return count;
}

SEC("kprobe") int register_enter(struct registers *registers)
{
    u64 thread = bpf_get_current_pid_tgid();
    struct call call = {};

    /* The kernel runs out of return probes where very many threads register at once. */
    if (call_of(thread))
        lose(LOST_RETURN);
    call.start_ns = bpf_ktime_get_ns();
    if (bpf_map_update_elem(&calls, &thread, &call, BPF_ANY))
        lose(LOST_CALL);
    return 0;
}

SEC("kretprobe") int register_exit(struct registers *registers)
{
    u64 now_ns = bpf_ktime_get_ns(), thread = bpf_get_current_pid_tgid();
    s32 result = (s32)RESULT(registers);
    u32 tgid = thread >> 32;
    struct call *call = call_of(thread);

    if (!call)
        return 0;
    u64 ns = now_ns - call->start_ns, bytes = call->bytes;
    /* On-demand paging, and what fails before a page is pinned, has no length here. */
    u16 size_class = call->is_sized ? log2_of(bytes) : SIZE_UNKNOWN;
    bpf_map_delete_elem(&calls, &thread);
    if (result < 0)
        record_failure(tgid, KERNEL, -result);
    record(tgid, KERNEL, size_class, ns, result < 0 ? 0 : bytes);
    return 0;
}

/* ib_umem_get(device, address, bytes, access) */
SEC("kprobe") int pin_enter(struct registers *registers)
{
    struct call *call = call_of(bpf_get_current_pid_tgid());

    if (!call)
        return 0;
    call->bytes = THIRD_ARGUMENT(registers);
    call->is_sized = 1;
    call->minor_before = minor_faults();
    call->major_before = major_faults();
    call->pin_start_ns = bpf_ktime_get_ns();
    return 0;
}

SEC("kretprobe") int pin_exit(struct registers *registers)
{
    u64 now_ns = bpf_ktime_get_ns(), thread = bpf_get_current_pid_tgid();
    s64 result = (s64)RESULT(registers);
    u32 tgid = thread >> 32;
    struct call *call = call_of(thread);

    if (!call || !call->pin_start_ns)
        return 0;
    u64 ns = now_ns - call->pin_start_ns, bytes = call->bytes;
    call->pin_start_ns = 0;
    struct pressure *pressure = pressure_of(tgid);
    if (pressure) {
        __sync_fetch_and_add(&pressure->minor_faults, minor_faults() - call->minor_before);
        __sync_fetch_and_add(&pressure->major_faults, major_faults() - call->major_before);
    }
    /* The kernel's pointers that are errors. */
    int has_failed = result < 0 && result >= -4095;
    if (has_failed)
        record_failure(tgid, PIN, -result);
    record(tgid, PIN, log2_of(bytes), ns, has_failed ? 0 : bytes);
    return 0;
}

/* Rare, and slow whenever it happens. */
SEC("kprobe") int compaction_enter(struct registers *registers)
{
    struct call *call = call_of(bpf_get_current_pid_tgid());

    if (call)
        call->compaction_start_ns = bpf_ktime_get_ns();
    return 0;
}

SEC("kretprobe") int compaction_exit(struct registers *registers)
{
    u64 now_ns = bpf_ktime_get_ns(), thread = bpf_get_current_pid_tgid();
    struct call *call = call_of(thread);

    if (!call || !call->compaction_start_ns)
        return 0;
    u64 ns = now_ns - call->compaction_start_ns;
    call->compaction_start_ns = 0;
    struct pressure *pressure = pressure_of(thread >> 32);
    if (pressure) {
        __sync_fetch_and_add(&pressure->compactions, 1);
        __sync_fetch_and_add(&pressure->compaction_ns, ns);
    }
    return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";

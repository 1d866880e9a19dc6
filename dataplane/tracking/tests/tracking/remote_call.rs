//! A process from which a userfaultfd is taken goes on as if nothing had happened.

use std::os::fd::OwnedFd;
use std::time::Instant;

use ramferry_tracking::remote_call::{Faults, RemoteCallError, remote_userfaultfd};

use crate::helper::{Helper, state, status};

fn take(pid: u32) -> OwnedFd {
    remote_userfaultfd(pid, Faults::UserOnly).unwrap()
}

#[test]
fn a_blocked_process_gives_a_userfaultfd_and_keeps_none() {
    let mut helper = Helper::spawn();
    let descriptors = |pid| std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let before = descriptors(helper.pid());
    let fds: Vec<_> = (0..10).map(|_| take(helper.pid())).collect();
    assert_eq!(descriptors(helper.pid()), before);
    assert_eq!(fds.len(), 10);
    assert_eq!(helper.status("TracerPid"), "0");
    assert_eq!(helper.order("hello"), "ok");
}

#[test]
fn interrupted_system_calls_are_restarted_and_last_as_long_as_asked() {
    // Both return early, with EINTR, if their restart is botched; neither is
    // ever restarted from its beginning.
    for call in ["nap", "poll"] {
        let mut helper = Helper::spawn();
        // The test harness's first thread waits for a futex, the second one naps.
        helper.send(&format!("{call} 400"));
        let start = Instant::now();
        let mut calls = 0;
        while start.elapsed().as_millis() < 300 {
            for tid in std::fs::read_dir(format!("/proc/{}/task", helper.pid())).unwrap() {
                let tid: u32 = tid.unwrap().file_name().to_str().unwrap().parse().unwrap();
                take(tid);
                calls += 1;
            }
        }
        assert_eq!(helper.answer(), "0 true", "{call} after {calls} calls");
        assert!(calls >= 3, "{calls} calls");
        assert!(start.elapsed().as_millis() < 2000);
    }
}

#[test]
fn a_thread_that_computes_keeps_its_registers() {
    let mut helper = Helper::spawn();
    helper.order("spin");
    for _ in 0..100 {
        for tid in std::fs::read_dir(format!("/proc/{}/task", helper.pid())).unwrap() {
            take(tid.unwrap().file_name().to_str().unwrap().parse().unwrap());
        }
    }
    let spun = helper.order("spun");
    assert!(spun.starts_with("ok ") && spun != "ok 0", "{spun}");
}

#[test]
fn no_signal_is_lost_while_a_thread_is_borrowed() {
    let mut helper = Helper::spawn();
    helper.order("count_signals");
    let pid = helper.pid();
    const SENT: u32 = 3000;
    let sender = std::thread::spawn(move || {
        for _ in 0..SENT {
            // SAFETY: takes numbers; the helper is alive, and is ours.
            unsafe { libc::kill(pid as i32, libc::SIGRTMIN() + 3) };
            std::thread::yield_now();
        }
    });
    while !sender.is_finished() {
        take(pid);
    }
    sender.join().unwrap();
    // Each is queued, so each is counted, at the latest when its thread next runs.
    let deadline = Instant::now() + std::time::Duration::from_secs(5);
    while helper.order("signals") != SENT.to_string() {
        assert!(Instant::now() < deadline, "{} of {SENT} signals", helper.order("signals"));
    }
}

#[test]
fn a_stopped_process_stays_stopped_and_goes_on_when_continued() {
    let mut helper = Helper::spawn();
    // SAFETY: takes numbers; the helper is alive, and is ours.
    let signal = |signal| unsafe { libc::kill(helper.pid() as i32, signal) };
    signal(libc::SIGSTOP);
    while state(helper.pid()) != 'T' {
        std::thread::yield_now();
    }
    take(helper.pid());
    let deadline = Instant::now() + std::time::Duration::from_secs(5);
    while state(helper.pid()) != 'T' {
        assert!(Instant::now() < deadline, "state {}", state(helper.pid()));
    }
    assert_eq!(helper.status("TracerPid"), "0");
    signal(libc::SIGCONT);
    assert_eq!(helper.order("hello"), "ok");
}

#[test]
fn a_process_that_is_stopped_and_continued_meanwhile_survives() {
    let mut helper = Helper::spawn();
    let pid = helper.pid();
    let sender = std::thread::spawn(move || {
        for _ in 0..300 {
            for signal in [libc::SIGSTOP, libc::SIGCONT] {
                // SAFETY: takes numbers; the helper is alive, and is ours.
                unsafe { libc::kill(pid as i32, signal) };
                std::thread::yield_now();
            }
        }
    });
    while !sender.is_finished() {
        take(pid);
    }
    sender.join().unwrap();
    assert_eq!(helper.order("hello"), "ok");
}

#[test]
fn a_seccomp_filter_that_would_kill_is_suspended_and_then_in_force_again() {
    let mut helper = Helper::spawn();
    helper.order("forbid_userfaultfd");
    assert_eq!(helper.status("Seccomp"), "2");
    take(helper.pid());
    assert_eq!(helper.status("Seccomp"), "2");
    assert_eq!(helper.order("hello"), "ok");
    helper.send("userfaultfd");
    let deadline = Instant::now() + std::time::Duration::from_secs(5);
    while state(helper.pid()) != 'Z' {
        assert!(Instant::now() < deadline, "the filter no longer kills");
    }
}

#[test]
fn an_unprivileged_process_gives_one_for_user_faults_only() {
    let mut helper = Helper::spawn();
    helper.order("drop_privileges");
    take(helper.pid());
    let all = remote_userfaultfd(helper.pid(), Faults::All);
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    if allowed.trim() == "0" {
        let refused = all.unwrap_err();
        assert!(matches!(refused, RemoteCallError::Refused { .. }));
        assert!(refused.to_string().contains("vm.unprivileged_userfaultfd=1"), "{refused}");
    } else {
        all.unwrap();
    }
    assert_eq!(helper.order("hello"), "ok");
}

#[test]
fn a_process_that_is_being_debugged_is_left_to_its_debugger() {
    let mut helper = Helper::spawn();
    let pid = helper.pid() as i32;
    // SAFETY: seizes a child of ours without stopping it; no memory is involved.
    unsafe { assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0), 0) };
    match remote_userfaultfd(helper.pid(), Faults::UserOnly).unwrap_err() {
        RemoteCallError::AlreadyTraced { tracer, .. } => {
            assert_eq!(tracer, rustix::thread::gettid().as_raw_nonzero().get() as u32);
        }
        error => panic!("{error}"),
    }
    assert_eq!(helper.order("hello"), "ok");
}

#[test]
fn a_process_that_ended_is_an_error() {
    let mut helper = Helper::spawn();
    let pid = helper.pid();
    // SAFETY: takes numbers; the helper is ours and not reaped yet.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    while state(pid) != 'Z' {
        std::thread::yield_now();
    }
    assert!(matches!(remote_userfaultfd(pid, Faults::UserOnly), Err(RemoteCallError::Ended { .. })));
    helper.kill();
    assert!(matches!(remote_userfaultfd(pid, Faults::UserOnly), Err(RemoteCallError::Ended { .. })));
}

#[test]
fn a_process_that_is_killed_meanwhile_is_an_error_and_nothing_hangs() {
    for round in 0..20u32 {
        let mut helper = Helper::spawn();
        let pid = helper.pid();
        let start = Instant::now();
        let killer = std::thread::spawn(move || {
            for _ in 0..round * 20 {
                std::thread::yield_now();
            }
            helper.kill();
        });
        while remote_userfaultfd(pid, Faults::UserOnly).is_ok() {}
        killer.join().unwrap();
        assert!(start.elapsed().as_secs() < 4, "{:?}", start.elapsed());
    }
}

#[test]
fn a_kernel_thread_is_an_error() {
    if status(2, "Name") != "kthreadd" {
        eprintln!("SKIPPED: process 2 is no kernel thread here");
        return;
    }
    assert!(remote_userfaultfd(2, Faults::UserOnly).is_err());
}

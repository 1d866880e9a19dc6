//! An agent under the kernel's lockdown. A kernel that was locked down stays so until it is booted again: this runs in the
//! lab's VM only, and last (`make lab-test`).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

#[path = "../voyage/harness.rs"]
#[allow(dead_code, reason = "what is shared with the migrations has more than is used here")]
mod harness;
#[path = "../voyage/limited.rs"]
#[allow(dead_code, reason = "other hosts are limited otherwise")]
mod limited;

use std::path::Path;
use std::process::Command;

use ramferry_probes::Probe;

use harness::Site;
use limited::{Absent, Traveller, library, release, says};

const SECURITY: &str = "/sys/kernel/security";

fn lock_down(mode: &str) {
    release();
    let lockdown = Path::new(SECURITY).join("lockdown");
    if !lockdown.exists() {
        let mounted = Command::new("mount").args(["-t", "securityfs", "securityfs", SECURITY]).status();
        assert!(mounted.unwrap().success());
    }
    std::fs::write(&lockdown, mode).unwrap();
    let now = std::fs::read_to_string(&lockdown).unwrap();
    assert!(now.contains(&format!("[{mode}]")), "{now}");
}

#[tokio::test(flavor = "multi_thread")]
async fn under_lockdown_guests_move_and_only_confidentiality_takes_the_kernels_probes() {
    let mut traveller = (!release().starts_with("6.1.")).then(Traveller::boot);
    lock_down("integrity");
    says(Site::here(), &Probe::ALL.map(Probe::as_str), &[]);

    lock_down("confidentiality");
    let reason = "the kernel is locked down (confidentiality)";
    let remedy = "lockdown=integrity";
    let absent = [
        Absent { probes: vec!["ib_uverbs_reg_mr"], reason, remedy },
        Absent {
            probes: vec!["ib_umem_get", "try_to_compact_pages"],
            reason: "it needs the probe ib_uverbs_reg_mr",
            remedy,
        },
    ];
    match &mut traveller {
        Some(traveller) => traveller.leaves(Site::here(), &library(), &absent).await,
        None => drop(says(Site::here(), &library(), &absent)),
    }
}

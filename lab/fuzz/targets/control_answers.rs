//! Answers of a destination on the control stream, at the source.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing::Answers;
use ramferry_fuzz::{layout, messages};

const PAGES: u64 = 200;

fuzz_target!(|data: &[u8]| {
    let mut answers = Answers::new(&layout(PAGES));
    for message in messages(data) {
        if answers.take(message).is_err() {
            return;
        }
    }
    if let Some(presence) = answers.presence {
        let (_, set) = presence.iter().next().expect("one block");
        assert!(set.runs().all(|run| run.count > 0 && run.end() <= PAGES));
        assert_eq!(set.runs().map(|run| run.count).sum::<u64>(), set.count());
    }
});

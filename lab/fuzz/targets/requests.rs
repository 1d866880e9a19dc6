//! What callers and sources ask for, as it comes out of gRPC. The first byte chooses the message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing;

fuzz_target!(|data: &[u8]| {
    let Some((kind, message)) = data.split_first() else { return };
    match kind % 3 {
        0 => {
            let _ = fuzzing::creation(message);
        }
        1 => {
            let _ = fuzzing::change(message);
        }
        _ => {
            if let Some(layout) = fuzzing::proposal(message) {
                assert!(layout.check_same(&layout).is_ok() && layout.total_bytes() > 0);
            }
        }
    }
});

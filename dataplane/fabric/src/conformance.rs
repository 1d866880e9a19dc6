//! What every fabric must do, as a suite of cases over a [`Fixture`].
//!
//! [`conformance_suite!`](crate::conformance_suite) makes a test of each case.
//! A case panics where the fabric does not conform.

mod delayed;
mod fixture;
mod lives;
mod refusals;
mod transfers;

pub use delayed::Delayed;
pub use fixture::{BLOCK_LENGTHS_BYTES, Drive, Fixture, Pair, TestMemory, eventually};
pub use lives::*;
pub use refusals::*;
pub use transfers::*;

/// Makes one test of each case of the suite, run on the fixture that the
/// expression gives.
#[macro_export]
macro_rules! conformance_suite {
    ($fixture:expr) => {
        $crate::conformance_suite! { @tests $fixture;
            write_lands_exactly,
            many_operations_through_a_full_queue_complete_once,
            fence_completes_after_everything_before_it,
            read_brings_the_bytes_of_the_peer,
            reads_see_the_writes_before_them,
            two_links_of_a_session_write_side_by_side,
            largest_transfer_lands,
            operations_may_share_a_label,
            unknown_key_is_refused,
            deregistered_key_is_refused,
            local_key_is_no_remote_key,
            write_out_of_bounds_is_refused,
            read_out_of_bounds_is_refused,
            offset_beyond_the_block_is_refused,
            write_without_the_right_is_refused,
            read_without_the_right_is_refused,
            wrong_token_is_refused,
            invalid_operations_are_not_accepted,
            more_links_than_agreed_are_refused,
            ranges_that_cannot_be_registered_are_refused,
            operations_before_a_refused_one_complete_once,
            idle_region_is_deregistered,
            region_under_way_is_deregistered_after_its_operations,
            link_works_on_after_its_peer_deregisters_another_region,
            peer_lost_mid_write_completes_every_operation,
            stalled_peer_blocks_nothing,
            sessions_are_isolated,
            keys_are_dead_after_the_session_ends,
            closed_link_is_no_failure,
            dropped_link_is_a_failure,
            injected_faults_complete_every_operation_once,
        }
    };
    (@tests $fixture:expr; $($case:ident,)*) => {
        $(
            #[test]
            fn $case() {
                let fixture = $fixture;
                if $crate::conformance::Fixture::is_available(&fixture) {
                    $crate::conformance::$case(&fixture);
                }
            }
        )*
    };
}

//! The conformance suite over RDMA, and once more through a link that delays
//! completions, turns their order round, and refuses posts. To be run one test
//! at a time (`--test-threads=1`): soft-RoCE drops completions otherwise.

mod fixtures;

mod verbs {
    use super::fixtures::Verbs;

    ramferry_fabric::conformance_suite!(Verbs);
}

mod verbs_delayed {
    use ramferry_fabric::conformance::Delayed;

    use super::fixtures::Verbs;

    ramferry_fabric::conformance_suite!(Delayed(Verbs));
}

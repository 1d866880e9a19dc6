//! The conformance suite on every fabric of this crate, and on each of them
//! through a link that delays completions, turns their order round, and refuses posts.

mod fixtures;

mod tcp {
    use super::fixtures::Tcp;

    ramferry_fabric::conformance_suite!(Tcp);
}

mod shm {
    use super::fixtures::Shm;

    ramferry_fabric::conformance_suite!(Shm);
}

mod tcp_delayed {
    use ramferry_fabric::conformance::Delayed;

    use super::fixtures::Tcp;

    ramferry_fabric::conformance_suite!(Delayed(Tcp));
}

mod shm_delayed {
    use ramferry_fabric::conformance::Delayed;

    use super::fixtures::Shm;

    ramferry_fabric::conformance_suite!(Delayed(Shm));
}

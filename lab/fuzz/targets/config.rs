//! A configuration file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ramferry_agent::fuzzing;

fuzz_target!(|text: &str| match fuzzing::config(text) {
    Ok(config) => {
        assert!(config.max_migrations > 0 && config.registration_workers > 0);
        assert!(config.state_dir.is_absolute() && config.run_dir.is_absolute());
        let served = [Some(config.listen), Some(config.data_listen), config.metrics_listen];
        let is_exposed = served.iter().flatten().any(|address| !address.ip().is_loopback());
        assert!(!is_exposed || (config.tls.is_some() && !config.guest_dirs.is_any()));
    }
    Err(error) => assert!(!error.to_string().is_empty()),
});

use super::*;

fn error_of(options: &Options) -> ConfigError {
    Config::check(options).expect_err("refused")
}

#[test]
fn defaults_serve_loopback_only() {
    let config = Config::check(&Options::default()).unwrap();
    assert!(config.listen.ip().is_loopback() && config.data_listen.ip().is_loopback());
    assert_eq!(config.metrics_listen, Some("127.0.0.1:9750".parse().unwrap()));
    assert_eq!((config.max_migrations, config.registration_workers), (4, 2));
    assert_eq!(config.shutdown_grace, Duration::from_secs(10));
    assert!(config.guest_dirs.is_any() && config.tls.is_none());
}

#[test]
fn probes_are_on_unless_they_are_off() {
    let mode = |text: Option<&str>| {
        Config::check(&Options { probes: text.map(str::to_owned), ..Options::default() })
            .map(|config| config.probes)
    };
    assert_eq!(mode(None).unwrap(), ProbesMode::Auto);
    assert_eq!(mode(Some("off")).unwrap(), ProbesMode::Off);
    let error = mode(Some("on")).unwrap_err().to_string();
    assert!(error.contains("\"auto\" or \"off\""), "{error}");
}

#[test]
fn keys_are_the_fields_of_options() {
    let path = || Some(PathBuf::from("/x"));
    let text = || Some("x".to_owned());
    let full = Options {
        config: path(),
        listen: text(),
        data_listen: text(),
        rdma_listen: text(),
        rdma_device: text(),
        metrics_listen: text(),
        state_dir: path(),
        run_dir: path(),
        tls_cert: path(),
        tls_key: path(),
        tls_ca: path(),
        tls_server_name: text(),
        max_migrations: Some(1),
        guest_dirs: Some(vec![]),
        log_format: text(),
        log_filter: text(),
        shutdown_grace: text(),
        poller_cpus: Some(vec![]),
        registration_workers: Some(1),
        probes: text(),
        step_socket: path(),
    };
    let json = serde_json::to_value(&full).unwrap();
    let mut fields: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    let mut keys = KEYS.to_vec();
    fields.sort_unstable();
    keys.sort_unstable();
    assert_eq!(fields, keys);
}

#[test]
#[allow(clippy::result_large_err, reason = "figment's own error, in a closure it calls")]
fn flags_win_over_environment_over_file() {
    figment::Jail::expect_with(|jail| {
        jail.create_file(
            "agent.toml",
            "listen = \"127.0.0.1:1\"\nmax_migrations = 2\nlog_filter = \"warn\"\n",
        )?;
        jail.set_env("RAMFERRY_LISTEN", "127.0.0.1:2");
        jail.set_env("RAMFERRY_MAX_MIGRATIONS", "3");
        jail.set_env("RAMFERRY_GUEST_DIRS", "[/a, /b]");
        jail.set_env("RAMFERRY_AGENT", "a variable of the client");
        let flags = Options {
            config: Some("agent.toml".into()),
            listen: Some("127.0.0.1:3".into()),
            ..Options::default()
        };
        let config = Config::load(&flags).expect("usable");
        assert_eq!(config.listen.port(), 3);
        assert_eq!(config.max_migrations, 3);
        assert_eq!(config.log.filter, "warn");
        assert_eq!(config.guest_dirs, GuestDirs::new(vec!["/a".into(), "/b".into()]));
        Ok(())
    });
}

#[test]
#[allow(clippy::result_large_err, reason = "figment's own error, in a closure it calls")]
fn unknown_key_in_the_file_is_named() {
    figment::Jail::expect_with(|jail| {
        jail.create_file("agent.toml", "listn = \"127.0.0.1:1\"\n")?;
        let flags = Options { config: Some("agent.toml".into()), ..Options::default() };
        let error = Config::load(&flags).expect_err("refused");
        let cause = std::error::Error::source(&error).expect("a cause").to_string();
        assert!(cause.contains("listn"), "{cause}");
        let missing = Options { config: Some("gone.toml".into()), ..Options::default() };
        assert!(matches!(Config::load(&missing), Err(ConfigError::File { .. })));
        Ok(())
    });
}

#[test]
fn anything_but_loopback_needs_tls_then_guest_dirs() {
    let exposed: [fn(&mut Options); 4] = [
        |options| options.listen = Some("0.0.0.0:7050".into()),
        |options| options.data_listen = Some("[::]:7051".into()),
        |options| options.rdma_listen = Some("192.0.2.1:7052".into()),
        |options| options.metrics_listen = Some("192.0.2.1:9750".into()),
    ];
    for (expose, name) in exposed.iter().zip(["listen", "data_listen", "rdma_listen", "metrics_listen"]) {
        let mut options = Options::default();
        expose(&mut options);
        let ConfigError::NotLoopback { key, .. } = error_of(&options) else { panic!("{name}") };
        assert_eq!(key, name);

        options.tls_cert = Some("/tls/cert".into());
        options.tls_key = Some("/tls/key".into());
        options.tls_ca = Some("/tls/ca".into());
        assert!(matches!(error_of(&options), ConfigError::GuestDirsMissing { .. }));

        options.guest_dirs = Some(vec!["/run/vms".into()]);
        assert!(Config::check(&options).is_ok());
    }
}

#[test]
fn incomplete_tls_names_what_is_missing() {
    let options = Options { tls_cert: Some("/c".into()), tls_ca: Some("/a".into()), ..Options::default() };
    assert!(error_of(&options).to_string().ends_with("add tls_key"));
    let options = Options { tls_server_name: Some("peer".into()), ..Options::default() };
    assert!(matches!(error_of(&options), ConfigError::TlsIncomplete { missing } if missing.len() == 3));
}

#[test]
fn bad_values_name_their_key() {
    let cases: [(&str, Options); 12] = [
        ("listen", Options { listen: Some("localhost:7050".into()), ..Options::default() }),
        ("data_listen", Options { data_listen: Some("7051".into()), ..Options::default() }),
        ("rdma_listen", Options { rdma_listen: Some("rxe0".into()), ..Options::default() }),
        ("metrics_listen", Options { metrics_listen: Some("no".into()), ..Options::default() }),
        ("state_dir", Options { state_dir: Some("state".into()), ..Options::default() }),
        ("run_dir", Options { run_dir: Some("".into()), ..Options::default() }),
        ("max_migrations", Options { max_migrations: Some(0), ..Options::default() }),
        ("registration_workers", Options { registration_workers: Some(17), ..Options::default() }),
        ("guest_dirs", Options { guest_dirs: Some(vec!["vms".into()]), ..Options::default() }),
        ("log_format", Options { log_format: Some("xml".into()), ..Options::default() }),
        ("shutdown_grace", Options { shutdown_grace: Some("10".into()), ..Options::default() }),
        ("poller_cpus", Options { poller_cpus: Some(vec![1, 1]), ..Options::default() }),
    ];
    for (key, options) in cases {
        let message = error_of(&options).to_string();
        assert!(message.starts_with(key), "{message}");
    }
    let options = Options { log_filter: Some("agent=loud".into()), ..Options::default() };
    assert!(error_of(&options).to_string().starts_with("log_filter"));
}

#[test]
fn metrics_can_be_off() {
    let options = Options { metrics_listen: Some("off".into()), ..Options::default() };
    assert_eq!(Config::check(&options).unwrap().metrics_listen, None);
}

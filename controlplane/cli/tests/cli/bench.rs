//! `ramferry bench`: short real runs, on one side and on two.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use serde_json::Value;

use crate::command::{Ended, Running, run, start};
use crate::deaf_address;

/// Of no agent: none is asked.
const NOBODY: &str = "127.0.0.1:1";
const SHORT: &str = "--runs 2 --duration 10ms --memory 4MiB --output json --quiet";
const SERVER: &str = "bench fabric --listen 127.0.0.1:0 --memory 4MiB --output json";

fn server(line: &str) -> (Running, u16) {
    let mut server = start(NOBODY, line);
    let port = server.listening_port();
    (server, port)
}

fn client(port: u16, more: &str) -> Ended {
    run(NOBODY, &format!("bench fabric --connect 127.0.0.1:{port} --sizes 4KiB --links 1,2 {SHORT} {more}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Checks a spread's order; its median.
fn median(spread: &Value) -> f64 {
    let [min, median, max] = ["min", "median", "max"].map(|key| number(&spread[key]));
    assert!(min > 0.0 && min <= median && median <= max, "{spread}");
    median
}

fn check_cases(report: &Value, sizes: &[u64], links: &[u64]) {
    let cases = report["cases"].as_array().expect("cases");
    assert_eq!(cases.len(), sizes.len() * links.len(), "{report}");
    let expected = links.iter().flat_map(|links| sizes.iter().map(move |size| (*size, *links)));
    for (case, (size, links)) in cases.iter().zip(expected) {
        assert_eq!((case["size_bytes"].as_u64(), case["links"].as_u64()), (Some(size), Some(links)));
        let bytes = median(&case["bytes_per_second"]);
        let close = |value: f64, expected: f64| (value / expected - 1.0).abs() < 1e-9;
        assert!(close(median(&case["bits_per_second"]), 8.0 * bytes), "{case}");
        assert!(close(median(&case["messages_per_second"]) * size as f64, bytes), "{case}");
        let limit = median(&case["limit_bytes_per_second"]);
        assert!(close(median(&case["limit_bits_per_second"]), 8.0 * limit), "{case}");
        assert!(number(&case["of_limit"]) > 0.0, "{case}");
    }
    let fence = &report["fence"];
    assert!(fence["count"].as_u64() > Some(0), "{fence}");
    let [p50, p99, max] = ["p50_seconds", "p99_seconds", "max_seconds"].map(|key| number(&fence[key]));
    assert!(p50 > 0.0 && p50 <= p99 && p99 <= max, "{fence}");
}

#[test]
fn each_fabric_is_measured_beside_its_limit() {
    for (fabric, limit) in [("tcp", "sockets"), ("shm", "memcpy")] {
        let line = format!("bench fabric --fabric {fabric} --sizes 4KiB,1MiB --links 1,3 {SHORT}");
        let ended = run(NOBODY, &line);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
        let report = ended.json();
        check_cases(&report, &[4096, 1 << 20], &[1, 3]);
        assert_eq!(
            (&report["bench"], &report["fabric"], &report["limit"], &report["complete"]),
            (&"fabric".into(), &fabric.into(), &limit.into(), &true.into())
        );
        assert_eq!(report["limit_round_trip"].is_null(), fabric == "shm", "{report}");
        assert_eq!((report["memory_bytes"].as_u64(), report["runs"].as_u64()), (Some(4 << 20), Some(2)));
    }
}

#[test]
fn text_is_a_table() {
    let line = "bench fabric --sizes 64KiB --links 1 --runs 1 --duration 10ms --memory 1MiB";
    let ended = run(NOBODY, line);
    assert_eq!(ended.code, 0, "{ended:?}");
    let lines: Vec<&str> = ended.stdout.lines().collect();
    assert!(
        matches!(&lines[..], [about, fence, limit, heading, case]
            if about.starts_with("tcp, both sides in this process at 127.0.0.1; 1.00 MiB a side")
                && fence.starts_with("fence") && limit.starts_with("sockets")
                && heading.starts_with("SIZE") && heading.contains("LIMIT (sockets)")
                && case.starts_with("64.0 KiB")),
        "{}",
        ended.stdout
    );
}

#[test]
fn two_processes_measure_between_them_and_both_end() {
    for (fabric, tells) in [("tcp", true), ("shm", false)] {
        let (server, port) = server(SERVER);
        let ended = client(port, &format!("--fabric {fabric}"));
        assert_eq!(ended.code, 0, "{ended:?}");
        check_cases(&ended.json(), &[4096], &[1, 2]);
        assert_eq!(ended.json()["server"], format!("127.0.0.1:{port}"));
        let served = server.wait();
        assert_eq!((served.code, &served.json()["fabric"]), (0, &fabric.into()), "{served:?}");
        assert_eq!(served.json()["placed_bytes"].as_u64().is_some_and(|bytes| bytes > 4 << 20), tells);
    }
}

#[test]
fn clients_that_cannot_be_served_are_told_and_the_next_one_is_served() {
    let (mut server, port) = server(SERVER);
    let mut stranger = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("it listens");
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("it reads");
    server.wait_for_stderr("is no client; still listening");
    let refused = run(
        NOBODY,
        &format!("bench fabric --connect 127.0.0.1:{port} --memory 8MiB --sizes 4KiB --output json"),
    );
    assert_eq!(
        (refused.code, &refused.json()["error"]["reason"]),
        (5, &"BENCH_REFUSED".into()),
        "{refused:?}"
    );
    let why =
        "8.00 MiB of memory were asked for, this side gives 4.00 MiB: give both sides the same --memory";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
    server.wait_for_stderr("still listening");
    assert_eq!(client(port, "").code, 0);
    assert_eq!(server.wait().code, 0);
}

#[test]
fn address_where_nobody_listens_exits_four() {
    let (_socket, address) = deaf_address();
    let ended =
        run(NOBODY, &format!("bench fabric --connect {address} --memory 1MiB --sizes 4KiB --output json"));
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (4, &"BENCH_UNREACHABLE".into()), "{ended:?}");
    assert!(ended.stderr.contains("--listen"), "{}", ended.stderr);
}

#[test]
fn what_speaks_otherwise_is_named() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    let address = listener.local_addr().expect("bound");
    let running =
        start(NOBODY, &format!("bench fabric --connect {address} --memory 1MiB --sizes 4KiB --output json"));
    let (mut peer, _) = listener.accept().expect("it connects");
    peer.read_exact(&mut [0]).expect("it speaks first");
    peer.write_all(b"SSH-2.0-OpenSSH\n").expect("it listens");
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (1, &"BENCH_FAILED".into()), "{ended:?}");
    assert!(ended.stderr.contains("is no `ramferry bench fabric`"), "{}", ended.stderr);
}

#[test]
fn server_to_which_nobody_comes_ends_at_its_timeout() {
    let ended = run(NOBODY, &format!("{SERVER} --timeout 200ms"));
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (1, &"BENCH_TIMEOUT".into()), "{ended:?}");
    assert!(ended.stderr.contains("nobody came within 200ms"), "{}", ended.stderr);
}

#[test]
fn measurement_ends_at_its_timeout() {
    let line = "bench fabric --runs 100 --duration 1s --memory 64MiB --timeout 300ms --output json";
    let ended = run(NOBODY, line);
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (1, &"BENCH_TIMEOUT".into()), "{ended:?}");
}

#[test]
fn ctrl_c_shows_what_was_measured_and_the_other_side_ends_too() {
    let (mut server, port) = server(SERVER);
    let line = format!(
        "bench fabric --connect 127.0.0.1:{port} --runs 100 --duration 1s --memory 4MiB --sizes 4KiB --output json"
    );
    let running = start(NOBODY, &line);
    server.wait_for_stderr("serving a client");
    running.interrupt();
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["complete"]), (130, &false.into()), "{ended:?}");
    assert_eq!(server.wait().code, 0);
}

#[test]
fn ctrl_c_ends_a_server_that_waits() {
    let (server, _) = server(SERVER);
    server.interrupt();
    assert_eq!(server.wait().code, 130);
}

#[test]
fn client_whose_server_is_gone_fails_with_the_link() {
    let (mut server, port) = server(SERVER);
    let line = format!(
        "bench fabric --connect 127.0.0.1:{port} --runs 100 --duration 1s --memory 4MiB --sizes 4KiB --output json"
    );
    let running = start(NOBODY, &line);
    server.wait_for_stderr("serving a client");
    server.interrupt();
    assert_eq!(server.wait().code, 130);
    let ended = running.wait();
    assert_eq!((ended.code, &ended.json()["error"]["reason"]), (1, &"BENCH_FAILED".into()), "{ended:?}");
}

#[test]
fn writes_that_do_not_fit_the_memory_are_a_matter_of_the_command_line() {
    let ended = run(NOBODY, "bench fabric --sizes 16MiB --links 4 --memory 32MiB --output json");
    assert_eq!((ended.code, &ended.json()["error"]["code"]), (2, &"INVALID_ARGUMENT".into()), "{ended:?}");
    assert!(ended.stderr.contains("give more --memory, or smaller --sizes"), "{}", ended.stderr);
    let ended = run(NOBODY, "bench scan --memory 1000TiB --output json");
    assert_eq!((ended.code, &ended.json()["error"]["code"]), (1, &"RESOURCE_EXHAUSTED".into()), "{ended:?}");
}

#[test]
fn registration_is_measured_for_both_sides() {
    for fabric in ["tcp", "shm"] {
        let line =
            format!("bench registration --fabric {fabric} --sizes 4KiB,2MiB,16MiB --threads 1,2 {SHORT}");
        let ended = run(NOBODY, &line);
        assert_eq!(ended.code, 0, "{ended:?}");
        let report = ended.json();
        assert_eq!((&report["complete"], &report["fabric"]), (&true.into(), &fabric.into()));
        let cases = report["cases"].as_array().expect("cases");
        let small: Vec<_> = cases.iter().filter(|case| case["page_bytes"] == 4096).collect();
        // 4 KiB and 2 MiB by 1 and 2 threads, of what each side registers.
        assert_eq!(small.len(), 3 * 4, "{report}");
        for case in cases {
            for kind in ["register", "deregister"] {
                let [p50, max] = ["p50_seconds", "max_seconds"].map(|key| number(&case[kind][key]));
                assert!(p50 > 0.0 && p50 <= max && case[kind]["count"].as_u64() > Some(0), "{case}");
            }
            median(&case["bytes_per_second"]);
        }
        let skipped = report["skipped"].as_array().expect("skipped").iter();
        let mut large = skipped.filter(|skipped| skipped["size_bytes"] == 16 << 20);
        assert!(large.all(|skipped| skipped["reason"].as_str().is_some_and(|why| why.contains("of memory"))));
    }
}

#[test]
fn scan_measures_passes_and_harvests_or_says_why_not() {
    let ended = run(NOBODY, "bench scan --memory 16MiB --runs 2 --output json --quiet");
    assert_eq!(ended.code, 0, "{ended:?}");
    let report = ended.json();
    let pages: Vec<_> =
        report["zero_scan"].as_array().expect("passes").iter().map(|pass| &pass["pages"]).collect();
    assert_eq!((pages, &report["complete"]), (vec![&"zero".into(), &"data".into()], &true.into()));
    median(&report["page_hash"]["bytes_per_second"]);
    let harvests = report["harvest"].as_array().expect("harvests");
    if let Some(reason) = report["harvest_skipped"].as_str() {
        println!("SKIPPED the harvest: {reason}");
        assert!(harvests.is_empty(), "{report}");
        return;
    }
    let shares: Vec<_> = harvests.iter().map(|harvest| harvest["dirty_percent"].as_u64()).collect();
    assert_eq!(shares, [Some(0), Some(20), Some(100)]);
    assert!(harvests.iter().all(|harvest| median(&harvest["seconds_per_gib"]) > 0.0), "{report}");
}

#[cfg(feature = "verbs")]
#[test]
fn verbs_is_measured_where_there_is_a_device() {
    let line = format!("bench registration --fabric verbs --sizes 4KiB,1MiB --threads 1,2 {SHORT}");
    let registration = run(NOBODY, &line);
    if registration.code != 0 {
        // The lab has devices.
        assert!(std::env::var_os("RAMFERRY_LAB").is_none(), "{registration:?}");
        println!("SKIPPED: {}", registration.json()["error"]["message"]);
        return;
    }
    assert!(
        registration.json()["cases"].as_array().is_some_and(|cases| cases.len() >= 12),
        "{registration:?}"
    );
    let fabric = run(NOBODY, &format!("bench fabric --fabric verbs --sizes 4KiB,64KiB --links 1,2 {SHORT}"));
    assert_eq!(fabric.code, 0, "{fabric:?}");
    let report = fabric.json();
    check_cases(&report, &[4096, 65536], &[1, 2]);
    assert!(report["rdma_device"]["name"].is_string() && report["limit"] == "sockets", "{report}");
}

#[test]
fn help_says_whom_a_listener_trusts() {
    let ended = run(NOBODY, "bench fabric --help");
    assert_eq!(ended.code, 0);
    for text in ["networks that are trusted", "ib_write_bw", "Exit codes:", "[default: 200ms]"] {
        assert!(ended.stdout.contains(text), "{text} in {}", ended.stdout);
    }
    assert!(!run(NOBODY, "bench --help").stdout.contains("scan-writer"));
}

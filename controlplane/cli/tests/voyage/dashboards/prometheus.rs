//! Debian's Prometheus over a few agents, with the rules of the repository made quick.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Agent, PATIENCE};

/// Between two looks at what is waited for.
const LOOK: Duration = Duration::from_millis(100);
/// Between two points of a range.
const STEP_SECONDS: f64 = 0.5;
/// The same of counts over a time: that time, so that nothing is counted twice.
const COUNT_STEP_SECONDS: f64 = 2.0;

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// Killed and reaped when it is dropped.
pub(crate) struct Prometheus {
    child: Child,
    address: String,
    started: SystemTime,
    _directory: TempDir,
}

impl Prometheus {
    /// `None` where there is no Prometheus.
    pub(crate) fn over(agents: &[&Agent]) -> Option<Prometheus> {
        Prometheus::every(200, agents)
    }

    /// One that asks them so often, in milliseconds.
    pub(crate) fn every(interval_ms: u32, agents: &[&Agent]) -> Option<Prometheus> {
        let program = repository("target/prometheus/prometheus");
        if !program.is_file() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for rules in ["recording.yml", "alerts.yml"] {
            let text = std::fs::read_to_string(repository("dashboards/prometheus").join(rules)).unwrap();
            std::fs::write(path(rules), quick(&text)).unwrap();
        }
        std::fs::write(path("prometheus.yml"), configuration(interval_ms, agents)).unwrap();
        let mut child = Command::new(program)
            .arg(format!("--config.file={}", path("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .arg("--web.listen-address=127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let address = listening(&mut child);
        Some(Prometheus { child, address, started: SystemTime::now(), _directory: directory })
    }

    /// What a query gives now: a list of series.
    pub(crate) fn now(&self, query: &str) -> Vec<Value> {
        self.result(&format!("/api/v1/query?query={}", encoded(query)))
    }

    /// What it gave from the start until now.
    pub(crate) fn all_along(&self, query: &str) -> Vec<Value> {
        let (start, end) = self.time_seconds();
        let step = if query.contains("increase(") { COUNT_STEP_SECONDS } else { STEP_SECONDS };
        let query = encoded(query);
        self.result(&format!("/api/v1/query_range?query={query}&start={start}&end={end}&step={step}"))
    }

    /// Its start and now, since 1970.
    pub(crate) fn time_seconds(&self) -> (f64, f64) {
        let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
        (seconds(self.started), seconds(SystemTime::now()))
    }

    /// Every rule that is loaded.
    pub(crate) fn rules(&self) -> Vec<Value> {
        let groups = self.get("/api/v1/rules")["data"]["groups"].as_array().unwrap().clone();
        groups.iter().flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
    }

    /// Until a query gives something.
    pub(crate) async fn wait(&self, query: &str) {
        let deadline = Instant::now() + PATIENCE;
        while self.now(query).is_empty() {
            assert!(Instant::now() < deadline, "never: {query}\n{:#?}", self.get("/api/v1/alerts"));
            tokio::time::sleep(LOOK).await;
        }
    }

    pub(crate) async fn wait_firing(&self, alert: &str) {
        self.wait(&format!("ALERTS{{alertname=\"{alert}\",alertstate=\"firing\"}}")).await;
    }

    /// What `promtool query instant` prints of a query.
    pub(crate) fn shown(&self, query: &str) -> String {
        let server = format!("http://{}", self.address);
        let promtool = Command::new(repository("target/prometheus/promtool"))
            .args(["query", "instant", &server, query])
            .output()
            .unwrap();
        assert!(promtool.status.success(), "{promtool:?}");
        String::from_utf8(promtool.stdout).unwrap()
    }

    fn result(&self, path: &str) -> Vec<Value> {
        let answer = self.get(path);
        assert_eq!(answer["status"], "success", "{path}: {answer}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    fn get(&self, path: &str) -> Value {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // Of 1.0, so that the answer comes in one piece.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: prometheus\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        serde_json::from_str(body).unwrap_or_else(|error| panic!("{path}: {error}\n{answer}"))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What promtool finds wrong with what an agent exposes.
pub(crate) fn check_metrics(exposition: &str) -> Result<(), String> {
    let mut child = Command::new(repository("target/prometheus/promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(exposition.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn configuration(interval_ms: u32, agents: &[&Agent]) -> String {
    let targets: Vec<_> = agents.iter().map(|agent| format!("'{}'", agent.metrics)).collect();
    format!(
        "global: {{scrape_interval: {interval_ms}ms, scrape_timeout: {interval_ms}ms, \
         evaluation_interval: {}ms}}\n\
         rule_files: [recording.yml, alerts.yml]\n\
         scrape_configs:\n  - {{job_name: ramferry, static_configs: [{{targets: [{}]}}]}}\n",
        interval_ms + interval_ms / 2,
        targets.join(", ")
    )
}

/// The rules, over seconds and without delay, as a scrape every 200 ms allows.
fn quick(rules: &str) -> String {
    let times = [
        ("[1h]", "[120s]"),
        ("[15m]", "[60s]"),
        ("[10m]", "[60s]"),
        ("[5m]", "[60s]"),
        ("[2m]", "[1s]"),
        ("[1m]", "[5s]"),
        ("offset 2m", "offset 1s"),
        ("offset 1m", "offset 5s"),
    ];
    let quick = times.iter().fold(rules.to_owned(), |text, (slow, quick)| text.replace(slow, quick));
    let lines = quick.lines().filter(|line| !line.trim_start().starts_with("for: "));
    let quick = lines.collect::<Vec<_>>().join("\n");
    assert!(!quick.contains("m]") && !quick.contains("h]"), "a time that is not made quick: {quick}");
    quick
}

fn listening(child: &mut Child) -> String {
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in stderr.lines().map_while(Result::ok) {
            // Read on, so that it never waits for a reader.
            let _ = sender.send(line);
        }
    });
    let deadline = Instant::now() + PATIENCE;
    let (mut seen, mut listening) = (Vec::new(), None);
    loop {
        let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) else {
            let _ = child.kill();
            panic!("Prometheus did not start: {:?}\n{}", child.wait(), seen.join("\n"));
        };
        if line.contains("msg=\"Listening on\"")
            && let Some((_, address)) = line.split_once("address=")
        {
            listening = address.split_whitespace().next().map(str::to_owned);
        }
        if line.contains("Server is ready") {
            return listening.expect("it listens before it is ready");
        }
        seen.push(line);
    }
}

fn encoded(query: &str) -> String {
    query
        .bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            },
        )
        .collect()
}
